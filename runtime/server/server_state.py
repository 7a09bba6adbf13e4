"""The state that all routes share: the server's phase, the engines, the tokenizer, queue limits."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.checkpoint.classifier_config import ClassifierConfig, read_classifier_config
from llmkit.checkpoint.embedding_config import PoolingConfig, read_pooling_config
from llmkit.checkpoint.model_files import ModelFiles
from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.common.errors import InputError
from llmkit.common.version import version
from llmkit.runtime.server.engine_control import EngineControl
from llmkit.runtime.server.engines.engine_messages import EngineReady
from llmkit.runtime.server.engines.replicas import Replicas
from llmkit.runtime.server.generation import Generation
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.response_cache import ResponseCache
from llmkit.runtime.server.sandbox import Sandbox
from llmkit.runtime.server.schemas.ignored_fields import IgnoredFieldsLog
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server.server_metrics import ServerMetrics
from llmkit.runtime.server.stored_responses.response_store import ResponseStore
from llmkit.runtime.server.text.dialect_detection import ChatDialect, detect_chat_dialect
from llmkit.runtime.server.throughput import Throughput
from llmkit.runtime.server.tracing import Tracing
from llmkit.runtime.server.websockets.open_sockets import OpenSockets

if TYPE_CHECKING:
    # It needs numpy, without which the API process starts.
    from llmkit.runtime.server.semantic.semantic_lookup import SemanticAnswers

MAX_RETRY_AFTER_S = 60

# Fields of generation_config.json that change sampling and that this server does not apply, with
# the values that have no effect.
_NOT_APPLIED = {"no_repeat_ngram_size": 0, "typical_p": 1.0, "penalty_alpha": None}


class Phase(Enum):
    """The phases of a server's life. The value is the error code of requests in this phase."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    SLEEPING = "sleeping"
    DRAINING = "draining"
    DEAD = "engine_dead"


_PHASE_MESSAGES = {
    Phase.LOADING: "The model is being loaded.",
    Phase.RESTARTING: "The engine process has ended and is being restarted.",
    Phase.SLEEPING: "The server sleeps; POST /wake_up wakes it up.",
    Phase.DRAINING: "The server is shutting down.",
    Phase.DEAD: "The engine process has ended; the server is going down.",
}


@dataclass(frozen=True)
class SamplingDefaults:
    """Values for requests that give none: generation_config.json's, else OpenAI's defaults.

    The field names are those of SamplingParams.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @staticmethod
    def from_generation_config(config: dict[str, Any]) -> SamplingDefaults:
        """Read a generation config; values that are not numbers or out of range count as absent."""

        def number(name: str, default: float, low: float, high: float) -> float:
            value = config.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                return default
            return value if low <= value <= high else default

        return SamplingDefaults(
            temperature=float(number("temperature", 1.0, 0, 100)),
            top_p=float(number("top_p", 1.0, 1e-6, 1)),
            top_k=int(number("top_k", 0, 0, 2**31 - 1)),
            min_p=float(number("min_p", 0.0, 0, 1)),
            repetition_penalty=float(number("repetition_penalty", 1.0, 1e-6, 10)),
        )


@dataclass(frozen=True)
class TextResources:
    """What the API process reads from the checkpoint."""

    tokenizer: Tokenizer
    defaults: SamplingDefaults
    # Fields of generation_config.json without effect, as "name: value".
    not_applied: tuple[str, ...] = ()
    embeddings: PoolingConfig = field(default_factory=PoolingConfig)
    edit_warning: str | None = None  # about files that were edited since llmkit wrote them
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    # The ids of `classifier.label_tokens`; None: there are none.
    label_token_ids: tuple[int, ...] | None = None
    files: ModelFiles | None = None  # of the checkpoint; None only in tests
    dialect: ChatDialect = field(default_factory=ChatDialect)

    @staticmethod
    def load(
        model: str,
        chat_template: Path | None = None,
        label_tokens: tuple[str, ...] = (),
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> TextResources:
        """Read the tokenizer and generation config of `model`.

        chat_template: a file to use in place of its own chat templates. label_tokens: the tokens
        that stand for labels, if the checkpoint does not name them. tool_parser, reasoning_parser:
        see `detect_chat_dialect`. Raises LlmkitError.
        """
        # Imported in the thread that loads them, while the event loop starts.
        from llmkit.checkpoint.manifest import edit_warning, load_manifest
        from llmkit.checkpoint.open_model_files import open_model_files
        from llmkit.checkpoint.tokenizer import load_tokenizer

        files = open_model_files(model)
        config = files.generation_config
        not_applied = [
            f"{name}: {config[name]}"
            for name, neutral in _NOT_APPLIED.items()
            if config.get(name) not in (None, neutral)
        ]
        manifest = load_manifest(files.path) if files.path.is_dir() else None
        tokenizer = load_tokenizer(files, chat_template)
        classifier = read_classifier_config(files).with_label_tokens(label_tokens)
        return TextResources(
            tokenizer,
            SamplingDefaults.from_generation_config(config),
            tuple(not_applied),
            read_pooling_config(files),
            None if manifest is None else edit_warning(files.path, manifest),
            classifier,
            _label_token_ids(tokenizer, classifier.label_tokens),
            files,
            detect_chat_dialect(
                tokenizer.chat_templates, tokenizer.settings, tool_parser, reasoning_parser
            ),
        )


def _label_token_ids(tokenizer: Tokenizer, label_tokens: tuple[str, ...]) -> tuple[int, ...] | None:
    """The ids of the tokens that stand for labels. Raises InputError for one that is no token."""
    if not label_tokens:
        return None
    found = []
    for text in label_tokens:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        if len(token_ids) != 1:
            raise InputError(
                f"classifier_from_token has {text!r}, which is {len(token_ids)} tokens",
                "Two words that are one token each",
            )
        found += token_ids
    return tuple(found)


@dataclass
class ServerState:
    """The state of one server. Set up by `lifecycle.serve`, read by the routes."""

    options: ServeOptions
    engines: Replicas
    metrics: ServerMetrics
    model_name: str
    phase: Phase = Phase.LOADING
    created: int = field(default_factory=lambda: int(time.time()))  # Unix time
    generations: set[Generation] = field(default_factory=set)  # in the engine now
    # Paths of the adapters that clients have loaded, by name; changed by LoraAdapterRoutes.
    loaded_adapters: dict[str, str] = field(default_factory=dict)
    response_cache: ResponseCache | None = None  # set by `serve` if the option is on
    response_store: ResponseStore | None = None  # set by `serve` if the option is on
    semantic: SemanticAnswers | None = None  # set by `serve` if the option is on
    tracing: Tracing | None = None  # set by `serve` if the option is on
    engine_changes: EngineControl | None = None  # set by `serve`
    num_background_responses: int = 0  # that run; changed by BackgroundRuns
    open_sockets: OpenSockets = field(default_factory=OpenSockets)
    root: str = ""  # the model's directory or hub id; another one after /reload
    templates: Sandbox = field(default_factory=Sandbox)  # renders chat templates
    ignored_fields_log: IgnoredFieldsLog = field(default_factory=IgnoredFieldsLog)
    _engine_info: EngineReady | None = None  # set by `become_ready`
    _text: TextResources | None = None  # set by `become_ready`
    # Requests, and tokens of their prompts, that the engine finishes per second.
    _finished_requests: Throughput = field(default_factory=Throughput)
    _finished_tokens: Throughput = field(default_factory=Throughput)
    _active_requests: int = 0  # HTTP requests being answered
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.root = self.root or self.options.model

    def become_ready(self, engine_info: EngineReady, text: TextResources) -> None:
        """Accept requests from now on."""
        self._engine_info = engine_info
        self._text = text
        self.phase = Phase.READY
        self._idle.set()

    def update_engine_info(self, engine_info: EngineReady) -> None:
        """Replace what the engine reported about the model, after a restart."""
        self._engine_info = engine_info

    def use_weights(self, root: str, text: TextResources) -> None:
        """Serve the weights of the directory `root`, whose tokenizer is the same, from now on."""
        self.root = root
        self._text = text
        self.grammars.use_model(root)

    @property
    def engine_info(self) -> EngineReady:
        """What the engine reported about the model. Only once ready."""
        assert self._engine_info is not None
        return self._engine_info

    @cached_property
    def grammars(self) -> Sandbox:
        """Checks clients' grammars. Only once ready."""
        return Sandbox(self.root, self.engine_info.vocab_size)

    def close_sandboxes(self) -> None:
        """End the sandbox processes that have been started."""
        self.templates.close()
        if self._engine_info is not None:
            self.grammars.close()

    @property
    def models(self) -> list[str]:
        """All names that a request may give as its model: the model's own and its adapters'."""
        return [*self.base_model_names, *self.adapter_paths]

    @property
    def adapter_paths(self) -> dict[str, str]:
        """The path of each loaded adapter, by name."""
        return self.options.engine.adapters | self.loaded_adapters

    @property
    def base_model_names(self) -> list[str]:
        """The names of the model without an adapter, the main one first."""
        return [self.model_name, *self.options.aliases]

    @property
    def info(self) -> dict[str, Any]:
        """The document of /info: the model and how it is served. Only once ready."""
        engine_info = self.engine_info
        engine = self.options.engine
        return {
            "model": self.model_name,
            "adapters": list(self.adapter_paths),
            "card": engine_info.card,
            "device": engine_info.device,
            "dtype": engine_info.dtype,
            "max_model_len": engine_info.max_model_len,
            "kv_cache_tokens": engine_info.kv_cache_tokens,
            "memory": engine_info.plan,
            "layout": {
                kind: max(getattr(engine, kind), size)
                for kind, size in engine_info.card["layout"].items()
            },
            "replicas": engine.dp,
            "defaults": vars(self.text.defaults),
            "paths": engine_info.fast_paths,
            "dialect": self.text.dialect.description,
            "version": version(),
        }

    @property
    def text(self) -> TextResources:
        """The tokenizer and sampling defaults. Only once ready."""
        assert self._text is not None
        return self._text

    @property
    def unavailable_error(self) -> ApiError | None:
        """The 503 that requests get now; None while they are accepted."""
        phase = self.phase
        if phase is Phase.READY:
            if self.engines.serving:
                return None
            phase = Phase.RESTARTING
        return ApiError(503, _PHASE_MESSAGES[phase], code=phase.value, headers={"retry-after": "1"})

    def require_text_model(self) -> None:
        """Raise ApiError 400 when the model has a classification head and generates nothing."""
        if self.text.classifier.labels:
            message = (
                "The model has a classification head and generates no text; use /classify, /score "
                "or /rerank."
            )
            raise ApiError(400, message, code="not_supported", param="model")

    def check_queue_capacity(self, requests: int, tokens: int = 0, param: str = "prompt") -> None:
        """Raise ApiError 429 when `requests` more requests would make the queue too long.

        `tokens` are the prompt tokens of all of them. Raises ApiError 400 when even an empty queue
        could not hold `requests` requests.
        """
        engine = self.options.engine
        max_requests = engine.dp * engine.max_num_seqs + self.options.max_waiting
        if requests > max_requests:
            message = (
                f"The request asks for {requests} answers; at most {max_requests} can be queued."
            )
            raise ApiError(400, message, code="too_many_prompts", param=param)
        excess = self.engines.in_flight + requests - max_requests
        if excess > 0:
            raise _queue_full_error(
                f"{self.engines.in_flight} requests run or wait",
                self._finished_requests.estimate_seconds(excess),
            )
        max_tokens = self.options.max_waiting_tokens
        queued_tokens = self.engines.queued_tokens
        excess = queued_tokens + tokens - max_tokens
        # An empty queue accepts one request of any size.
        if max_tokens and queued_tokens and excess > 0:
            raise _queue_full_error(
                f"prompts of {queued_tokens} tokens wait",
                self._finished_tokens.estimate_seconds(excess),
            )

    def generation_started(self, generation: Generation) -> None:
        """A generation is about to enter the engine."""
        if not self.engines.in_flight:
            self._finished_requests.restart()
            self._finished_tokens.restart()
        self.generations.add(generation)

    def generation_ended(self, generation: Generation) -> None:
        """A generation has left the engine."""
        self.generations.discard(generation)
        self._finished_requests.add(len(generation.choices))
        self._finished_tokens.add(
            sum(len(choice.request.prompt_token_ids) for choice in generation.choices)
        )

    @contextlib.contextmanager
    def track_request(self) -> Iterator[None]:
        """Count an HTTP request as active until its last byte is sent; a graceful stop waits."""
        self._active_requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._active_requests -= 1
            if self._active_requests == 0:
                self._idle.set()

    @property
    def num_active_requests(self) -> int:
        """HTTP requests without a complete response."""
        return self._active_requests

    async def wait_until_idle(self) -> None:
        """Wait until no HTTP request is active."""
        await self._idle.wait()

    def fail_all(self, error: ApiError) -> None:
        """End every running generation with `error`."""
        for generation in list(self.generations):
            generation.fail(error)


def _queue_full_error(reason: str, wait_s: float | None) -> ApiError:
    """Return the 429 of a full queue; `wait_s`: seconds until there is room, None if unknown."""
    retry_after = 1
    if wait_s is not None:
        retry_after = min(MAX_RETRY_AFTER_S, max(1, math.ceil(wait_s)))
    return ApiError(
        429,
        f"The queue is full: {reason}. Try again later.",
        code="queue_full",
        headers={"retry-after": str(retry_after)},
    )
