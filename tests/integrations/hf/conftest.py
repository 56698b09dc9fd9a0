"""Tiny random trios in fp64 as one model, and transformers' own generate() steered from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from proxytune_kernels.integrations.hf import ProxyTunedForCausalLM
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import argmax, byte_tokenizer, naive_loop, tiny_llama

ALPHA = 0.7
PLAIN: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
"""Greedy, to the full length."""


def three() -> tuple[Any, Any, Any]:
    """Of one small size, to be changed."""
    return tiny_llama(0, 16, 1), tiny_llama(1, 16, 1), tiny_llama(2, 16, 1)


@pytest.fixture(scope="session")
def hf_trio() -> Trio:
    """The base has other sizes than the pair; fp64, where rounding can't change a token."""
    return Trio.from_models(tiny_llama(0, 48, 3), tiny_llama(1), tiny_llama(2), byte_tokenizer())


@pytest.fixture(scope="session")
def hf_model(hf_trio: Trio) -> ProxyTunedForCausalLM:
    return ProxyTunedForCausalLM.from_trio(hf_trio, ALPHA)


@pytest.fixture(scope="session")
def loop() -> Callable[..., list[int]]:
    """The naive loop's greedy tokens: (trio, prompt, count, alpha) -> token ids."""

    def run(trio: Trio, prompt: Any, count: int, alpha: float = ALPHA) -> list[int]:
        ids = trio.tokenize(prompt)
        return naive_loop(trio.models, ids, count, lambda logits, _: argmax(logits, alpha))

    return run


class Recorder(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def put(self, value: Any) -> None:
        self.events.append(value.tolist())

    def end(self) -> None:
        self.events.append("end")


class Steer(LogitsProcessor):
    """Proxy-tuning as a processor over the base's scores: no cache, whole forwards of the pair."""

    def __init__(self, trio: Trio, alpha: Any, mask: Tensor) -> None:
        self.trio, self.mask = trio, mask
        self.alpha = torch.as_tensor(alpha, dtype=torch.float64).reshape(-1)

    @torch.no_grad()
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        rows = input_ids.shape[0]
        mask = self.mask.repeat_interleave(rows // self.mask.shape[0], 0)
        ones = mask.new_ones((rows, input_ids.shape[1] - mask.shape[1]))
        mask = torch.cat([mask, ones], 1)
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        expert, anti = (
            model(input_ids, attention_mask=mask, position_ids=place, use_cache=False).logits[:, -1]
            for model in (self.trio.expert, self.trio.anti)
        )
        alpha = self.alpha.repeat_interleave(rows // self.alpha.shape[0])[:, None]
        # Of logits and of log-probabilities, which beam search gives, this is the same.
        return torch.log_softmax(scores + alpha * (expert - anti), -1).float()


@pytest.fixture(scope="session")
def steered() -> Callable[..., Any]:
    """``generate()`` of the trio's base with :class:`Steer`: (trio, inputs, alpha, **options)."""

    def generate(trio: Trio, inputs: Any, alpha: Any = ALPHA, **options: Any) -> Any:
        steer = LogitsProcessorList([Steer(trio, alpha, inputs["attention_mask"])])
        return trio.base.generate(**inputs, logits_processor=steer, **options)

    return generate
