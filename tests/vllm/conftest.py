"""vLLM in this process on a CPU, and tiny random trios that it opens."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

# Read when vLLM is imported. One process: engines can be looked into, and start in seconds. One
# thread: vLLM's own do not mix with OpenMP's (14 times slower with both). Nothing is compiled.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TORCHDYNAMO_DISABLE": "1",
}
# Only where vLLM is: elsewhere pytest reads this file among all tests, and theirs do compile.
if find_spec("vllm"):
    os.environ |= _ENVIRONMENT | os.environ

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 4,
    "enforce_eager": True,
    # Less than a prompt of the tests: prefill in chunks.
    "max_num_batched_tokens": 64,
}


@pytest.fixture(scope="session", autouse=True)
def imported() -> None:
    """Import vLLM; the notes on deprecation of what it imports are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import vllm.compilation.backends
        import vllm.entrypoints.llm
        import vllm.v1.engine.core
        import vllm.v1.worker.cpu_worker  # noqa: F401
        from vllm.plugins import load_general_plugins

        load_general_plugins()


def close(llm: Any) -> None:
    """End an engine of this process, so that the next one can start."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


@contextmanager
def kernels_registered() -> Iterator[None]:
    """Have an engine register vLLM's replacements of Triton kernels once, and quietly.

    To do so vLLM reads every object of every module: torch notes that one is deprecated, and it
    fails on numba's, which n-gram speculation has imported by the next time.
    """
    from vllm.triton_utils import dispatcher

    register, registered = dispatcher.register_kernels, bool(dispatcher._registry)

    def once(overrides: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            if not registered:
                register(overrides)

    with mock.patch.object(dispatcher, "register_kernels", once):
        yield


@pytest.fixture(scope="module")
def make_llm() -> Iterator[Callable[..., Any]]:
    """Open a directory with vLLM; the one before is closed, since a process holds one at a time."""
    from vllm import LLM

    opened: list[Any] = []

    def make(directory: str | Path, **settings: Any) -> Any:
        while opened:
            close(opened.pop())
        with kernels_registered():
            opened.append(LLM(str(directory), **{**ENGINE, **settings}))
        return opened[-1]

    yield make
    while opened:
        close(opened.pop())
