"""What the routes share: the server's phase, the engine, the tokenizer and the limits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.checkpoint.version import version
from llmkit.runtime.server.errors import ApiError
from llmkit.runtime.server.generation import Generation
from llmkit.runtime.server.messages import Ready
from llmkit.runtime.server.metrics import Metrics
from llmkit.runtime.server.options import ServeOptions
from llmkit.runtime.server.replicas import Replicas

# generation_config.json fields that change what is sampled and that this server does not apply -> the neutral value.
_NOT_APPLIED = {"no_repeat_ngram_size": 0, "typical_p": 1.0, "penalty_alpha": None}


class Phase(Enum):
    """Where the server is in its life. The value is the error code that a request gets then."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "engine_dead"


_MEANING = {
    Phase.LOADING: "The model is being loaded.",
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
        return TextSide(load_tokenizer(files), SamplingDefaults.of(config), tuple(ignored))


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
    _facts: Ready | None = None
    _text: TextSide | None = None
    _active: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def become_ready(self, facts: Ready, text: TextSide) -> None:
        """Requests are taken from now on."""
        self._facts, self._text, self.phase = facts, text, Phase.READY
        self._idle.set()

    @property
    def facts(self) -> Ready:
        """What the engine said of the model. Only once ready."""
        assert self._facts is not None
        return self._facts

    @property
    def models(self) -> list[str]:
        """The names that a request may ask for: the model, and its adapters. Only once ready."""
        return [self.model_name, *self.facts.adapters]

    @property
    def info(self) -> dict[str, Any]:
        """What there is to know of the model and how it is served. Only once ready."""
        facts, engine = self.facts, self.options.engine
        return {
            "model": self.model_name,
            "adapters": facts.adapters,
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
        if self.phase is Phase.READY:
            return None
        return ApiError(503, _MEANING[self.phase], code=self.phase.value, headers={"retry-after": "1"})

    def check_room(self, requests: int) -> None:
        """ApiError 429 when `requests` more for the engine would make the queue too long."""
        engine = self.options.engine
        limit = engine.dp * engine.max_num_seqs + self.options.max_waiting
        if requests > limit:
            message = f"The request asks for {requests} answers; at most {limit} can be queued."
            raise ApiError(400, message, code="too_many_prompts", param="prompt")
        if self.client.in_flight + requests > limit:
            message = f"The queue is full: {self.client.in_flight} requests run or wait. Try again later."
            raise ApiError(429, message, code="queue_full", headers={"retry-after": "1"})

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
