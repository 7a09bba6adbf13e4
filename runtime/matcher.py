"""Grammars compiled by llguidance (https://github.com/guidance-ai/llguidance), without torch.

The server compiles each of them twice: first in a process that it can kill (`llmkit.runtime.server.sandbox_process`),
for a schema of a hundred bytes may take for ever, and then, knowing that it is cheap, in the engine process.
"""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from llmkit.runtime.engine.types import RequestError

LIMITS = LLParserLimits(
    max_grammar_size=500_000, max_lexer_states=50_000, initial_lexer_fuel=300_000, step_lexer_fuel=50_000
)


def grammar_tokenizer(text: str, vocab: int, eos_ids: Sequence[int]) -> LLTokenizer:
    """What grammars are compiled for. text: tokenizer.json; vocab: rows of the model's output projection."""
    return LLTokenizer(text, n_vocab=vocab, eos_token=list(eos_ids) or None)


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """The state before an answer's first token. Raises RequestError for a text that is no grammar or too large."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise RequestError("invalid_grammar", matcher.get_error().splitlines()[0][:500], "grammar")
    return matcher
