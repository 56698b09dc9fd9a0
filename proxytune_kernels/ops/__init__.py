"""The public operators, the one table that defines them, and the backends that run them."""

from proxytune_kernels.ops.backends import backends
from proxytune_kernels.ops.hidden import sample_hidden
from proxytune_kernels.ops.operators import VERIFY_MODES, combine, sample, score, verify

__all__ = ["VERIFY_MODES", "backends", "combine", "sample", "sample_hidden", "score", "verify"]
