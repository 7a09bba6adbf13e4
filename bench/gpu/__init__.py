"""Benchmarks and tuning on a GPU: kernels, steps, profiles, and other engines as baselines."""
