"""Compiles the grammars of requests and follows outputs through them.

A grammar is in llguidance's own format. llguidance converts JSON schemas, regular expressions and
Lark grammars to it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import torch
from llguidance import LLMatcher

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.runtime.grammar_compiler import compile_grammar, grammar_tokenizer

MAX_CACHED_GRAMMARS = 64


class GrammarBackend:
    """Compiles grammars for a model and caches the recent ones. Several threads may use it."""

    def __init__(
        self, checkpoint: Checkpoint, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        """vocab_size: rows of the model's output projection.

        Raises InputError without a tokenizer.
        """
        tokenizer_json = load_tokenizer(checkpoint).to_json()
        self._tokenizer = grammar_tokenizer(tokenizer_json, vocab_size, eos_token_ids)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()  # at the start of an output
        self._lock = threading.Lock()

    def compile(self, grammar: str) -> LLGuidanceMatcher:
        """A matcher at the start of an output.

        Raises RequestError for an invalid or too large grammar.
        """
        matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = compile_grammar(self._tokenizer, grammar)
        with self._lock:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        return LLGuidanceMatcher(matcher.deep_copy())


class LLGuidanceMatcher:
    """Follows one output; see `llmkit.runtime.engine.grammar_matcher.GrammarMatcher`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fill_bitmask(self, bitmask: torch.Tensor) -> None:
        """See `GrammarMatcher.fill_bitmask`."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: len(bitmask)]
        filled = bitmask.numpy()
        filled[: len(words)] = words
        filled[len(words) :] = 0

    def accept_token(self, token_id: int) -> None:
        """See `GrammarMatcher.accept_token`."""
        self._matcher.consume_token(token_id)

    def is_terminated(self) -> bool:
        """See `GrammarMatcher.is_terminated`; also true when the grammar's limits are exceeded."""
        return bool(self._matcher.is_stopped())
