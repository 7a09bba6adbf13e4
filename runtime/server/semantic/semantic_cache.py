"""Complete answers, found by the meaning of a question.

An entry belongs to a namespace: everything that the answer depends on but for the question, as a
hash (see semantic_question.py). Within one, the entry whose question has the most similar embedding
is found by comparing all of them, which is exact. What questions say in numbers, names and other
facts must be the same, too (see question_facts.py).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmkit.runtime.engine.engine_outputs import EngineOutput
from llmkit.runtime.server.semantic.question_facts import differing_facts

Vector = NDArray[np.float32]
MAX_CANDIDATES = 8  # entries above the threshold whose facts are compared
_ENTRY_BYTES = 512  # estimated memory of an entry besides its outputs, question and vector
_MAX_SPARE_ROWS = 2  # of a matrix, for each entry
_decoder = msgspec.msgpack.Decoder(list[EngineOutput])


class Hit(NamedTuple):
    """An answer to a similar question."""

    outputs: list[EngineOutput]  # of the engine, step by step
    similarity: float  # the cosine of the questions' embeddings


@dataclass(eq=False)
class _Entry:
    namespace: bytes
    question: str
    outputs: bytes
    row: int  # in the namespace's matrix
    num_bytes: int
    expires: float  # by the cache's clock


class _Namespace:
    """The entries that may answer each other's questions, with a matrix of their embeddings."""

    def __init__(self, size: int) -> None:
        self.entries: list[_Entry] = []
        self._matrix: Vector = np.empty((1, size), np.float32)

    @property
    def size(self) -> int:
        """The numbers of an embedding."""
        size: int = self._matrix.shape[1]
        return size

    def add(self, entry: _Entry, vector: Vector) -> None:
        """Add an entry as the last row."""
        if len(self.entries) == len(self._matrix):
            self._matrix = np.concatenate((self._matrix, np.empty_like(self._matrix)))
        self._matrix[entry.row] = vector
        self.entries.append(entry)

    def remove(self, entry: _Entry) -> None:
        """Remove an entry; the last one takes its row."""
        last = self.entries.pop()
        if last is not entry:
            self._matrix[entry.row] = self._matrix[last.row]
            self.entries[entry.row] = last
            last.row = entry.row
        if len(self._matrix) > (1 + _MAX_SPARE_ROWS) * max(1, len(self.entries)):
            self._matrix = self._matrix[: max(1, len(self.entries))].copy()

    def similarities(self, vector: Vector) -> Vector:
        """The cosine of each entry's embedding and `vector`, [entries]."""
        cosines: Vector = self._matrix[: len(self.entries)] @ vector
        return cosines


class SemanticCache:
    """Answers in memory, the least recently used evicted first.

    threshold: the least cosine of the embeddings of two questions with one answer. limit_bytes:
    the size of all entries. ttl_s: how long an entry is used; 0: until it is evicted. clock: in
    seconds. compares_facts: False: similarity alone decides, as a benchmark compares with.
    """

    def __init__(
        self,
        threshold: float,
        limit_bytes: int,
        ttl_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        compares_facts: bool = True,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self.queries = 0
        self.hits = 0
        self.rejected = 0  # similar questions whose facts differ
        self._threshold = threshold
        self._ttl_s = ttl_s
        self._clock = clock
        self._compares_facts = compares_facts
        self._namespaces: dict[bytes, _Namespace] = {}
        # By id(), the least recently used first.
        self._entries: OrderedDict[int, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def emptied(self) -> SemanticCache:
        """Another cache with the same settings and counters, without an entry."""
        other = SemanticCache(
            self._threshold, self.limit_bytes, self._ttl_s, self._clock, self._compares_facts
        )
        other.queries = self.queries
        other.hits = self.hits
        other.rejected = self.rejected
        return other

    def find(self, namespace: bytes, question: str, vector: Vector) -> Hit | None:
        """Return the answer to the most similar question; None when there is none that is alike.

        vector: the embedding of the question, of length 1.
        """
        self.queries += 1
        known = self._namespaces.get(namespace)
        if known is None or known.size != len(vector):
            return None
        cosines = known.similarities(vector)
        rows = np.flatnonzero(cosines >= self._threshold)
        rows = rows[np.argsort(-cosines[rows], kind="stable")][:MAX_CANDIDATES]
        candidates = [(known.entries[row], float(cosines[row])) for row in rows]
        now = self._clock()
        for entry, similarity in candidates:
            if entry.expires <= now:
                self._remove(entry)
            elif self._compares_facts and differing_facts(entry.question, question) is not None:
                self.rejected += 1
            else:
                self.hits += 1
                self._entries.move_to_end(id(entry))
                return Hit(_decoder.decode(entry.outputs), min(1.0, similarity))
        return None

    def put(
        self, namespace: bytes, question: str, vector: Vector, outputs: Sequence[EngineOutput]
    ) -> None:
        """Keep a complete answer, unless it is larger than the whole cache."""
        known = self._namespaces.get(namespace)
        if known is not None:
            if known.size != len(vector):
                return
            same = [entry for entry in known.entries if entry.question == question]
            for entry in same:
                self._remove(entry)
        data = msgspec.msgpack.encode(outputs)
        rows_bytes = (1 + _MAX_SPARE_ROWS) * vector.nbytes
        num_bytes = len(data) + len(question.encode()) + rows_bytes + _ENTRY_BYTES
        if num_bytes > self.limit_bytes:
            return
        known = self._namespaces.setdefault(namespace, _Namespace(len(vector)))
        expires = self._clock() + self._ttl_s if self._ttl_s else float("inf")
        entry = _Entry(namespace, question, data, len(known.entries), num_bytes, expires)
        known.add(entry, vector)
        self._entries[id(entry)] = entry
        self.bytes += num_bytes
        while self.bytes > self.limit_bytes:
            self._remove(next(iter(self._entries.values())))

    def clear(self) -> None:
        """Drop all entries, as after the model has changed."""
        self._namespaces.clear()
        self._entries.clear()
        self.bytes = 0

    def _remove(self, entry: _Entry) -> None:
        del self._entries[id(entry)]
        self.bytes -= entry.num_bytes
        known = self._namespaces[entry.namespace]
        known.remove(entry)
        if not known.entries:
            del self._namespaces[entry.namespace]
