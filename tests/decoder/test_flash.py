"""The flash-attn path, with a stand-in for its decoding kernel: the logits of the SDPA path.

No test runs flash-attn itself, which needs a GPU. The stand-in does what the documentation of
``flash_attn_with_kvcache`` says (flash-attn 2.8, flash_attn_interface.py), in plain torch.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from proxytune_kernels.decoder import runner as runner_module
from proxytune_kernels.decoder.attention import flash_missing, register_attention
from proxytune_kernels.decoder.cache import SlotCache
from proxytune_kernels.decoder.model import SlotModel, with_slot_attention
from proxytune_kernels.decoder.runner import Runner
from tests.decoder.test_runner import ARCHITECTURES, make, prefill, random_ids, step

# Both are fp64 forwards of logits up to about 30 that differ by some 1e-15 of them, given as fp32.
TOLERANCE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}


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


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> _Kernel:
    """In the place of flash-attn, for runners that are made from now on."""
    stand_in = _Kernel()
    module = ModuleType("flash_attn")
    vars(module)["flash_attn_with_kvcache"] = stand_in
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return stand_in


def runners(architecture: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Runner, Runner]:
    """With SDPA, and with flash-attn."""
    model = make(architecture)
    with_sdpa = Runner({"base": model}, 4, 64, slack=3)
    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "flash_missing", lambda device, dtype: None)
        with_flash = Runner({"base": model}, 4, 64, slack=3)
    assert with_flash.models["base",].cache.flash
    return with_sdpa, with_flash


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lengths", [(9, 3, 14), (7, 7, 7), (11,)], ids=str)
def test_logits_equal_those_of_sdpa(kernel, monkeypatch, architecture, lengths):
    """One token a row and several, of which some are taken back; windows and soft caps."""
    both = runners(architecture, monkeypatch)
    for slot, length in enumerate(lengths):
        sdpa, flash = (prefill(r, [slot], [random_ids(length, slot)]) for r in both)
        torch.testing.assert_close(flash, sdpa, **TOLERANCE)
    assert not kernel.calls  # nothing is cached before a whole prompt
    for count, width in enumerate([1, 4, 1, 3, 2, 1]):
        token_ids = [random_ids(width, 10 * count + slot) for slot in range(len(lengths))]
        sdpa, flash = (step(r, token_ids, kept=(width + 1) // 2) for r in both)
        torch.testing.assert_close(flash, sdpa, **TOLERANCE)
    # Made once in a forward, not in each layer.
    assert len({id(lengths) for lengths in kernel.lengths}) == 6
    config = ARCHITECTURES[architecture][1]
    assert {call["queries"] for call in kernel.calls} == {1, 2, 3, 4}
    windows = {(-1, -1)}
    if getattr(config, "sliding_window", None) is not None:
        full = "full_attention" in (getattr(config, "layer_types", None) or ())
        windows = {(config.sliding_window - 1, 0)} | (windows if full else set())
    assert {call["window_size"] for call in kernel.calls} == windows
    softcap = getattr(config, "attn_logit_softcapping", None) or 0.0
    assert {call["softcap"] for call in kernel.calls} == {softcap}


@pytest.mark.parametrize("architecture", ["llama", "mistral-window", "gemma2-softcap"])
def test_a_prompt_in_chunks(kernel, monkeypatch, architecture):
    both = runners(architecture, monkeypatch)
    prompt = random_ids(23, 0)
    for start in range(0, 23, 9):
        part = {"base": prompt[start : start + 9]}
        sdpa, flash = (r.extend(1, part)["base"] for r in both)
        torch.testing.assert_close(flash, sdpa, **TOLERANCE)
    assert {call["queries"] for call in kernel.calls} == {9, 5}


@pytest.mark.parametrize("architecture", ["llama", "qwen2-mixed-window", "gemma2-softcap"])
@pytest.mark.parametrize("length", [None, 40])
def test_every_second_row(kernel, architecture, length):
    """As an expert's rows lie between its anti-expert's; and with the fixed length of a graph."""
    register_attention()
    twins = [with_slot_attention(make(architecture)) for _ in range(2)]
    models = []
    for twin, flash, stride in zip(twins, (False, True), (1, 2), strict=True):
        cache = SlotCache(3 * stride, 40, torch.device("cpu"), flash=flash)
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
            sdpa, flash_logits = (m.forward(token_ids, length=length) for m in models)
            torch.testing.assert_close(flash_logits, sdpa, **TOLERANCE)
    assert kernel.calls


def test_what_lies_behind_a_row_is_not_read(kernel, monkeypatch):
    _, runner = runners("llama", monkeypatch)
    for slot, length in enumerate([9, 3]):
        prefill(runner, [slot], [random_ids(length, slot)])
    wanted = runner.forward(("base",), torch.tensor([[7], [8]]))["base"]
    cache = runner.models["base",].cache
    with torch.inference_mode():
        for layer in (*cache.keys, *cache.values):
            layer[0, 10:] = layer[1, 4:] = torch.nan
    assert torch.equal(runner.forward(("base",), torch.tensor([[7], [8]]))["base"], wanted)


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
    installed = ModuleType("flash_attn")
    installed.__spec__ = ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", installed)
    assert flash_missing(cuda, torch.bfloat16) is None
    assert flash_missing(cpu, torch.bfloat16) is not None
