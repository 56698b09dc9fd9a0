"""Prompts and parameters go to the device in one copy each, and nothing waits for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from proxytune_kernels.decoder import transfer
from proxytune_kernels.decoder.loop import DecodingLoop
from proxytune_kernels.decoder.runner import Runner
from proxytune_kernels.decoder.step import Stepper
from proxytune_kernels.params import SamplingParams
from tests.decoder.conftest import BACKEND
from tests.decoder.tape import NeverWaits, make_decoder
from tests.decoder.test_graphs import SPECULATIONS, check, requests
from tests.decoder.test_runner import make

NEEDS_KERNELS = pytest.mark.skipif(BACKEND == "reference", reason="the reference waits")


# PEFT asks a model for a property that transformers renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("pair", "speculation"),
    [("separate", "plain"), ("separate", "lookup"), ("batched", "coupled"), ("shared", "plain")],
)
def test_a_prefill_waits_for_nothing(near, lora_trio, monkeypatch, pair, speculation):
    """Prompts per role, together and in chunks, min_tokens; refills and moves of slots."""
    trio = lora_trio if pair == "shared" else near
    options: dict[str, Any] = {"speculation": SPECULATIONS[speculation], "prefill_chunk": 12}
    prompts, params = requests(6, 9)
    wanted = make_decoder(monkeypatch, trio, 4, pair=pair, **options).generate(prompts, params)
    decoder = make_decoder(monkeypatch, trio, 4, ahead=1, pair=pair, **options)
    watched = NeverWaits(monkeypatch)
    for owner, name in (
        (Runner, "prefill"), (Runner, "extend"), (Runner, "move"), (Runner, "release"),
        (Stepper, "prefill"), (Stepper, "move"), (Stepper, "run"),
    ):  # fmt: skip
        watched.watch(owner, name)
    check(decoder.generate(prompts, params), wanted)
    copies = {name: {count for n, count in watched.runs if n == name} for name, _ in watched.runs}
    assert copies.pop("prefill") == copies.pop("extend") == {1}
    assert copies.pop("run") == copies.pop("release") == {0}
    assert copies == {"move": {0}}


@NEEDS_KERNELS
@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: bool(x.any()),
        lambda x: torch.tensor([1], device=x.device),
    ],
    ids=["item", "tolist", "nonzero", "mask", "cpu", "to", "bool", "tensor"],
)
def test_what_waits_is_refused(monkeypatch, waits):
    """The test above would not pass for any prefill."""
    runner, prefill = Runner({"base": make("llama")}, 2, 16), Runner.prefill

    def waiting(self: Runner, *arguments: Any) -> Any:
        logits = prefill(self, *arguments)
        waits(logits["base"])
        return logits

    monkeypatch.setattr(Runner, "prefill", waiting)
    NeverWaits(monkeypatch).watch(Runner, "prefill")
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        runner.prefill([0, 1], {"base": [[3, 4], [5]]})


def test_one_pinned_copy_holds_them_all(monkeypatch):
    """Of any dtype and shape, each at a multiple of 16 bytes; a stand-in for a GPU."""
    log: list[Any] = []
    empty, to = torch.empty, Tensor.to

    def pinned(*arguments: Any, pin_memory: bool, **options: Any) -> Tensor:
        log.append(("pinned", pin_memory))
        return empty(*arguments, **options)

    def sent(self: Tensor, device: Any, *, non_blocking: bool) -> Tensor:
        log.append((str(device), non_blocking))
        return to(self, "cpu", copy=True)

    made = [
        torch.arange(6).view(2, 3), torch.tensor([True, False, True]), torch.tensor(1.5),
        torch.empty(0, dtype=torch.int32), torch.arange(5, dtype=torch.int32)[::2],
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", pinned)
        patch.setattr(Tensor, "to", sent)
        there = transfer.to_device(lambda: made, torch.device("cuda", 1))
    assert log == [("pinned", True), ("cuda:1", True)]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(made, there, strict=True))
    assert {tensor.data_ptr() % 16 for tensor in there} == {there[0].data_ptr() % 16}


@pytest.mark.parametrize("ahead", [0, 1])
def test_steps_run_on_while_others_prompts_do(near, monkeypatch, ahead):
    """A prompt's first token is not waited for either: the next step is launched behind it."""
    log: list[str] = []
    take, prefill, launch = DecodingLoop._take, Stepper.prefill, Stepper.run

    def logged(name: str, function: Any) -> Any:
        def run(self: Any, *arguments: Any) -> Any:
            log.append(name)
            return function(self, *arguments)

        return run

    def taken(self: DecodingLoop, pending: Any) -> Any:
        log.append("first tokens" if pending.drafts < 0 else "tokens")
        return take(self, pending)

    monkeypatch.setattr(Stepper, "prefill", logged("prompt", prefill))
    monkeypatch.setattr(Stepper, "run", logged("step", launch))
    monkeypatch.setattr(DecodingLoop, "_take", taken)
    decoder = make_decoder(monkeypatch, near, 2, ahead=ahead)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 9, 4)]
    wanted = make_decoder(monkeypatch, near, 1).generate([[5], [6], [7]], params)
    log.clear()
    check(decoder.generate([[5], [6], [7]], params), wanted)
    if ahead:
        # Two prompts; a slot is free again, and its next prompt runs behind a step in flight.
        assert log[:4] == ["prompt", "step", "first tokens", "step"]
        again = log.index("prompt", 1)
        assert log[again - 2 : again + 4] == [
            "step", "tokens", "prompt", "tokens", "step", "first tokens",
        ]  # fmt: skip
    else:
        assert log[:4] == ["prompt", "first tokens", "step", "tokens"]
