"""benchmarks.generate: what its providers run, and how figures come from times."""

import json

import pytest

from benchmarks import generate
from benchmarks.generate import make_providers, speeds
from benchmarks.harness.agreement import check_greedy
from benchmarks.harness.decoding import GREEDY, Case
from benchmarks.harness.measure import Spent


def test_greedy_providers_agree(trio):
    providers = make_providers(trio, GREEDY, 4, 32)
    assert check_greedy(providers) == []
    tokens = [provider.generate([[5, 6, 7]], 9).token_ids for provider in providers]
    assert len(tokens[0][0]) == 9
    assert all(found == tokens[0] for found in tokens)


def test_ratios_are_paired_by_repeat():
    # The second repeat ran on a machine ten times as slow.
    seconds = {"naive": 3.0, "generate": 1.5, "decoder": 2.0}
    spent = {name: [Spent(s, 2 * s), Spent(10 * s, 20 * s)] for name, s in seconds.items()}
    found = speeds(Case(2, 5, 6), spent, "generate")
    assert found["speed_over"]["naive"]["p90"] == pytest.approx(2.0)
    assert found["processor_speed_over"]["decoder"]["p10"] == pytest.approx(4 / 3)
    assert found["tokens_per_second"]["median"] == pytest.approx((8 + 0.8) / 2)
    assert found["processor_ms_per_token"]["p10"] == pytest.approx(250 * 1.9)
    assert list(speeds(Case(2, 5, 6), spent, "naive")["speed_over"]) == ["decoder"]


def test_command(run_command, trio_directory, tmp_path):
    output = tmp_path / "lines.jsonl"
    arguments = ("--trio", trio_directory, "--lengths", "4:5", "--repeats", 1, "--output", output)
    done = run_command(generate.main, *arguments)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    names = ["naive", "generate-warpers", "generate", "decoder"]
    assert [(r["batch_size"], r["provider"]) for r in lines] == [
        (rows, name) for rows in (1, 4) for name in names
    ]
    by_name = {line["provider"]: line for line in lines}
    assert "Nothing" in by_name["generate-warpers"]["path"]["sampling"]
    assert by_name["naive"]["path"] == by_name["decoder"]["path"] == {}
    assert lines[0]["sampling"] == {"alpha": 1.0, "temperature": 0.7, "top_p": 0.9}
    assert run_command(generate.main, "--lengths", "own:8").exit_code == 2
