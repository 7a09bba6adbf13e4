"""The continuous-batching engine: scheduler, paged KV cache, runner and sampler.

It speaks in token ids only: no text, no HTTP, no processes.
"""
