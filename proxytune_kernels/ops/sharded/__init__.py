"""``sample`` and ``verify`` where the vocabulary is spread over ranks of torch.distributed.

Tensor-parallel engines leave each rank a part of the three logits. Every rank calls these with its
part and the same parameters, and gets the same token as :func:`proxytune_kernels.sample` would draw
from the whole row, for tens of bytes a row instead of the logits. docs/sharded.md has the protocol.
"""

from __future__ import annotations

from proxytune_kernels.ops.sharded.candidates import MAX_CANDIDATES
from proxytune_kernels.ops.sharded.operators import sample, verify
from proxytune_kernels.ops.sharded.shard import Shard

__all__ = ["MAX_CANDIDATES", "Shard", "sample", "verify"]
