"""What the routes share: the server's phase, the engine, the tokenizer and the limits."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

from llmkit.checkpoint.embedding import EmbeddingFacts, embedding_facts
from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.checkpoint.version import version
from llmkit.runtime.server.engines.messages import Ready
from llmkit.runtime.server.engines.replicas import Replicas
from llmkit.runtime.server.generation import Generation
from llmkit.runtime.server.http.errors import ApiError
from llmkit.runtime.server.metrics import Metrics
from llmkit.runtime.server.options import ServeOptions
from llmkit.runtime.server.pace import Pace
from llmkit.runtime.server.response_cache import ResponseCache
from llmkit.runtime.server.sandbox import Sandbox
from llmkit.runtime.server.tracing import Tracing

MAX_RETRY_AFTER_S = 60

# generation_config.json fields that change what is sampled and that this server does not apply -> the neutral value.
_NOT_APPLIED = {"no_repeat_ngram_size": 0, "typical_p": 1.0, "penalty_alpha": None}


class Phase(Enum):
    """Where the server is in its life. The value is the error code that a request gets then."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    DEAD = "engine_dead"


_MEANING = {
    Phase.LOADING: "The model is being loaded.",
    Phase.RESTARTING: "The engine process has ended and is started again.",
    Phase.DRAINING: "The server is shutting down.",
    Phase.DEAD: "The engine process has ended; the server is going down.",
}


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request that says nothing gets: the checkpoint's generation_config.json, else OpenAI's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @staticmethod
    def of(config: dict[str, Any]) -> SamplingDefaults:
        """From a generation config; values that are no numbers or out of range count as absent."""

        def number(name: str, default: float, low: float, high: float) -> float:
            value = config.get(name)
            usable = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
            return value if usable else default  # type: ignore[return-value]

        return SamplingDefaults(
            temperature=float(number("temperature", 1.0, 0, 100)),
            top_p=float(number("top_p", 1.0, 1e-6, 1)),
            top_k=int(number("top_k", 0, 0, 2**31 - 1)),
            min_p=float(number("min_p", 0.0, 0, 1)),
            repetition_penalty=float(number("repetition_penalty", 1.0, 1e-6, 10)),
        )


@dataclass(frozen=True)
class TextSide:
    """What the API process itself reads of the checkpoint."""

    tokenizer: Tokenizer
    defaults: SamplingDefaults
    not_applied: tuple[str, ...] = ()  # fields of generation_config.json that will have no effect
    embeddings: EmbeddingFacts = field(default_factory=EmbeddingFacts)

    @staticmethod
    def load(model: str) -> TextSide:
        """Open the checkpoint `model` for its tokenizer and generation config. Raises LlmkitError."""
        from llmkit.checkpoint.files import open_files
        from llmkit.checkpoint.tokenizer import load_tokenizer

        files = open_files(model)
        config = files.generation_config
        ignored = (
            f"{name}: {config[name]}" for name, off in _NOT_APPLIED.items() if config.get(name) not in (None, off)
        )
        return TextSide(load_tokenizer(files), SamplingDefaults.of(config), tuple(ignored), embedding_facts(files))


@dataclass
class State:
    """Set up by serve.py, read by the routes."""

    options: ServeOptions
    client: Replicas
    metrics: Metrics
    model_name: str
    phase: Phase = Phase.LOADING
    created: int = field(default_factory=lambda: int(time.time()))
    generations: set[Generation] = field(default_factory=set)
    loaded_adapters: dict[str, str] = field(default_factory=dict)  # by clients: their paths by name
    responses: ResponseCache | None = None  # answers that are given again
    tracing: Tracing | None = None
    templates: Sandbox = field(default_factory=Sandbox)  # renders chat templates
    _facts: Ready | None = None
    _text: TextSide | None = None
    _left: Pace = field(default_factory=Pace)  # requests that the engine is done with
    _left_tokens: Pace = field(default_factory=Pace)  # of their prompts
    _active: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def become_ready(self, facts: Ready, text: TextSide) -> None:
        """Requests are taken from now on."""
        self._facts, self._text, self.phase = facts, text, Phase.READY
        self._idle.set()

    def learn(self, facts: Ready) -> None:
        """What the engine says of the model after it was started again."""
        self._facts = facts

    @property
    def facts(self) -> Ready:
        """What the engine said of the model. Only once ready."""
        assert self._facts is not None
        return self._facts

    @cached_property
    def grammars(self) -> Sandbox:
        """Compiles clients' grammars. Only once ready."""
        return Sandbox(self.options.model, self.facts.vocab_size)

    def close_sandboxes(self) -> None:
        """End the two processes, as far as they have been started."""
        self.templates.close()
        if self._facts is not None:
            self.grammars.close()

    @property
    def models(self) -> list[str]:
        """The names that a request may ask for: the model's, and its adapters. Only once ready."""
        return [*self.names, *self.roots]

    @property
    def roots(self) -> dict[str, str]:
        """Where each adapter comes from, by name."""
        return self.options.engine.adapters | self.loaded_adapters

    @property
    def names(self) -> list[str]:
        """The names of the model itself, the main one first."""
        return [self.model_name, *self.options.aliases]

    @property
    def info(self) -> dict[str, Any]:
        """What there is to know of the model and how it is served. Only once ready."""
        facts, engine = self.facts, self.options.engine
        return {
            "model": self.model_name,
            "adapters": list(self.roots),
            "card": facts.card,
            "device": facts.device,
            "dtype": facts.dtype,
            "max_model_len": facts.max_model_len,
            "kv_cache_tokens": facts.kv_cache_tokens,
            "memory": facts.plan,
            "layout": {kind: max(getattr(engine, kind), size) for kind, size in facts.card["layout"].items()},
            "replicas": engine.dp,
            "defaults": vars(self.text.defaults),
            "paths": facts.paths,
            "version": version(),
        }

    @property
    def text(self) -> TextSide:
        """The tokenizer and defaults. Only once ready."""
        assert self._text is not None
        return self._text

    @property
    def unready(self) -> ApiError | None:
        """The 503 that a request gets now, if it does."""
        phase = self.phase
        if phase is Phase.READY:
            if self.client.serving:
                return None
            phase = Phase.RESTARTING
        return ApiError(503, _MEANING[phase], code=phase.value, headers={"retry-after": "1"})

    def check_room(self, requests: int, tokens: int = 0, param: str = "prompt") -> None:
        """ApiError 429 when `requests` more, with so many prompt tokens together, would make the queue too long."""
        engine = self.options.engine
        limit = engine.dp * engine.max_num_seqs + self.options.max_waiting
        if requests > limit:
            message = f"The request asks for {requests} answers; at most {limit} can be queued."
            raise ApiError(400, message, code="too_many_prompts", param=param)
        if (over := self.client.in_flight + requests - limit) > 0:
            raise _full(f"{self.client.in_flight} requests run or wait", self._left.seconds(over))
        most, queued = self.options.max_waiting_tokens, self.client.queued_tokens
        if most and queued and (over := queued + tokens - most) > 0:  # one is always taken
            raise _full(f"prompts of {queued} tokens wait", self._left_tokens.seconds(over))

    def began(self, generation: Generation) -> None:
        """A generation is about to enter the engine."""
        if not self.client.in_flight:
            self._left.restart()
            self._left_tokens.restart()
        self.generations.add(generation)

    def ended(self, generation: Generation) -> None:
        """It has left the engine."""
        self.generations.discard(generation)
        self._left.add(len(generation.choices))
        self._left_tokens.add(sum(len(choice.request.prompt) for choice in generation.choices))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Around one request, from its first byte read to its last byte sent: a graceful stop waits for it."""
        self._active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._active -= 1
            if self._active == 0:
                self._idle.set()

    async def idle(self) -> None:
        """Wait until no request is being answered."""
        await self._idle.wait()

    def fail_all(self, error: ApiError) -> None:
        """End every request that is still running with `error`."""
        for generation in list(self.generations):
            generation.fail(error)


def _full(why: str, seconds: float | None) -> ApiError:
    """The 429. seconds: until there will be room, as far as that is known."""
    wait = 1 if seconds is None else min(MAX_RETRY_AFTER_S, max(1, math.ceil(seconds)))
    return ApiError(
        429, f"The queue is full: {why}. Try again later.", code="queue_full", headers={"retry-after": str(wait)}
    )
