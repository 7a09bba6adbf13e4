"""Running models: `engine` (scheduler, KV cache, runner, sampler) and `server` (HTTP in front of it).

The engine imports nothing of the HTTP stack, so that it runs on a bare GPU machine.
"""
