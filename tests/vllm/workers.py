"""Methods that vLLM gives its workers in a test (``worker_extension_cls``)."""

from __future__ import annotations

from typing import Any

from vllm.distributed import get_pp_group
from vllm.distributed.parallel_state import GroupCoordinator

from proxytune_kernels.ops.sharded import Shard


class WorkerTools:
    """What a test asks of each worker."""

    gathers: list[tuple[int, ...]]
    sent: list[int]
    model_runner: Any

    def kinds(self) -> tuple[str, str]:
        """The runner's module, and the name of its sampler's class."""
        return type(self.model_runner).__module__, type(self.model_runner.sampler).__name__

    def count_gathers(self) -> None:
        """Note what goes from rank to rank from now on: shapes by vLLM, bytes by our own draws."""
        self.gathers, self.sent = [], []

        def counted(function: Any) -> Any:
            def gather(group: Any, tensor: Any, *arguments: Any, **named: Any) -> Any:
                self.gathers.append(tuple(tensor.shape))
                return function(group, tensor, *arguments, **named)

            return gather

        for name in ("all_gather", "gather"):
            setattr(GroupCoordinator, name, counted(getattr(GroupCoordinator, name)))

        def sending(method: Any) -> Any:
            def send(shard: Shard, tensor: Any) -> Any:
                self.sent.append(tensor.nbytes)
                return method(shard, tensor)

            return send

        for name in ("gather", "add"):
            setattr(Shard, name, sending(getattr(Shard, name)))

    def traffic(self) -> tuple[list[tuple[int, ...]], list[int]]:
        """What went from rank to rank since the last call."""
        told = list(self.gathers), list(self.sent)
        self.gathers.clear()
        self.sent.clear()
        return told

    def make_intermediate_tensors(self) -> None:
        """Do what vLLM's warm-up does, which it leaves out on a CPU with a cache of a set size.

        Without it a later stage of any model's pipeline fails.
        """
        runner = self.model_runner
        if not get_pp_group().is_first_rank:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
            )
