"""Requests of many lengths and alphas share a batch and a cache that is too small for them."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed here: `make vllm` runs these")

import proxytune_kernels as ptk
from tests.decoder.conftest import as_asked
from tests.vllm.trios import generate, rounding, save_trio

BLOCKS, BLOCK_SIZE = 9, 32
ALPHAS = (0.0, 0.5, 1.0, 1.7, -0.8, None)
WORDS = [bytes(pair) for pair in product(b"abcdefghijk", repeat=2)] + [b"m", b"n", b"o", b"p"]
ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "repetition": {"repetition_penalty": 1.9},
    "counts": {"presence_penalty": 1.5, "frequency_penalty": 1.0},
    "bias": {"logit_bias": {i: 4.0 - i / 20 for i in range(20, 260, 3)}},
    "words": {"bad_words": WORDS, "allowed_token_ids": list(range(67, 84))},
    "min_tokens": {"stop_token_ids": list(range(3, 259)), "min_tokens": 7},
    "all": {
        "repetition_penalty": 1.3, "presence_penalty": -0.5, "frequency_penalty": 0.7,
        "logit_bias": {i: 2.0 for i in range(67, 84, 5)}, "bad_words": WORDS,
        "allowed_token_ids": list(range(67, 120)), "stop_token_ids": [70, 90], "min_tokens": 9,
    },
}  # fmt: skip
"""What vLLM itself does to logits, in its words; bad words as bytes, which are tokens."""


def counter(llm: Any, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def test_mixed_requests(make_llm, tmp_path):
    """Tokens are the argmax, and logprobs those, of forwards over the whole text at its alpha.

    What vLLM does to logits, it does to the combined ones.
    """
    from vllm import SamplingParams

    trio = save_trio(tmp_path, "llama", alpha=0.3)
    cache = {"num_gpu_blocks_override": BLOCKS, "block_size": BLOCK_SIZE}
    llm = make_llm(trio, max_num_batched_tokens=48, disable_log_stats=False, **cache)
    rng = random.Random(7)
    tokenizer = llm.get_tokenizer()
    requests = []
    for i in range(28):
        prompt = [rng.randrange(3, 259) for _ in range(rng.randrange(1, 120))]
        name = [*ASKED][i % len(ASKED)]
        requests.append((prompt, rng.choice(ALPHAS), rng.randrange(10, 60), name))
    said_too = {"logprobs": 0, "prompt_logprobs": 0}
    params = [
        SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, **said_too,
                       extra_args=None if alpha is None else {"alpha": alpha},
                       **named(name, lambda word: word.decode()))
        for _, alpha, length, name in requests
    ]  # fmt: skip
    prompts = [{"prompt_token_ids": request[0]} for request in requests]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert counter(llm, "vllm:num_preemptions") > 0
    moved = set()
    for (prompt, alpha, length, name), output in zip(requests, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        asked = ptk.SamplingParams(
            max_tokens=length, **named(name, lambda word: tokenizer.encode(word.decode()))
        )
        ends = len(tokens) >= asked.min_tokens and tokens[-1] in asked.stop_token_ids
        assert len(tokens) == length or ends
        # vLLM's min_tokens bar the end of a text, too, where it is ignored.
        asked = replace(asked, stop_token_ids=(*asked.stop_token_ids, tokenizer.eos_token_id))
        text = prompt + tokens
        x, error = rounding(trio, text, 0.3 if alpha is None else alpha)
        logprobs = x.log_softmax(-1)
        said = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        for i, token in enumerate(text[1:]):
            # A logit's error moves its logprob by at most twice as much.
            assert abs(said[i][token].logprob - float(logprobs[i, token])) <= 2 * error
        for i, token in enumerate(tokens):
            row = x[len(prompt) - 1 + i]
            after = as_asked(row, asked, prompt, tokens[:i])
            # A repetition penalty multiplies a logit with its error.
            assert float(after.max() - after[token]) <= 2 * error * asked.repetition_penalty
            moved |= {name} if int(row.argmax()) != token else set()
    assert moved == ASKED.keys() - {"nothing"}


def named(name: str, spell: Any) -> dict[str, Any]:
    """What is asked by this name, with its bad words spelt."""
    asked = ASKED[name]
    words = (
        {"bad_words": [spell(word) for word in asked["bad_words"]]} if "bad_words" in asked else {}
    )
    return asked | words


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
