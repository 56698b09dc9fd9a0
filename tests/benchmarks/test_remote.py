"""benchmarks.remote: what is known, of logits whose answer can be written down."""

import pytest
import torch

from benchmarks import acceptance, remote


def test_of_known_on_four_tokens():
    log = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    logits = {"base": log, "expert": log.flip(1), "anti": log}
    # The whole: base x expert / anti, which is the expert; without the last two, 0.1 : 0.2.
    found = remote.of_known(logits, 2, "drop")
    assert found["coverage"].item() == pytest.approx(0.7)
    assert found["agreement"].item() == 0.0
    assert found["total_variation"].item() == pytest.approx(0.7)
    # The anti is the base: its tail is the base's own, and nothing is lost.
    found = remote.of_known(logits, 2, "anti")
    assert found["agreement"].item() == 1.0
    assert found["total_variation"].item() == pytest.approx(0.0, abs=1e-6)


def test_command(records_of, trio_directory, monkeypatch):
    monkeypatch.setattr(acceptance, "_PROMPT_LENGTH", 10)
    records, _ = records_of(
        remote.main, "--trio", trio_directory, "--kinds", "text", "--known", "3,100000",
        "--prompts", 2, "--tokens", 5,
    )  # fmt: skip
    assert [(r["known"], r["tail"]) for r in records] == [
        (known, tail) for known in (3, 100000) for tail in ("drop", "anti", "uniform")
    ]
    few, every = records[0], records[3:]
    assert few["coverage"] < 1 and few["total_variation"] > 0
    for record in every:
        assert record["coverage"] == pytest.approx(1.0, abs=1e-5)
        assert record["total_variation"] == pytest.approx(0.0, abs=1e-5)
        assert record["agreement"] == 1.0
