"""The public operators: check the arguments, resolve the backend, call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels import reference, rng
from proxytune_kernels.ops import checks
from proxytune_kernels.ops.backends import IMPLEMENTATIONS, resolve
from proxytune_kernels.ops.table import CUDA_OPERATORS, OPERATORS, empty_top
from proxytune_kernels.params import RowParams, SamplingParams
from proxytune_kernels.reference import SampleOutput, TopLogprobs, VerifyOutput

VERIFY_MODES = ("coupled", "rejection")

# By name, found once: torch.ops takes 0.1 us to look one up.
_OPERATORS = {name: getattr(torch.ops.proxytune, name) for name in OPERATORS}
_CUDA_OPERATORS = {name: getattr(torch.ops.proxytune_cuda, name) for name in CUDA_OPERATORS}


def _implementation(backend: str, base: Tensor, name: str) -> Callable[..., Any]:
    """What runs operator ``name`` for a backend, not the reference, on the device of ``base``."""
    if backend == "triton" and base.device.type != "cuda":  # Triton's interpreter
        return IMPLEMENTATIONS[name]
    return (_CUDA_OPERATORS if backend == "cuda" else _OPERATORS)[name]


# Checking every argument takes longer than a small call, and the C++ operators refuse what would
# be read out of bounds. So `sample` calls first, and finds the words for the error when refused.


def _width(base: Tensor, expert: Tensor | None, anti: Tensor | None) -> int:
    width = base.shape[-1]
    if expert is not None and anti is not None:
        width = min(width, expert.shape[-1], anti.shape[-1])
    return width


def _row_params(base: Tensor, params: Any, values: dict[str, Any]) -> RowParams:
    if params is None:
        return RowParams.make(base.shape[0], device=base.device, **values)
    if values:
        raise TypeError("params and single parameters")  # _check finds the words
    if isinstance(params, RowParams):
        return params
    requests = [params] * base.shape[0] if isinstance(params, SamplingParams) else params
    return RowParams.from_sampling_params(requests, device=base.device)


def sample(
    base: Tensor,
    expert: Tensor | None = None,
    anti: Tensor | None = None,
    params: RowParams | SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    bias: Tensor | None = None,
    allowed_mask: Tensor | None = None,
    vocab_size: int | None = None,
    stream: str = "sample",
    top_logprobs: int = 0,
    backend: str | None = None,
    out: SampleOutput | None = None,
    **values: Any,
) -> SampleOutput:
    """Combine, filter and draw one token per row, reading each logit once.

    Args:
        base, expert, anti: logits [B, V_role], bf16, fp16 or fp32, last dimension contiguous, any
            row stride, ``V_role >= vocab_size``. Without expert and anti: base alone.
        params: one value per row; :class:`RowParams` costs nothing to pass again.
        bias: fp32 [B, vocab_size], added to the combined logits.
        allowed_mask: int32 [B, ceil(vocab_size / 32)]; token i is allowed where bit ``i & 31`` of
            word ``i >> 5`` is set.
        vocab_size: agreed width; what lies past it is never read. The narrowest role's unless told.
        stream: which noise the draw uses: "sample", or "draft" for a drafter in rejection mode.
        top_logprobs: how many of the likeliest tokens to report in ``top``, whatever the filters
            keep, at most 128; 0 is off.
        backend: None for the fastest usable one; by name it runs or raises.
        out: tensors to write into, returned; ``top`` is written where top_logprobs is not 0.
        values: in place of ``params``: alpha, temperature, top_k, top_p, min_p, filter_order, seed
            and position, each a scalar or a tensor [B].

    Returns:
        :class:`SampleOutput`. Rows with nothing left or a parameter out of range have token -1 and
        a status bit.

    Raises:
        ValueError, TypeError: names the argument, what it got and what it wanted.
        RuntimeError: a backend asked for by name that can't run here.

    Example:
        >>> base, expert, anti = torch.randn(3, 2, 1000)
        >>> sample(base, expert, anti, alpha=1.0, top_p=0.9, seed=7).token_ids.shape
        torch.Size([2])

    Source: docs/contracts.md; Liu et al. 2024, arXiv 2401.08565.
    """
    checks.top_logprobs(top_logprobs)
    try:
        row_params = _row_params(base, params, values)
        width = _width(base, expert, anti) if vocab_size is None else vocab_size
        arguments = (base, expert, anti, *row_params, bias, allowed_mask, width,
                     rng.STREAMS[stream], top_logprobs)  # fmt: skip
        resolved = resolve(backend, base, "sample", width)
        if resolved != "reference" and out is None:
            results = _implementation(resolved, base, "sample")(*arguments)
            if not top_logprobs:
                return SampleOutput(*results[:5])
            return SampleOutput(*results[:5], TopLogprobs(*results[5:]))
        if resolved != "reference" and out is not None:
            top = out.top if top_logprobs else TopLogprobs(*empty_top(base, 0))
            _implementation(resolved, base, "sample_out")(
                *arguments, out_token_ids=out.token_ids, out_logprobs=out.logprobs,
                out_raw_logprobs=out.raw_logprobs, out_num_kept=out.num_kept,
                out_status=out.status, out_top_token_ids=top.token_ids,
                out_top_logprobs=top.logprobs,
            )  # fmt: skip
            return out
    except Exception:
        checks.sample(base, expert, anti, params, values, bias, allowed_mask, vocab_size, stream)
        checks.sample_out(out, base, top_logprobs)
        raise
    checks.sample(base, expert, anti, row_params, {}, bias, allowed_mask, vocab_size, stream)
    checks.sample_out(out, base, top_logprobs)
    x = _reference_x(base, expert, anti, row_params.alpha, bias, allowed_mask, width)
    return _into(out, reference.sample(x, row_params, stream, top_logprobs))


def combine(
    base: Tensor,
    expert: Tensor | None,
    anti: Tensor | None,
    alpha: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
    allowed_mask: Tensor | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Combined logits ``fma(alpha, expert - anti, base)``, fp32 [B, vocab_size].

    For engines with a sampler of their own. Arguments and errors as in :func:`sample`; alpha is a
    number or fp32 [B]; ``out`` is fp32 [B, vocab_size], last dimension contiguous. NaN and
    infinities pass through, except that ``-inf`` in base and disallowed tokens give ``-inf``.

    Example:
        >>> combine(torch.ones(1, 4), torch.ones(1, 4), torch.zeros(1, 4), 0.5).tolist()
        [[1.5, 1.5, 1.5, 1.5]]
    """
    vocab_size = checks.logits("combine", base, expert, anti, 2, vocab_size)
    alphas = checks.alpha("combine", alpha, base)
    checks.constraints("combine", base, bias, allowed_mask, vocab_size)
    if out is not None:
        checks.matrix_out("combine", out, (base.shape[0], vocab_size), base.device)
    resolved = resolve(backend, base, "combine", vocab_size)
    if resolved == "reference":
        x = _reference_x(base, expert, anti, alphas, bias, allowed_mask, vocab_size)
        return x if out is None else out.copy_(x)
    arguments = (base, expert, anti, alphas, bias, allowed_mask, vocab_size)
    if out is None:
        return _implementation(resolved, base, "combine")(*arguments)
    _implementation(resolved, base, "combine_out")(*arguments, out_x=out)
    return out


def score(
    base: Tensor,
    expert: Tensor | None,
    anti: Tensor | None,
    token_ids: Tensor,
    alpha: float | Tensor = 1.0,
    *,
    vocab_size: int | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Raw logprobs of given tokens under the combined logits, with no [B, T, V] temporary.

    Args:
        base, expert, anti: logits [B, T, V_role], as in :func:`sample`.
        token_ids: int64 [B, T]; outside [0, vocab_size) (padding) the result is NaN.
        alpha: a number or fp32 [B].
        out: fp32 [B, T], contiguous.

    Returns:
        fp32 [B, T]: log-softmax of the combined logits at the tokens.

    Raises:
        As :func:`sample`.

    Example:
        >>> score(torch.zeros(1, 2, 4), None, None, torch.tensor([[0, 3]])).exp().tolist()
        [[0.25, 0.25]]
    """
    vocab_size = checks.logits("score", base, expert, anti, 3, vocab_size)
    alphas = checks.alpha("score", alpha, base)
    checks.ids("score", "token_ids", token_ids, tuple(base.shape[:2]), base.device)
    if out is not None:
        checks.matrix_out("score", out, tuple(base.shape[:2]), base.device)
    resolved = resolve(backend, base, "score", vocab_size)
    if resolved == "reference":
        x = _reference_x(base, expert, anti, alphas, None, None, vocab_size)
        result = reference.score(x, token_ids)
        return result if out is None else out.copy_(result)
    arguments = (base, expert, anti, token_ids, alphas, vocab_size)
    if out is None:
        return _implementation(resolved, base, "score")(*arguments)
    _implementation(resolved, base, "score_out")(*arguments, out_logprobs=out)
    return out


def verify(
    base: Tensor,
    expert: Tensor | None,
    anti: Tensor | None,
    draft_token_ids: Tensor,
    params: RowParams | SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    mode: str = "coupled",
    draft_logits: Tensor | None = None,
    bias: Tensor | None = None,
    allowed_mask: Tensor | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    out: VerifyOutput | None = None,
    **values: Any,
) -> VerifyOutput:
    """Check k drafted tokens per row against the target, exactly; emit what decoding would.

    Args:
        base, expert, anti: logits [B, k + 1, V_role], position j after j drafted tokens.
        draft_token_ids: int64 [B, k]; -1 from where a row has no more drafts.
        params: as in :func:`sample`; ``position`` is that of the first drafted token.
        mode: "coupled": the drafter drew with the target's own noise (stream "sample"), the tokens
            are plain decoding's. "rejection": the drafter drew with stream "draft".
        draft_logits: [B, k, V_draft], what the drafter drew from; rejection only.
        bias, allowed_mask: as in :func:`sample`, with a dimension k + 1 after the first; they
            apply to the target alone.
        out: tensors to write into, returned.

    Returns:
        :class:`VerifyOutput`.

    Raises:
        As :func:`sample`.

    Example:
        >>> logits = torch.randn(1, 3, 100)
        >>> plain = [int(sample(logits[:, j], position=j).token_ids) for j in range(3)]
        >>> verify(logits, None, None, torch.tensor([plain[:2]])).token_ids.tolist() == [plain]
        True

    Source: docs/contracts.md, Speculative verification; Leviathan et al. 2023, arXiv 2211.17192;
    Daliri, Musco and Suresh 2024, arXiv 2408.07978.
    """
    vocab_size = checks.logits("verify", base, expert, anti, 3, vocab_size)
    drafts = (base.shape[0], base.shape[1] - 1)
    checks.ids("verify", "draft_token_ids", draft_token_ids, drafts, base.device)
    checks.params("verify", params, values)
    row_params = _row_params(base, params, values)
    checks.row_params("verify", row_params, base)
    checks.constraints("verify", base, bias, allowed_mask, vocab_size)
    if mode not in VERIFY_MODES:
        raise ValueError(f"verify: mode must be one of {list(VERIFY_MODES)}, got {mode!r}")
    checks.draft_logits(draft_logits, mode, drafts, vocab_size, base.device)
    if out is not None:
        checks.verify_out(out, base)
    resolved = resolve(backend, base, "verify", vocab_size, mode == "rejection")
    if resolved == "reference":
        x = _reference_x(base, expert, anti, row_params.alpha, bias, allowed_mask, vocab_size)
        draft_x = None if draft_logits is None else draft_logits[..., :vocab_size].float()
        result = reference.verify(x, draft_token_ids, row_params, mode, draft_x)
        return _into(out, result)
    arguments = (base, expert, anti, draft_token_ids, draft_logits, *row_params, bias,
                 allowed_mask, vocab_size, VERIFY_MODES.index(mode))  # fmt: skip
    if out is None:
        return VerifyOutput(*_implementation(resolved, base, "verify")(*arguments))
    _implementation(resolved, base, "verify_out")(
        *arguments, out_token_ids=out.token_ids, out_num_accepted=out.num_accepted,
        out_logprobs=out.logprobs, out_raw_logprobs=out.raw_logprobs, out_status=out.status,
    )  # fmt: skip
    return out


def _reference_x(
    base: Tensor, expert: Tensor | None, anti: Tensor | None, alpha: Tensor,
    bias: Tensor | None, allowed_mask: Tensor | None, vocab_size: int,
) -> Tensor:  # fmt: skip
    """Combined logits of [B, V] or [B, T, V] inputs, in the shape of base."""
    shape = (*base.shape[:-1], vocab_size)
    rows = [None if t is None else t[..., :vocab_size].reshape(-1, vocab_size)
            for t in (base, expert, anti, bias)]  # fmt: skip
    mask = None if allowed_mask is None else allowed_mask.reshape(-1, allowed_mask.shape[-1])
    if base.dim() == 3:
        alpha = alpha.repeat_interleave(base.shape[1])
    assert rows[0] is not None
    return reference.combine(rows[0], rows[1], rows[2], alpha, rows[3], mask).reshape(shape)


def _into(out: Any, result: Any) -> Any:
    if out is None:
        return result
    for target, value in zip(out, result, strict=True):
        if isinstance(value, Tensor):
            target.copy_(value)
        elif value is not None:
            _into(target, value)
    return out
