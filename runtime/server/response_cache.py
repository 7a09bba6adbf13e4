"""Caches complete answers, so that a repeated deterministic request needs no computation.

Only deterministic answers are kept: greedy ones, and those whose request has a seed. An entry
holds the engine's outputs for one prompt, so it serves every endpoint, streamed or not, and
`usage` is what it was the first time. The key is a hash of the whole engine request. It includes
the client's cache salt: no client gets another client's answer.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Container, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from llmkit.runtime.engine.engine_outputs import EngineOutput
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.server.choice import Choice

if TYPE_CHECKING:  # it needs numpy, without which the API process starts
    from llmkit.runtime.server.semantic.semantic_lookup import SemanticLookup

HEADER = "x-llmkit-cache"
SIMILARITY_HEADER = "x-llmkit-cache-similarity"  # of an answer to a similar question
_ENTRY_BYTES = 256  # estimated memory of an entry besides its outputs
_decoder = msgspec.msgpack.Decoder(list[EngineOutput])


class ResponseCache:
    """Answers in memory, the least recently used evicted first.

    `limit_bytes` limits their size. `adapters` are the names of adapters that never change;
    requests for other adapters are not cached.
    """

    def __init__(self, limit_bytes: int, adapters: Container[str] = ()) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self.queries = 0
        self.hits = 0
        self._adapters = adapters
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()

    def emptied(self) -> ResponseCache:
        """Another cache with the same settings and counters, without an entry."""
        other = ResponseCache(self.limit_bytes, self._adapters)
        other.queries = self.queries
        other.hits = self.hits
        return other

    def key(
        self,
        request: EngineRequest,
        stop_strings: Sequence[str],
        skipped_token_ids: Collection[int] = (),
    ) -> bytes | None:
        """Return the key of a request's answer; None when the answer is not deterministic.

        skipped_token_ids: the tokens in whose text no stop string is searched.
        """
        params = request.sampling_params
        greedy = params.temperature == 0
        if not greedy and params.seed is None:
            return None
        if request.adapter is not None and request.adapter not in self._adapters:
            return None
        if greedy:
            params = replace(params, seed=None)
        request = replace(request, request_id="", priority=0, sampling_params=params)
        # Where a stop string is found, and so how much is generated, depends on the tokens' texts.
        searched = (stop_strings, sorted(skipped_token_ids)) if stop_strings else ()
        return hashlib.sha256(msgspec.msgpack.encode((request, searched))).digest()

    def get(self, key: bytes) -> list[EngineOutput] | None:
        """Return the engine's outputs, step by step; None when there is no entry."""
        self.queries += 1
        data = self._entries.get(key)
        if data is None:
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return _decoder.decode(data)

    def put(self, key: bytes, outputs: Sequence[EngineOutput]) -> None:
        """Keep a complete answer, unless it is larger than the whole cache."""
        data = msgspec.msgpack.encode(outputs)
        if len(data) + _ENTRY_BYTES > self.limit_bytes or key in self._entries:
            return
        self._entries[key] = data
        self.bytes += len(data) + _ENTRY_BYTES
        while self.bytes > self.limit_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.bytes -= len(evicted) + _ENTRY_BYTES


class CachedResponses:
    """The cached answers for the choices of one HTTP request, and the new answers to be cached.

    Without a cache both stay empty.
    """

    def __init__(
        self,
        cache: ResponseCache | None,
        choices: Sequence[Choice],
        semantic: SemanticLookup | None = None,
    ) -> None:
        """`semantic`: what the semantic cache has for the only choice, unless `cache` has it."""
        self.outputs: dict[str, list[EngineOutput]] = {}  # the cached ones, by request id
        self.headers: dict[str, str] = {}  # of the HTTP response
        self.semantic = semantic
        self._cache = cache
        self._keys: dict[str, bytes] = {}  # by request id
        self._new_outputs: dict[str, list[EngineOutput]] = {}  # of cacheable requests, by id
        if cache is not None:
            self._look_up(cache, choices)
        if semantic is not None and not self.outputs:
            self._take_semantic(semantic, choices[0].request.request_id)

    def _look_up(self, cache: ResponseCache, choices: Sequence[Choice]) -> None:
        for choice in choices:
            request_id = choice.request.request_id
            key = cache.key(choice.request, choice.stop_strings, choice.skipped_token_ids)
            if key is None:
                continue
            self._keys[request_id] = key
            self._new_outputs[request_id] = []
            outputs = cache.get(key)
            if outputs is not None:
                self.outputs[request_id] = _for_request(outputs, request_id)
        if self._keys:
            self.headers = {HEADER: "hit" if len(self.outputs) == len(choices) else "miss"}

    def _take_semantic(self, semantic: SemanticLookup, request_id: str) -> None:
        """Take the answer to a similar question, or else record the one that is computed."""
        if semantic.hit is None:
            self.headers = {HEADER: "miss"}
            self._new_outputs.setdefault(request_id, [])
            return
        self.outputs[request_id] = _for_request(semantic.hit.outputs, request_id)
        self.headers = {HEADER: "semantic", SIMILARITY_HEADER: semantic.similarity}

    def marked(self, body: bytes) -> bytes:
        """A response in full; an answer to a similar question says so in a field of its own."""
        is_semantic = self.headers.get(HEADER) == "semantic"
        return self.semantic.marked(body) if self.semantic and is_semantic else body

    def record(self, output: EngineOutput, choice: Choice) -> None:
        """Note an output that `choice` has processed; the last one completes the entry."""
        request_id = output.request_id
        new_outputs = self._new_outputs.get(request_id)
        if new_outputs is None or request_id in self.outputs:
            return
        new_outputs.append(output)
        # An answer that ended early for another reason, such as after its only tool call, may be
        # incomplete and is not cached.
        has_stopped = output.finish_reason == "stop" or choice.matched_stop_string is not None
        if not has_stopped and output.finish_reason is None:
            return
        if self._cache is not None and request_id in self._keys:
            self._cache.put(self._keys[request_id], new_outputs)
        # An answer that was cut is no answer to another question.
        if self.semantic is not None and has_stopped:
            self.semantic.put(new_outputs)


def _for_request(outputs: Sequence[EngineOutput], request_id: str) -> list[EngineOutput]:
    return [output._replace(request_id=request_id) for output in outputs]
