"""``custom_generate=`` is the decoder, in the words of ``generate()``."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, set_seed

from proxytune_kernels import Decoder, SamplingParams, Speculation
from proxytune_kernels.decoder.request import StreamEvent
from proxytune_kernels.integrations.hf import ProxyTunedForCausalLM
from proxytune_kernels.integrations.hf.engine import EngineGenerate, engine_generate
from proxytune_kernels.integrations.hf.engine import _run as run_rows
from proxytune_kernels.integrations.hf.logits import draw_seeds
from proxytune_kernels.integrations.hf.requests import Call, Refused
from proxytune_kernels.integrations.hf.stops import Criteria
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import byte_tokenizer, tiny_llama
from tests.integrations.hf.conftest import Recorder

LONG = 12


@pytest.fixture(scope="module")
def trio():
    """Random models in fp64, where rounding can't change a token."""
    return Trio.from_models(tiny_llama(0, 48, 3), tiny_llama(1), tiny_llama(2), byte_tokenizer())


@pytest.fixture(scope="module")
def model(trio):
    return ProxyTunedForCausalLM.from_trio(trio)


@pytest.fixture(scope="module")
def batch(model):
    return model.tokenize(["The sum", "of two", "stop stop, she said"])


@pytest.fixture(scope="module")
def steer(trio):
    return EngineGenerate(trio)


SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95, "min_p": 0.02}
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "alpha per row": {**SAMPLED, "alpha": torch.tensor([0.0, 1.0, -0.5])},
    "sequences": {**SAMPLED, "num_return_sequences": 2, "alpha": [0.0, 1.0, 2.0]},
    "many ends": {**SAMPLED, "eos_token_id": list(range(60, 130)), "pad_token_id": 0},
    "min_new_tokens": {**SAMPLED, "eos_token_id": list(range(60, 130)), "min_new_tokens": 4},
    "min_length": {**SAMPLED, "eos_token_id": list(range(60, 130)), "min_length": 22},
    "too long a minimum": {"min_new_tokens": LONG, "min_length": 500},
    "no end": {**SAMPLED, "eos_token_id": None, "pad_token_id": None},
    "one token": {"max_new_tokens": 1},
    "renormalized": {**SAMPLED, "renormalize_logits": True},
    "max_length": {"max_new_tokens": None, "max_length": 23},
    "stop strings": {"stop_strings": ["a", "e", "0"], "tokenizer": byte_tokenizer()},
}


def tokens(model, inputs, seed=5, **options):
    set_seed(seed)
    return model.generate(**inputs, **{"max_new_tokens": LONG, **options})


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")  # what is tried
@pytest.mark.parametrize("name", CALLS)
def test_tokens_are_those_of_generate(model, batch, name):
    options = CALLS[name]
    plain = tokens(model, batch, **options)
    engine = tokens(model, batch, **options, custom_generate=engine_generate)
    assert engine.dtype == plain.dtype
    assert engine.tolist() == plain.tolist()
    assert model.info()["sampling"] == "proxytune_kernels.Decoder, by custom_generate"


def test_tokens_are_those_of_the_decoder(trio, batch, steer):
    got = tokens(trio.base, batch, **SAMPLED, custom_generate=steer, eos_token_id=None, alpha=1.5)
    set_seed(5)
    seeds = draw_seeds(3).tolist()
    params = [
        SamplingParams(alpha=1.5, temperature=0.8, top_k=20, top_p=0.95, min_p=0.02, seed=seed,
                       filter_order="hf", max_tokens=LONG, ignore_eos=True)
        for seed in seeds
    ]  # fmt: skip
    prompts = [ids[mask == 1].tolist() for ids, mask in zip(*batch.values(), strict=True)]
    outputs = Decoder(trio, 4).generate(prompts, params)
    assert got[:, -LONG:].tolist() == [output.token_ids for output in outputs]


@pytest.mark.parametrize("name", ["greedy", "sampled", "many ends", "sequences"])
@pytest.mark.parametrize(
    "options",
    [{"speculation": Speculation()}, {"max_batch_size": 2}, {"pair": "separate"}],
    ids=["speculation", "two at a time", "separate"],
)
def test_how_the_decoder_runs_changes_no_token(trio, model, batch, name, options):
    plain = tokens(model, batch, **CALLS[name])
    engine = EngineGenerate(trio, **options)
    assert (
        tokens(trio.base, batch, custom_generate=engine, **CALLS[name]).tolist() == plain.tolist()
    )
    assert tokens(model, batch, custom_generate=engine, **CALLS[name]).tolist() == plain.tolist()
    if "speculation" in options:
        assert engine.decoder is not None
        assert engine.decoder.statistics()["speculative_rounds"] > 0


def test_the_models_own_alpha_holds_unless_told(trio, batch):
    weak = ProxyTunedForCausalLM.from_trio(trio, alpha=0.25)
    plain, steered = tokens(weak, batch), tokens(weak, batch, alpha=1.0)
    assert plain.tolist() != steered.tolist()
    assert tokens(weak, batch, custom_generate=engine_generate).tolist() == plain.tolist()
    base = tokens(trio.base, batch, custom_generate=EngineGenerate(trio))
    assert base.tolist() == steered.tolist()
    base = tokens(trio.base, batch, custom_generate=EngineGenerate(weak))
    assert base.tolist() == plain.tolist()


def test_a_role_may_read_its_own_prompt(model):
    prompts = [
        {"base": "The sum", "expert": "stop: The sum of two", "anti": "The"},
        {"base": "of two and three", "expert": "two", "anti": "of two and three"},
    ]
    inputs = model.tokenize(prompts)
    options = {**SAMPLED, "num_return_sequences": 2}
    engine = tokens(model, inputs, **options, custom_generate=engine_generate)
    assert engine.tolist() == tokens(model, inputs, **options).tolist()
    alone = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert engine.tolist() != tokens(model, alone, **options).tolist()


def test_models_without_tokenizers(trio, batch):
    model = ProxyTunedForCausalLM.from_models(trio.base, trio.expert, trio.anti)
    engine = tokens(model, batch, custom_generate=engine_generate)
    assert engine.tolist() == tokens(model, batch).tolist()


class EveryThird(StoppingCriteria):
    """Ends a row at a token that 3 divides."""

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None
        return input_ids[:, -1] % 3 == 0


@pytest.mark.parametrize("speculation", [None, Speculation()])
def test_other_criteria_end_rows(trio, model, batch, speculation):
    criteria = StoppingCriteriaList([EveryThird()])
    engine = EngineGenerate(trio, speculation=speculation)
    options = {"stopping_criteria": criteria, "custom_generate": engine, **SAMPLED}
    rows = tokens(model, batch, **options)[:, batch["input_ids"].shape[1] :]
    free = tokens(model, batch, **SAMPLED)[:, batch["input_ids"].shape[1] :]
    for row, uncut in zip(rows.tolist(), free.tolist(), strict=True):
        end = next((i + 1 for i, t in enumerate(uncut) if t % 3 == 0), len(uncut))
        assert row[:end] == uncut[:end]
        assert not any(row[end:])
    assert engine.decoder is not None and not engine.decoder._loop.unfinished


def test_rows_that_a_criterion_ends_leave_the_decoder(trio, model):
    inputs = model.tokenize("The sum")
    engine = EngineGenerate(trio)
    options = {"stopping_criteria": StoppingCriteriaList([EveryThird()]), "eos_token_id": None}
    row = tokens(model, inputs, custom_generate=engine, max_new_tokens=100, **options)
    output = row.shape[1] - inputs["input_ids"].shape[1]
    assert engine.decoder is not None and output < 50
    assert engine.decoder.statistics()["plain_steps"] == output - 1


class Scripted:
    """A decoder that had launched one more step when its request was cancelled."""

    def stream(self, prompts, params):
        for token_id in (4, 6, 8):
            yield StreamEvent(1, 0, "", (token_id,), (0.0,))

    def cancel(self, request_id):
        assert request_id == 1


def test_what_was_on_its_way_when_a_row_ended_does_not_count():
    stops = Criteria(None, frozenset(), (EveryThird(),), pads=False)
    decoder: Any = Scripted()
    assert run_rows(decoder, Call([{}], [], stops, None), torch.tensor([[1]]), []) == [[4, 6]]


def test_rows_that_end_apart_need_padding(model, batch):
    criteria = StoppingCriteriaList([EveryThird()])
    with pytest.raises(ValueError, match="pad_token_id must be given where rows end"):
        tokens(model, batch, stopping_criteria=criteria, custom_generate=engine_generate,
               eos_token_id=None, pad_token_id=None, **SAMPLED)  # fmt: skip


def test_streamers(trio, model, steer):
    inputs = model.tokenize("The sum")
    theirs, ours, passed, base = Recorder(), Recorder(), Recorder(), Recorder()
    tokens(model, inputs, streamer=theirs)
    tokens(model, inputs, streamer=ours, custom_generate=engine_generate)
    tokens(model, inputs, stream_to=passed, custom_generate=engine_generate)
    tokens(trio.base, inputs, stream_to=base, custom_generate=steer)
    assert theirs.events == ours.events == passed.events == base.events
    assert len(ours.events) > 3 and ours.events[-1] == "end"


def test_the_result_can_be_a_dict(model, batch):
    result = tokens(model, batch, custom_generate=engine_generate, return_dict_in_generate=True)
    assert result.sequences.tolist() == tokens(model, batch).tolist()


def test_a_decoder_is_kept_while_it_has_room(trio, model):
    engine = EngineGenerate(trio, max_batch_size=4)
    seen: list[Any] = []
    for prompts, new in ((["a"], 8), (["b"], 8), (["a", "b", "c"], 8), (["a"] * 9, 8), (["a"], 240),
                         (["a", "b"], 8)):  # fmt: skip
        inputs = model.tokenize(prompts)
        tokens(trio.base, inputs, custom_generate=engine, max_new_tokens=new, eos_token_id=None)
        seen.append(engine.decoder)
    shapes = [(d.max_batch_size, d.max_seq_len) for d in seen]
    assert shapes == [(1, 256), (1, 256), (4, 256), (4, 256), (4, 256), (4, 256)]
    assert [a is b for a, b in itertools.pairwise(seen)] == [True, False, True, True, True]


def test_a_copy_of_the_model_makes_its_own_decoder(trio):
    model = ProxyTunedForCausalLM.from_trio(trio)
    inputs = model.tokenize("The sum")
    wanted = tokens(model, inputs, custom_generate=engine_generate).tolist()
    twin = copy.deepcopy(model)
    kept: Any = twin.engine
    assert vars(kept)["_decoder"] is None
    assert tokens(twin, inputs, custom_generate=engine_generate).tolist() == wanted
    assert kept.decoder.trio.base is twin.base is not model.base


def test_a_text_longer_than_the_context_is_refused(trio, model):
    inputs = model.tokenize("The sum")
    with pytest.raises(ValueError, match="must fit in max_seq_len 256"):
        tokens(model, inputs, custom_generate=EngineGenerate(trio), max_new_tokens=500)
    with pytest.raises(ValueError, match="must fit in max_seq_len 16"):
        tokens(model, inputs, custom_generate=EngineGenerate(trio, max_seq_len=16))


REFUSED: dict[str, dict[str, Any]] = {
    "repetition_penalty 1.3 is not in the op": {"repetition_penalty": 1.3},
    "suppress_tokens": {"suppress_tokens": [3]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [3]},
    "bad_words_ids": {"bad_words_ids": [[3]]},
    "sequence_bias": {"sequence_bias": [[[3], 1.0]]},
    "generation mode beam_search": {"num_beams": 2},
    r"assisted_generation .*speculation=": {"prompt_lookup_num_tokens": 2},
    "use_cache False": {"use_cache": False},
    "cache_implementation 'static'": {"cache_implementation": "static"},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "prefill_chunk_size: give prefill_chunk": {"prefill_chunk_size": 4},
    "labels": {"labels": torch.zeros(1, 8)},
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_the_decoder_does_not_do_is_named(model, named):
    with pytest.raises(Refused, match=f"^custom_generate: .*{named}|^custom_generate: {named}"):
        tokens(model, model.tokenize("The sum"), custom_generate=engine_generate, **REFUSED[named])


def test_an_assistant_is_named(trio, model):
    with pytest.raises(Refused, match="assistant_model: the decoder drafts"):
        tokens(model, model.tokenize("The sum"), custom_generate=engine_generate,
               assistant_model=trio.expert)  # fmt: skip


def test_a_cache_with_tokens_is_named(model):
    inputs = model.tokenize("The sum")
    first = tokens(model, inputs, return_dict_in_generate=True)
    with pytest.raises(Refused, match="past_key_values with tokens"):
        model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=2,
                       custom_generate=engine_generate)  # fmt: skip


def test_padding_and_positions_of_another_kind_are_named(model, batch):
    width = batch["input_ids"].shape[1]
    inside = batch["attention_mask"].clone()
    inside[:, -2] = 0
    with pytest.raises(Refused, match="attention_mask must be .* with padding on the left alone"):
        tokens(model, {**batch, "attention_mask": inside}, custom_generate=engine_generate)
    for positions in (2 * torch.arange(width)[None], torch.arange(width - 1)[None]):
        with pytest.raises(Refused, match="position_ids other than the attention mask counts"):
            tokens(model, batch, custom_generate=engine_generate, position_ids=positions)


def test_a_streamer_of_several_rows_is_named(model, batch):
    with pytest.raises(Refused, match="a streamer takes one row here.*got 3"):
        tokens(model, batch, custom_generate=engine_generate, streamer=Recorder())


def test_models_that_do_not_belong_together_are_named(trio, model, steer):
    inputs = model.tokenize("The sum")
    with pytest.raises(Refused, match="called on the base of the trio"):
        tokens(trio.expert, inputs, custom_generate=steer)
    with pytest.raises(Refused, match="called on the model that it is given, or its base"):
        tokens(trio.expert, inputs, custom_generate=EngineGenerate(model))
    with pytest.raises(Refused, match="needs a trio to steer a LlamaForCausalLM"):
        tokens(trio.base, inputs, custom_generate=EngineGenerate())
    with pytest.raises(Refused, match=r"EngineGenerate\(trio\) steers any base"):
        tokens(trio.base, inputs, custom_generate=engine_generate)


def test_arguments_are_checked(trio):
    with pytest.raises(TypeError, match="source must be a Trio, a ProxyTunedForCausalLM or None"):
        EngineGenerate(trio.base)
    with pytest.raises(ValueError, match="max_batch_size must be an integer of at least 1"):
        EngineGenerate(trio, max_batch_size=0)
