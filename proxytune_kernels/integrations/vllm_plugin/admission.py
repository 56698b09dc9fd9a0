"""Refuses a request's own alpha where vLLM's runner would drop it.

Under speculative decoding the V1 runner builds no custom logits processors, so nothing tells the
model which request has which alpha, and vLLM asks no plugin when a request comes in. What it would
give is text at the default alpha and no error. So the check goes into vLLM's own validation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from proxytune_kernels.integrations.vllm_plugin import ARCHITECTURE
from proxytune_kernels.integrations.vllm_plugin.alpha import KEY, check_request


def refuse_alpha() -> None:
    """Put the check into vLLM's validation of requests, once in a process.

    Raises:
        AttributeError: this vLLM validates requests elsewhere: the trio must not be served, since
            an alpha would be dropped.
    """
    validate = InputProcessor._validate_params
    if not hasattr(validate, "__wrapped__"):
        InputProcessor._validate_params = _checked(validate)


def _checked(validate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(validate)
    def validate_params(self: Any, params: Any, *arguments: Any) -> Any:
        _check(self.vllm_config, params)
        return validate(self, params, *arguments)

    return validate_params


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
