"""The cases of ``python -m benchmarks.kernels`` under pytest-benchmark, to compare two revisions.

``pytest benchmarks --benchmark-autosave``, then at the other revision ``pytest benchmarks
--benchmark-compare``. The yardstick runs beside ours: what it moves by is the machine.
"""

import pytest
import torch

from benchmarks.op_cases import DEFAULT_CASES, PROVIDERS, OpCase, make_calls


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.benchmark(min_rounds=5, max_time=0.3, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("case", DEFAULT_CASES, ids=lambda case: str(case).replace(" ", "-"))
@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name != "torch.compile"])
def test_sample(benchmark, provider: str, case: OpCase):
    benchmark.group = str(case)
    call = make_calls(case, [provider], buffers=4)[provider]
    benchmark(call)


@pytest.mark.benchmark(min_rounds=5, max_time=0.3, warmup=True, warmup_iterations=1)
def test_sample_compiled(benchmark):
    """One case only: each compiles for some seconds."""
    benchmark.group = str(DEFAULT_CASES[0])
    benchmark(make_calls(DEFAULT_CASES[0], ["torch.compile"], buffers=4)["torch.compile"])
