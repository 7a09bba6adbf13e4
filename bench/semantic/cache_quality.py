"""Right and wrong hits of the semantic cache at each threshold, with and without its facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmkit.bench.semantic.question_pairs import QuestionPair
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.errors import InputError
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_outputs import EngineOutput
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import Pooling, SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.server.semantic.semantic_cache import SemanticCache, Vector

# fmt: off
THRESHOLDS = (
    0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.999,
)
# fmt: on
MAX_TOKENS = 512  # of a question
_CACHE_BYTES = 1 << 32
_NAMESPACE = b""


@dataclass(frozen=True)
class CacheQuality:
    """What the cache answers at one threshold, when it has the answers to all first questions."""

    threshold: float
    compares_facts: bool
    num_same: int  # pairs with the same answer
    num_different: int
    right_hits: int  # pairs with the same answer that get it
    mixed_up: int  # pairs with the same answer that get that of another question
    wrong_hits: int  # pairs with different answers that get any answer of the cache
    wrong_by_kind: dict[str, int]

    @property
    def hit_rate(self) -> float:
        """The share of questions with an answer in the cache that get it."""
        return self.right_hits / self.num_same

    @property
    def wrong_hit_rate(self) -> float:
        """The share of questions without an answer in the cache that get one."""
        return self.wrong_hits / self.num_different

    @property
    def precision(self) -> float | None:
        """The share of hits that are right; None: there are no hits."""
        hits = self.right_hits + self.mixed_up + self.wrong_hits
        return self.right_hits / hits if hits else None


def embed_texts(
    model: str, texts: Iterable[str], pooling: Pooling, device: str = "auto"
) -> dict[str, Vector]:
    """The embedding of each text, of length 1. Raises InputError for a model that has none."""
    checkpoint = open_checkpoint(model)
    tokenizer = load_tokenizer(checkpoint)
    engine = load_engine(checkpoint, EngineOptions(device=device, kv_cache_memory=1 << 28))
    texts = list(dict.fromkeys(texts))
    params = SamplingParams(max_tokens=1, temperature=0.0)
    for index, text in enumerate(texts):
        token_ids = tokenizer.encode(text, True, MAX_TOKENS, keep="first")
        engine.add(EngineRequest(str(index), token_ids, params, pooling=pooling))
    found: dict[str, Vector] = {}
    while engine.has_work:
        for output in engine.step():
            text = texts[int(output.request_id)]
            if output.embedding is None:
                raise InputError(f"{model} has no embedding of {text!r} ({output.error})")
            vector = np.frombuffer(output.embedding, np.float32)
            found[text] = vector / np.linalg.norm(vector)
    return found


def measure(
    pairs: Sequence[QuestionPair],
    vectors: Mapping[str, Vector],
    threshold: float,
    compares_facts: bool,
) -> CacheQuality:
    """Fill a cache with the first questions of all pairs and ask each second question."""
    cache = SemanticCache(threshold, _CACHE_BYTES, compares_facts=compares_facts)
    for first in dict.fromkeys(pair.first for pair in pairs):
        # The "answer" is the question that it belongs to.
        answer = EngineOutput(first, [], "stop", None, 0, 0)
        cache.put(_NAMESPACE, first, vectors[first], [answer])
    right_hits = 0
    mixed_up = 0
    wrong_by_kind = {pair.kind: 0 for pair in pairs if not pair.same}
    for pair in pairs:
        hit = cache.find(_NAMESPACE, pair.second, vectors[pair.second])
        if hit is None:
            continue
        if not pair.same:
            wrong_by_kind[pair.kind] += 1
        elif hit.outputs[0].request_id == pair.first:
            right_hits += 1
        else:
            mixed_up += 1
    num_same = sum(pair.same for pair in pairs)
    return CacheQuality(
        threshold,
        compares_facts,
        num_same,
        len(pairs) - num_same,
        right_hits,
        mixed_up,
        sum(wrong_by_kind.values()),
        wrong_by_kind,
    )


def measure_all(pairs: Sequence[QuestionPair], vectors: Mapping[str, Vector]) -> list[CacheQuality]:
    """All of THRESHOLDS, with the cache's facts and by similarity alone."""
    return [
        measure(pairs, vectors, threshold, compares_facts)
        for compares_facts in (True, False)
        for threshold in THRESHOLDS
    ]
