"""Our sampler in the place of the V2 runner's: one pass over the combined logits.

A request with a seed draws the same tokens as from :class:`proxytune_kernels.Decoder`, whatever
it shares a batch with. No device has run this.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.sample.sampler import Sampler

from proxytune_kernels import ops
from proxytune_kernels.params import FILTER_ORDERS, RowParams

_ORDER = FILTER_ORDERS.index("vllm")


class FusedSampler(Sampler):  # type: ignore[misc]  # vllm is Any here
    """vLLM's Sampler with another draw; requests that change the logits keep vLLM's.

    Those are requests with penalties, a bias, banned, allowed or forced tokens, a minimal length or
    a thinking budget. Grammars mask the logits before any sampler sees them.
    """

    @classmethod
    def over(cls, sampler: Sampler) -> FusedSampler:
        """A sampler that takes over another's state."""
        own = cls.__new__(cls)
        own.__dict__.update(sampler.__dict__)
        states = own.sampling_states
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
            logits: combined, fp32 [rows, vocab_size].
            expanded_idx_mapping: [rows], the request of each row.
            idx_mapping, idx_mapping_np: [requests], on the device and on the host.
            pos: [rows], index of the last token that each row has read.
            arguments, named: for vLLM's own draw.
        """
        processed = self.processed.np[idx_mapping_np]
        rest = (expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, *arguments)
        if processed.all():
            return super().sample(logits, *rest, **named)
        tokens = self._draw(logits, expanded_idx_mapping, pos)
        if not processed.any():
            return tokens, logits
        theirs, _ = super().sample(logits, *rest, **named)
        return torch.where(self.processed.gpu[expanded_idx_mapping] != 0, theirs, tokens), logits

    def _draw(self, logits: Tensor, requests: Tensor, pos: Tensor) -> Tensor:
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
        # A row with nothing left has token -1, which no embedding has; vLLM's own draw gives 0.
        return ops.sample(logits, None, None, params).token_ids.clamp_(min=0)
