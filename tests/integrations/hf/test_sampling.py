"""``generate()`` draws through the op where it can, says where it can't, and changes no law."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)

from proxytune_kernels.decoder.loop import DecodeError
from proxytune_kernels.integrations.hf import ProxyTunedForCausalLM
from proxytune_kernels.integrations.hf.sampling import FusedSampling
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import VOCAB_SIZE, byte_tokenizer, tiny_llama
from tests.integrations.hf.conftest import Recorder

OP = "proxytune_kernels.sample on the three roles' logits"
LONG = 10


@pytest.fixture(scope="module")
def model():
    """Random models in fp64, where rounding can't change a token."""
    base, expert, anti = tiny_llama(0, 48, 3), tiny_llama(1), tiny_llama(2)
    trio = Trio.from_models(base, expert, anti, byte_tokenizer())
    return ProxyTunedForCausalLM.from_trio(trio)


@pytest.fixture(scope="module")
def batch(model):
    return model.tokenize(["The sum", "of two", "stop stop, she said"])


@pytest.fixture
def theirs(model, monkeypatch):
    """``generate()`` with transformers' own loop over the model's forward."""

    def loop(self, *args, tokenizer=None, **kwargs):
        return GenerationMixin._sample(self, *args, **kwargs)

    def generate(**options):
        with monkeypatch.context() as patch:
            patch.setattr(FusedSampling, "_sample", loop)
            return model.generate(**options)

    return generate


class EveryThird(StoppingCriteria):
    """Ends a row at a token that 3 divides."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 3 == 0


class WithEos(EveryThird):
    """The same, and makes the loop pad the rows that have ended."""

    eos_token_id = 3


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"alpha": 2.0},
    "alpha 0": {"alpha": 0},
    "alpha per row": {"alpha": torch.tensor([0.0, 0.5, -1.0])},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": list(range(200))},
    "min_length": {"min_length": 22, "eos_token_id": list(range(200))},
    "many ends": {"eos_token_id": list(range(30, 120)), "pad_token_id": 0},
    "no end": {"eos_token_id": None, "pad_token_id": None},
    "suppress": {"suppress_tokens": list(range(0, 250))},
    "begin": {"begin_suppress_tokens": list(range(0, 250))},
    "bias": {"sequence_bias": [[[i], float(i % 7)] for i in range(50)]},
    "bad words": {"bad_words_ids": [[i] for i in range(3, 200)]},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 3},
    "criterion": {"stopping_criteria": StoppingCriteriaList([EveryThird()])},
    "criterion without ends": {
        "stopping_criteria": StoppingCriteriaList([EveryThird()]),
        "eos_token_id": None,
        "pad_token_id": None,
    },
    "criterion that pads": {"stopping_criteria": StoppingCriteriaList([WithEos()])},
    "own length": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(23)])},
    "time": {"max_time": 0.0},
    "string": {"stop_strings": ["a", "e", "0"], "tokenizer": byte_tokenizer()},
    "one token": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers_loop(model, batch, theirs, case):
    options = {"max_new_tokens": LONG, "do_sample": False, **CASES[case]}
    got = model.generate(**batch, **options)
    assert model.info()["sampling"] == OP
    assert got.tolist() == theirs(**batch, **options).tolist()


def test_one_candidate_is_drawn_as_greedily(model, batch):
    greedy = model.generate(**batch, max_new_tokens=LONG)
    drawn = model.generate(**batch, max_new_tokens=LONG, do_sample=True, top_k=1)
    assert drawn.tolist() == greedy.tolist()


def test_first_tokens_follow_the_law_of_the_warpers(model):
    inputs = model.tokenize("of two")
    options = {"do_sample": True, "temperature": 1.3, "top_k": 12, "top_p": 0.9, "alpha": 0.5}
    set_seed(3)
    drawn = model.generate(**inputs, max_new_tokens=1, num_return_sequences=2000, **options)
    config, _ = model._prepare_generation_config(None, **options)
    warpers = GenerationMixin._get_logits_processor(
        model, config, input_ids_seq_length=inputs["input_ids"].shape[1]
    )
    with torch.no_grad():
        logits = model(**inputs, alpha=0.5).logits[:, -1]
    probabilities = warpers(inputs["input_ids"], logits.double()).softmax(-1)[0]
    counts = drawn[:, -1].bincount(minlength=VOCAB_SIZE).double()
    kept = probabilities > 0
    assert 2 < kept.sum() < 13 and counts[~kept].sum() == 0
    assert chisquare(counts[kept], probabilities[kept] * 2000).pvalue > 1e-3


def test_transformers_default_of_50_candidates_holds_unless_told(model):
    inputs = model.tokenize("of two")
    few = model.generate(**inputs, max_new_tokens=1, num_return_sequences=400, do_sample=True,
                         temperature=9.0)  # fmt: skip
    more = model.generate(**inputs, max_new_tokens=1, num_return_sequences=400, do_sample=True,
                          temperature=9.0, top_k=0)  # fmt: skip
    assert few[:, -1].unique().numel() <= 50 < more[:, -1].unique().numel()


def sampled(model, inputs, seed=1, **options):
    set_seed(seed)
    options = {"do_sample": True, "max_new_tokens": LONG, "top_k": 0, **options}
    return model.generate(**inputs, **options).tolist()


def test_set_seed_repeats_a_call(model, batch):
    assert sampled(model, batch) == sampled(model, batch)
    assert sampled(model, batch) != sampled(model, batch, seed=2)
    torch.manual_seed(1)
    once = model.generate(**batch, do_sample=True, max_new_tokens=LONG, top_k=0)
    again = model.generate(**batch, do_sample=True, max_new_tokens=LONG, top_k=0)
    assert once.tolist() != again.tolist()


def test_a_row_draws_the_same_whatever_comes_behind_it(model):
    both = model.tokenize(["The sum", "Two and"])
    alone = {name: tensor[:1] for name, tensor in both.items()}
    assert sampled(model, alone, eos_token_id=None)[0] == sampled(model, both, eos_token_id=None)[0]


def test_rows_of_one_prompt_differ(model):
    inputs = model.tokenize("The sum")
    rows = sampled(model, inputs, num_return_sequences=4)
    assert len({tuple(row) for row in rows}) == 4


def test_alpha_goes_with_each_return_sequence(model):
    inputs = model.tokenize(["The sum", "of two"])
    options = {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "max_new_tokens": LONG}
    got = model.generate(**inputs, alpha=[0.0, 2.0], **options)
    for row, alpha in ((0, 0.0), (1, 0.0), (2, 2.0), (3, 2.0)):
        one = model.generate(**inputs, alpha=alpha, max_new_tokens=LONG)[row // 2]
        assert [t for t in got[row].tolist() if t] == [t for t in one.tolist() if t]


def test_greedy_decoding_draws_no_seed(model, batch):
    before = torch.get_rng_state()
    model.generate(**batch, max_new_tokens=2)
    assert torch.equal(before, torch.get_rng_state())


def test_streamers_get_what_transformers_gives_them(model, batch, theirs):
    ours, other = Recorder(), Recorder()
    options = {**CASES["many ends"], "max_new_tokens": LONG}
    model.generate(**batch, streamer=ours, **options)
    theirs(**batch, streamer=other, **options)
    assert ours.events == other.events
    assert ours.events[-1] == "end" and len(ours.events) > 3


def test_logits_and_the_cache_can_be_returned(model, batch, theirs):
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True,
               "alpha": torch.tensor([0.0, 0.5, 2.0]), "min_new_tokens": 3}  # fmt: skip
    ours, other = model.generate(**batch, **options), theirs(**batch, **options)
    assert model.info()["sampling"] == OP
    assert ours.sequences.tolist() == other.sequences.tolist()
    assert len(ours.logits) == len(other.logits) == 4
    for got, wanted in zip(ours.logits, other.logits, strict=True):
        # Both are base + alpha (expert - anti) in fp32, of fp64 forwards of equal shapes.
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert ours.scores is None
    assert ours.past_key_values.get_seq_length() == batch["input_ids"].shape[1] + 3


def test_a_returned_cache_goes_on(model):
    inputs = model.tokenize("The sum of")
    whole = model.generate(**inputs, max_new_tokens=8, eos_token_id=None)
    part = model.generate(
        **inputs, max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True
    )
    rest = model.generate(
        part.sequences, past_key_values=part.past_key_values, max_new_tokens=4, eos_token_id=None,
        attention_mask=torch.ones_like(part.sequences),
    )  # fmt: skip
    assert rest.tolist() == whole.tolist()


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


FALLBACKS: dict[str, dict[str, Any]] = {
    "repetition_penalty 1.3 is not in the op": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size 2 is not in the op": {"no_repeat_ngram_size": 2},
    "typical_p 0.9 is not in the op": {"do_sample": True, "typical_p": 0.9},
    "Nothing is not in the op": {"logits_processor": [Nothing()]},
    "prefix_allowed_tokens_fn is not in the op": {
        "prefix_allowed_tokens_fn": lambda row, ids: list(range(100))
    },
    "use_cache False is not in this package's loop": {"use_cache": False},
    "synced_gpus is not in this package's loop": {"synced_gpus": True},
    "output_scores asks for the rows that the op does not write": {
        "output_scores": True,
        "return_dict_in_generate": True,
    },
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_is_not_in_the_op_runs_in_transformers_loop(model, theirs, batch, reason, monkeypatch):
    # One process is a world of its own: its peers have always finished.
    monkeypatch.setattr(
        FusedSampling, "_has_unfinished_sequences", lambda self, done, *a, **k: not done
    )
    options = {"max_new_tokens": 4, **FALLBACKS[reason]}
    set_seed(2)
    got = model.generate(**batch, **options)
    assert model.info()["sampling"] == f"transformers' warpers: {reason}"
    set_seed(2)
    wanted = theirs(**batch, **options)
    if options.get("output_scores"):
        assert all(torch.equal(a, b) for a, b in zip(got.scores, wanted.scores, strict=True))
        got, wanted = got.sequences, wanted.sequences
    assert got.tolist() == wanted.tolist()


def test_beams_and_drafts_say_that_they_go_through_transformers(model):
    inputs = model.tokenize("The sum")
    model.generate(**inputs, max_new_tokens=3, num_beams=2)
    assert "beam search ranks whole rows" in model.info()["sampling"]
    model.generate(**inputs, max_new_tokens=3, prompt_lookup_num_tokens=2)
    assert "assisted decoding checks its drafts" in model.info()["sampling"]
    model.generate(**inputs, max_new_tokens=3)
    assert model.info()["sampling"] == OP


def test_a_drafter_of_ours_runs_in_transformers_loop(model):
    inputs = model.tokenize("The sum")
    plain = model.base.generate(**inputs, max_new_tokens=6)
    drafted = model.base.generate(**inputs, max_new_tokens=6, assistant_model=model)
    assert "transformers' warpers" in model.info()["sampling"]
    assert drafted.tolist() == plain.tolist()


def test_no_token_left_to_draw_is_an_error(model, batch):
    with pytest.raises(DecodeError, match="row 0: no token can be drawn at position 0"):
        model.generate(**batch, max_new_tokens=3, suppress_tokens=list(range(VOCAB_SIZE)))


def test_an_alpha_that_is_no_number_is_an_error(model, batch):
    with pytest.raises(ValueError, match="alpha"):
        model.generate(**batch, max_new_tokens=3, alpha=torch.tensor([0.0, math.nan, 1.0]))
