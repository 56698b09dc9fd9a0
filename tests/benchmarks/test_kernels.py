"""benchmarks.kernels: a run at small sizes, and wrong heads are caught."""

import pytest
import torch

import proxytune_kernels as ptk
from benchmarks import kernels
from benchmarks.harness.samplers import OpCase, check_heads, random_heads


@pytest.mark.slow
def test_command(run_command, records_of):
    records, _ = records_of(
        kernels.main, "--vocab-sizes", 32000, "--filters", "none,top_p", "--repeats", 1,
        "--providers", "ours,softmax only,torch",
    )  # fmt: skip
    times = [(r["filters"], r["provider"]) for r in records if r["op"] == "sample"]
    assert times == [(f, p) for f in ("none", "top_p") for p in ("ours", "softmax only", "torch")]
    assert all(r["microseconds"]["median"] > 0 for r in records)
    result = run_command(kernels.main, "--kinds", "round")
    assert result.exit_code == 2
    assert "--kinds" in result.output


def test_heads(records_of):
    records, _ = records_of(
        kernels.main, "--heads", "shipped", "--dtypes", "bfloat16", "--batch-sizes", 2,
        "--repeats", 1, "--no-accuracy",
    )  # fmt: skip
    assert [r["provider"] for r in records] == [kernels.FUSED, kernels.APART, kernels.PRODUCTS]
    heads = random_heads("shipped", torch.bfloat16, 64)
    found = kernels.errors_of(heads, 1536)
    assert found[kernels.FUSED]["largest_error"] <= found["bound"]
    assert found[kernels.FUSED]["rms_error"] < found[kernels.APART]["rms_error"] / 100


def test_wrong_heads_are_caught():
    heads, params = random_heads("shipped", torch.bfloat16, 4), OpCase(batch_size=4).row_params()
    base, expert, anti = heads
    check_heads(heads, 1536, params, ptk.sample_hidden(*heads, params=params), 2)
    swapped = ptk.sample_hidden(base, anti, expert, params=params)
    with pytest.raises(AssertionError, match="sample_hidden"):
        check_heads(heads, 1536, params, swapped, 2)


def test_statistics(run_command):
    result = run_command(kernels.main, "--statistics", "shipped")
    assert result.exit_code == 0, result.output
    assert "entropy, nats" in result.output
