"""What a backend is. A new one is a module beside this and a line in ``backends.ALL``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune_kernels.ops import checks
from proxytune_kernels.ops.table import OPERATORS

Implementation = Callable[..., Any]


class Backend:
    """One way to run the operators."""

    name: str
    """What users ask for."""
    device_type: str | None = None
    """The kind of device whose tensors it runs on, and where it may be the default; None: any, and
    nowhere."""
    compiles: bool = False
    """Whether a call may have to wait until a kernel is compiled."""
    edits: bool = True
    """Whether it takes penalties and biases of some tokens."""
    operators: Sequence[str] = (
        *("sample", "attribution", "sample_hidden", "combine", "score", "verify", "sharded"),
    )
    """The public functions that it runs; "sharded" stands for those of :mod:`ops.sharded`."""

    def missing(self) -> str | None:
        """What it lacks on every device of this machine, as a sentence; None where all is there."""
        return None

    def device_unusable(self, index: int) -> str | None:
        """Why it can't run on the device of its kind with this index; None where it can."""
        return None

    def max_vocab_size(self, index: int, rejection: bool) -> int | None:
        """The widest rows that a device takes, in tokens; None is no limit but the operators'.

        Args:
            index: of the device.
            rejection: for ``verify`` in that mode.
        """
        return None

    def implementation(self, name: str, device: torch.device) -> Implementation:
        """What runs an operator, or its ``_out`` twin, on tensors of a device."""
        raise NotImplementedError

    def unusable(self) -> str | None:
        """Why it can't run here; None where it can."""
        return self.missing()

    def runs_on(self, device: torch.device) -> bool:
        """Whether it takes tensors of this device."""
        return self.device_type in (None, device.type)

    def refusal(self, op: str, device: torch.device) -> str | None:
        """Why it can't run a public function on a device; None where it can."""
        if op not in self.operators:
            return f"it has no kernel for {op}, backend 'triton' has one"
        missing = self.missing()
        if missing is not None:
            return missing
        if not self.runs_on(device):
            return f"the logits are on {device}, it runs on {self.device_type} tensors"
        return self.device_unusable(device.index or 0)


def registered(namespace: str, names: Sequence[str]) -> dict[str, Implementation]:
    """What ``torch.ops`` has for operators and their twins, by name; a look-up takes 0.1 us."""
    ops = getattr(torch.ops, namespace)
    twins = [f"{name}_out" for name in names if OPERATORS[name].has_twin]
    return {name: getattr(ops, name) for name in (*names, *twins)}


def from_writer(op: str, write: Implementation) -> dict[str, Implementation]:
    """An operator and its twin from what writes results for checked arguments.

    Args:
        op: name of the operator.
        write: takes :func:`checks.operator_arguments`, and the outputs as a tuple.
    """

    def run(*arguments: Any) -> Any:
        given = checks.operator_arguments(op, arguments)
        results = OPERATORS[op].empty(*arguments)
        write(*given, results)
        return results if len(results) > 1 else results[0]

    def run_out(*arguments: Any, **out: Tensor) -> None:
        given = checks.operator_arguments(op, arguments)
        checks.operator_out(op, out, arguments)
        write(*given, tuple(out.get(name) for name in OPERATORS[op].out_names))

    return {op: run, f"{op}_out": run_out}


def from_function(op: str, compute: Implementation) -> dict[str, Implementation]:
    """An operator and its twin from what computes results, a tuple, from checked arguments."""

    def run(*arguments: Any) -> Any:
        results = compute(*checks.operator_arguments(op, arguments))
        return results if len(results) > 1 else results[0]

    def run_out(*arguments: Any, **out: Tensor) -> None:
        given = checks.operator_arguments(op, arguments)
        checks.operator_out(op, out, arguments)
        for name, result in zip(OPERATORS[op].out_names, compute(*given), strict=True):
            if result.numel():
                out[name].copy_(result)

    return {op: run, f"{op}_out": run_out}
