"""The operators on a GPU: contract suite, peers, times. ``python -m benchmarks.gpu --help``."""
