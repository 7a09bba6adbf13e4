"""Grammars compiled by llguidance (https://github.com/guidance-ai/llguidance), without torch.

The server compiles each grammar twice: first in a process that it can kill
(`llmkit.runtime.server.sandbox_process`), because even a schema of a hundred bytes may take
forever, and then in the engine process.
"""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from llmkit.runtime.engine.engine_errors import RequestError

LIMITS = LLParserLimits(
    max_grammar_size=500_000,
    max_lexer_states=50_000,
    initial_lexer_fuel=300_000,
    step_lexer_fuel=50_000,
)


def grammar_tokenizer(
    tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]
) -> LLTokenizer:
    """The tokenizer that grammars are compiled for.

    vocab_size: rows of the model's output projection.
    """
    return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the start of an output.

    Raises RequestError for an invalid or too large grammar.
    """
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise RequestError("invalid_grammar", matcher.get_error().splitlines()[0][:500], "grammar")
    return matcher
