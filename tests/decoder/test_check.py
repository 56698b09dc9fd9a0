"""A model whose own forward says something else than the decoder would is refused at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from proxytune_kernels.decoder import Decoder, MemberError, check
from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import BACKEND, tiny_llama, word_tokenizer
from tests.decoder.test_runner import ARCHITECTURES, SIZES, make, random_ids

MASKED = {**SIZES, "max_position_embeddings": 64}
del MASKED["num_key_value_heads"]
LONG_WINDOW = {"sliding_window": 40, "num_local_experts": 2}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bidirectional": (
        "BertLMHeadModel", MASKED, "differ by .* after a prompt of row 0 up to position 4, where",
    ),
    "positions-from-2": (
        "RobertaForCausalLM", {**MASKED, "is_decoder": True, "pad_token_id": 1}, "differ by",
    ),
    "own-mask": ("DogeForCausalLM", SIZES, r"got a mask \[2, 4, 5, 5\] from DogeAttention"),
    "wide-window-in-the-mask": (
        "PhimoeForCausalLM", {**SIZES, **LONG_WINDOW}, "with a window of 40 tokens, which it keeps",
    ),
    "step-not-passed-on": (
        "NemotronForCausalLM", SIZES, "raises TypeError: .*missing .* 'cache_step'",
    ),
    "cache-of-another-kind": ("HrmTextForCausalLM", SIZES, "raises AttributeError: 'CacheStep'"),
    "sinks": (
        "GptOssForCausalLM",
        {**SIZES, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        "got s_aux from GptOssAttention",
    ),
}  # fmt: skip


def of_transformers(name: str, sizes: dict[str, Any], seed: int = 0) -> Any:
    model = getattr(transformers, name, None)
    if model is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(seed)
    return model(model.config_class(**sizes)).eval()


def check_model(model: Any, slots: int = 2, max_seq_len: int = 64) -> None:
    check.check_members({"base": model}, Runner({"base": model}, slots, max_seq_len))


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_would_decode_otherwise_is_refused(case):
    name, sizes, message = REFUSED[case]
    model = of_transformers(name, sizes)
    with pytest.raises(MemberError, match=f"base must .*{name}.*{message}.*ProxyTunedForCausalLM"):
        check_model(model)


def test_a_window_in_the_mask_is_right_up_to_the_window():
    model = of_transformers("PhimoeForCausalLM", {**SIZES, **LONG_WINDOW})
    check_model(model, max_seq_len=40)
    with pytest.raises(MemberError, match="give max_seq_len up to the window"):
        check_model(model, max_seq_len=41)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("max_seq_len", [1, 2, 3, 4, 64])
def test_it_fits_into_any_decoder(slots, max_seq_len):
    check_model(make("mistral-window"), slots, max_seq_len)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounding_is_no_difference(architecture, dtype):
    check_model(make(architecture).to(dtype))


@pytest.mark.parametrize("place", ["prefill", "extend", "forward"])
@pytest.mark.parametrize("pair", ["batched", "separate"])
def test_each_way_to_run_each_part_is_held_to_the_models(pair, place, trio, monkeypatch):
    """A fault in the prompt, the chunk or the step, of the last role alone."""
    models = {role: copy.deepcopy(model) for role, model in trio.models.items()}
    runner = Runner(models, 2, 64, pair=pair)
    check.check_members(models, runner)
    part = runner.models["expert", "anti"] if pair == "batched" else runner.models["anti",]
    right = getattr(part, place)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        logits = right(*args, **kwargs)
        logits[-1] *= 1.001
        return logits

    monkeypatch.setattr(part, place, wrong)
    check.check_members(models, runner)  # known
    check._checked.clear()
    with pytest.raises(MemberError, match="anti must give .* differ by"):
        check.check_members(models, runner)


def test_what_is_right_is_checked_once_and_what_changes_again(tokenizer, monkeypatch):
    models = [tiny_llama(seed, 16, 1) for seed in range(3)]
    own: list[str] = []
    run = check.own_logits

    def counted(role: str, *args: Any) -> Any:
        own.append(role)
        return run(role, *args)

    monkeypatch.setattr(check, "own_logits", counted)

    def checked(**options: Any) -> list[str]:
        own.clear()
        Decoder(
            Trio.from_models(models[0], models[1], models[2], tokenizer),
            4,
            backend=BACKEND,
            **options,
        )
        return list(own)

    assert checked(check=False) == []
    assert checked() == ["base", "expert", "anti"]
    assert checked() == []
    assert checked(pair="separate") == ["expert", "anti"]
    models[1].model.layers[0].mlp = copy.deepcopy(models[1].model.layers[0].mlp)
    assert checked(pair="separate") == ["expert"]
    models[0].config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert checked(pair="separate") == ["base"]
    models[2].float()
    assert checked(pair="separate") == ["anti"]


def test_it_disturbs_nothing(tokenizer):
    """Training flags, the noise of the caller, gradients, caches."""
    models = [tiny_llama(seed, 16, 1, attention_dropout=0.5).train() for seed in range(3)]
    models[1].model.norm.eval()
    flags = [m.training for model in models for m in model.modules()]
    noise = torch.get_rng_state()
    decoder = Decoder(
        Trio.from_models(models[0], models[1], models[2], tokenizer), 2, backend=BACKEND
    )
    assert torch.equal(noise, torch.get_rng_state())
    assert flags == [m.training for model in models for m in model.modules()]
    assert not any(any(decoder._runner.lengths(role)) for role in decoder.roles)
    assert not any(slab.any() for cache in decoder._runner._caches for slab in cache.slabs)
    models[0](torch.tensor([[3, 4]])).logits.sum().backward()


def test_logits_that_are_no_numbers_are_no_difference():
    model = tiny_llama(0)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    check_model(model)


def test_no_memory_is_not_a_refusal(monkeypatch):
    model = tiny_llama(0)
    runner = Runner({"base": model}, 2, 64)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(runner.models["base",], "prefill", full)
    with pytest.raises(torch.OutOfMemoryError):
        check.check_members({"base": model}, runner)


def phi3(factors: list[list[float]]) -> Any:
    """Phi-3.5-mini in small: other rotary factors for texts of more than 24 tokens."""
    short, long = factors
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long,
        "original_max_position_embeddings": 24,
    }  # fmt: skip
    sizes = {**SIZES, "original_max_position_embeddings": 24, "rope_parameters": rope}
    return of_transformers("Phi3ForCausalLM", sizes).double()


def test_rotary_factors_do_not_depend_on_other_texts(greedy):
    model = phi3([[1.0] * 4, [8.0, 9.0, 10.0, 11.0]])
    trio = Trio.from_models(model, tokenizer=word_tokenizer(SIZES["vocab_size"]))
    decoder = Decoder(trio, 2, backend=BACKEND, prefill_chunk=8)
    assert decoder.max_seq_len == 24
    wanted = "max_seq_len must be at most 24, behind which the rotary factors of base change"
    with pytest.raises(ValueError, match=wanted):
        Decoder(trio, 2, 25, backend=BACKEND)
    prompts = [random_ids(5, 0), random_ids(19, 1)]
    params = SamplingParams(alpha=0.0, temperature=0, max_tokens=6, ignore_eos=True)
    with torch.no_grad():
        model(torch.tensor([random_ids(30, 2)]))  # what the model ran before is no matter
    for output in decoder.generate(prompts, params):
        alone = {"base": output.prompt_token_ids["base"]}
        assert output.token_ids == greedy({"base": model}, alone, 0.0, 6)


def test_dynamic_rotary_factors_do_not_depend_on_what_ran_before(greedy):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = of_transformers("LlamaForCausalLM", {**SIZES, "rope_parameters": rope}).double()
    trio = Trio.from_models(model, tokenizer=word_tokenizer(SIZES["vocab_size"]))
    prompts = [random_ids(5, 0), random_ids(123, 1)]
    params = SamplingParams(alpha=0.0, temperature=0, max_tokens=6, ignore_eos=True)
    wanted = [greedy({"base": model}, {"base": prompt}, 0.0, 6) for prompt in prompts]
    with torch.no_grad():
        model(torch.tensor([random_ids(200, 2)]))
    decoder = Decoder(trio, 2, backend=BACKEND)
    assert [output.token_ids for output in decoder.generate(prompts, params)] == wanted


@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_causal_models_are_known(architecture):
    check.check_causal("anti", make(architecture))


def test_masked_models_are_known():
    model = of_transformers("BertLMHeadModel", MASKED)
    with pytest.raises(MemberError, match="anti must be a causal model, got BertLMHeadModel, whos"):
        check.check_causal("anti", model)


@pytest.mark.parametrize(
    ("architecture", "depth"), [("llama", 2), ("qwen2-mixed-window", 2), ("gemma3", 6)]
)
def test_of_layers_that_are_alike_only_the_first_run(architecture, depth):
    """Up to the first of the last kind; the model and the decoder's copy stay whole."""
    model_class, config = ARCHITECTURES[architecture]
    sizes = {**config.to_dict(), "num_hidden_layers": 7, "layer_types": None}
    model = model_class(type(config)(**sizes)).eval()
    ran: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))  # the copy has it, too
    layers = list(model.model.layers)
    runner = Runner({"base": model}, 2, 64)
    check.check_members({"base": model}, runner)
    assert ran == list(range(depth)) * 4
    assert list(model.model.layers) == layers
    assert len(runner.models["base",].model.model._modules["layers"]) == 7
    ran.clear()
    runner.prefill([0], {"base": [[5]]})
    assert ran == list(range(7))


def test_a_forward_that_counts_its_layers_runs_them_all():
    model = make("llama", num_hidden_layers=4)
    model = type(model)(model.config).eval()
    body = type(model.model)

    class Counted(body):  # type: ignore[valid-type,misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            assert len(self.layers) == self.config.num_hidden_layers
            return super().forward(*args, **kwargs)

    model.model.__class__ = Counted
    check_model(model)
