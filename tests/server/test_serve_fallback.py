"""A model that is no native family, served over HTTP."""

from __future__ import annotations

import httpx
import openai

from llmkit.model.families import FALLBACK

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


def test_server_fallback_is_named_among_the_fast_paths(http: httpx.Client) -> None:
    """`llmkit serve` prints them at its start."""
    assert FALLBACK in http.get("/info").json()["paths"]
