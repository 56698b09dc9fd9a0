"""Methods that vLLM gives its workers in a test (``worker_extension_cls``)."""

from __future__ import annotations

from typing import Any

from vllm.distributed import get_pp_group
from vllm.distributed.parallel_state import GroupCoordinator


class WorkerTools:
    """What a test asks of each worker."""

    gathers: list[tuple[int, ...]]
    model_runner: Any

    def count_gathers(self) -> None:
        """Note the shape of every tensor that goes from rank to rank from now on."""
        self.gathers = []

        def counted(function: Any) -> Any:
            def gather(group: Any, tensor: Any, *arguments: Any, **named: Any) -> Any:
                self.gathers.append(tuple(tensor.shape))
                return function(group, tensor, *arguments, **named)

            return gather

        for name in ("all_gather", "gather"):
            setattr(GroupCoordinator, name, counted(getattr(GroupCoordinator, name)))

    def gathered(self) -> list[tuple[int, ...]]:
        """Shapes of what went from rank to rank."""
        return self.gathers

    def make_intermediate_tensors(self) -> None:
        """Do what vLLM's warm-up does, which it leaves out on a CPU with a cache of a set size.

        Without it a later stage of any model's pipeline fails.
        """
        runner = self.model_runner
        if not get_pp_group().is_first_rank:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
            )
