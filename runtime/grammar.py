"""Answers that follow a grammar: which tokens may come next.

A grammar is llguidance's own text, which its functions make of JSON schemas, regular expressions and Lark grammars.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import torch
from llguidance import LLMatcher

from llmkit.checkpoint.source import Checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.runtime.matcher import compile_grammar, grammar_tokenizer

KEPT = 64  # compiled grammars


class Grammars:
    """The grammars of requests to a model, each compiled once as long as it is in use. Threads may share one."""

    def __init__(self, checkpoint: Checkpoint, vocab: int, eos_ids: tuple[int, ...]) -> None:
        """vocab: rows of the model's output projection. Raises InputError for a checkpoint without a tokenizer."""
        self._tokenizer = grammar_tokenizer(load_tokenizer(checkpoint).to_json(), vocab, eos_ids)
        self._vocab = vocab
        self._made: OrderedDict[str, LLMatcher] = OrderedDict()
        self._change = threading.Lock()

    def __call__(self, grammar: str) -> GrammarState:
        """The state before a request's first token. Raises RequestError for a text that is no grammar or too large."""
        matcher = self._made.get(grammar)
        if matcher is None:
            matcher = compile_grammar(self._tokenizer, grammar)
        with self._change:
            self._made[grammar] = matcher
            self._made.move_to_end(grammar)
            if len(self._made) > KEPT:
                self._made.popitem(last=False)
        return GrammarState(matcher.deep_copy(), self._vocab)


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
