"""Compiled decoding steps: the same tokens, and nothing compiled after the warm-up."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from proxytune_kernels.decoder import Decoder, Speculation, memory
from proxytune_kernels.decoder import runner as runner_module
from proxytune_kernels.decoder.compiled import CompiledStep, merge_products
from proxytune_kernels.decoder.pair.shared import shared_pair
from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from proxytune_kernels.trio.adapters import copy_modules
from tests.decoder import tape
from tests.decoder.conftest import tiny_llama
from tests.decoder.test_runner import make

# Importing torch's own compiler calls what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")


def sliding(seed: int) -> Any:
    """A window of 8 of one layer."""
    sizes: dict[str, Any] = {
        "vocab_size": 262, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "max_position_embeddings": 64, "sliding_window": 8,
    }  # fmt: skip
    return make("mistral-window", seed, **sizes)


def test_compiled_tokens_equal_the_naive_loop(trio, make_decoder, greedy, monkeypatch):
    """One row and several, equally long and ragged, from within a window to past it."""
    # Which graphs there are is decided before code is generated, which takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    alone = Trio.from_models(sliding(7), tokenizer=trio.tokenizer)
    decoder = make_decoder(alone, 3, max_seq_len=48, compile=True)
    decoder.warm_up()
    assert not any(any(decoder._runner.lengths(role)) for role in decoder.roles)
    graphs = counters["stats"]["unique_graphs"]
    params = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
    for prompts in (["a"], ["hello", "world"], ["a", "hello you", "abc", "b"], ["hello, you two"]):
        for output in decoder.generate(prompts, params):
            assert output.token_ids == greedy(alone.models, output.prompt_token_ids, 1.0, 14)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.slow
def test_generated_code_gives_the_same_tokens(trio, make_decoder, greedy):
    alone = Trio.from_models(sliding(7), tokenizer=trio.tokenizer)
    decoder = make_decoder(alone, 2, max_seq_len=7, compile=True)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for prompts in (["a"], ["a", "abc"]):
        for output in decoder.generate(prompts, params):
            assert output.token_ids == greedy(alone.models, output.prompt_token_ids, 1.0, 4)


@pytest.mark.slow
def test_generated_code_of_static_forwards(floats, monkeypatch):
    """Products merged, our attention as an operator; fp32 sums in another order move no argmax."""
    monkeypatch.setattr(runner_module, "choose_kernel", lambda device, dtype: ("triton", None))
    tokens = []
    for compile in (False, True):
        decoder = Decoder(floats, 1, 40, roles=["base"], compile=compile)
        tokens.append(decoder.generate(PROMPTS, PARAMS[0])[1].token_ids)
    assert tokens[0] == tokens[1]


def test_every_length_fits_its_slot():
    step = CompiledStep(lambda token_ids, step: token_ids, [None, 8, 40])
    assert step.warm_up_lengths(4, 64) == [(5,), (9,), (41,), (5, 4)]
    assert step.warm_up_lengths(1, 20) == [(5,), (9,)]
    assert step.warm_up_lengths(2, 3) == [(2,), (2, 1)]


# PEFT asks a model for a property that transformers renamed.
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture
def static(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our attention, as on a CUDA device; what is compiled runs as it is; never compiled twice."""
    monkeypatch.setattr(runner_module, "choose_kernel", lambda device, dtype: ("triton", None))
    monkeypatch.setattr(torch, "compile", tape.compile_with("eager"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.fixture(scope="module")
def floats(near: Trio) -> Trio:
    """Our attention takes no fp64."""
    base, expert, anti = (copy.deepcopy(near.models[role]).float() for role in near.roles)
    return Trio.from_models(base, expert, anti, near.tokenizer)


PROMPTS = [[5, 6, 7], [8] * 9]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=3, max_tokens=9, ignore_eos=True),
]
DRAFTS = Speculation(max_drafts=1, adaptive=False)


@pytest.mark.parametrize(
    ("taped", "slots", "options", "forwards"),
    [
        # One row, two and three.
        (False, 3, {"roles": ("base",)}, 3),
        # A token of each role (drafts at both places are one), and two of base and anti.
        (True, 1, {"speculation": DRAFTS, "pair": "separate"}, 3 + 2),
    ],
    ids=["steps", "captured-drafts"],
)
def test_static_forwards_give_the_eager_tokens(
    static, floats, monkeypatch, taped, slots, options, forwards
):
    def tokens(decoder: Decoder, count: int) -> list[list[int]]:
        outputs = decoder.generate(PROMPTS[:count], PARAMS[:count])
        return [output.token_ids for output in outputs]

    eager = tape.make_decoder(monkeypatch, floats, slots, compile=False, **options)
    wanted = tokens(eager, 2)
    assert eager.info()["compile"] == "none: not asked for"
    decoder = tape.make_decoder(monkeypatch, floats, slots, compile=True, taped=taped, **options)
    assert tokens(decoder, 2) == wanted
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(2):
        assert tokens(decoder, 2) == wanted
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert decoder.info()["compile"] == f"{forwards} forwards"
    if taped:
        assert decoder._graphs is not None
        assert decoder._graphs.failed is None
        assert decoder._graphs.count > 0


@pytest.mark.slow
@peft_warns
@pytest.mark.parametrize("speculation", [None, DRAFTS], ids=["plain", "drafts"])
def test_a_shared_pair_gives_the_eager_tokens(static, lora_trio, monkeypatch, speculation):
    """In captured steps, with adapters merged; drafts run the expert alone, on every second row."""
    members = [copy.deepcopy(lora_trio.models[role]).float() for role in lora_trio.roles]
    trio = Trio.from_models(members[0], members[1], members[2], lora_trio.tokenizer)
    options: dict[str, Any] = {"pair": "shared", "speculation": speculation}
    found = []
    for compile in (False, True):
        decoder = tape.make_decoder(monkeypatch, trio, 2, compile=compile, taped=compile, **options)
        decoder.warm_up()
        assert not any(any(decoder._runner.lengths(role)) for role in decoder.roles)
        found.append([output.token_ids for output in decoder.generate(PROMPTS, PARAMS)])
    assert found[0] == found[1]
    assert decoder.info()["graphs"].endswith(" captured")


def test_what_cannot_be_compiled_runs_as_it_is(static, floats, monkeypatch):
    """Unless it was asked for."""

    def refuse(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no such thing")

    def answer(**options: Any) -> tuple[list[int], str]:
        decoder = Decoder(floats, 1, roles=["base"], **options)
        [output] = decoder.generate(PROMPTS[:1], PARAMS[0])
        return output.token_ids, decoder.info()["compile"]

    wanted, _ = answer(compile=False)
    monkeypatch.setattr(torch, "compile", tape.compile_with(refuse))
    monkeypatch.setattr(
        runner_module.Runner, "_why_eager", lambda self, models, kernels, wanted, layers: None
    )
    found, reason = answer()
    assert found == wanted
    assert reason.startswith("none: BackendCompilerFailed: ")
    assert "no such thing" in reason
    with pytest.raises(Exception, match="no such thing"):
        answer(compile=True)


def test_what_is_compiled_unasked(floats):
    """On CUDA, where our attention runs and no hook brings weights in."""
    cpu = Decoder(floats, 1)
    assert cpu.info()["compile"] == (
        "none: the models are on cpu, where they are compiled if asked for"
    )
    runner, base = cpu._runner, copy.deepcopy(floats.base)
    runner.device = torch.device("cuda", 0)

    def why(kernel: str, layers: dict[str, Any]) -> str | None:
        return runner._why_eager({"base": base}, {"base": kernel}, None, layers)

    assert why("triton", {"base": []}) is None
    assert why("sdpa", {"base": []}) == "base attends through sdpa, which is compiled if asked for"
    assert why("triton", {}) == "base does not show its layers' keys and values before it runs"
    base.lm_head._hf_hook = object()
    assert why("triton", {"base": []}) == "base is spread over devices by hooks"


@pytest.mark.parametrize("why", ["a large head", "layers that are not known"])
def test_what_captured_steps_cannot_hold_is_not_compiled_for_them(static, monkeypatch, why):
    """It is known before the forwards are made: a head of more than 256 goes through SDPA."""
    sizes: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = make("qwen3", head_dim=264 if why == "a large head" else 256, **sizes).float()
    layers = memory.layers_of(model)
    known = {"base": layers} if why == "a large head" and layers else {}
    runner = Runner({"base": model}, 2, 16, compile=True, layers=known)
    assert runner.models["base",].compiled == "step" and not runner.static
    assert runner.attention()["base"].startswith("sdpa: a head" if known else "triton")


def test_forwards_are_warmed_up_once(static, floats, monkeypatch):
    decoder = Decoder(floats, 1, roles=["base"], compile=True)
    decoder.warm_up()
    monkeypatch.setattr(Runner, "warm_up", lambda self: pytest.fail("once more"))
    decoder.warm_up()


def merging(**settings: Any) -> Any:
    return tiny_llama(3, attention_bias=True, **settings).float()


def test_merged_products(tmp_path):
    """The same numbers from the same parameters, which lie one behind the other."""
    model, ids = merging(), torch.tensor([[4, 5, 6], [7, 8, 9]])
    parameters = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    own = copy.deepcopy(model)
    for _ in range(2):  # the second finds them laid out
        twin = copy_modules(model)
        assert merge_products(twin) == 2 * len(model.model.layers)
        with torch.inference_mode():
            # Sums of at most 64 products in another order, through two layers.
            torch.testing.assert_close(twin(ids).logits, own(ids).logits, rtol=1e-5, atol=1e-4)
        assert torch.equal(model(ids).logits, own(ids).logits)
    layer = model.model.layers[0]
    starts = [layer.self_attn.get_submodule(f"{n}_proj").weight.data_ptr() for n in "qkv"]
    assert starts[1] - starts[0] == layer.self_attn.q_proj.weight.nbytes
    storages = {layer.mlp.get_submodule(n).weight.untyped_storage().data_ptr()
                for n in ("gate_proj", "up_proj")}  # fmt: skip
    assert len(storages) == 1
    for name, p in model.named_parameters():
        number, value = parameters[name]
        assert id(p) == number
        assert torch.equal(p, value)
        assert not p.is_inference()
    # They can be trained, changed, saved.
    model(ids).logits.sum().backward()
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(2)
    assert not torch.equal(twin(ids).logits, own(ids).logits)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_layers_that_take_other_inputs_stay_right():
    """What one of them computed is not another's."""

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = torch.nn.Linear(4, 3), torch.nn.Linear(4, 5)

    model: Any = Layers()
    x, y = torch.randn(2, 6, 4)
    wanted = model.gate_proj(x), model.up_proj(y)
    assert merge_products(model) == 1
    for found, result in zip((model.gate_proj(x), model.up_proj(y)), wanted, strict=True):
        torch.testing.assert_close(found, result)
    assert model.gate_proj.product.output is None


@peft_warns
def test_merged_products_under_adapters(lora_trio):
    """Of the pair, whose even rows have them, and of the expert alone."""
    ids = torch.tensor([[4, 5, 6], [4, 5, 6], [7, 8, 9], [7, 8, 9]])
    for member in shared_pair(lora_trio.expert, copy.deepcopy(lora_trio.anti)):
        merged = copy_modules(member)
        with torch.inference_mode():
            wanted = member(ids, use_cache=False).logits
            # Those of one input, and the two that are alone with their adapters.
            assert merge_products(merged) == 4 * len(member.model.layers)
            # fp64: sums in another order.
            found = merged(ids, use_cache=False).logits
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("why", ["hook", "subclass", "tied", "view", "dtype", "forward"])
def test_layers_that_are_left_alone(why):
    model = merging(layers=1)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    if why == "hook":
        mlp.up_proj.register_forward_hook(lambda *given: None)
    elif why == "subclass":
        mlp.up_proj.__class__ = type("Adapted", (torch.nn.Linear,), {})
    elif why == "tied":
        mlp.up_proj.weight = mlp.gate_proj.weight
    elif why == "view":
        mlp.up_proj.weight.data = torch.zeros(65, 32)[1:]
    elif why == "dtype":
        mlp.up_proj.double()
    else:
        mlp.up_proj.forward = lambda x: x
    weight = mlp.gate_proj.weight.data_ptr()
    assert merge_products(model) == 1
    assert mlp.gate_proj.weight.data_ptr() == weight
    assert type(mlp.gate_proj) is torch.nn.Linear
    assert type(attention.q_proj) is not torch.nn.Linear
