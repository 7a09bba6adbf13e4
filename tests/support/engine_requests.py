"""Short ways to write requests and outputs of the engine."""

from __future__ import annotations

from typing import Any

from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams


def engine_request(
    request_id: str,
    prompt_token_ids: list[int],
    max_tokens: int,
    *,
    adapter: str | None = None,
    cache_salt: str = "",
    grammar: str | None = None,
    **sampling: Any,
) -> EngineRequest:
    """A request; `sampling` are further fields of its SamplingParams."""
    return EngineRequest(
        request_id,
        prompt_token_ids,
        SamplingParams(max_tokens=max_tokens, **sampling),
        adapter=adapter,
        cache_salt=cache_salt,
        grammar=grammar,
    )
