"""FlashInfer's samplers behind the combination; optional, from its PyPI wheel.

FlashInfer compiles its kernels on first use, with nvcc, for a minute or more. ``python -m
benchmarks.gpu.flashinfer_peer`` does that in a process of its own (:class:`Build`), so that it can
run beside the contract suite and be given up on.

Read against flashinfer-python 0.7.2.post1, ``flashinfer/sampling.py``: everything takes fp32, seed
and offset as tensors for CUDA graphs, and top-k before top-p as in vLLM.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version

import torch
from torch import Tensor

from benchmarks.gpu.cases import FLASHINFER
from benchmarks.gpu.process import run_process, tail
from benchmarks.gpu.samplers import Sampler, compiled_combination
from benchmarks.logits import Logits
from benchmarks.peers import Filters

_PACKAGE = "flashinfer-python"
# top_k_top_p_sampling_from_logits has another path, with another module to build, from here on.
_BUILD_VOCAB_SIZES = (1024, 131_072)


def missing() -> str | None:
    """Why FlashInfer can't be a peer, as far as can be told without compiling; None: it can."""
    if importlib.util.find_spec("flashinfer") is None:
        return f"{_PACKAGE} is not installed (pip install {_PACKAGE})"
    return None


def make_sampler(filters: Filters, device: str) -> Sampler:
    """The combination compiled into one kernel, temperature included; then FlashInfer.

    Each filter by the function that its documentation names for it, with the filters as scalars,
    which is the faster of its two forms.

    Raises:
        ImportError: not installed, or a release without what is needed here.
    """
    draw = _draw(filters)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    offset = torch.zeros(1, dtype=torch.int64, device=device)
    combine = compiled_combination(filters.temperature)

    def sample(logits: Logits) -> Tensor:
        return draw(combine(logits), seed, offset)

    return Sampler(FLASHINFER, sample, seed.fill_, config={_PACKAGE: version(_PACKAGE)})


def _draw(filters: Filters) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    sampling = import_module("flashinfer.sampling")  # optional: see missing()
    if filters.top_k:
        name = "top_k_top_p_sampling_from_logits"
    elif filters.top_p < 1:
        name = "top_p_sampling_from_probs"
    else:
        name = "sampling_from_logits"
    function, softmax = getattr(sampling, name, None), getattr(sampling, "softmax", None)
    if function is None or softmax is None or "seed" not in inspect.signature(function).parameters:
        raise ImportError(
            f"{_PACKAGE} {version(_PACKAGE)} has no sampling.softmax, or no sampling.{name} that "
            "takes a seed: its draws can't be captured in a CUDA graph"
        )
    if filters.top_k:
        return lambda x, seed, offset: function(
            x, filters.top_k, filters.top_p, seed=seed, offset=offset
        )
    if filters.top_p < 1:
        return lambda x, seed, offset: function(softmax(x), filters.top_p, seed=seed, offset=offset)
    return lambda x, seed, offset: function(x, seed=seed, offset=offset)


class Build:
    """FlashInfer's compilation, in the background.

    Args:
        limit_seconds: after which it is given up, counted from now.
    """

    def __init__(self, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self._ended: list[tuple[int | None, str]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.flashinfer_peer"]
        self._ended.append(run_process(command, self._limit))

    def wait(self) -> str | None:
        """Wait for the end or the limit. None: it is built; else why not."""
        self._thread.join()
        [(code, output)] = self._ended
        if code == 0:
            return None
        if code is None:
            return f"{_PACKAGE} did not build within {self._limit:.0f} s"
        return f"{_PACKAGE} does not build: {tail(output, 1) or f'exit code {code}'}"


def build_all() -> None:
    """Run each of FlashInfer's functions that the benchmark uses once: that compiles them."""
    seed = torch.zeros(1, dtype=torch.int64, device="cuda")
    for filters in (Filters(), Filters(top_p=0.9), Filters(top_k=50, top_p=0.9)):
        for vocab_size in _BUILD_VOCAB_SIZES:
            _draw(filters)(torch.randn(2, vocab_size, device="cuda"), seed, seed)
    torch.cuda.synchronize()


if __name__ == "__main__":
    build_all()
