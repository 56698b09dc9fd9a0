"""Attention over a slot cache, registered with transformers under the name ``proxytune_slots``.

No mask function is registered under that name, so transformers builds no mask: what a row may
attend to is in the :class:`~proxytune_kernels.decoder.cache.CacheStep` that travels to every
attention layer as the keyword ``cache_step``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from proxytune_kernels.ops.attention import num_arrivals, unusable

if TYPE_CHECKING:
    from proxytune_kernels.decoder.cache import CacheStep

ATTENTION_NAME = "proxytune_slots"
"""The name under which :func:`slot_attention` is registered."""

# Attention terms that other models add and this function does not know. To ignore one would give
# wrong tokens without an error.
_UNKNOWN_TERMS = ("s_aux", "position_bias")

MAX_NEW = 64
"""More new tokens a row are a prompt's, and go through SDPA where the kernel is ours."""

_SDPA = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
"""Not cuDNN, which torch prefers on some devices: it plans anew for every shape."""

_MAX_GROUPED_QUERIES = 64
"""Up to here query heads that share a key are run as its queries; SDPA would copy keys for each."""


def register_attention() -> None:
    """Register :func:`slot_attention` with transformers; doing it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, slot_attention)


KERNELS = ("triton", "flash-attn", "sdpa")
"""What attends to the cache in steps: ``proxytune::decode_attention``, flash-attn's decoding
kernel, torch's SDPA under a mask. The first two read each row's length on the device, and no key
past it."""


class Choice(NamedTuple):
    """A measurement: the kernel that is fastest in steps on a CUDA device."""

    device: str
    """How the driver's name of the device begins: ``NVIDIA H100``."""
    kernel: str
    """Of :data:`KERNELS`."""
    source: str
    """The measurement: a file in benchmarks/results."""


CHOICES: tuple[Choice, ...] = ()
"""The kernel that is tried first, by device. Nothing has been measured yet: ours is."""


def choose_kernel(
    device: torch.device, dtype: torch.dtype, choices: Sequence[Choice] | None = None
) -> tuple[str, str | None]:
    """The kernel for a model, of :data:`KERNELS`, and why it is SDPA, as a sentence.

    Args:
        device, dtype: of the model.
        choices: lines to look in; None for :data:`CHOICES`.
    """
    reasons = {"triton": unusable(device, dtype), "flash-attn": flash_missing(device, dtype)}
    order = list(reasons)
    if device.type == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
        lines = CHOICES if choices is None else choices
        order[:0] = [line.kernel for line in lines if name.startswith(line.device)][:1]
    for kernel in order:
        if reasons[kernel] is None:
            return kernel, None
    return "sdpa", reasons["triton"]


def flash_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash-attn's decoding kernel can't be used, as a sentence; None where it can."""
    if device.type != "cuda":
        return f"flash-attn runs on CUDA devices, and this model is on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn takes bfloat16 and float16, and this model has {dtype}"
    try:
        _flash_attn_with_kvcache()
    except ModuleNotFoundError:
        return "flash-attn is not installed (pip install 'proxytune_kernels[flash]')"
    except Exception as error:  # flash-attn 4 has its name and not its functions; a wrong build
        return f"flash_attn has no flash_attn_with_kvcache that can be imported: {error}"
    return None


def _flash_attn_with_kvcache() -> Callable[..., Tensor]:
    from flash_attn import flash_attn_with_kvcache

    function: Callable[..., Tensor] = flash_attn_with_kvcache
    return function


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cache_step: CacheStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of B rows, each of its own length, over the keys of a slot cache.

    Args:
        module: the attention layer (unused; transformers passes it).
        query: [B, heads, q, D].
        key, value: [B, kv_heads, L, D], as :meth:`CacheStep.update` returned them.
        attention_mask: must be None: ``cache_step`` says what is masked.
        cache_step: the forward's positions and lengths.
        scaling: factor of the scores; None is 1 / sqrt(D).
        sliding_window: a query sees this many keys at most, itself included; None sees all.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2); None leaves them.

    Returns:
        [B, q, heads, D], and None in place of the attention weights.

    Raises:
        NotImplementedError: a mask, or a term of the scores that is not implemented here.
    """
    for name in _UNKNOWN_TERMS:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{ATTENTION_NAME} attention got {name} from {type(module).__name__}, "
                f"which it does not implement"
            )
    if attention_mask is not None:
        # No mask function is registered for us, so this one is the model's own.
        raise NotImplementedError(
            f"{ATTENTION_NAME} attention got a mask {list(attention_mask.shape)} from "
            f"{type(module).__name__}, where it makes its own"
        )
    kernel = "sdpa" if cache_step.fresh else cache_step.cache.kernel
    if kernel == "triton" and query.shape[2] <= MAX_NEW:
        return _own(query, key, value, cache_step, scaling, sliding_window, softcap), None
    if kernel == "flash-attn":
        return _flash(query, key, value, cache_step, scaling, sliding_window, softcap), None
    first, masked = cache_step.visible(sliding_window)
    if first:
        key, value = key[:, :, first:], value[:, :, first:]
    if softcap is not None:
        # Needs the mask where SDPA has a flag for it.
        masked = masked or query.shape[2] > 1
        mask = _mask(cache_step, sliding_window, 1, query)[..., first:] if masked else None
        attended = _softcapped(query, key, value, mask, scaling, softcap)
        return attended.transpose(1, 2).contiguous(), None
    rows, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    if groups == queries == 1 and not masked and not cache_step.fresh:
        # SDPA as it is: no mask, no heads to group.
        attended = _sdpa(query, key, value, scale=scaling)
        return attended.transpose(1, 2), None
    if queries * groups <= _MAX_GROUPED_QUERIES and not cache_step.fresh:
        mask = None
        if masked:
            # One query's mask is broadcast over the heads that share a key.
            copies = groups if queries > 1 else 1
            mask = _mask(cache_step, sliding_window, copies, query)[..., first:]
        grouped = query.reshape(rows, key.shape[1], groups * queries, width)
        attended = _sdpa(grouped, key, value, attn_mask=mask, scale=scaling)
        attended = attended.reshape(rows, heads, queries, value.shape[-1])
        if queries == 1:
            return attended.transpose(1, 2), None
    else:
        mask = _mask(cache_step, sliding_window, 1, query)[..., first:] if masked else None
        attended = _sdpa(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and queries > 1,
            scale=scaling,
            enable_gqa=groups > 1,
        )
    return attended.transpose(1, 2).contiguous(), None


def _mask(step: CacheStep, window: int | None, groups: int, query: Tensor) -> Tensor:
    # A model may be spread over devices.
    return step.mask(window, groups).to(query.device)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    if query.device.type == "cuda":
        with sdpa_kernel(list(_SDPA)):
            return functional.scaled_dot_product_attention(query, key, value, **options)
    return functional.scaled_dot_product_attention(query, key, value, **options)


def _own(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: CacheStep,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """``proxytune::decode_attention``; result [B, q, heads, D]."""
    attended: Tensor = torch.ops.proxytune.decode_attention(
        query,
        key,
        value,
        step.seq_lens().to(query.device),
        query.shape[3] ** -0.5 if scaling is None else scaling,
        window,
        softcap,
        step.arrivals(query.device, num_arrivals(query)),
    )
    return attended


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: CacheStep,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """flash-attn's decoding kernel, which takes each row's length and reads no key past it."""
    attended = _flash_attn_with_kvcache()(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache_seqlens=step.seq_lens().to(query.device),
        softmax_scale=scaling,
        causal=True,
        # Keys to the left of a query's own, and to its right.
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    return attended


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Attention with capped scores, which SDPA cannot do; softmax in fp32, fp64 for fp64 inputs."""
    rows, heads, queries, width = query.shape
    kv_heads = key.shape[1]
    scaling = width**-0.5 if scaling is None else scaling
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, queries, width)
    scores = torch.matmul(grouped, key.unsqueeze(2).transpose(-1, -2)) * scaling
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask.unsqueeze(1)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    return torch.matmul(weights, value.unsqueeze(2)).reshape(rows, heads, queries, -1)
