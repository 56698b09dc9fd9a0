"""The cases of ``python -m benchmarks.kernels`` under pytest-benchmark, to compare two revisions.

``pytest benchmarks --benchmark-autosave``, then at the other revision ``pytest benchmarks
--benchmark-compare``. The yardstick runs beside ours: what it moves by is the machine.
"""

import pytest
import torch

from benchmarks.harness.samplers import OpCase
from benchmarks.kernels import DEFAULT_CASES, PROVIDERS, make_calls


@pytest.mark.benchmark(min_rounds=5, max_time=0.3, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("case", DEFAULT_CASES, ids=lambda case: str(case).replace(" ", "-"))
@pytest.mark.parametrize("provider", PROVIDERS)
def test_sample(benchmark, provider: str, case: OpCase):
    torch.set_num_threads(1)
    benchmark.group = str(case)
    benchmark(make_calls(case, [provider])[provider])
