"""What the op is told of a list of logits processors, held to the processors themselves; and the
sampler for loops that hold the three roles' logits."""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import textwrap
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import GenerationMixin, LogitsProcessorList, set_seed

from proxytune_kernels.integrations.hf import LogitsSampler, sampling
from proxytune_kernels.integrations.hf.sampling import NotInOp, draw_seeds, read_processors
from proxytune_kernels.params import SamplingParams
from tests.decoder.conftest import VOCAB_SIZE as MODEL_VOCAB_SIZE
from tests.integrations.hf.conftest import ALPHA

VOCAB_SIZE = 193  # not a multiple of a mask's 32 tokens
EOS = 7
PROMPT = 3
STEPS = 8


def warpers(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    chain = LogitsProcessorList()
    if temperature != 1.0:
        chain.append(hf.TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(hf.TopKLogitsWarper(top_k))
    if top_p < 1.0:
        chain.append(hf.TopPLogitsWarper(top_p))
    if min_p:
        chain.append(hf.MinPLogitsWarper(min_p))
    return chain


def ids_of(rows, length=PROMPT):
    return torch.zeros((rows, length), dtype=torch.int64)


def drawn_by(chain, rows, seed=0, position=0, do_sample=True):
    given: Any = {"seeds": torch.arange(len(rows)) + seed, "prompt_length": PROMPT}
    sampler = LogitsSampler(read_processors(chain, do_sample=do_sample), *rows.shape, **given)
    sampler.position = position
    return sampler.draw(rows)


def lowest(rows, kept):
    return rows.masked_fill(~kept, math.inf).amin(-1)


def assert_same_law(chain, rows, ordered=True):
    """The op's kept sets and probabilities are the chain's, computed in fp64.

    The op's logprobs are off by at most 2^-23 |s| + 9.1e-7 + 2^-24 |logprob| (docs/contracts.md),
    s below 200 in these rows.
    """
    drawn = drawn_by(chain, rows)
    warped = chain(ids_of(len(rows)), rows.double())
    kept = warped > -math.inf
    assert drawn.num_kept.tolist() == kept.sum(-1).tolist()
    if ordered:  # without ties a set that is a prefix of the order is known by its size
        assert (rows.masked_fill(kept, -math.inf).amax(-1) < lowest(rows, kept)).all()
    for seed in range(0, 3000, 1000):
        drawn = drawn_by(chain, rows, seed)
        wanted = warped.log_softmax(-1).gather(-1, drawn.token_ids[:, None])[:, 0]
        assert (wanted > -math.inf).all()
        torch.testing.assert_close(drawn.logprobs.double(), wanted, rtol=2e-7, atol=2.5e-5)


@pytest.mark.parametrize("scale", [0.3, 3.0, 12.0])
def test_filters_keep_what_the_warpers_keep(scale):
    rows = scale * torch.randn(48, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    temperatures, top_ks, top_ps, min_ps = (0.4, 1.0, 1.9), (0, 1, 9, 500), (0.35, 0.93, 1.0), (
        0.0, 0.02, 0.6)  # fmt: skip
    for settings in itertools.product(temperatures, top_ks, top_ps, min_ps):
        assert_same_law(warpers(*settings), rows)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1e-3}, {"temperature": 50.0}, {"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 1}],
    ids=str,
)
def test_filters_at_their_edges(settings):
    rows = 4 * torch.randn(32, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    assert_same_law(warpers(**settings), rows)


def test_masked_tokens_stay_masked():
    rows = 2 * torch.randn(32, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    rows[:, ::3] = -math.inf
    for settings in ((0.7, 5), (1.0, 150, 0.9), (1.0, 0, 1.0, 0.05), (1.3,)):
        assert_same_law(warpers(*settings), rows)


def test_of_equal_logits_top_k_keeps_the_lowest_ids_where_transformers_keeps_all():
    rows = torch.zeros(400, VOCAB_SIZE)
    rows[:, 5] = 1.0
    chain = warpers(top_k=4)
    drawn = drawn_by(chain, rows)
    assert drawn.num_kept.unique().tolist() == [4]
    assert set(drawn.token_ids.tolist()) == {0, 1, 2, 5}
    assert (chain(ids_of(400), rows) > -math.inf).sum(-1).unique().tolist() == [VOCAB_SIZE]


def test_of_equal_logits_top_p_keeps_as_many_as_transformers():
    rows = torch.zeros(2, 10)
    rows[0, 3] = rows[1, 3] = 1.0
    for top_p in (0.15, 0.33, 0.5, 0.99):
        chain = warpers(top_p=top_p)
        kept = chain(ids_of(2), rows.double()) > -math.inf
        drawn = drawn_by(chain, rows)
        assert drawn.num_kept.tolist() == kept.sum(-1).tolist()


def test_min_p_keeps_equal_logits_together():
    rows = torch.tensor([[0.0, 2.0, 0.0, 2.0, 0.0]])
    for min_p in (0.1, 0.2, 1.0):
        assert_same_law(warpers(min_p=min_p), rows, ordered=False)


def eos():
    return torch.tensor([EOS, 12])


CONSTRAINTS = {
    "suppress": lambda: hf.SuppressTokensLogitsProcessor([0, 31, 32, 64, VOCAB_SIZE - 1, 9999]),
    "begin": lambda: hf.SuppressTokensAtBeginLogitsProcessor([5, 6], PROMPT + 1),
    "min_length": lambda: hf.MinLengthLogitsProcessor(PROMPT + 2, eos()),
    "min_new_tokens": lambda: hf.MinNewTokensLengthLogitsProcessor(PROMPT, 3, eos()),
    "bad_words": lambda: hf.NoBadWordsLogitsProcessor([[4], [90], [EOS]], eos_token_id=EOS),
    "first": lambda: hf.ForcedBOSTokenLogitsProcessor(7),
    "last": lambda: hf.ForcedEOSTokenLogitsProcessor(PROMPT + 4, 9),
    "bias": lambda: hf.SequenceBiasLogitsProcessor([[[4], 2.5], [[50], -1.0], [[60], -math.inf]]),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("position", range(5))
def test_constraints_are_those_of_the_processors(name, position):
    rows = torch.randn(8, VOCAB_SIZE, generator=torch.Generator().manual_seed(4))
    ids = ids_of(8, PROMPT + position)
    chain = LogitsProcessorList([CONSTRAINTS[name](), hf.TemperatureLogitsWarper(0.7)])
    warped = chain(ids, rows.double())
    drawn = drawn_by(chain, rows, position=position)
    assert drawn.num_kept.tolist() == (warped > -math.inf).sum(-1).tolist()
    wanted = warped.log_softmax(-1).gather(-1, drawn.token_ids[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs.double(), wanted, rtol=2e-7, atol=2.5e-5)
    greedy = drawn_by(chain, rows, position=position, do_sample=False)
    assert greedy.token_ids.tolist() == warped.argmax(-1).tolist()


def test_constraints_add_up_in_any_order():
    rows = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(5))
    made = [make() for make in CONSTRAINTS.values()]
    for chain in (made, made[::-1]):
        warped = LogitsProcessorList(chain)(ids_of(4, PROMPT + 1), rows.double())
        drawn = drawn_by(chain, rows, position=1)
        assert drawn.num_kept.tolist() == (warped > -math.inf).sum(-1).tolist()


def test_biases_of_one_token_are_added():
    chain = [hf.SequenceBiasLogitsProcessor([[[4], 2.5]]), CONSTRAINTS["bad_words"](),
             CONSTRAINTS["bias"]()]  # fmt: skip
    sampling = read_processors(chain, do_sample=True)
    assert sampling.bias == {4: 5.0, 50: -1.0}


def test_renormalizing_changes_nothing():
    chain = [*warpers(0.7, 5), hf.LogitNormalization()]
    assert read_processors(chain, do_sample=True) == read_processors(chain[:-1], do_sample=True)


def test_greedy_needs_no_filters():
    sampling = read_processors(warpers(0.7, 5, 0.9, 0.1), do_sample=False)
    assert (sampling.temperature, sampling.top_k) == (0.0, 0)
    assert (sampling.top_p, sampling.min_p) == (1.0, 0.0)


class Own(hf.TopKLogitsWarper):
    """A subclass may do anything."""


@pytest.mark.parametrize(
    ("chain", "named"),
    [
        ([Own(5)], "Own is not in the op"),
        ([lambda ids, scores: scores], "function is not in the op"),
        ([hf.TopPLogitsWarper(0.9), hf.TopKLogitsWarper(5)], "top_k 5 behind another filter"),
        ([hf.TopKLogitsWarper(5), hf.TopKLogitsWarper(3)], "top_k 3 behind another filter"),
        ([hf.MinPLogitsWarper(0.1), hf.TemperatureLogitsWarper(0.7)], "temperature 0.7 behind"),
        ([hf.TopKLogitsWarper(5), hf.SuppressTokensLogitsProcessor([3])], "suppress_tokens behind"),
        ([hf.TopPLogitsWarper(0.9, min_tokens_to_keep=2)], "top_p 0.9 with min_tokens_to_keep 2"),
        ([hf.MinPLogitsWarper(0.9, min_tokens_to_keep=3)], "min_p 0.9 with min_tokens_to_keep 3"),
        ([hf.TopKLogitsWarper(5, filter_value=-99.0)], "top_k 5 with filter_value -99"),
        ([hf.TopPLogitsWarper(0.0)], r"top_p 0.0 is not in the op, which takes \(0, 1\]"),
        ([hf.SequenceBiasLogitsProcessor([[[4, 5], 2.5]])], r"sequence_bias .* \[4, 5\]"),
        ([hf.NoBadWordsLogitsProcessor([[4], [4, 6]])], r"bad_words_ids .* \[4, 6\]"),
        ([hf.ForcedEOSTokenLogitsProcessor(9, [4, 6])], "forced_eos_token_id of several tokens"),
    ],
)
def test_what_the_op_does_not_have_is_named(chain, named):
    with pytest.raises(NotInOp, match=named):
        read_processors(chain, do_sample=True)


# Options of GenerationConfig -> what is said; None is in the op.
OPTIONS = {
    "temperature": (0.7, None),
    "top_k": (5, None),
    "top_p": (0.9, None),
    "min_p": (0.1, None),
    "min_length": (5, None),
    "min_new_tokens": (5, None),
    "suppress_tokens": ([3], None),
    "begin_suppress_tokens": ([3], None),
    "bad_words_ids": ([[3]], None),
    "sequence_bias": ([[[3], 1.0]], None),
    "renormalize_logits": (True, None),
    "repetition_penalty": (1.3, "repetition_penalty 1.3"),
    "no_repeat_ngram_size": (2, "no_repeat_ngram_size 2"),
    "top_h": (0.5, "top_h 0.5"),
    "typical_p": (0.5, "typical_p 0.5"),
    "epsilon_cutoff": (0.1, "epsilon_cutoff 0.1"),
    "eta_cutoff": (0.1, "eta_cutoff"),
    "forced_bos_token_id": (3, None),
    "forced_eos_token_id": (3, None),
    "remove_invalid_values": (True, "remove_invalid_values"),
    "exponential_decay_length_penalty": ((3, 1.1), "exponential_decay_length_penalty"),
    "guidance_scale": (1.5, "guidance_scale 1.5"),
    "watermarking_config": (hf.WatermarkingConfig(), "watermarking_config"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_in_the_op_or_named(option):
    value, named = OPTIONS[option]
    options: Any = {"do_sample": True, "max_length": 20, "eos_token_id": EOS, option: value}

    def make():
        return LogitsSampler.from_config(**options, vocab_size=VOCAB_SIZE, prompt_length=PROMPT)

    if named is None:
        assert make().draw(torch.randn(1, VOCAB_SIZE)).token_ids.shape == (1,)
    else:
        with pytest.raises(NotInOp, match=f"^{named} is not in the op$"):
            make()


def test_every_processor_that_transformers_builds_is_known():
    source = textwrap.dedent(inspect.getsource(GenerationMixin._get_logits_processor))
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    built = {call.id for call in calls if isinstance(call, ast.Name)}
    logits_process = inspect.getmodule(hf.TopKLogitsWarper)
    kinds = {getattr(logits_process, name) for name in built if hasattr(logits_process, name)}
    kinds.discard(LogitsProcessorList)
    assert len(kinds) >= 20
    known = {*sampling._OPTIONS, hf.LogitNormalization}
    assert {kind.__name__ for kind in kinds - known} == set()


def rows_of_logits(batch_size=2, vocab_size=100):
    return torch.randn(3, batch_size, vocab_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def own_loop(model, sampler, inputs):
    """A decoding loop as one writes it: whole forwards, no cache."""
    token_ids = inputs["input_ids"]
    for _ in range(STEPS):
        roles = [
            role(input_ids=token_ids, use_cache=False).logits[:, -1].float()
            for role in (model.base, model.expert, model.anti)
        ]
        token_ids = torch.cat([token_ids, sampler.draw(*roles).token_ids[:, None]], dim=1)
    return token_ids.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "min_p": 0.05, "min_new_tokens": 4, "eos_token_id": [5, 6]},
        {"suppress_tokens": list(range(200)), "sequence_bias": [[[230], 4.0]]},
    ],
    ids=str,
)
def test_a_loop_of_ones_own_draws_what_generate_draws(hf_model, options):
    inputs = hf_model.tokenize(["The sum", "two and"])
    wanted = {"eos_token_id": None, **options}
    set_seed(4)
    generated = hf_model.generate(**inputs, max_new_tokens=STEPS, **wanted)
    set_seed(4)
    wanted |= {"prompt_length": inputs["input_ids"].shape[1], "vocab_size": MODEL_VOCAB_SIZE}
    sampler = LogitsSampler.from_config(**wanted, batch_size=2, alpha=ALPHA)
    # Rows that end go on here.
    assert own_loop(hf_model, sampler, inputs)[0][: generated.shape[1]] == generated[0].tolist()


def test_a_config_is_read_as_generate_reads_it():
    config = hf.GenerationConfig(do_sample=True, temperature=0.7)
    sampler = LogitsSampler.from_config(config, top_p=0.8, vocab_size=100)
    assert sampler.sampling.temperature == 0.7
    assert sampler.sampling.top_p == 0.8
    assert sampler.sampling.top_k == 50
    assert config.top_p is None
    assert LogitsSampler.from_config(vocab_size=100).sampling.temperature == 0


@pytest.mark.parametrize("options", [
    {}, {"top_k": 7}, {"do_sample": True}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    {"do_sample": True, "top_k": 0, "min_p": 0.1}, {"do_sample": False, "top_p": 0.5},
])  # fmt: skip
def test_sampling_params_of_a_config_are_what_its_processors_do(options):
    params = SamplingParams.from_generation_config(hf.GenerationConfig(**options))
    filters = LogitsSampler.from_config(**options, vocab_size=100).sampling.filters
    assert {name: getattr(params, name) for name in filters} == filters


def test_a_position_can_be_drawn_again():
    base, expert, anti = rows_of_logits()
    sampler = LogitsSampler.from_config(
        do_sample=True, vocab_size=100, batch_size=2, seed=-1, min_new_tokens=3,
        eos_token_id=list(range(50)),
    )  # fmt: skip
    first = [sampler.draw(base, expert, anti).token_ids.tolist() for _ in range(6)]
    assert all(token >= 50 for step in first[:3] for token in step)
    assert any(token < 50 for step in first[3:] for token in step)
    sampler.position = 1
    again = [sampler.draw(base, expert, anti).token_ids.tolist() for _ in range(5)]
    assert again == first[1:]
    assert sampler.position == 6


def test_seeds_come_from_the_global_generator():
    torch.manual_seed(3)
    few = draw_seeds(2)
    torch.manual_seed(3)
    assert draw_seeds(5)[:2].tolist() == few.tolist()
    assert draw_seeds(2).tolist() != few.tolist()
    assert (draw_seeds(2000) < 0).float().mean() == pytest.approx(0.5, abs=0.06)  # 5 deviations


def test_rows_have_seeds_of_their_own_unless_told():
    base, expert, anti = (x.expand(8, -1) for x in rows_of_logits(1))
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "vocab_size": 100, "batch_size": 8}
    drawn = LogitsSampler.from_config(**options).draw(base, expert, anti).token_ids
    assert drawn.unique().numel() > 1
    drawn = LogitsSampler.from_config(**options, seed=7).draw(base, expert, anti).token_ids
    assert drawn.unique().numel() == 1


def test_what_can_not_be_drawn_is_named():
    with pytest.raises(NotInOp, match="num_beams 3 is not in the op"):
        LogitsSampler.from_config(vocab_size=100, num_beams=3)
    with pytest.raises(ValueError, match="fields of GenerationConfig, got temprature"):
        LogitsSampler.from_config(vocab_size=100, temprature=0.5)
    with pytest.raises(ValueError, match="below the vocabulary's size 100, got 100"):
        LogitsSampler.from_config(vocab_size=100, sequence_bias=[[[100], 1.0]])
    with pytest.raises(ValueError, match=r"alpha must have shape \[2\]"):
        LogitsSampler.from_config(vocab_size=100, batch_size=2, alpha=torch.ones(3))
