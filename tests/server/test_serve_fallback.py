"""A model that is no native family, served over HTTP."""

from __future__ import annotations

import httpx
import openai

MODEL = {"architecture": "persimmon"}
API_KEYS = ("secret",)


def test_server_fallback_answers_and_streams(client: openai.OpenAI) -> None:
    (name,) = [model.id for model in client.models.list()]
    question = [{"role": "user", "content": "one two three"}]
    whole = client.chat.completions.create(
        model=name, messages=question, max_tokens=12, temperature=0
    )
    parts = client.chat.completions.create(
        model=name, messages=question, max_tokens=12, temperature=0, stream=True
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert whole.usage is not None
    assert 1 <= whole.usage.completion_tokens <= 12
    assert text == whole.choices[0].message.content


def test_server_fallback_says_so_at_start(http: httpx.Client, server) -> None:
    assert "fallback: no family of llmkit's own" in server.log.read_text()
