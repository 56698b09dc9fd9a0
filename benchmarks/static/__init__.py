"""What the compiler made of the Triton kernels, without a GPU; docs/benchmarks.md has the words."""
