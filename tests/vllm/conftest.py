"""vLLM in this process on a CPU, and tiny random trios that it opens."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Read when vLLM is imported. One process: engines can be looked into, and start in seconds. One
# thread: vLLM's own do not mix with OpenMP's (14 times slower with both). Nothing is compiled.
for name, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TORCHDYNAMO_DISABLE": "1",
}.items():
    os.environ.setdefault(name, value)

# What vLLM and what it imports warn of at import is not ours to mend.
IMPORT_WARNINGS = ("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 4,
    "enforce_eager": True,
    # Less than a prompt of the tests: prefill in chunks.
    "max_num_batched_tokens": 64,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for warning in IMPORT_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


def close(llm: Any) -> None:
    """End an engine of this process, so that the next one can start."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def make_llm() -> Iterator[Callable[..., Any]]:
    """Open a directory with vLLM; the one before is closed, since a process holds one at a time."""
    from vllm import LLM

    opened: list[Any] = []

    def make(directory: str | Path, **settings: Any) -> Any:
        while opened:
            close(opened.pop())
        opened.append(LLM(str(directory), **{**ENGINE, **settings}))
        return opened[-1]

    yield make
    while opened:
        close(opened.pop())
