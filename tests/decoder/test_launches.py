"""What a layer launches on CUDA, without a GPU: inductor's code for one, of what the decoder runs.

Dynamo and AOTAutograd trace a member's forward on the CPU. Their graph then goes through inductor
as one of CUDA tensors: its passes, fusion and code for Triton run, and the Python that would launch
the kernels is counted in place of being loaded. What it asks of a device is answered here.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from proxytune_kernels.decoder import memory
from proxytune_kernels.decoder import runner as runner_module
from proxytune_kernels.decoder.runner import Runner
from tests.decoder import tape
from tests.decoder.conftest import kind

# Importing torch's own compiler calls what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
MOST = 12
"""Launches of a layer, attention's one included."""
_VIEWS = set(
    "_unsafe_view alias detach expand permute reshape select slice split squeeze t transpose "
    "unsqueeze view unflatten _reshape_alias as_strided".split()
)


class _Counted(Exception):
    """Code was made, and is not to be loaded."""


@contextmanager
def cuda_code(found: list[str]) -> Iterator[Any]:
    """A backend that runs what it gets as it is, and leaves inductor's code for CUDA in a list."""
    import torch._inductor.compile_fx as compiler
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    def keep(graph: Any) -> None:
        found.append(graph.codegen()[0].value)
        raise _Counted

    def compile(graph: Any, inputs: list[Any]) -> Any:
        on_cuda = copy.deepcopy(graph)
        mode: Any = torch._guards.TracingContext.get().fake_mode
        for node in on_cuda.graph.nodes:
            node.meta.pop("val", None)
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        with mode:
            given = [
                torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cuda")
                for t in inputs
            ]
        with torch._guards.tracing(torch._guards.TracingContext(mode)):
            FakeTensorProp(on_cuda, mode).propagate_dont_convert_inputs(*given)
            # A pass copies tensors to see whether their shapes fit; these are nowhere.
            copies = mock.patch.object(torch.Tensor, "copy_", lambda tensor, source: tensor)
            with copies, pytest.raises(Exception, match="_Counted"):
                compiler.compile_fx_inner(on_cuda, given)
        return make_boxed_func(graph.forward)

    h200 = DeviceProperties(
        type="cuda", index=0, multi_processor_count=132, cc=90, major=9,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, warp_size=32,
    )  # fmt: skip
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, gcnArchName="")
    with ExitStack() as stack:
        for where, name, value in (
            (GraphLowering, "compile_to_module", keep),
            (DeviceProperties, "create", lambda device: h200),
            (compiler, "_check_triton_bf16_support", lambda graph: None),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "current_device", lambda: 0),
            (torch._inductor.scheduler, "has_triton", lambda *given: True),
            (torch.utils._triton, "triton_hash_with_backend", lambda: "none"),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
        yield aot_autograd(
            fw_compiler=compile,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )


def layer_launches(code: str) -> Counter[str]:
    """Of the layer between one attention and the next, that included."""
    body = code[code.index("def call(") :]
    kinds = r"(triton)_\w+\.run\(|(extern)_kernels\.\w+\(|torch\.ops\.proxytune\.(\w+)\."
    calls = re.findall(rf"^ +(?:\w+ = )?(?:{kinds})", body, re.MULTILINE)
    names = [next(filter(None, call)) for call in calls]
    first, second = (i for i, name in enumerate(names) if name == "decode_attention")
    return Counter(names[first + 1 : second + 1])


class _Count(TorchDispatchMode):
    """Operators that are a kernel: those that are no view."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.number += func.overloadpacket.__name__ not in _VIEWS
        return func(*args, **(kwargs or {}))


def layers_of(models: dict[str, Any]) -> dict[str, Any]:
    return {role: memory.layers_of(model) for role, model in models.items()}


def runner(monkeypatch: pytest.MonkeyPatch, family: str, compile: bool, **settings: Any) -> Runner:
    monkeypatch.setattr(runner_module, "choose_kernel", lambda device, dtype: ("triton", None))
    model_class, config = kind(family, {**SIZES, **settings})
    models = {"base": model_class(config).bfloat16().eval()}
    made = Runner(models, 1, 64, compile=compile, layers=layers_of(models))
    made.prefill([0], {"base": [[1, 2, 3]]})
    return made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_layer_of_the_shared_pair(monkeypatch):
    """14: an operator adds the adapters of each of four products, and copies nothing."""
    peft = pytest.importorskip("peft")
    model_class, config = kind("Llama", SIZES)
    anti = model_class(config).bfloat16().eval()
    adapter = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    made = peft.get_peft_model(copy.deepcopy(anti), adapter, autocast_adapter_dtype=False)
    expert, base = made.get_base_model().eval(), copy.deepcopy(anti)
    monkeypatch.setattr(runner_module, "choose_kernel", lambda device, dtype: ("triton", None))
    models = {"base": base, "expert": expert, "anti": anti}
    found: list[str] = []
    with cuda_code(found) as backend:
        monkeypatch.setattr(torch, "compile", tape.compile_with(backend))
        runner = Runner(models, 1, 64, compile=True, layers=layers_of(models))
        assert runner.pair == "shared"
        runner.prefill([0], {role: [[1, 2, 3]] for role in models})
        runner.forward(("base", "expert", "anti"), torch.ones(1, 1, dtype=torch.int64))
    launches = layer_launches(found[-1])
    assert launches["extern"] == launches["add_lora"] == 4
    assert launches.total() <= 14


def step(made: Runner) -> Tensor:
    return made.forward(("base",), torch.ones(1, 1, dtype=torch.int64))["base"]


@pytest.mark.parametrize(
    "family", ["Qwen3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("Llama", "Qwen2"))]
)
def test_a_layer_launches_few_kernels(monkeypatch, family):
    """11: 4 products, attention, 6 of inductor's. Modules called one by one make 34 or 38."""
    counts = []
    for layers in (1, 2):
        made = runner(monkeypatch, family, False, num_hidden_layers=layers)
        made.models["base",].cache.captured = True
        with _Count() as count:
            step(made)
        counts.append(count.number)
    eager = counts[1] - counts[0]
    found: list[str] = []
    with cuda_code(found) as backend:
        monkeypatch.setattr(torch, "compile", tape.compile_with(backend))
        step(runner(monkeypatch, family, True))
    launches = layer_launches(found[-1])
    assert launches["extern"] == 4
    assert launches.total() <= MOST < eager
    # Keys and values are written where they are: no kernel has as many elements as a cache.
    elements = re.findall(r"\.run\([^\n]*?, (\d+), stream", found[-1])
    assert max(map(int, elements)) < made.models["base",].cache.keys[0].numel()
