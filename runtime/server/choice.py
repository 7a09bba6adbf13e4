"""One answer to one prompt: turns the engine's outputs into text, parts and log probabilities.

An HTTP request has one or more choices; each is one request of the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from llmkit.checkpoint.tokenizer import Detokenizer
from llmkit.runtime.engine.engine_outputs import EngineOutput, Logprobs
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.server.request_times import RequestTimes
from llmkit.runtime.server.text.output_parser import OutputParser, PlainParser
from llmkit.runtime.server.text.output_parts import OutputPart, TextPart
from llmkit.runtime.server.text.stop_strings import StopStringBuffer


@dataclass(slots=True)
class Delta:
    """The new part of a choice. `parts` can be empty while text is held back."""

    index: int  # of the choice
    parts: list[OutputPart] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # all new tokens
    # The tokens of the text with their log probabilities, if the request asks for these.
    tokens: list[tuple[int, Logprobs | None]] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None  # "stop", "length" or "tool_calls"
    embedding: bytes | None = None  # float32

    @property
    def text(self) -> str:
        """The text of the answer, without reasoning and tool calls."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    def append(self, other: Delta) -> None:
        """Add the delta that follows this one."""
        self.parts += other.parts
        self.token_ids += other.token_ids
        self.tokens += other.tokens
        self.prompt_logprobs = self.prompt_logprobs or other.prompt_logprobs
        self.finish_reason = other.finish_reason
        self.embedding = other.embedding


@dataclass(frozen=True)
class Echo:
    """A prompt that the answer repeats."""

    text: str
    num_added_tokens: int = 0  # leading tokens that the tokenizer added to the text


class Choice:
    """One answer to a prompt, as it grows."""

    def __init__(
        self,
        request: EngineRequest,
        index: int,
        detokenizer: Detokenizer,
        stop_strings: tuple[str, ...] = (),
        parser: OutputParser | None = None,
        echo: Echo | None = None,
        empty: bool = False,
        include_stop: bool = False,
    ) -> None:
        """Create a choice for `request`.

        `parser` splits the text into parts. With `echo` the prompt precedes the answer. An `empty`
        answer has no tokens: the engine generates at least one, which is dropped. `include_stop`:
        the text ends with the stop string or stop token that ended the answer.
        """
        self.request = request
        self.index = index
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0  # tokens of the reasoning before the answer
        self.finish_reason: str | None = None
        self.times = RequestTimes()
        self.stop_strings = stop_strings
        self.echo = echo
        self._detokenizer = detokenizer
        self._include_stop = include_stop
        self._stop_buffer = StopStringBuffer(stop_strings, include_stop)
        self._parser = parser or PlainParser()
        self._has_output = False
        self._empty = empty
        self._on_logprobs: Callable[[Logprobs], None] | None = None
        self._shows_logprobs = True

    @property
    def skipped_token_ids(self) -> frozenset[int]:
        """The tokens that are not part of the text."""
        return self._detokenizer.skipped_ids

    @property
    def matched_stop_string(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stop_buffer.matched

    def watch_logprobs(self, on_logprobs: Callable[[Logprobs], None], count: int) -> None:
        """Call `on_logprobs` for each token of the text, with `count` alternatives at least.

        Call it before the request is added to the engine. Deltas have log probabilities only if the
        request had asked for them.
        """
        params = self.request.sampling_params
        self._on_logprobs = on_logprobs
        self._shows_logprobs = params.logprobs is not None
        params = replace(params, logprobs=max(count, params.logprobs or 0))
        self.request = replace(self.request, sampling_params=params)

    def process_output(self, output: EngineOutput, stop_token_ids: frozenset[int]) -> Delta:
        """Add an output of the engine and return the delta.

        After a stop string `finish_reason` is set although the engine continues.
        """
        token_ids = output.token_ids
        engine_finish: str | None = output.finish_reason
        logprobs = output.logprobs
        if self._empty:
            token_ids = []
            engine_finish = "length"
            logprobs = [] if logprobs is not None else None
        self.completion_tokens += len(token_ids)
        self.cached_tokens = output.cached_tokens

        # The stop token that ends an answer is counted and listed, but is not part of the text
        # unless the request wants it there.
        text_ids = token_ids
        ends_with_stop_token = (
            engine_finish == "stop" and token_ids and token_ids[-1] in stop_token_ids
        )
        if ends_with_stop_token and not self._include_stop:
            text_ids = token_ids[:-1]
        if self._on_logprobs is not None and logprobs is not None:
            for token_logprobs in logprobs[: len(text_ids)]:
                self._on_logprobs(token_logprobs)
        if not self._shows_logprobs:
            logprobs = None
        text = self._detokenizer.add(text_ids)
        if engine_finish is not None:
            text += self._detokenizer.flush()
        # Stop strings do not end an answer before min_tokens.
        if self.completion_tokens > self.request.sampling_params.min_tokens:
            text = self._stop_buffer.feed(text, final=engine_finish is not None)
        is_stopped = self._stop_buffer.stopped
        final = is_stopped or engine_finish is not None
        is_cut = is_stopped or engine_finish != "stop"
        parts = self._parser.feed(text, final=final, is_cut=is_cut)
        if self._parser.is_reasoning:
            self.reasoning_tokens += len(token_ids)

        if is_stopped or self._parser.stopped:
            self.finish_reason = "stop"
        else:
            self.finish_reason = engine_finish
        delta = Delta(
            self.index,
            parts,
            token_ids,
            finish_reason=self.finish_reason,
            prompt_logprobs=output.prompt_logprobs,
            embedding=output.embedding,
        )
        if self.finish_reason == "stop" and self._has_calls():
            delta.finish_reason = "tool_calls"
        if self.echo is not None and not self._has_output:
            delta.parts = [TextPart(self.echo.text), *parts]
            if logprobs is not None:
                # The first prompt token has no log probability: nothing precedes it.
                prompt_logprobs = [None, *(output.prompt_logprobs or [])]
                delta.tokens = list(
                    zip(self.request.prompt_token_ids, prompt_logprobs, strict=True)
                )
        if logprobs is not None:
            delta.tokens += zip(text_ids, logprobs, strict=False)
        self._has_output = True
        return delta

    def _has_calls(self) -> bool:
        """Whether the client must answer calls.

        A call that the model itself left incomplete is one: it was sent. One that only a stop
        string cut is not.
        """
        if self._stop_buffer.stopped:
            return self._parser.num_tool_calls > 0
        return self._parser.num_begun_calls > 0
