"""What is timed: our operators, the eager chain, torch.compile of it, transformers, FlashInfer.

None synchronises, so that a CUDA graph can hold it. FlashInfer, from its PyPI wheel, is optional
and compiles its kernels on first use, with nvcc, for a minute or more: ``python -m
benchmarks.gpu.peers`` does that in a process of its own (:class:`FlashInferBuild`), so that it can
run beside the contract suite and be given up on. Read against flashinfer-python 0.7.2.post1,
``flashinfer/sampling.py``: everything takes fp32, seed and offset as tensors for CUDA graphs, and
top-k before top-p as in vLLM.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import proxytune_kernels as ptk
from benchmarks.gpu import checks
from benchmarks.gpu.cases import BACKENDS, Case, Inputs
from benchmarks.gpu.checks import Sampler
from benchmarks.gpu.stages import run_process, tail
from benchmarks.harness.heads import logits_apart
from benchmarks.harness.logits import (
    ALPHA,
    FILTERS,
    Candidates,
    Filters,
    Logits,
    Peer,
    transformers_peer,
)

COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
"""Modes of torch.compile that are tried; graphs are captured around all providers alike."""

# Every shape is compiled on its own; at the default limit of 8 torch would fall back to eager.
_RECOMPILES = 256
# top_k_top_p_sampling_from_logits has another path, with another module to build, from here on.
_BUILD_VOCAB_SIZES = (1024, 131_072)
_FLASHINFER = "flashinfer-python"


@dataclass(frozen=True)
class Prepared:
    """What to time, and how to tell that it is right: ``check`` raises AssertionError."""

    call: Callable[[Inputs], Any]
    check: Callable[[Inputs], None]
    config: Mapping[str, Any] = field(default_factory=dict)


class Providers:
    """Makes providers; remembers which mode of torch.compile was the faster one.

    Args:
        probe: seconds of a call, by which that is decided.
        backends: of ours, by provider.
    """

    def __init__(
        self,
        probe: Callable[[Callable[[], object]], float],
        backends: Mapping[str, str] = BACKENDS,
    ) -> None:
        self._probe, self._backends = probe, backends
        self._microseconds: dict[str, dict[str, float]] = {}

    def prepare(self, case: Case, name: str, inputs: Inputs) -> Prepared:
        """A provider for a case, given one set of inputs to allocate outputs by; may compile."""
        if case.op == "sample_hidden":
            return _heads(case, name, inputs, self._backends["ours"])
        if name in self._backends:
            return _ours(case, name, inputs, self._backends[name])
        if case.op in ("score", "combine"):
            return self._dense(case, name, inputs)
        filters = FILTERS[case.filters]
        if name == "flashinfer":
            sampler = flashinfer_sampler(filters, inputs.token_ids.device)
        elif name == "torch.compile":
            chain = eager_peer(filters).sample
            sample, config = self._compile(f"sample {case.filters}", chain, inputs.logits)
            sampler = Sampler(name, sample, torch.manual_seed, config=config)
        else:
            peer = eager_peer(filters) if name == "eager" else transformers_peer(filters)
            sampler = Sampler(name, peer.sample, torch.manual_seed, peer)

        def call(i: Inputs) -> Any:
            drawn = sampler.sample(i.logits)
            return drawn if case.op == "sample" else accept(drawn, i.token_ids)

        def check(i: Inputs) -> None:
            checks.check_sampler(case.as_rows, sampler, i.logits)

        return Prepared(call, check, sampler.config)

    def _dense(self, case: Case, name: str, inputs: Inputs) -> Prepared:
        """``score`` and ``combine`` in torch, eager or compiled."""
        function: Callable[..., Tensor] = torch_score if case.op == "score" else combine
        count, config = 2 if case.op == "score" else 1, dict[str, Any]()
        if name == "torch.compile":
            function, config = self._compile(case.op, function, *inputs[:count])

        def call(i: Inputs) -> Tensor:
            return function(*i[:count])

        return Prepared(call, lambda i: checks.check_dense(case, name, i, call(i)), config)

    def _compile(
        self, key: str, function: Callable[..., Any], *arguments: Any
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """A function compiled in the faster mode of its key, and its configuration for results."""

        def microseconds(mode: str) -> float:
            run = partial(_compiled(function, mode), *arguments)
            run()
            return 1e6 * self._probe(run)

        if key not in self._microseconds:
            self._microseconds[key] = {mode: microseconds(mode) for mode in COMPILE_MODES}
        tried = self._microseconds[key]
        mode = min(tried, key=tried.__getitem__)
        return _compiled(function, mode), {"mode": mode, "mode_microseconds": tried}


def _compiled(function: Callable[..., Any], mode: str = "default") -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = _RECOMPILES
    return torch.compile(function, mode=mode, dynamic=False)


def combine(logits: Logits) -> Tensor:
    """Combined logits, fp32 [rows, V], in three kernels: torch widens mixed operands on the fly."""
    base, expert, anti = logits
    return torch.add(base, expert - anti.float(), alpha=ALPHA)


def torch_score(logits: Logits, token_ids: Tensor) -> Tensor:
    """Logprobs of given tokens [B, T] by torch's log-softmax, which writes all of [B, T, V]."""
    logprobs = combine(logits).log_softmax(-1)
    return logprobs.gather(-1, token_ids.view(-1, 1)).view(token_ids.shape)


def eager_distribution(logits: Logits, filters: Filters) -> Candidates:
    """The filtered distribution in the fewest torch operations that need no host.

    A top-k first where there is one; else a sort of the row for top_p, as vLLM's native sampler.
    """
    x = combine(logits).div_(filters.temperature)
    if filters.top_k:
        top, ids = x.topk(min(filters.top_k, x.shape[-1]), dim=-1)
    elif filters.top_p < 1:
        top, ids = x.sort(dim=-1, descending=True)
    else:
        return Candidates(x.softmax(-1), None)
    mass = top.softmax(-1)
    before = mass.cumsum(-1) - mass
    return Candidates(torch.where(before < filters.top_p, mass, 0.0), ids)


def draw_by_exponentials(candidates: Candidates) -> Tensor:
    """Argmax of p / e, e exponential: one pass, where multinomial checks its input first."""
    p: Tensor = candidates.probabilities
    column = (p / torch.empty_like(p).exponential_()).argmax(-1)
    if candidates.token_ids is None:
        return column
    return candidates.token_ids.gather(-1, column[:, None])[:, 0]


def eager_peer(filters: Filters) -> Peer:
    """The chain, operation by operation."""
    return Peer("eager", lambda logits: eager_distribution(logits, filters), draw_by_exponentials)


def accept(token_ids: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """Verification by draws at every position: keep drafts while they are what was drawn.

    Args:
        token_ids: [B * (k + 1)], drawn at each position.
        drafts: [B, k].

    Returns:
        The tokens to emit, [B, k + 1], -1 past the last, and how many are drafts, [B].
    """
    drawn = token_ids.view(drafts.shape[0], -1)
    accepted = (drawn[:, :-1] == drafts).cumprod(-1).sum(-1)
    positions = torch.arange(drawn.shape[1], device=drawn.device)
    return drawn.masked_fill(positions > accepted[:, None], -1), accepted


def _ours(case: Case, name: str, inputs: Inputs, backend: str) -> Prepared:
    """An operator of ours, with prepared parameters, into outputs of its own."""
    params = case.params(inputs.token_ids.device)
    given: dict[str, Any] = {"backend": backend}

    def call(i: Inputs) -> Any:
        base, expert, anti = i.logits
        if case.op == "sample":
            return ptk.sample(base, expert, anti, params, **given)
        if case.op == "combine":
            return ptk.combine(base, expert, anti, params.alpha, **given)
        base, expert, anti = map(case.shaped, i.logits)
        if case.op == "score":
            return ptk.score(base, expert, anti, i.token_ids, params.alpha, **given)
        mode: dict[str, Any] = {}
        if case.op == "verify-rejection":
            mode = {"mode": "rejection", "draft_logits": expert[:, :-1]}
        return ptk.verify(base, expert, anti, i.token_ids, params, **mode, **given)

    given["out"] = call(inputs)

    def check(i: Inputs) -> None:
        if case.op in ("score", "combine"):
            checks.check_dense(case, name, i, call(i), ours=True)
        elif case.op == "sample":
            sampler = Sampler(
                name, lambda x: call(Inputs(x, x[0])).token_ids, params.position.fill_
            )
            checks.check_sampler(case.as_rows, sampler, i.logits, backend)
            params.position.zero_()
        else:
            checks.check_verify(case, i, call(i))

    return Prepared(call, check, {"backend": backend})


def _heads(case: Case, name: str, inputs: Inputs, backend: str) -> Prepared:
    """``sample_hidden``, or three products by torch, which write their logits, then ``sample``."""
    params = case.params(inputs.token_ids.device)
    given: dict[str, Any] = {"params": params, "backend": backend}

    def call(i: Inputs) -> ptk.SampleOutput:
        assert i.heads is not None
        if name == "ours":
            return ptk.sample_hidden(*i.heads, **given)
        return ptk.sample(*logits_apart(i.heads, case.vocab_size), **given)

    given["out"] = call(inputs)

    def check(i: Inputs) -> None:
        checks.check_heads(case, name, i, params, call(i))

    return Prepared(call, check, {"backend": backend})


def flashinfer_missing() -> str | None:
    """Why FlashInfer can't be a peer, as far as can be told without compiling; None: it can."""
    if find_spec("flashinfer") is None:
        return f"{_FLASHINFER} is not installed (pip install {_FLASHINFER})"
    return None


def flashinfer_sampler(filters: Filters, device: torch.device | str) -> Sampler:
    """The combination compiled into one kernel, temperature included; then FlashInfer."""
    draw = _flashinfer_draw(filters)
    seed, offset = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
    scaled = _compiled(lambda logits: combine(logits) / filters.temperature)

    def sample(logits: Logits) -> Tensor:
        return draw(scaled(logits), seed, offset)

    config = {_FLASHINFER: version(_FLASHINFER)}
    return Sampler("flashinfer", sample, seed.fill_, config=config)


def _flashinfer_draw(filters: Filters) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Each filter by the function that FlashInfer's documentation names for it.

    Filters are scalars, which is the faster of the two forms.
    """
    sampling = import_module("flashinfer.sampling")
    name, values = "sampling_from_logits", list[float]()
    if filters.top_k:
        name, values = "top_k_top_p_sampling_from_logits", [filters.top_k, filters.top_p]
    elif filters.top_p < 1:
        name, values = "top_p_sampling_from_probs", [filters.top_p]
    function, softmax = getattr(sampling, name, None), getattr(sampling, "softmax", None)
    if function is None or softmax is None or "seed" not in inspect.signature(function).parameters:
        raise ImportError(
            f"{_FLASHINFER} {version(_FLASHINFER)} has no sampling.softmax, or no sampling.{name} "
            "that takes a seed: its draws can't be captured in a CUDA graph"
        )

    def draw(x: Tensor, seed: Tensor, offset: Tensor) -> Tensor:
        given = softmax(x) if name.endswith("from_probs") else x
        tokens: Tensor = function(given, *values, seed=seed, offset=offset)
        return tokens

    return draw


class FlashInferBuild:
    """FlashInfer's compilation, in the background; given up after ``limit_seconds`` from now."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self._ended: list[tuple[int | None, str]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.peers"]
        self._ended.append(run_process(command, self._limit))

    def wait(self) -> str | None:
        """Wait for the end or the limit. None: it is built; else why not."""
        self._thread.join()
        [(code, output)] = self._ended
        if code is None:
            return f"{_FLASHINFER} did not build within {self._limit:.0f} s"
        return None if code == 0 else f"{_FLASHINFER} does not build: {tail(output, 1) or code}"


def build_flashinfer() -> None:
    """Run each of FlashInfer's functions that the benchmark uses once: that compiles them."""
    seed = torch.zeros(1, dtype=torch.int64, device="cuda")
    for filters in FILTERS.values():
        for vocab_size in _BUILD_VOCAB_SIZES:
            _flashinfer_draw(filters)(torch.randn(2, vocab_size, device="cuda"), seed, seed)
    torch.cuda.synchronize()


if __name__ == "__main__":
    build_flashinfer()
