"""The slot cache and its attention against the plain forward of transformers, in fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.deprecation import deprecate_kwarg

from proxytune_kernels.decoder.cache import cache_keyword
from proxytune_kernels.decoder.runner import Runner
from tests.decoder.conftest import kind

VOCAB_SIZE = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA2: dict[str, Any] = {
    "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 7.0, "query_pre_attn_scalar": 8,
}  # fmt: skip
QWEN2: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "llama": kind("Llama", SIZES),
    "llama-mha": kind("Llama", SIZES, num_key_value_heads=4),
    "qwen3": kind("Qwen3", SIZES, head_dim=16),
    "qwen2-mixed-window": kind("Qwen2", SIZES, **QWEN2),
    "mistral-window": kind("Mistral", SIZES, sliding_window=5),
    "gemma2-softcap": kind("Gemma2", SIZES, **GEMMA2),
    "gemma3": kind("Gemma3", SIZES, head_dim=8, sliding_window=4),
}
# fp64 forwards differ by some 1e-15 of logits up to 30 here; the runner gives fp32, 2^-24 of them.
# Gemma 2's own eager attention takes its softmax in fp32.
TOLERANCE = {"gemma2-softcap": 1e-4}


def make(
    architecture: str, seed: int = 0, kinds: dict[str, Any] = ARCHITECTURES, **settings: Any
) -> Any:
    model_class, config = kinds[architecture]
    torch.manual_seed(seed)
    config = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(config, name, value)
    model = model_class(config).double().eval()
    if architecture == "gemma2-softcap":
        model.set_attn_implementation("eager")  # SDPA has no soft caps
    return model


def assert_plain(found: Tensor, model: Any, token_ids: list[int], architecture: str = "") -> None:
    """Logits after these tokens are those of the plain forward."""
    bound = TOLERANCE.get(architecture, 1e-6)
    torch.testing.assert_close(found, plain(model, token_ids), rtol=1e-6, atol=bound)


@torch.no_grad()
def plain(model: Any, token_ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0, -1]
    return logits.float()


def random_ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
    return ids


def prefill(runner: Runner, slots: list[int], prompts: list[list[int]]) -> Tensor:
    """Logits [B, V] after whole prompts in empty slots, which run from now on."""
    runner.start(torch.tensor(slots), ["base"])
    return runner.prefill(slots, {"base": prompts})["base"]


def step(runner: Runner, token_ids: list[list[int]], kept: int | None = None) -> Tensor:
    """Logits [B, q, V] of q more tokens in each of the first slots, of which ``kept`` stay."""
    logits = runner.forward(("base",), torch.tensor(token_ids))["base"]
    count = len(token_ids[0]) if kept is None else kept
    runner.advance(len(token_ids), torch.full((len(token_ids),), count))
    for slot in range(len(token_ids)):
        runner.advance_host(slot, ("base",), count)
    return logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lengths", [(9, 3, 14), (7, 7, 7), (11,)], ids=str)
def test_logits_equal_the_plain_forward(architecture, lengths):
    model = make(architecture)
    runner = Runner({"base": model}, 4, 64)
    rows = [random_ids(length, seed) for seed, length in enumerate(lengths)]
    logits = [prefill(runner, [slot], [row])[0] for slot, row in enumerate(rows)]
    for count in range(12):
        for row, row_logits in zip(rows, logits, strict=True):
            assert_plain(row_logits, model, row, architecture)
        token_ids = random_ids(len(rows), 100 + count)
        for row, token_id in zip(rows, token_ids, strict=True):
            row.append(token_id)
        logits = list(step(runner, [[token_id] for token_id in token_ids])[:, 0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lengths", [(9, 3, 14), (7, 7, 7), (11,)], ids=str)
def test_several_tokens_at_once_and_their_rollback(architecture, lengths):
    """Of four tokens two stay; what was written behind them must not be seen again."""
    model = make(architecture)
    runner = Runner({"base": model}, 4, 64, slack=3)
    rows = [random_ids(length, seed) for seed, length in enumerate(lengths)]
    for slot, row in enumerate(rows):
        prefill(runner, [slot], [row])
    for count in range(4):
        tokens = [random_ids(4, 10 * count + slot) for slot in range(len(rows))]
        logits = step(runner, tokens, kept=2)
        for row, new, row_logits in zip(rows, tokens, logits, strict=True):
            for j in range(4):
                assert_plain(row_logits[j], model, [*row, *new[: j + 1]], architecture)
            row += new[:2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_in_chunks(architecture):
    model = make(architecture)
    runner = Runner({"base": model}, 2, 64)
    row = random_ids(23, 0)
    for start in range(0, 23, 9):
        logits = runner.extend(range(1, 2), {"base": [row[start : start + 9]]})["base"]
        assert_plain(logits[0], model, row[: start + 9], architecture)


@pytest.mark.parametrize("lengths", [(8, 8, 8), (5, 12, 8)], ids=str)
def test_prompts_prefill_together(lengths):
    model = make("mistral-window")
    runner = Runner({"base": model}, 4, 64)
    rows = [random_ids(length, seed) for seed, length in enumerate(lengths)]
    logits = prefill(runner, [3, 0, 2], rows)
    for row, row_logits in zip(rows, logits, strict=True):
        assert_plain(row_logits, model, row)


def test_moved_and_reused_slots():
    model = make("llama")
    runner = Runner({"base": model}, 3, 64)
    long, short, new = random_ids(20, 0), random_ids(5, 1), random_ids(3, 2)
    prefill(runner, [0], [long])
    prefill(runner, [1], [short])
    runner.release(0)
    runner.move(1, 0)
    prefill(runner, [1], [new])
    logits = step(runner, [[7], [8]])[:, 0]
    assert_plain(logits[0], model, [*short, 7])
    assert_plain(logits[1], model, [*new, 8])


def test_nan_of_a_request_does_not_reach_the_next():
    model = make("llama")
    runner = Runner({"base": model}, 2, 64, slack=3)
    prefill(runner, [0], [random_ids(12, 0)])
    prefill(runner, [1], [random_ids(10, 1)])
    # Drafts that were rolled back leave something behind the end, too.
    step(runner, [[1, 2, 3, 4]] * 2, kept=1)
    cache = runner.models["base",].cache
    with torch.inference_mode():
        for layer in (*cache.keys, *cache.values):
            assert layer[1, 13].any()
            layer[1, :14] = torch.nan
    runner.release(1)
    prefill(runner, [1], [[5]])
    runner.forward(("base",), torch.tensor([[7], [8]]))
    logits = step(runner, [[7], [8]])[:, 0]
    assert_plain(logits[1], model, [5, 8])


def test_the_callers_model_is_left_as_it_was():
    model = make("llama")
    before = plain(model, [3, 4, 5])
    twin = Runner({"base": model}, 2, 64).models["base",].model
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(plain(model, [3, 4, 5]), before)
    shared = {id(p) for p in model.parameters()}
    assert {id(p) for p in twin.parameters()} == shared


def test_layers_that_a_slot_cache_cannot_serve_are_refused():
    model = make("gemma3")
    model.config.layer_types = ["full_attention", "chunked_attention", "sparse"]
    wanted = r"expert must have layers of .*, got Gemma3ForCausalLM with chunked_attention, sparse"
    with pytest.raises(ValueError, match=wanted):
        Runner({"base": make("llama"), "expert": model, "anti": model}, 2, 64)


def test_models_that_hide_their_attention_are_refused():
    with pytest.raises(ValueError, match=r"anti must be a model whose attention .* got Linear"):
        Runner({"base": make("llama"), "anti": torch.nn.Linear(2, 2)}, 2, 64)


def test_unknown_attention_terms_are_refused():
    model = make("llama")
    ours = Runner({"base": model}, 2, 64).models["base",]
    fresh = ours.cache.fresh_step(torch.tensor([0]), 2)
    with pytest.raises(NotImplementedError, match="got s_aux from LlamaAttention"):
        ours.model(
            torch.tensor([[1, 2]]),
            position_ids=fresh.position_ids,
            cache_step=fresh,
            s_aux=torch.zeros(4),
            **{cache_keyword(model.forward): fresh},
        )


class _Renamed(LlamaForCausalLM):
    """A model that warns of the old name of its cache, as those of transformers do from 5.24 on."""

    @deprecate_kwarg("past_key_values", version="99.0", new_name="cache")
    def forward(self, input_ids: Tensor, cache: Any = None, **keywords: Any) -> Any:
        name = cache_keyword(LlamaForCausalLM.forward)
        return super().forward(input_ids, **{name: cache}, **keywords)


def test_a_cache_goes_by_the_name_that_the_model_takes():
    assert cache_keyword(_Renamed.forward) == "cache"
    assert cache_keyword(lambda past_key_values, cache: None) == "past_key_values"
    torch.manual_seed(0)
    model = _Renamed(LlamaConfig(**SIZES)).double().eval()
    with pytest.warns(FutureWarning, match="past_key_values"):
        model(torch.tensor([[1]]), past_key_values=None)
    runner = Runner({"base": model}, 1, 64)
    row = random_ids(5, 0)
    # Warnings are errors here.
    assert_plain(prefill(runner, [0], [row])[0], model, row)
    assert_plain(step(runner, [[7]])[0, 0], model, [*row, 7])
