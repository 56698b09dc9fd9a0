"""Benchmarks: the decoder end to end (``throughput``) and the operators alone (``kernels``)."""
