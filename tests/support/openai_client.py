"""The `openai` client of a server under test."""

from __future__ import annotations

import openai

from support.server_process import LlmkitServer


def openai_client(server: LlmkitServer) -> openai.OpenAI:
    """A client without retries, so that a test sees every error."""
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=server.key or "none", max_retries=0, timeout=60
    )
