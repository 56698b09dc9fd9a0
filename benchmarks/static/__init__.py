"""What the compilers made of the kernels, without a GPU; docs/benchmarks.md has the words."""
