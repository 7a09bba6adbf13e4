"""One HTTP request's way through the engine and back to text.

A request may have several prompts and ask for several answers to each; each is a Choice and one request of the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from llmkit.checkpoint.tokenizer import Detokenizer
from llmkit.runtime.engine.types import Logprobs
from llmkit.runtime.server.engines.messages import Add, Output, Refused
from llmkit.runtime.server.engines.replicas import Replicas
from llmkit.runtime.server.http.errors import ApiError
from llmkit.runtime.server.metrics import Metrics, Times
from llmkit.runtime.server.response_cache import Remembered, ResponseCache
from llmkit.runtime.server.text.calls import Text
from llmkit.runtime.server.text.parts import Part, Parts
from llmkit.runtime.server.text.stop import StopBuffer

ENGINE_DEAD = "The engine process has ended."
MAX_UNREAD = 8192  # outputs that a client leaves unread before its request ends


@dataclass(slots=True)
class Delta:
    """What a choice gained: `parts` may be none while tokens are held back, `token_ids` has all new ones."""

    index: int
    parts: list[Part] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    tokens: list[tuple[int, Logprobs | None]] = field(default_factory=list)  # those of the text, where asked for
    prompt_logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None  # "stop", "length" or "tool_calls"
    embedding: bytes | None = None  # float32

    @property
    def text(self) -> str:
        """What is said."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    def add(self, other: Delta) -> None:
        """Take what comes after."""
        self.parts += other.parts
        self.token_ids += other.token_ids
        self.tokens += other.tokens
        self.prompt_logprobs = self.prompt_logprobs or other.prompt_logprobs
        self.finish_reason = other.finish_reason
        self.embedding = other.embedding


@dataclass(frozen=True)
class Echo:
    """A prompt's text, and how many of its first tokens the tokenizer added to it."""

    text: str
    hidden: int = 0


class Choice:
    """One answer to a prompt as it grows.

    parser: of what the text is made of. echo: the prompt comes with the answer. empty: the answer has no tokens; the
    one that the engine makes is dropped.
    """

    def __init__(
        self,
        request: Add,
        index: int,
        detokenizer: Detokenizer,
        stops: tuple[str, ...] = (),
        parser: Parts | None = None,
        echo: Echo | None = None,
        empty: bool = False,
    ) -> None:
        self.request = request
        self.index = index
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0  # that came while the answer had not begun, but a thought
        self.finish_reason: str | None = None
        self.times = Times()
        self._detokenizer = detokenizer
        self.stops = stops
        self._stop = StopBuffer(stops)
        self._parser = parser or Parts()
        self.echo = echo
        self._begun = False
        self._empty = empty

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stop.matched

    def feed(self, output: Output, stop_ids: frozenset[int]) -> Delta:
        """Take an output of the engine; after a stop string `finish_reason` is set though the engine goes on."""
        ids, finish, logprobs = output.token_ids, output.finish_reason, output.logprobs
        if self._empty:
            ids, finish, logprobs = [], "length", [] if logprobs is not None else None
        self.completion_tokens += len(ids)
        self.cached_tokens = output.cached_tokens
        # The token that ends an answer is counted and listed, but is no part of the text.
        shown_ids = ids[:-1] if finish == "stop" and ids and ids[-1] in stop_ids else ids
        text = self._detokenizer.add(shown_ids)
        if finish is not None:
            text += self._detokenizer.flush()
        if self.completion_tokens > self.request.min_tokens:  # no answer ends before
            text = self._stop.feed(text, final=finish is not None)
        ended = self._stop.stopped or finish is not None
        parts = self._parser.feed(text, final=ended)
        self.reasoning_tokens += len(ids) if self._parser.thinking else 0
        self.finish_reason = "stop" if self._stop.stopped or self._parser.stopped else finish
        delta = Delta(self.index, parts, ids, finish_reason=self.finish_reason, prompt_logprobs=output.prompt_logprobs)
        delta.embedding = output.embedding
        if self.finish_reason == "stop" and self._parser.called:
            delta.finish_reason = "tool_calls"
        if self.echo is not None and not self._begun:
            delta.parts = [Text(self.echo.text), *parts]
            if logprobs is not None:
                delta.tokens = list(zip(self.request.prompt, [None, *(output.prompt_logprobs or [])], strict=True))
        if logprobs is not None:
            delta.tokens += zip(shown_ids, logprobs, strict=False)
        self._begun = True
        return delta


class Generation:
    """The choices of one HTTP request, in the engine from `start` until `deltas` ends."""

    def __init__(
        self,
        client: Replicas,
        metrics: Metrics,
        choices: Sequence[Choice],
        eos_ids: Sequence[int],
        arrived: float,
        timeout: float | None = None,
        cache: ResponseCache | None = None,
    ) -> None:
        """arrived: perf_counter. timeout: seconds from then on, after which it fails. cache: of answers."""
        self.choices = choices
        self.disconnected = False
        self._client = client
        self._metrics = metrics
        self._open = {choice.request.id: choice for choice in choices}
        first = choices[0].request  # all choices share their sampling
        self._stop_ids = frozenset(first.stop_token_ids) | (frozenset() if first.ignore_eos else frozenset(eos_ids))
        self.remembered = Remembered(cache, choices)
        self._inbox: list[Output] = []
        self._news = asyncio.Event()
        self._error: ApiError | None = None
        self._arrived = arrived
        self._timeout = timeout
        self._timer: asyncio.TimerHandle | None = None

    # Receiver

    @property
    def ended(self) -> str:
        """How it ended: "finished", "cancelled", or the code of its error."""
        if self._error is not None:
            return self._error.code or "error"
        return "finished" if all(choice.finish_reason for choice in self.choices) else "cancelled"

    def on_output(self, output: Output) -> None:
        self._inbox.append(output)
        self._news.set()
        if len(self._inbox) > MAX_UNREAD:
            self.fail(ApiError(408, "The answer was left unread for too long.", code="slow_reader"))

    def on_refused(self, refused: Refused) -> None:
        self.fail(ApiError(400, refused.message, code=refused.code, param=refused.param))

    def on_dead(self) -> None:
        self.fail(ApiError(503, ENGINE_DEAD, code="engine_dead"))

    def fail(self, error: ApiError) -> None:
        """End the request with `error`, in the engine at once."""
        self._error = error
        self._inbox.clear()
        self.cancel()
        self._news.set()

    def disconnect(self) -> None:
        """The client is gone: `deltas` ends and the engine forgets the request."""
        self.disconnected = True
        self.cancel()
        self._news.set()

    def start(self) -> None:
        """Hand all choices to the engine, but for those whose answers are remembered."""
        for choice in self.choices:
            choice.times = Times(self._arrived, sent=time.perf_counter())
            if (outputs := self.remembered.found.get(choice.request.id)) is None:
                self._client.add(choice.request, self)
            else:
                self._inbox += outputs
                self._news.set()
        if self._timeout is not None:
            left = max(0.0, self._arrived + self._timeout - time.perf_counter())
            self._timer = asyncio.get_running_loop().call_later(left, self._expire, self._timeout)

    def cancel(self) -> None:
        """Take what is unfinished out of the engine; without effect on a finished request."""
        if self._timer is not None:
            self._timer.cancel()
        for request_id in self._open:
            self._client.cancel(request_id)
            self._metrics.finished("error" if self._error else "cancelled")
        self._open.clear()

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What arrived since the last time, until every choice is finished or the client is gone.

        Raises ApiError when the engine refuses or fails the request, or dies.
        """
        try:
            while self._open:
                await self._news.wait()
                self._news.clear()
                inbox, self._inbox = self._inbox, []
                deltas = [delta for output in inbox if (delta := self._take(output)) is not None]
                if deltas:
                    yield deltas
            if self._error is not None:
                raise self._error
        finally:
            self.cancel()

    def _expire(self, timeout: float) -> None:
        message = f"The request took longer than the {timeout:g} s it had."
        self.fail(ApiError(504, message, code="timeout", headers={"x-should-retry": "false"}))

    def _take(self, output: Output) -> Delta | None:
        choice = self._open.get(output.id)
        if choice is None:
            return None  # what the engine did after a stop string, beside a choice that failed, or for nobody
        if output.finish_reason in ("error", "cancelled"):
            message = output.error or f"The engine ended the request ({output.finish_reason})."
            self.fail(ApiError(500, message, code="generation_failed"))
            return None
        computed = output.id not in self.remembered.found
        if computed:
            self._metrics.came(choice.times, len(output.token_ids), output.queued_s)
        delta = choice.feed(output, self._stop_ids)
        self.remembered.note(output, choice)
        if choice.finish_reason is not None:
            del self._open[output.id]
            if output.finish_reason is None:
                self._client.cancel(output.id)
            self._metrics.finished(choice.finish_reason, choice.times if computed else None)
        return delta
