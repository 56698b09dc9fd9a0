"""benchmarks.serving: how figures come from steps, the check, and the members served alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoModelForCausalLM

from benchmarks.serving import (
    Load,
    Run,
    check,
    exported,
    make_load,
    make_members,
    record_of,
)

SHAPE = 8, 4, 3, 0.0


def run(prompt: float, *steps: float) -> Run:
    return Run([], [prompt, *steps])


def test_ratios_are_paired_and_leave_out_the_step_of_the_prompts() -> None:
    # The second repeat ran on a machine twice as slow.
    alone = [run(1.0, 0.010, 0.010, 0.030), run(2.0, 0.020, 0.020, 0.060)]
    trio = [run(3.3, 0.033, 0.033, 0.9), run(6.6, 0.066, 0.066, 1.8)]
    record = record_of("a", {"trio": trio, "base": alone, "expert": alone, "anti": alone})
    for ratio in ("step_over_sum", "first_step_over_sum"):
        assert record[ratio]["median"] == pytest.approx(1.1)
        assert record[ratio]["p90"] == pytest.approx(1.1)
    assert record["step_ms"]["base"]["median"] == pytest.approx(15)
    assert record["first_step_ms"]["trio"]["median"] == pytest.approx(4950)


class Engine:
    """Gives tokens by alpha; without one, those of the base."""

    def __init__(self, off: int, on: int) -> None:
        self.off, self.on = off, on

    def decode(self, load: Load) -> Run:
        alphas = load.alphas or [0.0] * len(load.prompts)
        return Run([[self.on if alpha else self.off] for alpha in alphas], [])


@pytest.mark.parametrize(("off", "on", "passes"), [(1, 2, True), (3, 2, False), (1, 1, False)])
def test_the_check(off: int, on: int, passes: bool) -> None:
    engines: Any = {"base": Engine(1, 1), "trio": Engine(off, on)}
    load = make_load(1536, *SHAPE)
    if passes:
        check(engines, load)
    else:
        with pytest.raises(typer.Exit):
            check(engines, load)


def test_requests_differ_and_lie_in_the_vocabulary() -> None:
    load = make_load(300, *SHAPE)
    assert len({tuple(prompt) for prompt in load.prompts}) == 8
    assert all(3 <= i < 300 for prompt in load.prompts for i in prompt)
    assert len(set(load.alphas or ())) == 8


def test_members_alone_are_those_of_the_trio(tmp_path: Path) -> None:
    with exported("shipped") as trio:
        members = make_members(trio, tmp_path)
        for role, directory in members.items():
            config = json.loads((directory / "config.json").read_text())
            assert config["architectures"] == ["LlamaForCausalLM"]
            assert "proxy_tuning" not in config
            own = AutoModelForCausalLM.from_pretrained(trio if role == "base" else trio / role)
            alone = AutoModelForCausalLM.from_pretrained(directory)
            assert alone.lm_head.weight.equal(own.lm_head.weight)


def test_an_unknown_trio_is_named() -> None:
    with pytest.raises(typer.BadParameter, match="got 'nowhere'"), exported("nowhere"):
        pass
