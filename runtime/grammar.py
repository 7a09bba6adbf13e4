"""Answers that follow a grammar: which tokens may come next, by llguidance (https://github.com/guidance-ai/llguidance).

A grammar is llguidance's own text, which its functions make of JSON schemas, regular expressions and Lark grammars.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from llmkit.checkpoint.source import Checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.runtime.engine.types import RequestError

KEPT = 64  # compiled grammars
LIMITS = LLParserLimits(
    max_grammar_size=500_000, max_lexer_states=50_000, initial_lexer_fuel=300_000, step_lexer_fuel=50_000
)


class Grammars:
    """The grammars of requests to a model, each compiled once as long as it is in use."""

    def __init__(self, checkpoint: Checkpoint, vocab: int, eos_ids: tuple[int, ...]) -> None:
        """vocab: rows of the model's output projection. Raises InputError for a checkpoint without a tokenizer."""
        text = load_tokenizer(checkpoint).to_json()
        self._tokenizer = LLTokenizer(text, n_vocab=vocab, eos_token=list(eos_ids) or None)
        self._vocab = vocab
        self._made: OrderedDict[str, LLMatcher] = OrderedDict()

    def __call__(self, grammar: str) -> GrammarState:
        """The state before a request's first token. Raises RequestError for a text that is no grammar or too large."""
        if grammar not in self._made:
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
            if matcher.is_error():
                raise RequestError("invalid_grammar", matcher.get_error().splitlines()[0][:500], "grammar")
            self._made[grammar] = matcher
            if len(self._made) > KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(grammar)
        return GrammarState(self._made[grammar].deep_copy(), self._vocab)


class GrammarState:
    """How far one answer has come; see `llmkit.runtime.engine.sequence.Guide`."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab

    def allowed(self) -> torch.Tensor:
        """See `Guide.allowed`."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab]).bool()

    def advance(self, token: int) -> bool:
        """See `Guide.advance`."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())  # a limit that is reached in the middle ends the answer, too
