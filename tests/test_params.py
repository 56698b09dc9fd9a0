"""SamplingParams refuse what is out of range by name; RowParams hold what they were given."""

# ruff: noqa: E501 (tables: one case a line)
from __future__ import annotations

import dataclasses
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from proxytune_kernels.decoder import Grammar
from proxytune_kernels.params import (
    FILTER_ORDERS,
    ROW_FIELDS,
    RowParams,
    SamplingParams,
    signed_seed,
)

GOOD = {
    "alpha": (0, -2.5, 1e30, (1.0, 0.0)),
    "alpha_schedule": ("constant", "decay:0", "decay:1", "entropy:2.5", "entropy:1e-3"),
    "pair_alphas": ((), (0.5, -2), (0,)),
    "temperature": (0, 1e-30, 5), "top_k": (-1, 0, 1, 10**9),
    "top_p": (1e-9, 1, 1.0), "min_p": (0, 0.3, 1), "filter_order": FILTER_ORDERS,
    "seed": (None, 0, -(2**63), 2**64 - 1), "max_tokens": (1, 10**6), "min_tokens": (0, 16),
    "stop": ("a", ("a", "b"), ["x"], ()), "stop_token_ids": ((), (0, 5), [7]),
    "ignore_eos": (True, False), "include_stop_str_in_output": (True, False),
    "skip_special_tokens": (True, False), "add_special_tokens": (True, False),
    "grammar": (None, Grammar.regex("a")),
    "n": (1, 10**6), "logit_bias": ({}, {0: -1e30, 7: 2.5}), "allowed_token_ids": ((), [0, 5]),
    "bad_words": ((), ("a", (1, 2)), ((5,),)), "repetition_penalty": (1e-9, 1, 1.5),
    "presence_penalty": (-2, 0, 2.0), "frequency_penalty": (-2, 0.5),
    "penalty_prompt": (True, False),
    "logprobs": (-1, 0, 20), "prompt_logprobs": (-1, 5, 10**6), "prompt_logprobs_last": (0, 7),
    "logprobs_mode": ("raw", "drawn"),
    "steering": (True, False),
}  # fmt: skip
BAD = {
    "alpha": (math.nan, math.inf, "1", None, True, ()),
    "alpha_schedule": ("decay", "decay:1.5", "entropy:-1", "entropy:nan", "entropy:1e99", 1, None),
    "pair_alphas": ("1", 1.0, (math.nan,), (True,), ("1",), (1e39,), None),
    "temperature": (-1e-9, math.nan, math.inf, "hot", True),
    "top_k": (-2, 1.0, "5", True, None),
    "top_p": (0, -0.1, 1.0001, math.nan, None),
    "min_p": (-1e-9, 1.1, math.nan, False),
    "filter_order": ("topp", 0, None),
    "seed": (2**64, -(2**63) - 1, 1.0, "7", True),
    "max_tokens": (0, -1, 2.0, None, True),
    "min_tokens": (-1, 0.0, True),
    "stop": ("", ("a", ""), (1,), None, 5),
    "stop_token_ids": ((-1,), (1.0,), "ab", 3, None, (True,)),
    "ignore_eos": (0, 1, "yes", None),
    "include_stop_str_in_output": (1, None),
    "skip_special_tokens": (1, None),
    "add_special_tokens": (0, None),
    "grammar": ("[0-9]", {"regex": "[0-9]"}, False),
    "n": (0, 1.0, True, None),
    "logit_bias": ([1], None, 5),
    "allowed_token_ids": ((-1,), "ab", 3),
    "bad_words": ("ab", ("",), ((),), None),
    "repetition_penalty": (0, -1.0, math.inf, None),
    "presence_penalty": (-2.1, 3, None, math.nan),
    "frequency_penalty": (-2.1, 3, "1"),
    "penalty_prompt": (0, None),
    "logprobs": (-2, 21, True, 1.0, None),
    "prompt_logprobs": (-2, True, None),
    "prompt_logprobs_last": (-1, 1.0, None),
    "logprobs_mode": ("processed_logprobs", None, 0),
    "steering": (1, None),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in GOOD.items() for v in vs])
def test_good_values(name, value):
    kept = getattr(SamplingParams(**{name: value}), name)
    if name == "stop":
        assert kept == ((value,) if isinstance(value, str) else tuple(value))
    elif name.endswith("token_ids"):
        assert kept == tuple(value)
    else:
        assert kept == value


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs])
def test_bad_values_name_field_and_value(name, value):
    with pytest.raises(ValueError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{name} must be ")
    listed = name.endswith(("token_ids", "pair_alphas")) and isinstance(value, tuple)
    got = value[0] if listed else value
    assert message.endswith(f"got {got!r}")


@pytest.mark.parametrize("bias", [{-1: 0.0}, {1.0: 0.0}, {1: math.inf}, {1: "2"}])
def test_logit_bias_names_what_is_wrong(bias):
    with pytest.raises(ValueError, match="^logit_bias .*must be .*, got "):
        SamplingParams(logit_bias=bias)


def test_every_field_is_covered():
    assert {f.name for f in dataclasses.fields(SamplingParams)} == set(GOOD) == set(BAD)


def test_min_tokens_is_at_most_max_tokens():
    with pytest.raises(ValueError, match=r"min_tokens must be at most max_tokens \(4\), got 5"):
        SamplingParams(max_tokens=4, min_tokens=5)


def test_frozen_keyword_only_and_no_unknown_names():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().alpha = 2.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]
    assert isinstance(hash(SamplingParams(stop=["a"], stop_token_ids=[1])), int)


# What a config says -> what it becomes.
CONFIGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"temperature": 0}),
    ({"do_sample": False, "temperature": 0.6, "top_k": 20}, {"temperature": 0}),
    ({"do_sample": True}, {"top_k": 50}),
    (
        {"do_sample": True, "temperature": 0.6, "top_k": 0, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 0.6, "top_k": 0, "top_p": 0.9, "min_p": 0.1},
    ),
    (
        {"max_new_tokens": 9, "min_new_tokens": 2, "stop_strings": ["a", "b"]},
        {"temperature": 0, "max_tokens": 9, "min_tokens": 2, "stop": ("a", "b")},
    ),
    (
        {"eos_token_id": [2, 3], "pad_token_id": 0, "max_length": 4096, "repetition_penalty": 1.0, "num_beams": 1,
         "no_repeat_ngram_size": 0, "bad_words_ids": None, "suppress_tokens": [], "early_stopping": False,
         "output_scores": True, "use_cache": True, "transformers_version": "5.23.0", "_from_model_config": True},
        {"temperature": 0},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "wanted"), CONFIGS)
@pytest.mark.parametrize("kind", ["mapping", "config", "model", "trio"])
def test_from_generation_config(kind, config, wanted):
    source: Any = config if kind == "mapping" else transformers.GenerationConfig(**config)
    if kind in ("model", "trio"):
        source = SimpleNamespace(generation_config=source)
    if kind == "trio":
        source = SimpleNamespace(base=source)
    assert SamplingParams.from_generation_config(source) == SamplingParams(
        filter_order="hf", **wanted
    )
    overridden = SamplingParams.from_generation_config(
        source, alpha=0.5, temperature=0.3, filter_order="vllm"
    )
    assert (overridden.alpha, overridden.temperature, overridden.filter_order) == (0.5, 0.3, "vllm")


@pytest.mark.parametrize("name, value", [
    ("num_beams", 4), ("typical_p", 0.9), ("no_repeat_ngram_size", 1),
    ("forced_eos_token_id", 0), ("suppress_tokens", [0]), ("min_length", 5), ("guidance_scale", 1.5),
    ("renamed", "something"),
])  # fmt: skip
def test_what_a_generation_config_asks_and_there_is_not(name, value):
    with pytest.raises(
        ValueError, match=f"^{name} of a generation config has no counterpart .* got "
    ):
        SamplingParams.from_generation_config({"do_sample": True, name: value})


@pytest.mark.parametrize(("source", "text"), [
    ({"do_sample": True, "temperature": "hot"}, "temperature must be .*, got 'hot'"),
    ({"do_sample": "yes"}, "do_sample must be True or False, got 'yes'"),
    ("gpt2", "source must be a GenerationConfig, a mapping, .* got 'gpt2'"),
])  # fmt: skip
def test_a_generation_config_of_wrong_types(source, text):
    with pytest.raises((ValueError, TypeError), match=text):
        SamplingParams.from_generation_config(source)


def test_with_seed():
    params = SamplingParams(alpha=0.5)
    first, second = params.with_seed(), params.with_seed()
    assert first.seed is not None and 0 <= first.seed < 2**64 and first.seed != second.seed
    assert dataclasses.replace(first, seed=None) == params and params.seed is None
    assert SamplingParams(seed=0).with_seed().seed == 0


SEEDS = {0: 0, 2**63 - 1: 2**63 - 1, 2**63: -(2**63), 2**64 - 1: -1, -1: -1, -(2**63): -(2**63)}


@pytest.mark.parametrize(("seed", "signed"), SEEDS.items())
def test_signed_seed(seed, signed):
    assert signed_seed(seed) == signed
    assert RowParams.make(1, seed=seed).seed.tolist() == [signed]
    assert RowParams.from_sampling_params([SamplingParams(seed=seed)]).seed.tolist() == [signed]


def test_make_defaults_and_dtypes():
    rows = RowParams.make(3)
    assert rows.batch_size == 3
    for name, column in rows._asdict().items():
        assert (column.dtype, column.shape) == (ROW_FIELDS[name].dtype, (3,))
        assert column.is_contiguous()
    assert [c[0].item() for c in rows] == [1.0, 1.0, 0, 1.0, 0.0, 0, 0, 0]
    neutral = RowParams.from_sampling_params([SamplingParams(seed=0)] * 3)
    assert all(torch.equal(a, b) for a, b in zip(rows, neutral, strict=True))


def test_make_from_scalars_and_tensors():
    rows = RowParams.make(
        2, alpha=2, temperature=torch.tensor([0.5, 0.0], dtype=torch.float64), top_k=torch.tensor([1, 2]),
        filter_order="joint", seed=torch.tensor([3, -4]), position=7,
    )  # fmt: skip
    assert rows.alpha.tolist() == [2.0, 2.0] and rows.temperature.tolist() == [0.5, 0.0]
    assert rows.top_k.tolist() == [1, 2] and rows.top_k.dtype == torch.int32
    assert rows.filter_order.tolist() == [2, 2] and rows.seed.tolist() == [3, -4]
    assert rows.position.tolist() == [7, 7]
    # Values in a tensor are the kernels' to report.
    assert RowParams.make(1, top_p=torch.tensor([9.0])).top_p.tolist() == [9.0]
    strided = torch.arange(4.0)[::2] / 4
    assert RowParams.make(2, min_p=strided).min_p.is_contiguous()


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        (dict(topp=1.0), TypeError, "got an unexpected keyword argument 'topp'"),
        (dict(max_tokens=1), TypeError, "got an unexpected keyword argument 'max_tokens'"),
        (dict(alpha=math.nan), ValueError, "alpha must be a finite number, got nan"),
        (dict(position=-1), ValueError, "position must be an integer of at least 0, got -1"),
        (dict(position=1.5), ValueError, "position must be an integer of at least 0, got 1.5"),
        (dict(seed=None), ValueError, "seed must be an integer in [-2^63, 2^64), got None"),
        (dict(top_p=torch.ones(2)), ValueError, "top_p must have shape [3], one value per row, got [2]"),
        (dict(top_p=torch.tensor(1.0)), ValueError, "top_p must have shape [3], one value per row, got []"),
        (dict(seed=torch.ones(3)), ValueError, "seed must be convertible to torch.int64, got torch.float32"),
        (dict(alpha=torch.ones(3, dtype=torch.complex64)), ValueError, "alpha must be convertible to torch.float32"),
    ],
)  # fmt: skip
def test_make_refuses(values, error, text):
    with pytest.raises(error, match=re.escape(text)):
        RowParams.make(3, **values)


def test_from_sampling_params():
    requests = [
        SamplingParams(alpha=0.5, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1,
                       filter_order="hf", seed=2**64 - 2),
        SamplingParams(seed=9, top_k=-1),
    ]  # fmt: skip
    rows = RowParams.from_sampling_params(requests, [4, 2**40])
    assert rows.alpha.tolist() == [0.5, 1.0] and rows.top_k.tolist() == [5, -1]
    assert rows.filter_order.tolist() == [1, 0] and rows.seed.tolist() == [-2, 9]
    assert rows.position.tolist() == [4, 2**40]
    torch.testing.assert_close(rows.temperature, torch.tensor([0.7, 1.0]), rtol=0, atol=0)
    torch.testing.assert_close(rows.top_p, torch.tensor([0.9, 1.0]), rtol=0, atol=0)
    torch.testing.assert_close(rows.min_p, torch.tensor([0.1, 0.0]), rtol=0, atol=0)
    assert [c.dtype for c in rows] == [ROW_FIELDS[name].dtype for name in rows._fields]
    with pytest.raises(ValueError, match=re.escape("one value per request (2), got 1")):
        RowParams.from_sampling_params(requests, [0])
    with pytest.raises(ValueError, match=re.escape("with_seed()")):
        RowParams.from_sampling_params([SamplingParams()])
    assert RowParams.from_sampling_params([]).batch_size == 0


def test_rows():
    rows = RowParams.make(4, position=torch.arange(4))
    part = rows.rows(slice(1, 3))
    part.position[0] = 9
    assert rows.position.tolist() == [0, 9, 2, 3]  # a view
    picked = rows.rows(torch.tensor([3, 3, 0]))
    assert picked.position.tolist() == [3, 3, 0] and picked.batch_size == 3
