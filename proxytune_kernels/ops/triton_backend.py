"""The operators on Triton: check the arguments, allocate what is returned, launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels.kernels import interpreted
from proxytune_kernels.ops import checks, head_checks
from proxytune_kernels.ops.table import (
    SAMPLE_OUTPUTS,
    TOP_OUTPUTS,
    VERIFY_OUTPUTS,
    empty_sample,
    empty_top,
    empty_verify,
)
from proxytune_kernels.params import RowParams
from proxytune_kernels.reference import SampleOutput, TopLogprobs, VerifyOutput
from proxytune_kernels.rng import STREAMS

if interpreted():
    from proxytune_kernels.kernels import interpreter

    interpreter.correct()

from proxytune_kernels.kernels.combine import launch_combine
from proxytune_kernels.kernels.common import inputs
from proxytune_kernels.kernels.sample import launch_sample
from proxytune_kernels.kernels.sample_hidden import launch_sample_hidden
from proxytune_kernels.kernels.score import launch_score
from proxytune_kernels.kernels.top_logprobs import TopOutputs, launch_top_logprobs
from proxytune_kernels.kernels.verify import VerifyOutputs, launch_coupled, launch_rejection
from proxytune_kernels.kernels.workspace import Outputs

_NUM_PARAMS = len(RowParams._fields)


def _on_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Launches go to the current device: make it the tensors'."""

    @wraps(run)
    def guarded(base: Tensor, *args: Any, **kwargs: Any) -> Any:
        if base.device.type != "cuda":
            return run(base, *args, **kwargs)
        with torch.cuda.device(base.device):
            return run(base, *args, **kwargs)

    return guarded


def _named(out: dict[str, Tensor], names: tuple[str, ...]) -> tuple[Tensor, ...]:
    return tuple(out[f"out_{name}"] for name in names)


def _results(drawn: tuple[Tensor, ...], top: tuple[Tensor, ...] | None = None) -> SampleOutput:
    values: dict[str, Any] = dict(zip(SAMPLE_OUTPUTS, drawn, strict=True))
    return SampleOutput(**values, top=None if top is None else TopLogprobs(*top))


def _sample(
    base: Tensor, expert: Tensor | None, anti: Tensor | None, rest: tuple[Any, ...],
    out: SampleOutput, num_top: int,
) -> None:  # fmt: skip
    row_params = RowParams(*rest[:_NUM_PARAMS])
    bias, allowed_mask, vocab_size, stream = rest[_NUM_PARAMS:]
    checks.logits("sample", base, expert, anti, 2, vocab_size)
    checks.row_params("sample", row_params, base)
    checks.constraints("sample", base, bias, allowed_mask, vocab_size)
    if stream not in STREAMS.values():
        raise ValueError(f"sample: stream must be one of {[*STREAMS.values()]}, got {stream!r}")
    checks.sample_out(out, base, num_top)
    logits = inputs(base, expert, anti, bias, allowed_mask)
    drawn = Outputs(*out[:5])
    tiles, workspace = launch_sample(logits, row_params, drawn, vocab_size, 1, stream)
    if out.top is not None:
        top = TopOutputs(*out.top)
        launch_top_logprobs(logits, row_params, tiles, workspace, drawn, top, vocab_size)


def _check_num_top(num_top: int) -> None:
    if not 1 <= num_top <= checks.MAX_TOP_LOGPROBS:
        wanted = f"[1, {checks.MAX_TOP_LOGPROBS}]"
        raise ValueError(f"sample: num_top must be in {wanted}, got {num_top}")


@_on_device
def sample(base: Tensor, expert: Any, anti: Any, *rest: Any) -> tuple[Tensor, ...]:
    """``proxytune::sample``."""
    out = empty_sample(base)
    _sample(base, expert, anti, rest, _results(out), 0)
    return out


@_on_device
def sample_out(base: Tensor, expert: Any, anti: Any, *rest: Any, **out: Tensor) -> None:
    """``proxytune::sample_out``."""
    _sample(base, expert, anti, rest, _results(_named(out, SAMPLE_OUTPUTS)), 0)


@_on_device
def sample_top(base: Tensor, expert: Any, anti: Any, *rest: Any) -> tuple[Tensor, ...]:
    """``proxytune::sample_top``."""
    num_top = rest[-1]
    _check_num_top(num_top)
    out, top = empty_sample(base), empty_top(base, num_top)
    _sample(base, expert, anti, rest[:-1], _results(out, top), num_top)
    return (*out, *top)


@_on_device
def sample_top_out(base: Tensor, expert: Any, anti: Any, *rest: Any, **out: Tensor) -> None:
    """``proxytune::sample_top_out``."""
    _check_num_top(rest[-1])
    results = _results(_named(out, SAMPLE_OUTPUTS), _named(out, TOP_OUTPUTS))
    _sample(base, expert, anti, rest[:-1], results, rest[-1])


def _sample_hidden(given: head_checks.Arguments, out: SampleOutput) -> None:
    drawn = Outputs(*out[:5])
    logits, tiles, workspace = launch_sample_hidden(
        given.heads, (given.bias, given.allowed_mask), given.params, drawn, given.vocab_size,
        given.stream,
    )  # fmt: skip
    if given.num_top > 0 and out.top is not None:
        top = TopOutputs(*out.top)
        launch_top_logprobs(logits, given.params, tiles, workspace, drawn, top, given.vocab_size)


@_on_device
def sample_hidden(base_hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """``proxytune::sample_hidden``."""
    given = head_checks.sample_hidden(base_hidden, *rest)
    out, top = empty_sample(base_hidden), empty_top(base_hidden, given.num_top)
    _sample_hidden(given, _results(out, top))
    return (*out, *top)


@_on_device
def sample_hidden_out(base_hidden: Tensor, *rest: Any, **out: Tensor) -> None:
    """``proxytune::sample_hidden_out``."""
    given = head_checks.sample_hidden(base_hidden, *rest)
    _sample_hidden(given, head_checks.outputs(given, out))


@_on_device
def combine_out(
    base: Tensor, expert: Any, anti: Any, alpha: Tensor, bias: Any, allowed_mask: Any,
    vocab_size: int, *, out_x: Tensor,
) -> None:  # fmt: skip
    """``proxytune::combine_out``."""
    checks.logits("combine", base, expert, anti, 2, vocab_size)
    checks.alpha("combine", alpha, base)
    checks.constraints("combine", base, bias, allowed_mask, vocab_size)
    checks.matrix_out("combine", out_x, (base.shape[0], vocab_size), base.device)
    logits = inputs(base, expert, anti, bias, allowed_mask)
    launch_combine(logits, alpha.contiguous(), out_x, vocab_size)


def combine(base: Tensor, *rest: Any) -> Tensor:
    """``proxytune::combine``."""
    x = base.new_empty((base.shape[0], rest[-1]), dtype=torch.float32)
    combine_out(base, *rest, out_x=x)
    return x


@_on_device
def score_out(
    base: Tensor, expert: Any, anti: Any, token_ids: Tensor, alpha: Tensor, vocab_size: int, *,
    out_logprobs: Tensor,
) -> None:  # fmt: skip
    """``proxytune::score_out``."""
    checks.logits("score", base, expert, anti, 3, vocab_size)
    checks.alpha("score", alpha, base)
    shape = (base.shape[0], base.shape[1])
    checks.ids("score", "token_ids", token_ids, shape, base.device)
    checks.matrix_out("score", out_logprobs, shape, base.device)
    logits = inputs(base, expert, anti)
    ids = token_ids.contiguous()
    launch_score(logits, ids, alpha.contiguous(), out_logprobs, vocab_size)


def score(base: Tensor, *rest: Any) -> Tensor:
    """``proxytune::score``."""
    logprobs = base.new_empty(base.shape[:2], dtype=torch.float32)
    score_out(base, *rest, out_logprobs=logprobs)
    return logprobs


@_on_device
def verify_out(
    base: Tensor, expert: Any, anti: Any, draft_token_ids: Tensor, draft_logits: Any, *rest: Any,
    **out: Tensor,
) -> None:  # fmt: skip
    """``proxytune::verify_out``."""
    row_params = RowParams(*rest[:_NUM_PARAMS])
    bias, allowed_mask, vocab_size, verify_mode = rest[_NUM_PARAMS:]
    checks.logits("verify", base, expert, anti, 3, vocab_size)
    drafts = (base.shape[0], base.shape[1] - 1)
    checks.ids("verify", "draft_token_ids", draft_token_ids, drafts, base.device)
    checks.row_params("verify", row_params, base)
    checks.constraints("verify", base, bias, allowed_mask, vocab_size)
    if verify_mode not in (0, 1):
        raise ValueError(f"verify: verify_mode must be 0 or 1, got {verify_mode!r}")
    mode = "coupled" if verify_mode == 0 else "rejection"
    checks.draft_logits(draft_logits, mode, drafts, vocab_size, base.device)
    results = VerifyOutput(*_named(out, VERIFY_OUTPUTS))
    checks.verify_out(results, base)
    logits = inputs(base, expert, anti, bias, allowed_mask)
    ids = draft_token_ids.contiguous()
    raw_logprobs = torch.empty_like(results.logprobs)  # the table has it not yet
    verified = VerifyOutputs(*results[:3], raw_logprobs, results.status)
    if mode == "coupled":
        launch_coupled(logits, ids, row_params, verified, vocab_size)
    else:
        launch_rejection(logits, ids, draft_logits, row_params, verified, vocab_size)


def verify(base: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """``proxytune::verify``."""
    out = empty_verify(base)
    names = [f"out_{name}" for name in VERIFY_OUTPUTS]
    verify_out(base, *rest, **dict(zip(names, out, strict=True)))
    return out
