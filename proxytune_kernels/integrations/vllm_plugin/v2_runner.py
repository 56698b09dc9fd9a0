"""Alpha of each request, and our sampler, in vLLM's V2 runner, which is the default on a GPU.

The sampler takes one pass over the combined logits. A request with a seed draws the same tokens as
from :class:`proxytune_kernels.Decoder`, whatever it shares a batch with. No device has run this:
the tests hold it to the same runner's code on a CPU.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.sampler import Sampler

from proxytune_kernels import ops
from proxytune_kernels.integrations.vllm_plugin.alpha import default_alpha, request_alpha
from proxytune_kernels.ops import sharded
from proxytune_kernels.params import FILTER_ORDERS, RowParams

logger = init_logger(f"vllm.{__name__}")

_ORDER = FILTER_ORDERS.index("vllm")


class ProxyTunedState(DefaultModelState):  # type: ignore[misc]  # vllm is Any here
    """Keeps alpha by request; gives the model's forward alpha by token.

    Args:
        vllm_config, model, encoder_cache, device: as the runner passes them.
    """

    supports_prompt_embeds = False

    def __init__(
        self, vllm_config: Any, model: nn.Module, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.default = default_alpha(vllm_config)
        # By request; written on the host while earlier steps still run on the device.
        self.alphas = UvaBackedTensor(self.max_num_reqs, dtype=torch.float32)
        self.alphas.np.fill(self.default)
        self.alphas.copy_to_uva()
        # By token; a captured graph reads it where it is.
        self.by_token = torch.full((self.max_num_tokens,), self.default, device=device)
        self.token_index = torch.arange(self.max_num_tokens, dtype=torch.int32, device=device)
        self.sampler: FusedSampler | None = None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Note a request's alpha."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        alpha = self.default if params is None else request_alpha(params, self.default)
        self.alphas.np[req_index] = alpha

    def apply_staged_writes(self) -> None:
        """Hand the requests' alphas to the device."""
        super().apply_staged_writes()
        self.alphas.copy_to_uva()

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Arguments of the model's forward; alpha, fp32 [tokens after padding]."""
        inputs = super().prepare_inputs(input_batch, req_states)
        tokens = input_batch.num_tokens_after_padding
        ends = input_batch.query_start_loc[1 : input_batch.num_reqs + 1]
        rows = torch.bucketize(self.token_index[:tokens], ends, right=True)
        # Padding, which nobody reads, counts as the last request's.
        rows.clamp_(max=input_batch.num_reqs - 1)
        torch.index_select(
            self.alphas.gpu, 0, input_batch.idx_mapping[rows], out=self.by_token[:tokens]
        )
        # Whatever one of its requests needs, the batch does.
        sampler, requests = self.sampler, input_batch.idx_mapping_np
        self.model.in_parts = sampler is not None and not sampler.whole[requests].any()
        return {**inputs, "alpha": self.by_token[:tokens]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Arguments of the forward that a graph is captured from."""
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "alpha": self.by_token[:num_tokens]}

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        """Our sampler in place of vLLM's, or None where it can't do what is asked of all requests.

        What a single request asks beyond it, that one request gets from vLLM's.
        """
        reason = self._vllm_samples(sampler)
        if reason is not None:
            logger.info_once("vLLM's own sampler draws from the combined logits: %s", reason)
            return None
        own = FusedSampler.over(sampler, self.model)
        if get_tensor_model_parallel_world_size() > 1 and not own.compute_nans:
            self.sampler = own
        return own, None

    def _vllm_samples(self, sampler: Any) -> str | None:
        if self.vllm_config.speculative_config is not None:
            return "drafts are checked by its rejection sampler"
        if type(sampler) is not Sampler:
            return f"{type(sampler).__name__} changes the draws"
        if sampler.logprobs_mode not in ("raw_logprobs", "raw_logits"):
            return f"logprobs_mode {sampler.logprobs_mode} wants the filtered logits"
        if sampler.return_sampling_mask:
            return "return_sampling_mask wants the filtered logits"
        if sampler.use_fp64_gumbel:
            return "use_fp64_gumbel asks for another noise"
        return None


class FusedSampler(Sampler):  # type: ignore[misc]  # vllm is Any here
    """vLLM's Sampler with another draw; requests that change the logits keep vLLM's.

    Those are requests with penalties, a bias, banned, allowed or forced tokens, a minimal length or
    a thinking budget. Grammars mask the logits before any sampler sees them.

    With tensor parallelism the logits of a batch stay on their ranks, unless a request in it needs
    whole rows: one of those above, or one with a grammar or logprobs.
    """

    @classmethod
    def over(cls, sampler: Sampler, model: Any) -> FusedSampler:
        """A sampler that takes over another's state, for the trio that gives it logits."""
        own = cls.__new__(cls)
        own.__dict__.update(sampler.__dict__)
        own.model = model
        states = own.sampling_states
        # By request: True where it needs whole rows of logits.
        own.whole = np.zeros(states.max_num_reqs, dtype=bool)
        # By request: 1 where its logits must be processed by vLLM before a draw.
        own.processed = UvaBackedTensor(states.max_num_reqs, dtype=torch.int32)
        size, device = states.max_num_reqs, own.req_states.device
        # Of no request: alpha is in the logits already.
        own.alpha = torch.zeros(size, device=device)
        own.order = torch.full((size,), _ORDER, dtype=torch.int32, device=device)
        return own

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """Note a request's parameters, and whether its logits must be processed."""
        # The filters of a greedy request do nothing, so what remains is all else it asks for.
        greedy = copy.copy(sampling_params)
        greedy.temperature = 0.0
        super().add_request(req_idx, greedy)
        self.processed.np[req_idx] = self.needs_logits_processing[req_idx]
        filtered = self.sampling_states.add_request(req_idx, sampling_params)
        self.needs_logits_processing[req_idx] |= filtered
        self.whole[req_idx] = self.processed.np[req_idx] or any(
            getattr(sampling_params, name) is not None
            for name in ("logprobs", "logprob_token_ids", "prompt_logprobs", "structured_outputs")
        )

    def apply_staged_writes(self) -> None:
        """Hand what was noted to the device."""
        super().apply_staged_writes()
        self.processed.copy_to_uva()

    def sample(
        self,
        logits: Tensor,
        expanded_idx_mapping: Tensor,
        idx_mapping: Tensor,
        idx_mapping_np: np.ndarray,
        pos: Tensor,
        *arguments: Any,
        **named: Any,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [rows], and the logits that logprobs are of.

        Args:
            logits: combined, fp32 [rows, vocab_size], or this rank's part of them.
            expanded_idx_mapping: [rows], the request of each row.
            idx_mapping, idx_mapping_np: [requests], on the device and on the host.
            pos: [rows], index of the last token that each row has read.
            arguments, named: for vLLM's own draw.
        """
        processed = self.processed.np[idx_mapping_np]
        rest = (expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, *arguments)
        if processed.all():
            return super().sample(logits, *rest, **named)
        tokens = self._draw(logits, expanded_idx_mapping, pos, idx_mapping_np)
        if not processed.any():
            return tokens, logits
        theirs, _ = super().sample(logits, *rest, **named)
        return torch.where(self.processed.gpu[expanded_idx_mapping] != 0, theirs, tokens), logits

    def _draw(
        self, logits: Tensor, requests: Tensor, pos: Tensor, requests_np: np.ndarray
    ) -> Tensor:
        states, rows = self.sampling_states, len(requests)
        params = RowParams(
            alpha=self.alpha[:rows],
            temperature=states.temperature.gpu[requests],
            top_k=states.top_k.gpu[requests],
            top_p=states.top_p.gpu[requests],
            min_p=states.min_p.gpu[requests],
            filter_order=self.order[:rows],
            seed=states.seeds.gpu[requests],
            position=pos + 1 - self.req_states.prompt_len.gpu[requests],
        )
        if self.model.in_parts:
            promise = self._max_top_k(requests_np)
            shard = self.model.shard
            drawn = sharded.sample(logits, None, None, params, shard=shard, max_top_k=promise)
        else:
            drawn = ops.sample(logits, None, None, params)
        # A row with nothing left has token -1, which no embedding has; vLLM's own draw gives 0.
        return drawn.token_ids.clamp_(min=0)

    def _max_top_k(self, requests: np.ndarray) -> int | None:
        """The highest top_k of requests with top_k or top_p, 0 where none has either.

        None where one has top_p alone, or a top_k past what ranks send.
        """
        states = self.sampling_states
        top_k = states.top_k.np[requests]
        counted = top_k < states.vocab_size
        wanted = int(top_k[counted].max(initial=0))
        known = (counted | (states.top_p.np[requests] >= 1)).all()
        return wanted if known and wanted <= sharded.MAX_CANDIDATES else None
