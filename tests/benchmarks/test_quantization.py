"""benchmarks.quantization: what it says of predictions is what their probabilities say."""

import math
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import quantization
from benchmarks.quantization import line, read_texts, sums

SHIPPED = Path(str(files("proxytune_kernels") / "data" / "trio"))


def test_sums_are_what_the_probabilities_say():
    ids = torch.tensor([1, 1, 0])
    plain = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]).log()
    other = torch.tensor([[0.25, 0.75], [0.75, 0.25], [0.9, 0.1]]).log()
    nll, agreement, divergence = sums(ids, plain, other)
    assert nll == pytest.approx(-(math.log(0.75) + math.log(0.25) + math.log(0.9)))
    # A tie counts for the lower id, as the argmax has it.
    assert agreement == 1
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.25 * math.log(0.25 / 0.75) + 0.75 * math.log(0.75 / 0.25)
    assert divergence == pytest.approx(first + second, rel=1e-5)


def test_pieces_count_by_their_tokens():
    count = np.array([10.0, 30.0])
    plain = np.array([[20.0, 10, 0], [30.0, 30, 0]])
    other = np.array([[21.0, 8, 2], [33.0, 30, 6]])
    said = line("Python", count, plain, other)
    assert (said["pieces"], said["tokens"]) == (2, 40)
    assert (said["nll"], said["agreement"], said["divergence"]) == (54 / 40, 38 / 40, 8 / 40)
    # Both of the pieces' own ratios are exp(1 / 10), and so is that of any draw of them.
    assert said["perplexity"] == pytest.approx([math.exp(0.1)] * 3)


def test_texts_are_of_the_length_and_number_that_were_asked_for():
    texts = read_texts(str(SHIPPED / "base"), 40, 3)
    assert {name: [len(ids) for ids, _ in texts[name]] for name in ("English", "Python")} == {
        "English": [40] * 3,
        "Python": [40] * 3,
    }
    assert len({tuple(ids.tolist()) for ids, _ in texts["Python"]}) == 3
    assert len(texts["questions"]) == len(texts["answers"]) == 60


def test_command(records_of, tmp_path):
    shutil.copytree(SHIPPED / "base", tmp_path, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, tmp_path)
    records, printed = records_of(
        quantization.main, tmp_path, "--tokens", 16, "--texts", 2, "--repeats", 2
    )
    assert tuple(record["variant"] for record in records) == quantization.VARIANTS
    size = {record["variant"]: record["bytes"] for record in records}
    assert size["int4"] < size["int8"] < size["plain"]
    plain, *others = (record["quality"] for record in records)
    assert all(q["perplexity"] == [1, 1, 1] and q["agreement"] == 1 for q in plain)
    assert all(q["divergence"] == 0 for q in plain)
    for own in others:
        assert all(q["divergence"] > 0 for q in own)
        wanted = [math.exp(q["nll"] - p["nll"]) for q, p in zip(own, plain, strict=True)]
        assert [q["perplexity"][0] for q in own] == pytest.approx(wanted)
    assert "English" in printed


def test_a_gguf_file_is_held_to_the_model_it_was_made_of(records_of, gguf_trio, tmp_path):
    gguf_trio.models["base"].save_pretrained(tmp_path)
    gguf_trio.load().tokenizer.save_pretrained(tmp_path)
    (plain, llama), _ = records_of(
        quantization.main, tmp_path, "--gguf", gguf_trio.files["base"], "--tokens", 32, "--texts",
        2, "--repeats", 1, "--dtype", "float32",
    )  # fmt: skip
    assert (plain["variant"], llama["variant"]) == ("plain", "llama.cpp")
    assert llama["bytes"] < plain["bytes"]
    assert all(0 < q["divergence"] < 0.01 and q["agreement"] > 0.9 for q in llama["quality"])
    assert llama["step_over_plain"]["median"] > 0
