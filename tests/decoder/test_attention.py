"""The kernels that read each row's length, ours and flash-attn's: logits and tokens of SDPA.

Ours runs as its reference here, and as it is with TRITON_INTERPRET=1 (make interpret). No test runs
flash-attn itself, which needs a GPU. A stand-in does what the documentation of
``flash_attn_with_kvcache`` says (flash-attn 2.8, flash_attn_interface.py), in plain torch.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from proxytune_kernels import kernels
from proxytune_kernels.decoder import Speculation, attention
from proxytune_kernels.decoder import runner as runner_module
from proxytune_kernels.decoder.attention import Choice, choose_kernel, flash_missing
from proxytune_kernels.decoder.cache import SlotCache
from proxytune_kernels.decoder.model import SlotModel, with_slot_attention
from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.params import SamplingParams
from proxytune_kernels.trio import Trio
from tests.decoder.conftest import near_trio
from tests.decoder.tape import make_decoder
from tests.decoder.test_runner import ARCHITECTURES, make, prefill, random_ids, step

# The stand-in's and SDPA's are both fp64 forwards of logits up to about 30, given as fp32. Ours
# takes no fp64: in fp32 two forwards differ by a few times 2^-24 sqrt(layers) of the logits' size,
# of which check.py allows 256.
TOLERANCE: dict[str, dict[str, Any]] = {
    "flash-attn": {"rtol": 1e-6, "atol": 1e-6},
    "triton": {"rtol": 1e-4, "atol": 1e-4},
}
INTERPRETED = kernels.interpreted()
"""At some 10 ms a program: fewer cases, never less exact ones."""
SOME = ["llama", "qwen2-mixed-window", "gemma2-softcap"] if INTERPRETED else list(ARCHITECTURES)
LENGTHS = [(9, 3, 14)] if INTERPRETED else [(9, 3, 14), (7, 7, 7), (11,)]
BOTH = [
    pytest.param("triton", marks=pytest.mark.triton),
    pytest.param(
        "flash-attn",
        marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter is for ours alone"),
    ),
]


class _Kernel:
    """``flash_attn_with_kvcache`` for a cache that holds the new keys already."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.lengths: list[Tensor] = []

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> Tensor:
        """Row b has cache_seqlens[b] keys, and its last query is at the last of them."""
        rows, queries, heads, width = q.shape
        assert k_cache.stride(-1) == v_cache.stride(-1) == 1
        assert cache_seqlens.dtype == torch.int32
        assert cache_seqlens.shape == (rows,)
        assert k_cache.shape[0] == v_cache.shape[0] == rows
        assert heads % k_cache.shape[2] == 0
        scale = width**-0.5 if softmax_scale is None else softmax_scale
        self.calls.append({"queries": queries, "window_size": window_size, "softcap": softcap})
        self.lengths.append(cache_seqlens)
        out = torch.zeros_like(q)
        for b, length in enumerate(cache_seqlens.tolist()):
            assert length <= k_cache.shape[1]
            for head in range(heads):
                shared = head // (heads // k_cache.shape[2])
                keys, values = k_cache[b, :length, shared], v_cache[b, :length, shared]
                scores = q[b, :, head] @ keys.T * scale
                if softcap > 0:
                    scores = softcap * torch.tanh(scores / softcap)
                for i in range(queries):
                    place = i + length - queries
                    left, right = window_size
                    first = 0 if left < 0 else max(0, place - left)
                    last = length - 1 if right < 0 else place + right
                    last = min(last, place) if causal else last
                    weights = torch.softmax(scores[i, first : last + 1], 0)
                    out[b, i, head] = weights @ values[first : last + 1]
        return out


@pytest.fixture(params=BOTH)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its name; flash-attn's stand-in is in its place from now on."""
    module = ModuleType("flash_attn")
    vars(module)["flash_attn_with_kvcache"] = _Kernel()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    name: str = request.param
    return name


def stand_in() -> _Kernel:
    found: _Kernel = sys.modules["flash_attn"].flash_attn_with_kvcache
    return found


def use(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Let runners that are made from now on use a kernel."""
    monkeypatch.setattr(runner_module, "choose_kernel", lambda device, dtype: (kernel, "of a test"))


def runners(architecture: str, monkeypatch: pytest.MonkeyPatch, kernel: str) -> list[Runner]:
    """With SDPA, and with the kernel."""
    model = make(architecture)
    if kernel == "triton":
        model = model.float()
    found = []
    for name in ("sdpa", kernel):
        use(monkeypatch, name)
        found.append(Runner({"base": model}, 4, 64, slack=3))
    assert found[1].attention() == {"base": kernel}
    return found


@pytest.mark.parametrize("architecture", SOME)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_logits_equal_those_of_sdpa(kernel, monkeypatch, architecture, lengths):
    """One token a row and several, of which some are taken back; windows and soft caps."""
    both = runners(architecture, monkeypatch, kernel)
    for slot, length in enumerate(lengths):
        sdpa, ours = (prefill(r, [slot], [random_ids(length, slot)]) for r in both)
        torch.testing.assert_close(ours, sdpa, **TOLERANCE[kernel])
    assert not stand_in().calls  # nothing is cached before a whole prompt
    for count, width in enumerate([1, 4, 1] if INTERPRETED else [1, 4, 1, 3, 2, 1]):
        token_ids = [random_ids(width, 10 * count + slot) for slot in range(len(lengths))]
        sdpa, ours = (step(r, token_ids, kept=(width + 1) // 2) for r in both)
        torch.testing.assert_close(ours, sdpa, **TOLERANCE[kernel])
    if kernel != "flash-attn":
        return
    # Made once in a forward, not in each layer.
    assert len({id(lengths) for lengths in stand_in().lengths}) == 6
    config = ARCHITECTURES[architecture][1]
    calls = stand_in().calls
    assert {call["queries"] for call in calls} == {1, 2, 3, 4}
    windows = {(-1, -1)}
    if getattr(config, "sliding_window", None) is not None:
        full = "full_attention" in (getattr(config, "layer_types", None) or ())
        windows = {(config.sliding_window - 1, 0)} | (windows if full else set())
    assert {call["window_size"] for call in calls} == windows
    softcap = getattr(config, "attn_logit_softcapping", None) or 0.0
    assert {call["softcap"] for call in calls} == {softcap}


@pytest.mark.parametrize("architecture", ["llama", "mistral-window", "gemma2-softcap"])
def test_a_prompt_in_chunks(kernel, monkeypatch, architecture):
    """Those of more than 12 tokens go through SDPA where the kernel is ours.

    What a request left in the slot is NaN; that steps are captured does not concern a prompt.
    """
    monkeypatch.setattr(attention, "MAX_NEW", 12)
    both = runners(architecture, monkeypatch, kernel)
    both[1].capture()
    prompt, cache = random_ids(38, 0), both[1].models["base",].cache
    for start, end in ((0, 9), (9, 18), (18, 33), (33, 38)):
        part = {"base": [prompt[start:end]]}
        with torch.inference_mode():
            for layer in (*cache.keys, *cache.values):
                layer[1, start:] = torch.nan
        sdpa, ours = (r.extend(range(1, 2), part)["base"] for r in both)
        torch.testing.assert_close(ours, sdpa, **TOLERANCE[kernel])


@pytest.mark.parametrize("architecture", ["llama", "qwen2-mixed-window", "gemma2-softcap"])
@pytest.mark.parametrize("captured", [False, True])
def test_every_second_row(kernel, architecture, captured):
    """As an expert's rows lie between its anti-expert's; and with the fixed length of a graph."""
    attention.register_attention()
    models = []
    for name, stride in (("sdpa", 1), (kernel, 2)):
        model = make(architecture)
        twin = with_slot_attention(model.float() if kernel == "triton" else model)
        cache = SlotCache(3 * stride, 40, torch.device("cpu"), kernel=name)
        cache.captured = captured
        models.append(SlotModel(twin, cache, first=stride - 1, stride=stride))
    with torch.inference_mode():
        for slot, size in enumerate([5, 12, 8]):
            for model in models:
                model.prefill([slot], [random_ids(size, slot)])
        # What lies between the rows must not be looked at.
        other = models[1].cache
        for layer in (*other.keys, *other.values):
            layer[0::2] = torch.nan
        for width in (1, 3):
            token_ids = torch.tensor([random_ids(width, slot) for slot in range(3)])
            sdpa, ours = (m.forward(token_ids) for m in models)
            torch.testing.assert_close(ours, sdpa, **TOLERANCE[kernel])


def test_what_lies_behind_a_row_is_not_read(kernel, monkeypatch):
    """Nor is it zeroed: what a request left stays where it is."""
    _, runner = runners("llama", monkeypatch, kernel)
    for slot, length in enumerate([9, 3]):
        prefill(runner, [slot], [random_ids(length, slot)])
    wanted = runner.forward(("base",), torch.tensor([[7], [8]]))["base"]
    cache = runner.models["base",].cache
    with torch.inference_mode():
        for layer in (*cache.keys, *cache.values):
            layer[0, 10:] = layer[1, 4:] = torch.nan
    assert torch.equal(runner.forward(("base",), torch.tensor([[7], [8]]))["base"], wanted)
    runner.release(1)
    assert all(layer[1, 5:].isnan().all() for layer in cache.keys)
    prefill(runner, [1], [random_ids(3, 1)])
    assert torch.equal(runner.forward(("base",), torch.tensor([[7], [8]]))["base"], wanted)


@pytest.fixture(scope="module")
def single() -> Trio:
    """A trio in fp32."""
    trio = near_trio()
    base, expert, anti = (trio.models[role].float() for role in ("base", "expert", "anti"))
    return Trio.from_models(base, expert, anti, trio.tokenizer)


SPECULATIONS = {
    "plain": None,
    "coupled": Speculation(max_drafts=3, adaptive=False),
    "lookup": Speculation(drafter="prompt_lookup", max_drafts=4, adaptive=False),
}


@pytest.mark.parametrize("speculation", ["coupled"] if INTERPRETED else SPECULATIONS)
@pytest.mark.parametrize("taped", [True] if INTERPRETED else [False, True])
def test_tokens_equal_those_of_sdpa(kernel, single, monkeypatch, speculation, taped):
    """Ragged and refilled slots, one step behind, eager and captured: one graph for all lengths."""
    if taped and kernel == "flash-attn":
        pytest.skip("the stand-in reads lengths on the host, which a graph can't")
    count, least = (3, 2) if INTERPRETED else (6, 6)
    prompts = [[5 + i, 6, 7, 5 + i, 6][: 2 + i % 4] for i in range(count)]
    params = [
        SamplingParams(temperature=i % 2 * 0.8, seed=i, max_tokens=least + i, ignore_eos=True)
        for i in range(count)
    ]
    options: dict[str, Any] = {"speculation": SPECULATIONS[speculation], "max_seq_len": 24}
    found = []
    for name, given in (("sdpa", {}), (kernel, {"taped": taped, "ahead": 1})):
        use(monkeypatch, name)
        decoder = make_decoder(monkeypatch, single, 2, **given, **options)
        found.append([output.token_ids for output in decoder.generate(prompts, params)])
    assert found[0] == found[1]
    assert set(decoder.info()["attention"].values()) == {kernel}
    if taped:
        assert decoder.info()["graphs"].endswith("captured")
        graphs: Any = decoder._graphs
        assert {rows for rows, _ in graphs._replays} <= {1, 2}


def test_heads_that_are_too_large_go_through_sdpa(kernel, monkeypatch):
    use(monkeypatch, kernel)
    model = make("qwen3", head_dim=264, num_attention_heads=2, num_key_value_heads=1)
    runner = Runner({"base": model}, 2, 16)
    prefill(runner, [0], [[3, 4, 5]])
    runner.release(0)
    assert not any(layer.any() for layer in runner.models["base",].cache.keys)
    assert step(runner, [[1]]).isfinite().all()
    assert runner.attention()["base"].startswith("sdpa: ")


def test_why_flash_attn_is_not_used(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    # As if it were not installed, wherever this runs.
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert flash_missing(cpu, torch.bfloat16) == (
        "flash-attn runs on CUDA devices, and this model is on cpu"
    )
    assert flash_missing(cuda, torch.float32) == (
        "flash-attn takes bfloat16 and float16, and this model has torch.float32"
    )
    for dtype in (torch.bfloat16, torch.float16):
        missing = flash_missing(cuda, dtype)
        assert missing is not None
        assert missing.startswith("flash-attn is not installed (pip install")
    # flash-attn 4 is a package of the same name, without the function.
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    missing = flash_missing(cuda, torch.bfloat16)
    assert missing is not None
    assert missing.startswith("flash_attn has no flash_attn_with_kvcache that can be imported: ")


def test_which_kernel_is_used(monkeypatch):
    """Ours, but where a measurement says otherwise; the other where one is not there."""
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    lines = [Choice("NVIDIA H", "flash-attn", "a file")]
    missing: dict[str, str | None] = {"triton": None, "flash-attn": None}
    monkeypatch.setattr(attention, "unusable", lambda *given: missing["triton"])
    monkeypatch.setattr(attention, "flash_missing", lambda *given: missing["flash-attn"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert attention.CHOICES == ()  # nothing has been measured
    assert choose_kernel(device, dtype) == ("triton", None)
    assert choose_kernel(device, dtype, lines) == ("flash-attn", None)
    assert choose_kernel(device, dtype, [lines[0]._replace(device="NVIDIA B")]) == ("triton", None)
    missing["flash-attn"] = "no flash"
    assert choose_kernel(device, dtype, lines) == ("triton", None)
    missing["triton"] = "no Triton"
    assert choose_kernel(device, dtype, lines) == ("sdpa", "no Triton")
    missing["flash-attn"] = None
    assert choose_kernel(device, dtype) == ("flash-attn", None)


def test_prompts_on_cuda_never_go_through_cudnn(monkeypatch):
    """A query that says it is on CUDA; on a CPU nothing is set."""
    seen = []

    def attend(query: Any, *given: Any, **options: Any) -> Any:
        cuda = torch.backends.cuda
        seen.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled()))
        return query

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for device in ("cuda", "cpu"):
        query: Any = SimpleNamespace(device=torch.device(device))
        attention._sdpa(query, query, query)
    assert seen == [(False, True), (before, True)]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
