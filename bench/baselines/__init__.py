"""What the benchmarks compare with: the same computations, written with PyTorch alone."""
