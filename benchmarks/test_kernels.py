"""The cases of ``benchmarks.kernels`` under pytest-benchmark, to compare two revisions."""

import pytest
import torch

from benchmarks.kernels import DEFAULT_CASES, OURS, YARDSTICK, make_calls


@pytest.mark.benchmark(min_rounds=5, max_time=0.3, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("case", DEFAULT_CASES, ids=lambda case: str(case).replace(" ", "-"))
@pytest.mark.parametrize("provider", [OURS, YARDSTICK])
def test_sample(benchmark, provider, case):
    torch.set_num_threads(1)
    benchmark.group = str(case)
    benchmark(make_calls(case, [provider])[provider])
