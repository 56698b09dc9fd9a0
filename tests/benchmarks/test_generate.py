"""benchmarks.generate: what its providers run, and how figures come from times."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import generate
from benchmarks.decode_timing import Case
from benchmarks.generate import check_greedy, make_providers, print_verdicts, records, time_case
from benchmarks.providers import GREEDY, Generation, Sampling
from proxytune_kernels import Trio

CASE = Case(2, 5, 6)


@pytest.fixture(scope="module")
def providers(trio):
    return make_providers(trio, Sampling(), 4, 32)


def test_each_provider_goes_its_own_way(trio, providers):
    times = time_case(providers, trio, CASE, 2)
    made = {r["provider"]: r for r in records(CASE, times, providers)}
    assert list(made) == ["naive", "generate-warpers", "generate", "custom-generate", "decoder"]
    assert "Nothing is not in the op" in made["generate-warpers"]["path"]["sampling"]
    assert made["generate-warpers"]["path"]["cache"].startswith("dynamic")
    assert made["generate"]["path"]["sampling"].startswith("proxytune_kernels.sample on the three")
    assert made["generate"]["path"]["cache"].startswith("rows")
    assert "Decoder" in made["custom-generate"]["path"]["sampling"]
    assert made["naive"]["path"] == made["decoder"]["path"] == {}
    for record in made.values():
        assert (record["batch_size"], record["prompt_length"], record["output_length"]) == (2, 5, 6)
        assert record["tokens_per_second"]["count"] == record["repeats"] == 2


def test_all_give_as_many_tokens_as_they_are_asked_for(trio, providers):
    for provider in providers:
        for greedy in (False, True):
            rows = provider.generate([[5, 6, 7], [8, 9, 10]], 9, greedy=greedy).token_ids
            assert [len(row) for row in rows] == [9, 9]


def test_greedy_providers_agree_and_the_check_passes(trio, capsys):
    providers = make_providers(trio, GREEDY, 4, 32)
    check_greedy(providers, trio)
    assert "Greedy tokens agree: 4 prompts x 16 tokens, naive, generate-warpers" in (
        capsys.readouterr().out
    )
    tokens = [provider.generate([[5, 6, 7]], 9).token_ids for provider in providers]
    assert all(found == tokens[0] for found in tokens)


class Wrong:
    name = "wrong"
    set_up_seconds = 0.0

    def __init__(self, trio: Trio) -> None:
        self.trio = trio
        self.roles: tuple[str, ...] = trio.roles

    def generate(self, prompts, max_tokens, *, greedy=False):
        return Generation([[3] * max_tokens] * len(prompts), [[1.0] * max_tokens] * len(prompts))


def test_other_tokens_end_the_run(trio, providers, capsys):
    with pytest.raises(typer.Exit):
        check_greedy([providers[0], Wrong(trio)], trio)
    assert "nothing is timed" in capsys.readouterr().out


def test_ratios_are_paired_by_repeat(trio, providers):
    # The second repeat ran on a machine ten times as slow.
    seconds = {"naive": 3.0, "generate-warpers": 4.0, "generate": 1.5, "custom-generate": 2.0,
               "decoder": 2.0}  # fmt: skip
    times = {name: [(s, 2 * s), (10 * s, 20 * s)] for name, s in seconds.items()}
    made = {r["provider"]: r for r in records(CASE, times, providers)}
    assert made["generate"]["speed_over"]["naive"]["p90"] == pytest.approx(2.0)
    assert made["generate"]["processor_speed_over"]["decoder"]["p10"] == pytest.approx(4 / 3)
    assert made["generate"]["tokens_per_second"]["median"] == pytest.approx((8 + 0.8) / 2)
    assert made["naive"]["processor_ms_per_token"]["p10"] == pytest.approx(500 * 1.9)
    assert list(made["naive"]["speed_over"]) == ["decoder"]


@pytest.mark.parametrize(("speed", "verdict"), [(1.5, "met"), (1.49, "missed")])
def test_verdicts(capsys, speed, verdict):
    summary = {"median": speed, "p10": 1.0, "p90": 2.0}
    row: dict[str, Any] = {"provider": "generate", "batch_size": 1, "prompt_length": 8,
                           "output_length": 128, "speed_over": {"naive": summary}}  # fmt: skip
    print_verdicts([row, {**row, "batch_size": 4}, {**row, "provider": "naive"}])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 and lines[0].endswith(f"target 1.5: {verdict}.")


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(generate.main)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command(command, trio_directory, tmp_path):
    output = tmp_path / "lines.jsonl"
    done = command("--trio", trio_directory, "--batch-sizes", "1,2", "--lengths", "4:5",
                   "--repeats", 1, "--dtype", "float32", "--output", output)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "custom-generate" in done.output
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["batch_size"], line["provider"]) for line in lines[:2]] == [
        (1, "naive"), (1, "generate-warpers")
    ]  # fmt: skip
    assert len(lines) == 10
    assert all(line["benchmark"] == "generate" for line in lines)
    assert lines[0]["sampling"] == {"alpha": 1.0, "temperature": 0.7, "top_p": 0.9}


@pytest.mark.parametrize("arguments", [("--lengths", "own:8"), ("--trio", "nowhere")])
def test_a_mistake_is_one_sentence(command, arguments):
    done = command(*arguments)
    assert done.exit_code == 2
    assert arguments[0].strip("-") in done.output
