"""From the options of `llmkit serve` to its semantic cache."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from llmkit.common.errors import InputError, UsageError
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import Pooling
from llmkit.runtime.server.engines.engine_messages import EngineReady, LoadModel
from llmkit.runtime.server.serve_options import ServeOptions

if TYPE_CHECKING:  # they need numpy or a tokenizer, without which a server starts
    from llmkit.runtime.server.engines.replicas import Replicas
    from llmkit.runtime.server.semantic.semantic_lookup import SemanticAnswers
    from llmkit.runtime.server.server_state import TextResources

MAX_QUESTION_TOKENS = 512  # that are embedded
_EMBEDDER_KV_BYTES = 64 << 20
_EMBEDDER_THREADS = 4  # at most; the served model may need the others


def check_semantic_options(options: ServeOptions) -> None:
    """Raise UsageError for options without --semantic-cache."""
    if options.semantic_cache is None and options.semantic_cache_model is not None:
        raise UsageError(
            "--semantic-cache-model needs --semantic-cache",
            todo="Give --semantic-cache SIMILARITY, or leave it out",
        )


def embedder_message(options: ServeOptions) -> LoadModel:
    """What the process of --semantic-cache-model loads."""
    assert options.semantic_cache_model is not None
    engine = EngineOptions(
        device="cpu",
        threads=min(_EMBEDDER_THREADS, os.cpu_count() or 1),
        kv_cache_memory=_EMBEDDER_KV_BYTES,
        max_num_seqs=16,
    )
    return LoadModel(options.semantic_cache_model, engine, options.debug)


async def new_semantic_answers(
    options: ServeOptions,
    engines: Replicas,
    engine_info: EngineReady,
    text: TextResources,
    embedding_engine: Replicas | None,
) -> SemanticAnswers | None:
    """The semantic cache of a server; None without the option.

    engines, engine_info, text: of the served model. embedding_engine: of --semantic-cache-model,
    which is waited for. Raises InputError for a model whose embeddings are not known.
    """
    if options.semantic_cache is None:
        return None
    # Imported here: these need numpy, without which the API process starts.
    from llmkit.runtime.server.semantic.question_embedder import QuestionEmbedder
    from llmkit.runtime.server.semantic.semantic_cache import SemanticCache
    from llmkit.runtime.server.semantic.semantic_lookup import SemanticAnswers
    from llmkit.runtime.server.server_state import TextResources

    model = options.model
    if embedding_engine is not None:
        assert options.semantic_cache_model is not None
        model = options.semantic_cache_model
        engine_info = await embedding_engine.ready()
        text = TextResources.load(model)
    embedder = QuestionEmbedder(
        embedding_engine or engines,
        text.tokenizer,
        _pooling(model, text, None if embedding_engine else options.pooling),
        min(MAX_QUESTION_TOKENS, engine_info.max_model_len),
        has_adapters=embedding_engine is None,
    )
    cache = SemanticCache(
        options.semantic_cache, options.semantic_cache_size, options.semantic_cache_ttl
    )
    return SemanticAnswers(cache, embedder)


def _pooling(model: str, text: TextResources, chosen: Pooling | None) -> Pooling:
    from llmkit.runtime.server.pooled_requests import POOLINGS  # as above

    if text.classifier.labels:
        raise InputError(
            f"{model} has a classification head, so it cannot embed the questions of"
            " --semantic-cache",
            "A model that generates text or embeds",
        )
    name = chosen or text.embeddings.pooling
    if name not in POOLINGS:
        raise InputError(
            f"{model} makes embeddings in a way that llmkit does not know ({name}), so it cannot"
            " embed the questions of --semantic-cache",
            todo="Name another model with --semantic-cache-model",
        )
    return POOLINGS[name]
