from __future__ import annotations

import math
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from benchmarks.quantization import PLAIN, VARIANTS, measure, quality

SHIPPED = Path(str(files("proxytune_kernels") / "data" / "trio"))


def test_quality_is_what_the_probabilities_say():
    ids = torch.tensor([0, 1, 1])
    plain = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]).log()
    other = torch.tensor([[0.25, 0.75], [0.75, 0.25], [0.9, 0.1]]).log()
    row = quality("text", ids, plain, other)
    assert row.tokens == 3
    # Token 1 follows twice; nothing follows the last.
    assert row.nll == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    # A tie counts for the lower id, as the argmax has it.
    assert row.agreement == pytest.approx(1 / 3)
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.25 * math.log(0.25 / 0.75) + 0.75 * math.log(0.75 / 0.25)
    assert row.divergence == pytest.approx((first + second) / 3, rel=1e-5)


def test_every_variant_is_measured_beside_the_plain_model(tmp_path):
    pytest.importorskip("torchao")
    shutil.copytree(SHIPPED / "base", tmp_path, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, tmp_path)
    records = measure(str(tmp_path), "bfloat16", ("int8", "int8+head", "int4"), 16, 2)
    assert [record["variant"] for record in records] == [PLAIN, "int8", "int8+head", "int4"]
    size = {record["variant"]: record["bytes"] for record in records}
    # The embedding is tied to the output layer: quantised apart it comes on top.
    assert size["int4"] < size["int8"] < size["int8+head"] < size[PLAIN]
    assert all(q["divergence"] == 0 and q["agreement"] == 1 for q in records[0]["quality"])
    assert all(q["divergence"] > 0 for record in records[1:] for q in record["quality"])
    assert all(q["tokens"] == 16 for record in records for q in record["quality"])
    assert all(record["step"]["count"] == 2 for record in records)
    assert set(VARIANTS) > {record["variant"] for record in records}
