"""Requests of many lengths and alphas share a batch and a cache that is too small for them."""

from __future__ import annotations

import random
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed here: `make vllm` runs these")

from tests.vllm.trios import generate, rounding, save_trio

BLOCKS, BLOCK_SIZE = 9, 32
ALPHAS = (0.0, 0.5, 1.0, 1.7, -0.8, None)


def counter(llm: Any, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def test_mixed_requests(make_llm, tmp_path):
    """Tokens are the argmax, and logprobs those, of forwards over the whole text at its alpha."""
    from vllm import SamplingParams

    trio = save_trio(tmp_path, "llama", alpha=0.3)
    llm = make_llm(
        trio,
        max_num_batched_tokens=48,
        num_gpu_blocks_override=BLOCKS,
        block_size=BLOCK_SIZE,
        disable_log_stats=False,
    )
    rng = random.Random(7)
    requests = [
        (
            [rng.randrange(3, 259) for _ in range(rng.randrange(1, 120))],
            rng.choice(ALPHAS),
            rng.randrange(1, 60),
        )
        for _ in range(24)
    ]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=length,
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=0,
            extra_args=None if alpha is None else {"alpha": alpha},
        )
        for _, alpha, length in requests
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in requests]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert counter(llm, "vllm:num_preemptions") > 0
    for (prompt, alpha, length), output in zip(requests, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert len(tokens) == length
        text = prompt + tokens
        x, error = rounding(trio, text, 0.3 if alpha is None else alpha)
        logprobs = x.log_softmax(-1)
        said = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        for i, token in enumerate(text[1:]):
            # A logit's error moves its logprob by at most twice as much.
            assert abs(said[i][token].logprob - float(logprobs[i, token])) <= 2 * error
        best = x[len(prompt) - 1 : -1].max(dim=-1).values
        chosen = x[range(len(prompt) - 1, len(text) - 1), tokens]
        assert float((best - chosen).max()) <= 2 * error


def test_a_prefix_in_the_cache_serves_another_alpha(make_llm, tmp_path):
    """The cache holds each member's keys and values, which alpha does not change."""
    trio = save_trio(tmp_path, "llama")
    llm = make_llm(trio, enable_prefix_caching=True, block_size=32, disable_log_stats=False)
    prompt = list(b"one prefix for several requests, longer than a block: ")
    for alpha in (1.0, -0.5):
        before = counter(llm, "vllm:prefix_cache_hits")
        [tokens] = generate(llm, [prompt], [alpha], 12)
        x, error = rounding(trio, prompt + tokens[:-1], alpha)
        rows = x[len(prompt) - 1 :]
        chosen = rows[range(len(tokens)), tokens]
        assert float((rows.max(dim=-1).values - chosen).max()) <= 2 * error
        hits = counter(llm, "vllm:prefix_cache_hits") - before
    assert hits >= 32
