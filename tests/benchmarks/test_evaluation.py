"""benchmarks.evaluation: a difference is noticed, documents repeat, and what quality says."""

import math
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from benchmarks import evaluation
from benchmarks.evaluation import CONTEXT_TOKENS, compare, make_documents, quality
from benchmarks.harness.memory import in_fresh_process

SHIPPED = Path(str(files("proxytune_kernels") / "data" / "trio"))


def test_answers_that_rounding_does_not_explain_are_an_error():
    ours, theirs = [(-1.0, True), (-2.0, False)], [(-1.0, True), (-2.1, True)]
    assert compare(ours, theirs, [1, 2], 0.06)["differing_greedy"] == 1
    with pytest.raises(RuntimeError, match=r"differ by up to 0\.0[0-9]+ per token"):
        compare(ours, theirs, [1, 2], 0.04)


def test_documents_share_a_context_and_repeat():
    one, other = (make_documents("shipped", 12, 3) for _ in range(2))
    assert [[r.args for r in d] for d in one] == [[r.args for r in d] for d in other]
    for document in one:
        assert len({request.args[0] for request in document}) == 1
        words = len(document[0].args[0].split())
        assert CONTEXT_TOKENS[0] <= words <= CONTEXT_TOKENS[1]


def test_quality_is_what_the_probabilities_say():
    ids = torch.tensor([1, 1, 0])
    plain = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]).log()
    other = torch.tensor([[0.25, 0.75], [0.75, 0.25], [0.9, 0.1]]).log()
    found = quality(ids, plain, other)
    assert found["nll"] == pytest.approx(-(math.log(0.75) + math.log(0.25) + math.log(0.9)) / 3)
    # A tie counts for the lower id, as the argmax has it.
    assert found["agreement"] == pytest.approx(1 / 3)
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.25 * math.log(0.25 / 0.75) + 0.75 * math.log(0.75 / 0.25)
    assert found["divergence"] == pytest.approx((first + second) / 3, rel=1e-5)


def test_quantised_weights(records_of, tmp_path):
    shutil.copytree(SHIPPED / "base", tmp_path, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, tmp_path)
    arguments = ("--quantized", tmp_path, "--tokens", 16, "--repeats", 2)
    records, _ = records_of(evaluation.main, *arguments)
    assert tuple(record["variant"] for record in records) == evaluation.VARIANTS
    size = {record["variant"]: record["bytes"] for record in records}
    assert size["int4"] < size["int8"] < size["plain"]
    assert [q["perplexity"] for q in records[0]["quality"]] == [1, 1]
    nll = [q["nll"] for r in records[:2] for q in r["quality"]]
    wanted = [math.exp(after - before) for before, after in zip(nll[:2], nll[2:], strict=True)]
    assert [q["perplexity"] for q in records[1]["quality"]] == pytest.approx(wanted)
    assert all(q["divergence"] == 0 and q["agreement"] == 1 for q in records[0]["quality"])
    assert all(q["divergence"] > 0 for record in records[1:] for q in record["quality"])


def test_a_gguf_file_is_held_to_the_model_it_was_made_of(records_of, gguf_trio, tmp_path):
    gguf_trio.models["base"].save_pretrained(tmp_path)
    gguf_trio.load().tokenizer.save_pretrained(tmp_path)
    arguments = ("--quantized", tmp_path, "--gguf", gguf_trio.files["base"], "--tokens", 32)
    (plain, llama), _ = records_of(
        evaluation.main, *arguments, "--repeats", 1, "--dtype", "float32"
    )
    assert (plain["variant"], llama["variant"]) == ("plain", "llama.cpp")
    assert llama["bytes"] < plain["bytes"]
    assert all(0 < q["divergence"] < 0.01 and q["agreement"] > 0.9 for q in llama["quality"])
    assert llama["step_over_plain"]["median"] > 0


@pytest.mark.slow
def test_command(records_of, monkeypatch):
    peaks: list[dict[str, int]] = []

    def measured_once(*given):  # a process takes 6 s
        peaks.extend([] if peaks else [in_fresh_process(*given)])
        return peaks[0]

    monkeypatch.setattr(evaluation, "in_fresh_process", measured_once)
    (ours, hflm), _ = records_of(
        evaluation.main, "--trio", "shipped", "--documents", 10, "--choices", 2, "--batch-size", 4,
        "--threads", 1,
    )  # fmt: skip
    assert (ours["provider"], hflm["provider"], ours["requests"]) == ("ours", "HFLM", 20)
    assert 0 < ours["worst_difference_per_token"] < 1e-4
    assert ours["block_seconds"]["count"] == evaluation.BLOCKS
    assert hflm["speed_over_hflm"]["median"] == 1
    assert ours["memory"]["total_bytes"] > ours["memory"]["extra_bytes"] > 0
