"""The models of a router as Ollama's API lists them, loaded or not."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from llmkit.runtime.server.ollama.model_facts import FOREVER, ModelFacts
from llmkit.runtime.server.router.model_pool import ModelPool, PooledModel


def tags(models: Iterable[PooledModel], created: float) -> list[dict[str, Any]]:
    """The entries of /api/tags; `created`: Unix time, of models whose files were not read."""
    return [_facts(model, created).tag(model.name) for model in models]


def running_models(pool: ModelPool, created: float) -> list[dict[str, Any]]:
    """The entries of /api/ps: the loaded models, the most recently used first."""
    entries = []
    for model in pool.loaded:
        seconds = pool.seconds_to_unload(model)
        expires = FOREVER
        if seconds is not None:
            expires = datetime.now(UTC) + timedelta(seconds=seconds)
        device = str(model.info.get("device", "cpu"))
        context_length = int(model.info.get("max_model_len", 0))
        entries.append(_facts(model, created).running(model.name, device, context_length, expires))
    return entries


def show_model(model: PooledModel) -> dict[str, Any]:
    """The document of /api/show for a model whose files were read."""
    assert model.facts is not None
    return model.facts.show(model.name, model.info.get("max_model_len"))


def _facts(model: PooledModel, created: float) -> ModelFacts:
    return model.facts or ModelFacts.unknown(model.reference, created)
