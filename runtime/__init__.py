"""Running models: `engine` computes tokens, `server` is the HTTP server in front of it.

The engine imports nothing of the HTTP stack, so that it runs on a bare GPU machine.
"""
