"""A case's provider, ready to be checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import proxytune_kernels as ptk
from benchmarks.gpu import checks, head_units
from benchmarks.gpu.cases import (
    COMBINE,
    COMPILED,
    EAGER,
    FLASHINFER,
    HEADS,
    OURS,
    OWN,
    REJECTION,
    SAMPLE,
    SCORE,
    Case,
    Inputs,
)
from benchmarks.gpu.device import Device
from benchmarks.gpu.flashinfer_peer import make_sampler
from benchmarks.gpu.samplers import Compiler, Sampler, combine, eager_sampler, transformers_sampler
from benchmarks.logits import Logits
from benchmarks.op_cases import FILTERS
from benchmarks.peers import ALPHA

_PROBE_CALLS = 5


@dataclass(frozen=True)
class Prepared:
    """What to time, and how to tell that it is right."""

    call: Callable[[Inputs], Any]
    check: Callable[[Inputs], None]
    """Raises AssertionError."""
    config: Mapping[str, Any]


class Providers:
    """Makes providers; remembers which mode of torch.compile was faster."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._compiler = Compiler()

    def prepare(self, case: Case, name: str, inputs: Inputs) -> Prepared:
        """A provider for a case; may compile.

        Args:
            case: the work.
            name: of :data:`benchmarks.gpu.cases.PROVIDERS`.
            inputs: one set, to allocate outputs and choose by.

        Raises:
            ImportError: an optional package is missing.
        """
        if case.op == HEADS:
            return _heads(case, name, inputs, self._device)
        if name in OWN:
            return _ours(case, inputs, self._device, name)
        if case.op in (SCORE, COMBINE):
            return self._dense(case, name, inputs)
        sampler = self._sampler(case, name, inputs)

        def check(inputs: Inputs) -> None:
            checks.check_sampler(case.as_rows, sampler, inputs.logits)

        if case.op == SAMPLE:
            return Prepared(lambda i: sampler.sample(i.logits), check, sampler.config)

        def verify(inputs: Inputs) -> tuple[Tensor, Tensor]:
            return accept(sampler.sample(inputs.logits), inputs.token_ids)

        return Prepared(verify, check, sampler.config)

    def _sampler(self, case: Case, name: str, inputs: Inputs) -> Sampler:
        filters = FILTERS[case.filters]
        if name == FLASHINFER:
            return make_sampler(filters, self._device.torch_device)
        if name == EAGER:
            return eager_sampler(filters)
        if name != COMPILED:
            return transformers_sampler(filters)
        chain = eager_sampler(filters).sample
        sample, config = self._compile(f"sample {case.filters}", chain, inputs.logits)
        return Sampler(COMPILED, sample, torch.manual_seed, config=config)

    def _dense(self, case: Case, name: str, inputs: Inputs) -> Prepared:
        """``score`` and ``combine`` in torch, eager or compiled."""
        config: dict[str, Any] = {}
        if case.op == COMBINE:
            run: Callable[..., Tensor] = combine
            if name == COMPILED:
                run, config = self._compile(COMBINE, run, inputs.logits)
            return Prepared(
                lambda i: run(i.logits),
                lambda i: checks.check_combine(case, name, i, run(i.logits)),
                config,
            )
        score: Callable[..., Tensor] = torch_score
        if name == COMPILED:
            score, config = self._compile(SCORE, score, inputs.logits, inputs.token_ids)
        return Prepared(
            lambda i: score(i.logits, i.token_ids),
            lambda i: checks.check_score(case, name, i, score(i.logits, i.token_ids), ours=False),
            config,
        )

    def _compile(
        self, key: str, function: Callable[..., Any], *arguments: Any
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        def probe(compiled: Callable[..., Any]) -> float:
            run = partial(compiled, *arguments)
            run()
            return self._device.seconds(self._device.capture([run]), _PROBE_CALLS)

        return self._compiler.compile(key, function, probe)


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


def torch_score(logits: Logits, token_ids: Tensor) -> Tensor:
    """Logprobs of given tokens [B, T] by torch's log-softmax, which writes all of [B, T, V]."""
    logprobs = combine(logits).log_softmax(-1)
    return logprobs.gather(-1, token_ids.view(-1, 1)).view(token_ids.shape)


def _ours(case: Case, inputs: Inputs, device: Device, name: str) -> Prepared:
    backend = device.backend if name == OURS else device.cuda_backend
    if case.op == SAMPLE:
        return _own_sample(case, inputs, device, name, backend)
    if case.op == COMBINE:
        alphas = torch.full((case.batch_size,), ALPHA, device=device.torch_device)
        x = ptk.combine(*inputs.logits, alphas, backend=backend)

        def combined(i: Inputs) -> Tensor:
            return ptk.combine(*i.logits, alphas, backend=backend, out=x)

        return Prepared(combined, lambda i: checks.check_combine(case, name, i, combined(i)), {})
    if case.op == SCORE:
        return _own_score(case, inputs, device, backend)
    return _own_verify(case, inputs, device, backend)


def _heads(case: Case, name: str, inputs: Inputs, device: Device) -> Prepared:
    params, backend = case.params(device.torch_device), device.backend
    assert inputs.heads is not None
    make = head_units.fused if name == OURS else head_units.apart
    run = make(inputs.heads, params, backend)

    def call(inputs: Inputs) -> ptk.SampleOutput:
        assert inputs.heads is not None
        return run(inputs.heads)

    def check(inputs: Inputs) -> None:
        assert inputs.heads is not None
        what, rounded = f"{case}: {name}", name != OURS
        head_units.check_heads(what, inputs.heads, params, call(inputs), rounded=rounded)

    return Prepared(call, check, {"backend": backend})


def _own_sample(case: Case, inputs: Inputs, device: Device, name: str, backend: str) -> Prepared:
    params = case.params(device.torch_device)
    out = ptk.sample(*inputs.logits, params, backend=backend)

    def sample(logits: Logits) -> Tensor:
        return ptk.sample(*logits, params, backend=backend, out=out).token_ids

    def check(inputs: Inputs) -> None:
        sampler = Sampler(name, sample, params.position.fill_)
        checks.check_own_sampler(case.as_rows, sampler, inputs.logits, backend)
        params.position.zero_()

    return Prepared(lambda i: sample(i.logits), check, {"backend": backend})


def _shaped(case: Case, logits: Logits) -> tuple[Tensor, Tensor, Tensor]:
    base, expert, anti = (
        role.view(case.batch_size, case.positions, case.vocab_size) for role in logits
    )
    return base, expert, anti


def _own_score(case: Case, inputs: Inputs, device: Device, backend: str) -> Prepared:
    alphas = torch.full((case.batch_size,), ALPHA, device=device.torch_device)
    shape = (case.batch_size, case.positions)
    out = torch.empty(shape, device=device.torch_device)

    def score(i: Inputs) -> Tensor:
        roles = _shaped(case, i.logits)
        return ptk.score(*roles, i.token_ids, alphas, backend=backend, out=out)

    return Prepared(
        score,
        lambda i: checks.check_score(case, OURS, i, score(i), ours=True),
        {"backend": backend},
    )


def _own_verify(case: Case, inputs: Inputs, device: Device, backend: str) -> Prepared:
    params = case.params(device.torch_device)

    def verify(i: Inputs, out: ptk.VerifyOutput | None) -> ptk.VerifyOutput:
        base, expert, anti = _shaped(case, i.logits)
        rejection = case.op == REJECTION
        return ptk.verify(
            base,
            expert,
            anti,
            i.token_ids,
            params,
            mode="rejection" if rejection else "coupled",
            draft_logits=expert[:, :-1] if rejection else None,
            backend=backend,
            out=out,
        )

    out = verify(inputs, None)
    return Prepared(
        lambda i: verify(i, out),
        lambda i: checks.check_verify(case, i, verify(i, out)),
        {"backend": backend},
    )
