"""Greedy and sampled ``generate()`` run in the decoder; what it can't do runs in transformers."""

from __future__ import annotations

import math
import re
import threading
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)

from proxytune_kernels import Decoder, SamplingParams, Speculation
from proxytune_kernels.decoder import DecodeError
from proxytune_kernels.decoder.request import StreamEvent
from proxytune_kernels.integrations.hf import EngineGenerate, ProxyTunedForCausalLM, engine_generate
from proxytune_kernels.integrations.hf.cache import CACHE
from proxytune_kernels.integrations.hf.custom_generate import NotInDecoder
from proxytune_kernels.integrations.hf.sampling import draw_seeds
from tests.decoder.conftest import byte_tokenizer, tiny_llama
from tests.integrations.hf.conftest import ALPHA, Recorder, three

DECODER = "proxytune_kernels.Decoder"
LONG = 12
TRANSFORMERS = {"cache_implementation": "dynamic"}
"""Sends a call through transformers' loop over the model's forward."""


@pytest.fixture(scope="module")
def batch(hf_model):
    return hf_model.tokenize(["The sum", "of two", "stop stop, she said"])


@pytest.fixture(scope="module")
def one(hf_model):
    return hf_model.tokenize("The sum")


def tiny_model():
    return ProxyTunedForCausalLM.from_models(*three(), byte_tokenizer(), alpha=ALPHA)


def generate(model, inputs, seed=5, **options):
    set_seed(seed)
    return model.generate(**{**inputs, "max_new_tokens": LONG, **options})


class EveryThird(StoppingCriteria):
    """Ends a row at a token that 3 divides."""

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None
        return input_ids[:, -1] % 3 == 0


ENDS = {"eos_token_id": list(range(60, 130)), "pad_token_id": 0}
STRINGS = {"stop_strings": ["a", "e", "0"], "tokenizer": byte_tokenizer()}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95, "min_p": 0.15}
GREEDY: dict[str, dict[str, Any]] = {
    "plain": {},
    "filters": {k: v for k, v in SAMPLED.items() if k != "do_sample"},
    "alpha": {"alpha": 2.0},
    "alpha 0": {"alpha": 0},
    "alpha per row": {"alpha": torch.tensor([0.0, 0.5, -1.0])},
    "one candidate": {"do_sample": True, "top_k": 1},
    "sequences": {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "alpha": [0.0, 1, 2]},
    "many ends": ENDS,
    "no end": {"eos_token_id": None, "pad_token_id": None},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": list(range(200))},
    "min_length": {"min_length": 22, "eos_token_id": list(range(200))},
    "too long a minimum": {"min_new_tokens": LONG, "min_length": 500},
    "ends past the vocabulary": {"min_new_tokens": 4, "eos_token_id": [*range(200), 9999]},
    "max_length": {"max_new_tokens": None, "max_length": 23},
    "own length": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(23)])},
    "length reached": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(3)])},
    "one token": {"max_new_tokens": 1},
    "time": {"max_time": 0.0},
    "strings": STRINGS,
    "renormalized": {"renormalize_logits": True},
    "suppressed": {"suppress_tokens": [*range(250), 9999]},
    "bad words": {"bad_words_ids": [[i] for i in range(3, 200)], "min_new_tokens": 3, **ENDS},
    "begin": {"begin_suppress_tokens": list(range(250)), "suppress_tokens": [*range(251, 256)]},
    "end": {"forced_eos_token_id": 5, "min_new_tokens": LONG, **ENDS},
    "biases": {"sequence_bias": [[[i], 9.0 - i / 8] for i in range(50)]},
}
UNPADDED: dict[str, dict[str, Any]] = {
    # Whatever the text, the tokens that would come without them can't.
    "words": {"bad_words_ids": [[i, j] for i in range(256) for j in range(i % 7, 200, 5)]
        + [[i, 250, 251] for i in range(200)]
        # The prompt's end is 85, 87, 79.
        + [[79, j] for j in range(130)] + [[87, 79, j] for j in range(130, 255)]},
    "words and others": {
        "sequence_bias": [[[i, i + 1], -torch.inf] for i in range(98)]
        + [[[i], 4.0 - i / 8] for i in range(50)],
        "repetition_penalty": 1.7, "forced_eos_token_id": 99, "begin_suppress_tokens": [*range(97)],
    },
    "one token before": {
        "input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 1),
        "forced_bos_token_id": 5,
    },
    "repetition": {"repetition_penalty": 1.7},
    "repetition and others": {
        "repetition_penalty": 0.6, "sequence_bias": [[[i], 4.0 - i / 8] for i in range(50)],
        "suppress_tokens": [7, 9, 11],
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")  # what is tried
@pytest.mark.parametrize("case", [*GREEDY, *UNPADDED])
def test_likeliest_tokens_are_those_of_transformers_loop(hf_model, batch, one, case):
    inputs, asked = (one, UNPADDED[case]) if case in UNPADDED else (batch, GREEDY[case])
    got = generate(hf_model, inputs, **asked)
    assert hf_model.info()["sampling"] == DECODER
    wanted = generate(hf_model, inputs, **asked, **TRANSFORMERS)
    assert "transformers' loop" in hf_model.info()["sampling"]
    assert got.dtype == wanted.dtype
    assert got.tolist() == wanted.tolist()


def test_transformers_default_of_50_candidates_holds_unless_told(hf_model):
    inputs = hf_model.tokenize("of two")
    options = {"max_new_tokens": 1, "num_return_sequences": 400, "do_sample": True,
               "temperature": 9.0}  # fmt: skip
    few, more = (generate(hf_model, inputs, **options, **k) for k in ({}, {"top_k": 0}))
    assert few[:, -1].unique().numel() <= 50 < more[:, -1].unique().numel()


def test_tokens_are_those_of_the_decoder_by_seeds_of_the_global_generator(hf_trio, hf_model, batch):
    got = generate(hf_model, batch, **SAMPLED, eos_token_id=None, alpha=1.5)
    set_seed(5)
    params = [
        SamplingParams(alpha=1.5, temperature=0.8, top_k=20, top_p=0.95, min_p=0.15, seed=seed,
                       filter_order="hf", max_tokens=LONG, ignore_eos=True)
        for seed in draw_seeds(3).tolist()
    ]  # fmt: skip
    prompts = [ids[mask == 1].tolist() for ids, mask in zip(*batch.values(), strict=True)]
    outputs = Decoder(hf_trio, 4).generate(prompts, params)
    assert got[:, -LONG:].tolist() == [output.token_ids for output in outputs]


def test_a_row_draws_the_same_whatever_comes_behind_it(hf_model):
    both = hf_model.tokenize(["The sum", "Two and"])
    alone = {name: tensor[:1] for name, tensor in both.items()}
    options = {"do_sample": True, "top_k": 0, "eos_token_id": None}
    assert torch.equal(
        generate(hf_model, alone, **options)[0], generate(hf_model, both, **options)[0]
    )


def test_rows_of_one_prompt_differ(hf_model, one):
    rows = generate(hf_model, one, do_sample=True, top_k=0, num_return_sequences=4).tolist()
    assert len({tuple(row) for row in rows}) == 4


def test_greedy_decoding_draws_no_seed(hf_model, batch):
    before = torch.get_rng_state()
    hf_model.generate(**batch, max_new_tokens=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "call",
    [{}, SAMPLED, {**SAMPLED, **ENDS, "min_new_tokens": 4},
     {**SAMPLED, "num_return_sequences": 2, "alpha": torch.tensor([0.0, 1.0, 2.0])}],
    ids=["greedy", "sampled", "ends", "sequences"],
)  # fmt: skip
@pytest.mark.parametrize(
    "options",
    [{"speculation": Speculation()}, {"max_batch_size": 2}, {"pair": "separate"}],
    ids=["speculation", "two at a time", "separate"],
)
def test_how_the_decoder_runs_changes_no_token(hf_trio, hf_model, batch, call, options):
    call = {"alpha": ALPHA, **call}
    wanted = generate(hf_model, batch, **call)
    engine = EngineGenerate(hf_trio, **options)
    for model in (hf_trio.base, hf_model):
        assert torch.equal(generate(model, batch, custom_generate=engine, **call), wanted)
    assert engine.decoder is not None
    rounds = engine.decoder.statistics()["speculative_rounds"]
    assert (rounds > 0) == ("speculation" in options)


def test_the_models_own_alpha_holds_unless_told(hf_trio, hf_model, batch):
    own, steered = generate(hf_model, batch), generate(hf_model, batch, alpha=1.0)
    assert own.tolist() != steered.tolist()
    base = hf_trio.base
    for engine, wanted in ((EngineGenerate(hf_trio), steered), (EngineGenerate(hf_model), own)):
        assert torch.equal(generate(base, batch, custom_generate=engine), wanted)
    assert torch.equal(generate(hf_model, batch, custom_generate=engine_generate), own)
    assert hf_model.info()["sampling"] == f"{DECODER}, by custom_generate"


def test_a_role_may_read_its_own_prompt_beside_a_plain_base(hf_trio, hf_model):
    prompts = [
        {"base": "The sum", "expert": "stop: The sum of two", "anti": "The"},
        {"base": "of two and three", "expert": "two", "anti": "of two and three"},
    ]
    inputs = hf_model.tokenize(prompts)
    options = {**SAMPLED, "num_return_sequences": 2, "alpha": [0.3, 0.9]}
    wanted = generate(hf_model, inputs, **options)
    engine = EngineGenerate(hf_trio)
    assert torch.equal(generate(hf_trio.base, inputs, **options, custom_generate=engine), wanted)


@pytest.mark.parametrize("speculation", [None, Speculation()])
def test_other_criteria_end_rows_one_by_one(hf_trio, hf_model, batch, speculation):
    engine = EngineGenerate(hf_trio, speculation=speculation)
    options = {**SAMPLED, "alpha": ALPHA, "eos_token_id": None, "max_new_tokens": 40}
    free = generate(hf_model, batch, **options)[:, -40:]
    criteria = {"stopping_criteria": StoppingCriteriaList([EveryThird()]), "pad_token_id": 0}
    rows = generate(hf_trio.base, batch, custom_generate=engine, **options, **criteria)
    rows = rows[:, batch["input_ids"].shape[1] :].tolist()
    lengths = []
    for row, uncut in zip(rows, free.tolist(), strict=True):
        end = next(i + 1 for i, token_id in enumerate(uncut) if token_id % 3 == 0)
        assert row[:end] == uncut[:end]
        assert not any(row[end:])
        lengths.append(end)
    assert len(rows[0]) == max(lengths) < 40
    assert engine.decoder is not None
    if speculation is None:  # and not one step more
        assert engine.decoder.statistics()["plain_steps"] == max(lengths) - 1


def test_what_was_on_its_way_when_a_row_ended_does_not_count(hf_trio, one):
    class Late:
        """A decoder that had launched one more step when its request was cancelled."""

        def stream(self, prompts, params):
            for token_id in (4, 6, 8):
                yield StreamEvent(1, 0, "", (token_id,), (0.0,))

        def cancel(self, request_id):
            assert request_id == 1

    engine: Any = EngineGenerate(hf_trio)
    engine.decoder_for = lambda call: Late()
    criteria = StoppingCriteriaList([EveryThird()])
    tokens = generate(hf_trio.base, one, custom_generate=engine, stopping_criteria=criteria)
    assert tokens[0, one["input_ids"].shape[1] :].tolist() == [4, 6]


@pytest.mark.parametrize("options", [{}, ENDS, STRINGS], ids=["full", "ends", "strings"])
def test_streamers_get_what_transformers_gives_them(hf_model, batch, one, options):
    for inputs in (batch, one):
        theirs = Recorder()
        generate(hf_model, inputs, streamer=theirs, **options, **TRANSFORMERS)
        for given in ({}, {"custom_generate": engine_generate}):
            ours = Recorder()
            generate(hf_model, inputs, streamer=ours, **options, **given)
            assert ours.events == theirs.events
            assert ours.events[-1] == "end" and len(ours.events) > 3


def test_a_streamer_for_a_plain_base_is_passed_as_stream_to(hf_trio, hf_model, batch):
    ours, passed = Recorder(), Recorder()
    generate(hf_model, batch, streamer=ours)
    generate(hf_trio.base, batch, stream_to=passed, custom_generate=EngineGenerate(hf_model))
    assert passed.events == ours.events


def test_the_result_can_be_a_dict_and_the_next_turn_begins_anew(hf_model, one):
    first = generate(hf_model, one, eos_token_id=None, return_dict_in_generate=True)
    assert first.past_key_values is None
    turn = {"input_ids": first.sequences, CACHE: first.past_key_values}
    rest = generate(hf_model, turn, eos_token_id=None, max_new_tokens=4)
    whole = generate(hf_model, one, eos_token_id=None, max_new_tokens=LONG + 4)
    assert torch.equal(rest, whole)


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


FALLBACKS: dict[str, dict[str, Any]] = {
    "repetition_penalty of a part of the prompt is not in the decoder": {
        "logits_processor": [RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=2)]
    },
    "no_repeat_ngram_size 2 is not in the op": {"no_repeat_ngram_size": 2},
    "typical_p 0.9 is not in the op": {"do_sample": True, "typical_p": 0.9},
    "Nothing is not in the op": {"do_sample": True, "logits_processor": [Nothing()]},
    "prefix_allowed_tokens_fn is not in the op": {
        "prefix_allowed_tokens_fn": lambda row, ids: list(range(100))
    },
    "sequence_bias of several tokens, as [3, 4], is not in the op": {
        "sequence_bias": [[[3, 4], 2.5]]
    },
    "bad_words_ids with a forced token is not in the decoder": {
        "bad_words_ids": [[5, 4]], "forced_eos_token_id": 4
    },
    "use_cache False is not in the decoder": {"use_cache": False},
    "synced_gpus is not in the decoder": {"synced_gpus": True},
    "cache_implementation 'static' is asked for": {"cache_implementation": "static"},
    "prefill_chunk_size: give prefill_chunk to EngineGenerate": {"prefill_chunk_size": 3},
    "EveryThird may look at all rows of the batch at once": {
        "stopping_criteria": StoppingCriteriaList([EveryThird()])
    },
    "rows that end apart go on to the last without end-of-sequence tokens": {
        **STRINGS, "eos_token_id": None, "pad_token_id": None
    },
    "output_scores is not in the decoder": {
        "output_scores": True, "return_dict_in_generate": True
    },
    "output_logits is not in the decoder": {
        "output_logits": True, "return_dict_in_generate": True
    },
    "texts of 312 tokens must fit in max_seq_len 256": {"max_new_tokens": 300},
}  # fmt: skip


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_is_not_in_the_decoder_runs_in_transformers_loop(hf_model, batch, reason, monkeypatch):
    # One process is a world of its own: its peers have always finished.
    finished = lambda self, done, *args, **kwargs: not done  # noqa: E731
    monkeypatch.setattr(type(hf_model), "_has_unfinished_sequences", finished)
    options = {"max_new_tokens": 4, **FALLBACKS[reason]}
    got = generate(hf_model, batch, **options)
    assert hf_model.info()["sampling"] == f"transformers' loop: {reason}"
    wanted = generate(hf_model, batch, **{**options, **TRANSFORMERS})
    if options.get("return_dict_in_generate"):
        assert isinstance(got.past_key_values.get_seq_length(), int)
        got, wanted = got.sequences, wanted.sequences
    assert torch.equal(got, wanted)


def test_other_modes_say_that_they_go_through_transformers(hf_model, one):
    generate(hf_model, one, num_beams=2)
    assert "beam search ranks whole rows" in hf_model.info()["sampling"]
    generate(hf_model, one, prompt_lookup_num_tokens=2)
    assert "assisted decoding checks its drafts" in hf_model.info()["sampling"]
    generate(hf_model, one)
    assert hf_model.info()["sampling"] == DECODER


def test_a_drafter_of_ours_runs_in_transformers_loop(hf_model, one):
    plain = generate(hf_model.base, one)
    drafted = generate(hf_model.base, one, assistant_model=hf_model)
    assert "a drafter's loop is transformers'" in hf_model.info()["sampling"]
    assert torch.equal(drafted, plain)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.expert.register_forward_hook(lambda *_: None), "expert has forward hooks"),
        (lambda m: m.anti.train(), "anti is in training mode"),
        (
            lambda m: setattr(m.base, "_supports_attention_backend", False),
            "base must be a model whose attention transformers can exchange",
        ),
    ],
    ids=["hooks", "training", "attention"],
)
def test_models_that_the_decoder_can_not_run_go_through_transformers(one, change, reason):
    model = tiny_model()
    wanted = generate(model, one, **TRANSFORMERS)
    change(model)
    assert torch.equal(generate(model, one), wanted)
    assert model.info()["sampling"].startswith(f"transformers' loop: {reason}")


def test_threads_take_turns(hf_model, batch, one):
    inputs = {1: one, 3: batch}
    wanted = {rows: generate(hf_model, inputs[rows], max_new_tokens=60) for rows in inputs}
    found = {}

    def run(rows):
        found[rows] = hf_model.generate(**inputs[rows], max_new_tokens=60)

    threads = [threading.Thread(target=run, args=(rows,)) for rows in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[rows], wanted[rows]) for rows in inputs)


def test_no_token_left_to_draw_is_an_error(one):
    model = tiny_model()
    with torch.no_grad():
        model.base.lm_head.weight.fill_(math.nan)
    with pytest.raises(DecodeError, match="no token can be drawn at position 0"):
        generate(model, one)


def test_an_alpha_that_is_no_number_is_an_error(hf_model, batch):
    with pytest.raises(ValueError, match="alpha must be a finite number, got nan"):
        generate(hf_model, batch, alpha=torch.tensor([0.0, math.nan, 1.0]))


REFUSED = {
    **{f"{re.escape(reason)}$": options for reason, options in FALLBACKS.items()
       if "not in the" in reason and "synced" not in reason},
    "generation mode beam_search is not in the decoder": {"num_beams": 2},
    r"generation mode assisted_generation .*speculation=": {"prompt_lookup_num_tokens": 2},
    "cache_implementation 'static': the decoder has": {"cache_implementation": "static"},
    "output_attentions": {"output_attentions": True},
    "prefill_chunk_size: give prefill_chunk": {"prefill_chunk_size": 4},
    "labels": {"labels": torch.zeros(1, 8)},
    "assistant_model: the decoder drafts": {"assistant_model": tiny_llama(1)},
}  # fmt: skip


@pytest.mark.parametrize("named", REFUSED)
def test_custom_generate_names_what_the_decoder_does_not_do(hf_model, one, named):
    with pytest.raises(NotInDecoder, match=f"^custom_generate: {named}"):
        generate(hf_model, one, custom_generate=engine_generate, **REFUSED[named])


def test_custom_generate_names_padding_positions_and_caches_of_another_kind(hf_model, batch):
    ours = {"custom_generate": engine_generate}
    width = batch["input_ids"].shape[1]
    inside = batch["attention_mask"].clone()
    inside[:, -2] = 0
    with pytest.raises(NotInDecoder, match="attention_mask must be .* with padding on the left al"):
        generate(hf_model, {**batch, "attention_mask": inside}, **ours)
    for positions in (2 * torch.arange(width)[None], torch.arange(width - 1)[None]):
        with pytest.raises(NotInDecoder, match="position_ids other than the attention mask counts"):
            generate(hf_model, batch, position_ids=positions, **ours)
    criteria = {"stopping_criteria": StoppingCriteriaList([EveryThird()])}
    with pytest.raises(ValueError, match="pad_token_id must be given where rows end"):
        generate(
            hf_model, batch, eos_token_id=None, pad_token_id=None, **SAMPLED, **ours, **criteria
        )
    full = generate(hf_model, batch, return_dict_in_generate=True, **TRANSFORMERS)
    turn = {"input_ids": full.sequences, CACHE: full.past_key_values}
    with pytest.raises(NotInDecoder, match="past_key_values with tokens"):
        generate(hf_model, turn, **ours)


def test_custom_generate_names_models_that_do_not_belong_together(hf_trio, hf_model, one):
    def refused(engine, model, match):
        with pytest.raises(NotInDecoder, match=match):
            generate(model, one, custom_generate=engine)

    refused(EngineGenerate(hf_trio), hf_trio.expert, "called on the base of the trio")
    refused(EngineGenerate(hf_model), hf_trio.expert, "on the model that it is given, or its base")
    refused(EngineGenerate(), hf_trio.base, "needs a trio to steer a LlamaForCausalLM")
    refused(engine_generate, hf_trio.base, r"EngineGenerate\(trio\) steers any base")


def test_custom_generate_keeps_its_bounds(hf_trio, one):
    for options, most in (({}, 256), ({"max_seq_len": 16}, 16)):
        with pytest.raises(ValueError, match=f"must fit in max_seq_len {most}"):
            generate(hf_trio.base, one, custom_generate=EngineGenerate(hf_trio, **options),
                     max_new_tokens=500)  # fmt: skip
    with pytest.raises(TypeError, match="source must be a Trio, a ProxyTunedForCausalLM or None"):
        EngineGenerate(hf_trio.base)
    with pytest.raises(ValueError, match="max_batch_size must be an integer of at least 1"):
        EngineGenerate(hf_trio, max_batch_size=0)
