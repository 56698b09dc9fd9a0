"""The public operators: each resolves its backend, and calls it.

Checking every argument takes longer than a small call, and what a backend runs checks them too. So
the public functions call the backend first; when it refuses, the checks find the words for the
error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels.heads import Head
from proxytune_kernels.ops import checks
from proxytune_kernels.ops.backends import implementation, resolve
from proxytune_kernels.ops.checks import VERIFY_MODES
from proxytune_kernels.ops.table import OPERATORS
from proxytune_kernels.params import Edits, RowParams, SamplingParams
from proxytune_kernels.reference import Attribution, SampleOutput, TopLogprobs, VerifyOutput
from proxytune_kernels.rng import STREAMS

Params = RowParams | SamplingParams | Sequence[SamplingParams] | None
"""What stands for the rows' parameters."""


_SAMPLE_OUT = OPERATORS["sample"].out_names
_NONE = (None,) * len(RowParams._fields)
_NO_EDITS = (None,) * len(Edits._fields)


def rows_of(op: str, base: Tensor, params: Any, *singles: Any) -> RowParams:
    """The rows' parameters: as given, or made of single ones, of which None has its default."""
    if isinstance(params, RowParams) and singles == _NONE:
        return params
    values = zip(RowParams._fields, singles, strict=True)
    given = {name: value for name, value in values if value is not None}
    if params is None:
        return RowParams.make(base.shape[0], device=base.device, **given)
    if given:
        raise TypeError(
            f"{op}: give params or single parameters, not both; got params and {sorted(given)}"
        )
    checks.row_params(op, params, base.shape[0], base.device)
    requests = [params] * base.shape[0] if isinstance(params, SamplingParams) else params
    return RowParams.from_sampling_params(requests, device=base.device)


def _refuse_bool(value: Any) -> None:
    # torch takes one for an integer; the checks find the words.
    if value is True or value is False:
        raise TypeError("a bool for an integer")


def _width(base: Tensor, expert: Tensor | None, anti: Tensor | None, vocab_size: int | None) -> int:
    _refuse_bool(vocab_size)
    if vocab_size is not None:
        return vocab_size
    width = base.size(-1)
    if expert is not None and anti is not None:
        width = min(width, expert.size(-1), anti.size(-1))
    return width


def _refuse_gradient(result: Tensor) -> None:
    # torch marks results of operators without a gradient where one is asked for. A look at the
    # arguments takes ten times as long.
    if result.requires_grad:
        raise ValueError("a gradient is asked for")  # checks.no_gradient finds the words


def _refuse_gradients(*read: Tensor | None) -> None:
    # Outputs of the caller are not marked.
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in read):
        raise ValueError("a gradient is asked for")


def _sampled(results: Any, top_logprobs: int, attributed: Tensor | None = None) -> SampleOutput:
    *drawn, top_token_ids, tops, columns = results
    top = TopLogprobs(top_token_ids, tops) if top_logprobs else None
    attribution = None if attributed is None else Attribution(columns)
    return SampleOutput._make((*drawn, top, attribution))


def _attributed(attribution: Any, base: Tensor) -> Tensor | None:
    """The tokens that attribution is asked of, -1 for the one drawn; None where it is not."""
    if attribution is True:
        return torch.full((base.shape[0],), -1, device=base.device)
    return None if attribution is False else attribution


def _into(out: SampleOutput, top_logprobs: int) -> dict[str, Tensor]:
    """``out`` as keywords of the sampling operators' twins; without top_logprobs no top of it."""
    written = out[:-2]
    if top_logprobs:
        written += out.top.token_ids, out.top.logprobs  # type: ignore[union-attr, assignment]
    return dict(zip(_SAMPLE_OUT, written))  # noqa: B905  # shorter without top


def sample(
    base: Tensor,
    expert: Tensor | None = None,
    anti: Tensor | None = None,
    params: Params = None,
    *,
    alpha: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    filter_order: str | Tensor | None = None,
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
    bias: Tensor | None = None,
    allowed_mask: Tensor | None = None,
    edits: Edits | None = None,
    vocab_size: int | None = None,
    noise_stream: str = "sample",
    top_logprobs: int = 0,
    attribution: bool | Tensor = False,
    backend: str | None = None,
    out: SampleOutput | None = None,
) -> SampleOutput:
    """Combine, filter and draw one token per row, reading each logit once.

    Args:
        base, expert, anti: logits [B, V_role], bf16, fp16 or fp32, last dimension contiguous, any
            row stride, ``V_role >= vocab_size``. Without expert and anti: base alone.
        params: one value per row; :class:`RowParams` costs nothing to pass again.
        alpha, temperature, top_k, top_p, min_p, filter_order, seed, position: in place of
            ``params``, each a scalar or a tensor [B]; see :class:`SamplingParams` for their ranges
            and defaults. Seed and position are 0 unless told.
        bias: fp32 [B, vocab_size], added to the combined logits.
        allowed_mask: int32 [B, ceil(vocab_size / 32)]; token i is allowed where bit ``i & 31`` of
            word ``i >> 5`` is set.
        edits: penalties and biases of some tokens of each row; see :class:`Edits`.
        vocab_size: agreed width; what lies past it is never read. The narrowest role's unless told.
        noise_stream: which noise the draw uses: "sample", or "draft" for a drafter in rejection
            mode.
        top_logprobs: how many of the likeliest tokens to report in ``top``, whatever the filters
            keep, at most 128; 0 is off.
        attribution: report in ``attribution`` what steering did to each row, of the token drawn;
            int64 [B] in place of True: of these tokens, -1 for the one drawn. With it ``out`` is
            None.
        backend: None for the fastest usable one; by name it runs or raises.
        out: tensors to write into, returned; ``top`` is written where top_logprobs is not 0. They
            share no memory with arguments, or with one another.

    Returns:
        :class:`SampleOutput`. Rows with nothing left or a parameter out of range have token -1 and
        a status bit.

    Raises:
        ValueError, TypeError: names the argument, what it got and what it wanted. Also where a
            tensor requires grad and gradients are recorded: no operator has one.
        RuntimeError: a backend asked for by name that can't run here.

    Example:
        >>> base, expert, anti = torch.randn(3, 2, 1000)
        >>> sample(base, expert, anti, alpha=1.0, top_p=0.9, seed=7).token_ids.shape
        torch.Size([2])

    Source: docs/contracts.md; Liu et al. 2024, arXiv 2401.08565.
    """
    try:
        _refuse_bool(top_logprobs)
        rows = rows_of(
            "sample", base, params,
            alpha, temperature, top_k, top_p, min_p, filter_order, seed, position,
        )  # fmt: skip
        width = _width(base, expert, anti, vocab_size)
        attributed = _attributed(attribution, base)
        op = "sample" if attributed is None else "attribution"
        arguments = (
            base, expert, anti, *rows, bias, allowed_mask, *(edits or _NO_EDITS), width,
            STREAMS[noise_stream], top_logprobs, attributed,
        )  # fmt: skip
        resolved = resolve(backend, base, op, width, edited=edits is not None)
        if out is None:
            results = implementation(resolved, "sample", base)(*arguments)
            _refuse_gradient(results[1])
            return _sampled(results, top_logprobs, attributed)
        if attributed is not None:
            raise ValueError("attribution")  # checks.attribution finds the words
        _refuse_gradients(base, expert, anti, rows.alpha, bias)
        written = _into(out, top_logprobs)
        implementation(resolved, "sample_out", base)(*arguments, **written)
        return out
    except Exception:
        checks.sample(
            base, expert, anti, params, bias, allowed_mask, edits, vocab_size, noise_stream,
            top_logprobs, None if isinstance(attribution, bool) else attribution,
        )  # fmt: skip
        checks.attribution(attribution, out)
        read = dict(
            base=base, expert=expert, anti=anti, params=params, alpha=alpha,
            temperature=temperature, bias=bias, allowed_mask=allowed_mask, edits=edits,
        )  # fmt: skip
        checks.no_gradient("sample", read)
        checks.out("sample", out, base, read, top_logprobs=top_logprobs)
        raise


def sample_hidden(
    base: Head,
    expert: Head | None = None,
    anti: Head | None = None,
    params: Params = None,
    *,
    alpha: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    filter_order: str | Tensor | None = None,
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
    bias: Tensor | None = None,
    allowed_mask: Tensor | None = None,
    edits: None = None,
    vocab_size: int | None = None,
    noise_stream: str = "sample",
    top_logprobs: int = 0,
    backend: str | None = None,
    out: SampleOutput | None = None,
) -> SampleOutput:
    """Draw one token per row from hidden states and lm_head weights: heads and ``sample`` in one.

    The heads' products are accumulated and combined in fp32; the roles' logits are never written.
    docs/heads.md says where this is faster than three heads and ``sample``, and where it is not.

    Args:
        base, expert, anti: :class:`proxytune_kernels.Head` of each role; ``hidden`` [B, H_role] and
            ``weight`` [V_role, H_role] are of one dtype, any row stride, last dimension
            contiguous. Without expert and anti: base alone.
        vocab_size: agreed width; weights past it are never read. The narrowest role's unless told.
        edits: refused; for these, give the heads' logits to :func:`proxytune_kernels.sample`.
        params and all others: as in :func:`proxytune_kernels.sample`.

    Returns:
        As :func:`proxytune_kernels.sample` of the combined logits x; x itself is right to the
        bound of docs/heads.md, and may differ from another backend's within it.

    Raises:
        As :func:`proxytune_kernels.sample`.

    Example:
        >>> hidden, weight = torch.randn(2, 64), torch.randn(1000, 64)
        >>> sample_hidden(Head(hidden, weight), top_p=0.9, seed=7).token_ids.shape
        torch.Size([2])

    Source: docs/heads.md; docs/contracts.md.
    """
    op = "sample_hidden"
    if edits is not None:
        raise checks.no_edits(op, "sample does, of the heads' logits")
    try:
        _refuse_bool(top_logprobs)
        _refuse_bool(vocab_size)
        hidden = base.hidden
        rows = rows_of(
            op, hidden, params,
            alpha, temperature, top_k, top_p, min_p, filter_order, seed, position,
        )  # fmt: skip
        states = (None if head is None else head.hidden for head in (base, expert, anti))
        _refuse_gradients(*states, rows.alpha, bias)
        width = vocab_size
        if width is None:
            width = min(len(head.weight) for head in (base, expert, anti) if head is not None)
        absent = (None,) * len(base)
        arguments = (
            *base, *(expert or absent), *(anti or absent), *rows, bias, allowed_mask, width,
            STREAMS[noise_stream], top_logprobs,
        )  # fmt: skip
        resolved = resolve(backend, hidden, op, width)
        with torch.no_grad():  # weights are parameters
            if out is None:
                return _sampled(implementation(resolved, op, hidden)(*arguments), top_logprobs)
            written = _into(out, top_logprobs)
            implementation(resolved, f"{op}_out", hidden)(*arguments, **written)
            return out
    except Exception:
        checks.sample_hidden(
            base, expert, anti, params, bias, allowed_mask, vocab_size, noise_stream, top_logprobs
        )
        read = dict(
            base=base, expert=expert, anti=anti, params=params, alpha=alpha,
            temperature=temperature, bias=bias, allowed_mask=allowed_mask,
        )  # fmt: skip
        checks.no_gradient(op, read)
        checks.out(op, out, base.hidden, read, top_logprobs=top_logprobs)
        raise


def combine(
    base: Tensor,
    expert: Tensor | None,
    anti: Tensor | None,
    alpha: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
    allowed_mask: Tensor | None = None,
    edits: Edits | None = None,
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
    width = vocab_size
    try:
        width = _width(base, expert, anti, vocab_size)
        alphas = checks.alpha("combine", alpha, base)
        arguments = (base, expert, anti, alphas, bias, allowed_mask, *(edits or _NO_EDITS), width)
        resolved = resolve(backend, base, "combine", width)
        if out is None:
            x = implementation(resolved, "combine", base)(*arguments)
            _refuse_gradient(x)
            return x
        _refuse_gradients(base, expert, anti, alphas, bias)
        implementation(resolved, "combine_out", base)(*arguments, out_x=out)
        return out
    except Exception:
        checks.combine(base, expert, anti, alpha, bias, allowed_mask, edits, vocab_size)
        read = dict(
            base=base, expert=expert, anti=anti, alpha=alpha, bias=bias, allowed_mask=allowed_mask,
            edits=edits,
        )  # fmt: skip
        checks.no_gradient("combine", read)
        checks.out("combine", out, base, read, vocab_size=width)
        raise


def score(
    base: Tensor,
    expert: Tensor | None,
    anti: Tensor | None,
    token_ids: Tensor,
    alpha: float | Tensor = 1.0,
    *,
    edits: None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Raw logprobs of given tokens under the combined logits, with no [B, T, V] temporary.

    Args:
        base, expert, anti: logits [B, T, V_role], as in :func:`sample`.
        token_ids: int64 [B, T]; outside [0, vocab_size) (padding) the result is NaN.
        alpha: a number or fp32 [B].
        edits: refused; for these, as for bias and mask, score what :func:`combine` gives.
        out: fp32 [B, T], contiguous.

    Returns:
        fp32 [B, T]: log-softmax of the combined logits at the tokens.

    Raises:
        As :func:`sample`.

    Example:
        >>> score(torch.zeros(1, 2, 4), None, None, torch.tensor([[0, 3]])).exp().tolist()
        [[0.25, 0.25]]
    """
    if edits is not None:
        raise checks.no_edits("score", "combine does, and score takes its result as base")
    try:
        width = _width(base, expert, anti, vocab_size)
        alphas = checks.alpha("score", alpha, base)
        arguments = (base, expert, anti, token_ids, alphas, width)
        resolved = resolve(backend, base, "score", width)
        if out is None:
            logprobs = implementation(resolved, "score", base)(*arguments)
            _refuse_gradient(logprobs)
            return logprobs
        _refuse_gradients(base, expert, anti, alphas)
        implementation(resolved, "score_out", base)(*arguments, out_logprobs=out)
        return out
    except Exception:
        checks.score(base, expert, anti, token_ids, alpha, vocab_size)
        read = dict(base=base, expert=expert, anti=anti, token_ids=token_ids, alpha=alpha)
        checks.no_gradient("score", read)
        checks.out("score", out, base, read)
        raise


def verify(
    base: Tensor,
    expert: Tensor | None,
    anti: Tensor | None,
    draft_token_ids: Tensor,
    params: Params = None,
    *,
    alpha: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    filter_order: str | Tensor | None = None,
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
    mode: str = "coupled",
    draft_logits: Tensor | None = None,
    bias: Tensor | None = None,
    allowed_mask: Tensor | None = None,
    edits: Edits | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    out: VerifyOutput | None = None,
) -> VerifyOutput:
    """Check k drafted tokens per row against the target, exactly; emit what decoding would.

    Args:
        base, expert, anti: logits [B, k + 1, V_role], position j after j drafted tokens.
        draft_token_ids: int64 [B, k]; -1 from where a row has no more drafts.
        params, alpha and the other single ones: as in :func:`sample`; ``position`` is that of the
            first drafted token.
        mode: "coupled": the drafter drew with the target's own noise (noise stream "sample"), the
            tokens are plain decoding's. "rejection": the drafter drew with noise stream "draft".
            A row without any draft gets what :func:`sample` draws, in both.
        draft_logits: [B, k, V_draft], what the drafter drew from; rejection only.
        bias, allowed_mask, edits: as in :func:`sample`, with a dimension k + 1 after the first;
            they apply to the target alone. The counts at a position are those after the drafts
            before it.
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
    try:
        rows = rows_of(
            "verify", base, params,
            alpha, temperature, top_k, top_p, min_p, filter_order, seed, position,
        )  # fmt: skip
        width = _width(base, expert, anti, vocab_size)
        rejection = mode == "rejection"
        if rejection is (draft_logits is None):
            raise ValueError("draft_logits")  # checks.verify finds the words
        arguments = (
            base, expert, anti, draft_token_ids, draft_logits, *rows, bias, allowed_mask,
            *(edits or _NO_EDITS), width, VERIFY_MODES.index(mode),
        )  # fmt: skip
        resolved = resolve(backend, base, "verify", width, rejection, edits is not None)
        if out is None:
            results = VerifyOutput(*implementation(resolved, "verify", base)(*arguments))
            _refuse_gradient(results.logprobs)
            return results
        _refuse_gradients(base, expert, anti, rows.alpha, bias)
        written = dict(zip(OPERATORS["verify"].out_names, out, strict=True))
        implementation(resolved, "verify_out", base)(*arguments, **written)
        return out
    except Exception:
        checks.verify(
            base, expert, anti, draft_token_ids, draft_logits, params, bias, allowed_mask,
            edits, vocab_size, mode,
        )  # fmt: skip
        read = dict(
            base=base, expert=expert, anti=anti, draft_token_ids=draft_token_ids,
            draft_logits=draft_logits, params=params, alpha=alpha, temperature=temperature,
            bias=bias, allowed_mask=allowed_mask, edits=edits,
        )  # fmt: skip
        checks.no_gradient("verify", read)
        checks.out("verify", out, base, read)
        raise
