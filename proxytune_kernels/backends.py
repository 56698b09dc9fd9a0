"""Which backends can run here, and for each that can't, the reason as a sentence."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module

from torch import Tensor

from proxytune_kernels import _library  # noqa: F401  (defines the operators the extension implements)


def _cpu() -> str | None:
    try:
        import_module("proxytune_kernels._cpu")  # registers the CPU kernels
    except ModuleNotFoundError:
        return (
            "the C++ extension is not built: install a C++20 compiler, then run "
            "`pip install --no-build-isolation .` without PROXYTUNE_SKIP_EXT"
        )
    except ImportError as error:
        return f"the C++ extension does not load: {error}"
    return None


# At import, so that exported and compiled graphs find torch.ops.proxytune's kernels.
_CPU_REASON = _cpu()


def backends() -> dict[str, str | None]:
    """Backends by name: None where usable, else why not.

    ``cpu`` is the C++ extension; ``reference`` is plain PyTorch, exact and slow, on any device.

    Example:
        >>> backends()["reference"] is None
        True
    """
    return {"cpu": _CPU_REASON, "reference": None}


@cache
def _warn_reference(device: str, reason: str) -> None:
    warnings.warn(
        f"proxytune_kernels runs its slow reference backend on {device}: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )


def resolve(backend: str | None, base: Tensor, op: str) -> str:
    """Name of the backend that runs ``op`` on these logits: as asked for, or the fastest usable.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend asked for by name that can't run here, with the reason.
    """
    device = base.device.type
    if backend is None:
        reason = _CPU_REASON if device == "cpu" else f"no kernel for device {device!r} is built yet"
        if reason is None:
            return "cpu"
        _warn_reference(device, reason)
        return "reference"
    known = backends()
    if backend not in known:
        raise ValueError(f"{op}: backend must be one of {sorted(known)} or None, got {backend!r}")
    reason = known[backend]
    if reason is None and backend == "cpu" and device != "cpu":
        reason = f"the logits are on {base.device}, it runs on cpu tensors"
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} can't run: {reason}")
    return backend
