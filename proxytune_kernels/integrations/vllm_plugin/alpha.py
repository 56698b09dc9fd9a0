"""Alpha of each request on its way from the sampling parameters to the model's rows.

vLLM's V1 runner has one place where a plugin learns which request sits in which row of the batch,
the logits processor's ``update_state``. It runs before the forward of the same step, so
:class:`AlphaProcessor` keeps a table there that the model reads, and changes no logits itself. The
V2 runner has a better one, :mod:`.v2_runner`.

Under speculative decoding the V1 runner builds no logits processors, and vLLM asks no plugin when a
request comes in: a request's own alpha would be dropped without an error. There the refusal goes
into vLLM's own validation of requests (:func:`refuse_alpha`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2Processor

from proxytune_kernels.integrations.vllm_plugin import ARCHITECTURE
from proxytune_kernels.params import check_alpha

KEY = "alpha"
"""Name of alpha in a request's ``extra_args``, over HTTP in ``vllm_xargs``."""

# The table's name among what an engine's layers find each other by. It must be the engine's own: of
# two in one process, one whose runner builds no logits processors must not find the other's.
_TABLE = "proxytune.alpha"


def request_alpha(params: Any, default: float) -> float:
    """Alpha of a request: what its ``extra_args`` say, or the default.

    Raises:
        VLLMValidationError: not a finite number; the server answers 400.
    """
    alpha = (params.extra_args or {}).get(KEY)
    if alpha is None:
        return default
    try:
        return check_alpha(alpha)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter=KEY, value=alpha) from None


def check_request(params: Any) -> None:
    """Refuse, at admission, a request that asks for what one vLLM model can't do."""
    request_alpha(params, 1.0)
    if "prompts" in (params.extra_args or {}):
        raise VLLMValidationError(
            "vLLM reads one prompt for all three models: prompts per role need "
            "proxytune_kernels.Decoder, which takes a mapping from role to prompt",
            parameter="prompts",
        )


def default_alpha(vllm_config: Any) -> float:
    """Alpha of requests that name none."""
    return float(vllm_config.model_config.hf_config.proxy_tuning.get("alpha", 1.0))


def table(vllm_config: Any) -> Tensor | None:
    """fp32 [max_num_seqs], alpha by row of the V1 runner's batch; None without a processor."""
    return vllm_config.compilation_config.static_forward_context.get(_TABLE)


class AlphaProcessor(LogitsProcessor):  # type: ignore[misc]  # vllm is Any here
    """Keeps alpha by row for the V1 runner; leaves the logits as they are."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a bad alpha when the request comes in."""
        check_request(sampling_params)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.default = default_alpha(vllm_config)
        self.pinned = is_pin_memory
        size = (vllm_config.scheduler_config.max_num_seqs,)
        self.host = torch.full(size, self.default, dtype=torch.float32)
        self.device = self.host if device.type == "cpu" else self.host.to(device)
        vllm_config.compilation_config.static_forward_context[_TABLE] = self.device

    def is_argmax_invariant(self) -> bool:
        """Say that greedy requests need not call ``apply``."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Follow requests that left, came or moved; in this order, as vLLM asks."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.host[row] = self.default
        for row, params, _prompt, _output in batch_update.added:
            self.host[row] = request_alpha(params, self.default)
        for source, target, direction in batch_update.moved:
            moved, replaced = self.host[source].item(), self.host[target].item()
            self.host[target] = moved
            swapped = direction == MoveDirectionality.SWAP
            self.host[source] = replaced if swapped else self.default
        if self.device is not self.host:
            # A copy, since the device may read it after the host has gone on to the next step.
            staged = self.host.pin_memory() if self.pinned else self.host
            self.device.copy_(staged, non_blocking=True)

    def apply(self, logits: Tensor) -> Tensor:
        """Leave the logits, which the model has combined."""
        return logits


class AlphaCheck(V2Processor):  # type: ignore[misc]  # vllm is Any here
    """Refuses a bad alpha when a request comes in to the V2 runner; leaves the logits."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a bad alpha when the request comes in."""
        check_request(sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Say that the request's logits need no processing."""
        return False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Leave the logits."""
        return logits


def refuse_alpha() -> None:
    """Put the check into vLLM's validation of requests, once in a process.

    Raises:
        AttributeError: this vLLM validates requests elsewhere: the trio must not be served, since
            an alpha would be dropped.
    """
    validate = InputProcessor._validate_params
    if hasattr(validate, "__wrapped__"):
        return

    @functools.wraps(validate)
    def validate_params(self: Any, params: Any, *arguments: Any) -> Any:
        _check(self.vllm_config, params)
        return validate(self, params, *arguments)

    InputProcessor._validate_params = validate_params


def _check(vllm_config: Any, params: Any) -> None:
    if vllm_config.use_v2_model_runner or vllm_config.speculative_config is None:
        return
    if ARCHITECTURE not in vllm_config.model_config.architectures:
        return
    if KEY in (getattr(params, "extra_args", None) or {}):
        raise VLLMValidationError(
            "a request's own alpha does not reach the model under speculative decoding in vLLM's "
            "V1 runner: leave alpha out (proxy_tuning in config.json has the default), or serve "
            "without speculation, or on a GPU with the V2 runner",
            parameter=KEY,
        )
    check_request(params)
