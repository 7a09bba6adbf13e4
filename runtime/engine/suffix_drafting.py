"""Suffix decoding: draft tokens from the earlier text with the longest and most frequent match.

SuffixDecoding (Oliaro et al., 2024, arXiv 2411.04975): where the last tokens of a request occurred
before, in its own text or in recent outputs, the tokens that followed them most often are proposed.
A longer match allows more tokens. The paper counts in suffix trees. Here the counts come from the
latest occurrences of a match, which hash chains as in LZ77 find in a window of the text: no
structure grows with the text, and the oldest text can be dropped.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from llmkit.runtime.engine.sequence import Sequence

MAX_MATCH = 64  # tokens of context that are compared
MAX_SPEC_FACTOR = 1.0  # draft tokens for each token of the match, at most
MIN_TOKEN_PROB = 0.1  # of a draft token and all before it, estimated from the counts
MAX_OCCURRENCES = 16  # of a match that are counted, the latest ones

# The match lengths that have a chain. A match of 2 may have so many occurrences that the latest
# ones include none of a longer match; the chains of longer ones find it.
CHAINED_LENGTHS = (2, 4, 8)
MAX_STEPS = 4 * MAX_OCCURRENCES  # along a chain; other n-grams may have the same hash

MIN_CAPACITY = 1024
MAX_REQUEST_TOKENS = 1 << 17  # of one request, the latest ones
MAX_HISTORY_TOKENS = 1 << 16  # of the recent outputs of one namespace
MAX_TOTAL_HISTORY_TOKENS = 1 << 20  # of all namespaces

_NONE = -1  # no position
_END_OF_TEXT = -1  # in the place of a token id


class Chain(NamedTuple):
    """The positions after each n-gram of one length, the latest first."""

    length: int
    heads: array[int]  # by the n-gram's hash: the latest position
    earlier: array[int]  # by position: the one before it in the chain


class SuffixDraft(NamedTuple):
    """Draft tokens, and how many of them are expected to be accepted."""

    token_ids: list[int]
    score: float


NO_DRAFT = SuffixDraft([], 0.0)


class SuffixProposer:
    """Proposes what followed earlier occurrences of the sequence's last tokens.

    They are looked up in the sequence itself and in the recent outputs of its namespace: of
    finished requests with the same cache salt, which differs between API keys, and adapter.
    """

    def __init__(self, max_total_history_tokens: int = MAX_TOTAL_HISTORY_TOKENS) -> None:
        self._max_total_history_tokens = max_total_history_tokens
        self._indexes: dict[Sequence, SuffixIndex] = {}
        # Recent outputs by namespace, the least recently extended first.
        self._histories: OrderedDict[tuple[int, str], SuffixIndex] = OrderedDict()

    def propose(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """See `DraftProposer.propose`."""
        token_ids = sequence.token_ids
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = SuffixIndex(MAX_REQUEST_TOKENS)
        index.extend(token_ids[index.num_appended :])
        context = token_ids[-MAX_MATCH:]
        draft = index.find_draft(context, max_tokens)
        history = self._histories.get(_namespace(sequence))
        if history is not None:
            draft = max(draft, history.find_draft(context, max_tokens), key=_score)
        return draft.token_ids

    def forget(self, sequence: Sequence) -> None:
        """See `DraftProposer.forget`. The output becomes a part of its namespace's history."""
        self._indexes.pop(sequence, None)
        if len(sequence.token_ids) == sequence.num_prompt_tokens:
            return
        namespace = _namespace(sequence)
        history = self._histories.pop(namespace, None) or SuffixIndex(MAX_HISTORY_TOKENS)
        # The end of the prompt is the context of the first tokens of the output.
        start = max(0, sequence.num_prompt_tokens - CHAINED_LENGTHS[-1])
        history.extend(sequence.token_ids[start:])
        history.end_text()
        self._histories[namespace] = history
        total = sum(history.capacity for history in self._histories.values())
        while total > self._max_total_history_tokens:
            _, oldest = self._histories.popitem(last=False)
            total -= oldest.capacity

    @property
    def num_history_bytes(self) -> int:
        """The memory of all histories."""
        return sum(history.num_bytes for history in self._histories.values())


class SuffixIndex:
    """The latest tokens of one or several texts, and where each n-gram occurred in them.

    A token costs one entry in each of the chains: about 1 us, however long the text. A draft costs
    at most MAX_STEPS positions in each chain, MAX_OCCURRENCES comparisons of MAX_MATCH tokens in
    each, and one count of MAX_OCCURRENCES tokens for each draft token and match length. The memory
    is 52 bytes for each token of `capacity`.
    """

    def __init__(self, max_tokens: int, max_occurrences: int = MAX_OCCURRENCES) -> None:
        """max_tokens: the most that it keeps, a power of two."""
        assert max_tokens & (max_tokens - 1) == 0, f"{max_tokens} is no power of two"
        self._max_tokens = max_tokens
        self._max_occurrences = max_occurrences
        self.num_appended = 0  # tokens and ends of texts, those that were dropped included
        self._recent: list[int] = []  # the last tokens of the current text
        self._allocate(min(MIN_CAPACITY, max_tokens))

    @property
    def capacity(self) -> int:
        """The tokens that its memory has room for; a power of two."""
        return len(self._tokens)

    @property
    def num_bytes(self) -> int:
        """The memory of its tables."""
        chains = (table for chain in self._chains for table in (chain.heads, chain.earlier))
        return sum(table.itemsize * len(table) for table in (self._tokens, *chains))

    def extend(self, token_ids: SequenceOf[int]) -> None:
        """Append tokens to the current text; the oldest tokens beyond `max_tokens` are dropped."""
        self._reserve(len(token_ids))
        tokens = self._tokens
        mask = len(tokens) - 1
        position = self.num_appended
        text = [*self._recent, *token_ids]
        for place in range(len(self._recent), len(text)):
            for chain in self._chains:
                if place < chain.length:
                    break
                bucket = hash(tuple(text[place - chain.length : place])) & mask
                chain.earlier[position & mask] = chain.heads[bucket]
                chain.heads[bucket] = position
            tokens[position & mask] = text[place]
            position += 1
        self.num_appended = position
        self._recent = text[-CHAINED_LENGTHS[-1] :]

    def end_text(self) -> None:
        """Begin another text. No match and no draft reaches from one text into another."""
        self.extend([_END_OF_TEXT])

    def find_draft(self, context: SequenceOf[int], max_tokens: int) -> SuffixDraft:
        """At most `max_tokens` tokens that may follow `context`.

        For each match length, the draft is the path of the tokens that followed most often. The
        draft with the highest score is returned: the sum of its tokens' estimated probabilities,
        which is the expected number of accepted tokens. Of equals, the one with the longest match.
        """
        best = NO_DRAFT
        longest = MAX_MATCH
        for chain in reversed(self._chains):
            occurrences = self._occurrences(chain, context, longest)
            longest = chain.length - 1
            for match_length in sorted({length for _, length in occurrences}, reverse=True):
                limit = min(max_tokens, int(match_length * MAX_SPEC_FACTOR))
                if limit <= best.score:  # shorter matches allow even fewer tokens
                    return best
                positions = [start for start, length in occurrences if length >= match_length]
                best = max(best, self._most_frequent(positions, limit), key=_score)
        return best

    def _occurrences(
        self, chain: Chain, context: SequenceOf[int], longest: int
    ) -> list[tuple[int, int]]:
        """The latest occurrences of the end of `context`, as (position after it, match length).

        Matches have at least the chain's length; beyond `longest` tokens they are not compared.
        """
        occurrences: list[tuple[int, int]] = []
        if len(context) < chain.length:
            return occurrences
        tokens = self._tokens
        mask = len(tokens) - 1
        first = max(0, self.num_appended - len(tokens))
        position = chain.heads[hash(tuple(context[-chain.length :])) & mask]
        for _ in range(MAX_STEPS):
            if position < first or len(occurrences) == self._max_occurrences:
                break
            length = 0
            most = min(longest, len(context), position - first)
            while length < most and tokens[(position - 1 - length) & mask] == context[-1 - length]:
                length += 1
            if length >= chain.length and tokens[position & mask] != _END_OF_TEXT:
                occurrences.append((position, length))
            position = chain.earlier[position & mask]
        return occurrences

    def _most_frequent(self, positions: list[int], max_tokens: int) -> SuffixDraft:
        """The path of the most frequent tokens from these positions, the latest ones first."""
        tokens = self._tokens
        mask = len(tokens) - 1
        token_ids: list[int] = []
        probability = 1.0
        score = 0.0
        while len(token_ids) < max_tokens:
            positions = [
                position
                for position in positions
                if position < self.num_appended and tokens[position & mask] != _END_OF_TEXT
            ]
            if not positions:
                break
            following = [tokens[position & mask] for position in positions]
            # Of equally frequent tokens, the one that occurred last. Mostly they are all equal.
            token_id = following[0]
            count = following.count(token_id)
            if 2 * count < len(following):
                token_id = max(following, key=following.count)
                count = following.count(token_id)
            probability *= count / len(following)
            if probability < MIN_TOKEN_PROB:
                break
            token_ids.append(token_id)
            score += probability
            positions = [
                position + 1
                for position, token in zip(positions, following, strict=True)
                if token == token_id
            ]
        return SuffixDraft(token_ids, score)

    def _reserve(self, num_tokens: int) -> None:
        """Double the memory until it has room for `num_tokens` more, up to `max_tokens`."""
        capacity = self.capacity
        while capacity < min(self._max_tokens, self.num_appended + num_tokens):
            capacity *= 2
        if capacity == self.capacity:
            return
        # Nothing has been dropped yet. The n-grams get other places in larger tables.
        tokens = self._tokens[: self.num_appended]
        self.num_appended = 0
        self._recent = []
        self._allocate(capacity)
        self.extend(tokens)

    def _allocate(self, capacity: int) -> None:
        self._tokens = array("i", [0]) * capacity
        self._chains = [
            Chain(length, array("q", [_NONE]) * capacity, array("q", [_NONE]) * capacity)
            for length in CHAINED_LENGTHS
        ]


def _namespace(sequence: Sequence) -> tuple[int, str]:
    return sequence.adapter_id, sequence.request.cache_salt


def _score(draft: SuffixDraft) -> float:
    return draft.score
