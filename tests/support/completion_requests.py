"""A completion with a fixed answer, asked before and after a server's engine has changed."""

from __future__ import annotations

from typing import Any

import httpx

from support.server_process import LlmkitServer

COMPLETION: dict[str, Any] = {
    "model": "model",
    "prompt": "one two three",
    "max_tokens": 8,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
}
# Of the models: room for an answer that still runs when the engine changes.
LONG_CONTEXT = {"max_position_embeddings": 4096}


def complete(server: LlmkitServer, **changes: Any) -> httpx.Response:
    """The answer to COMPLETION with these changes."""
    with server.client() as client:
        return client.post("/v1/completions", json=COMPLETION | changes)
