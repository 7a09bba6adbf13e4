"""Responses of TGI's API, in full and streamed with one event for each token."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.runtime.engine.engine_outputs import Logprobs
from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.responses.response_builder import SERVER_SENT_EVENTS, sse_event
from llmkit.runtime.server.tgi.tgi_request import TgiGenerateRequest

_MIN_LOGPROB = -9999.0  # JSON has no minus infinity


class TgiResponseBuilder:
    """Builds a response of /generate, /generate_stream or /. A ResponseBuilder."""

    stream_format = SERVER_SENT_EVENTS

    def __init__(
        self, request: TgiGenerateRequest, tokenizer: Tokenizer, as_list: bool = False
    ) -> None:
        """as_list: a full response is a list of one document, as that of / is."""
        self.id = f"tgi-{uuid.uuid4().hex}"
        self._request = request
        self._tokenizer = tokenizer
        self._as_list = as_list
        self._text = ""  # streamed so far
        self._num_events = 0
        self._last_event: dict[str, Any] | None = None  # held back until the text is complete
        self._finish_reason: str | None = None

    def full_response(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        best = max(answers, key=_mean_logprob) if len(answers) > 1 else answers[0]
        document: dict[str, Any] = {"generated_text": self._full_text(best.text)}
        parameters = self._request.given_parameters
        if parameters.details or parameters.decoder_input_details:
            document["details"] = self._details(choices[best.index], best)
            if len(answers) > 1:
                document["details"]["best_of_sequences"] = [
                    {
                        "generated_text": self._full_text(other.text),
                        **self._details(choices[other.index], other),
                    }
                    for other in answers
                    if other is not best
                ]
        return msgspec.json.encode([document] if self._as_list else document)

    def stream_events(self, choices: Sequence[Choice], deltas: Iterable[Delta]) -> bytes:
        events = []
        for delta in deltas:
            choice = choices[delta.index]
            self._text += delta.text
            for entry in self._stream_tokens(choice, delta):
                if self._last_event is not None:
                    events.append(sse_event(self._last_event))
                self._last_event = entry
            if delta.finish_reason is None and self._last_event is not None:
                events.append(sse_event(self._last_event))
                self._last_event = None
            self._finish_reason = delta.finish_reason
        return b"".join(events)

    def final_events(self, choices: Sequence[Choice]) -> bytes:
        choice = choices[0]
        event = self._last_event or self._stream_event(self._token(choice, 0, "", None), [])
        event["generated_text"] = self._full_text(self._text)
        event["details"] = {
            **self._end(choice, self._finish_reason),
            "input_length": len(choice.request.prompt_token_ids),
        }
        return sse_event(event)

    def error_event(self, error: ApiError) -> bytes:
        return sse_event(error.tgi_envelope())

    def _stream_tokens(self, choice: Choice, delta: Delta) -> Iterable[dict[str, Any]]:
        """Yield an event for each token. The text of `delta` is that of its last token.

        So the texts joined are the answer, also where it was held back for a stop sequence.
        """
        logprobs = [entry for _, entry in delta.tokens]
        last = len(delta.token_ids) - 1
        for index, token_id in enumerate(delta.token_ids):
            of_token = logprobs[index] if index < len(logprobs) else None
            text = delta.text if index == last else ""
            token = self._token(choice, token_id, text, of_token)
            yield self._stream_event(token, self._top_tokens(choice, of_token))

    def _stream_event(
        self, token: dict[str, Any], top_tokens: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        self._num_events += 1
        event = {"index": self._num_events, "token": token}
        if self._request.num_top_tokens:
            event["top_tokens"] = top_tokens
        return event | {"generated_text": None, "details": None}

    def _full_text(self, text: str) -> str:
        if self._request.given_parameters.return_full_text:
            return self._request.inputs + text
        return text

    def _details(self, choice: Choice, answer: Delta) -> dict[str, Any]:
        detokenizer = self._tokenizer.stream(skip_special_tokens=True)
        logprobs = [entry for _, entry in answer.tokens]
        tokens = []
        for index, token_id in enumerate(answer.token_ids):
            of_token = logprobs[index] if index < len(logprobs) else None
            tokens.append(self._token(choice, token_id, detokenizer.add([token_id]), of_token))
        details = {
            **self._end(choice, answer.finish_reason),
            "prefill": self._prefill(choice, answer),
            "tokens": tokens,
        }
        if self._request.num_top_tokens:
            details["top_tokens"] = [self._top_tokens(choice, entry) for entry in logprobs]
        return details

    def _prefill(self, choice: Choice, answer: Delta) -> list[dict[str, Any]]:
        if not self._request.given_parameters.decoder_input_details:
            return []
        # The first token has no log probability: nothing precedes it.
        logprobs = [None, *(entry.logprob for entry in answer.prompt_logprobs or [])]
        return [
            {
                "id": token_id,
                "text": self._token_text(token_id),
                "logprob": None if logprob is None else max(logprob, _MIN_LOGPROB),
            }
            for token_id, logprob in zip(choice.request.prompt_token_ids, logprobs, strict=True)
        ]

    def _end(self, choice: Choice, finish_reason: str | None) -> dict[str, Any]:
        reason = "length"
        if finish_reason != "length":
            is_stop_string = choice.matched_stop_string is not None
            reason = "stop_sequence" if is_stop_string else "eos_token"
        return {
            "finish_reason": reason,
            "generated_tokens": choice.completion_tokens,
            "seed": choice.request.sampling_params.seed,
        }

    def _token(
        self, choice: Choice, token_id: int, text: str, logprobs: Logprobs | None
    ) -> dict[str, Any]:
        """A token; the one that ends the text has no log probability."""
        return {
            "id": token_id,
            "text": text,
            "logprob": None if logprobs is None else max(logprobs.logprob, _MIN_LOGPROB),
            "special": token_id in choice.skipped_token_ids,
        }

    def _top_tokens(self, choice: Choice, logprobs: Logprobs | None) -> list[dict[str, Any]]:
        top = [] if logprobs is None else logprobs.top[: self._request.num_top_tokens]
        return [
            {
                "id": token_id,
                "text": self._token_text(token_id),
                "logprob": max(logprob, _MIN_LOGPROB),
                "special": token_id in choice.skipped_token_ids,
            }
            for token_id, logprob in top
        ]

    def _token_text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


def _mean_logprob(answer: Delta) -> float:
    """How likely an answer is, for best_of. One that ends at once has no tokens and comes last."""
    logprobs = [entry.logprob for _, entry in answer.tokens if entry is not None]
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf
