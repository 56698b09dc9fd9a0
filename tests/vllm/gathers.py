"""Counts, inside a worker, how often logits go from rank to rank."""

from __future__ import annotations

from typing import Any

from vllm.distributed.parallel_state import GroupCoordinator


class CountGathers:
    """Methods that vLLM gives its workers (``worker_extension_cls``)."""

    gathers: list[tuple[int, ...]]

    def count_gathers(self) -> None:
        """Note the shape of every tensor that is gathered from now on."""
        self.gathers = []

        def counted(function: Any) -> Any:
            def gather(group: Any, tensor: Any, *arguments: Any, **named: Any) -> Any:
                self.gathers.append(tuple(tensor.shape))
                return function(group, tensor, *arguments, **named)

            return gather

        for name in ("all_gather", "gather"):
            setattr(GroupCoordinator, name, counted(getattr(GroupCoordinator, name)))

    def gathered(self) -> list[tuple[int, ...]]:
        """Shapes of what was gathered."""
        return self.gathers
