"""The performance-critical operations: torch references, Triton and C kernels, and dispatchers.

Nothing here knows about models, requests or files; arguments are tensors and numbers.
"""
