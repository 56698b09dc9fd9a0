"""The public operators, the one table that defines them, and the backends that run them."""

from proxytune_kernels.ops import attention as attention  # registers its operator
from proxytune_kernels.ops import lora as lora  # likewise
from proxytune_kernels.ops.backends import backends
from proxytune_kernels.ops.checks import VERIFY_MODES
from proxytune_kernels.ops.operators import combine, sample, sample_hidden, score, verify
from proxytune_kernels.ops.warm_up import warm_up

__all__ = [
    "VERIFY_MODES",
    "backends",
    "combine",
    "sample",
    "sample_hidden",
    "score",
    "verify",
    "warm_up",
]
