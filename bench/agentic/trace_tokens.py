"""Tokens and text for the block ids and lengths of a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from llmkit.bench.agentic.agent_trace import HashedTokens
from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.common.errors import InputError


class TraceTokens:
    """Makes tokens: equal block ids are equal tokens within one run, and other ones in the next.

    So a run shares what its trace shares, and a prefix cache finds nothing of earlier runs. Blocks
    are spans of a text.
    """

    def __init__(
        self, corpus: Sequence[int], tokenizer: Tokenizer, block_tokens: int, run: str
    ) -> None:
        """corpus: tokens of the text. run: names the run; part of every block's seed.

        Raises InputError when the text is shorter than a block.
        """
        if len(corpus) <= block_tokens:
            raise InputError(
                f"the text of the prompts is {len(corpus)} tokens long",
                f"More than a block of {block_tokens} is needed",
                "Check the model's tokenizer",
            )
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._block_tokens = block_tokens
        self._run = run

    def ids(self, tokens: HashedTokens, place: str) -> list[int]:
        """The token ids. place: names the turn or message; tokens without an id depend on it."""
        token_ids: list[int] = []
        for hash_id in tokens.hash_ids:
            length = min(self._block_tokens, tokens.num_tokens - len(token_ids))
            token_ids += self._block(f"block {hash_id!r}")[:length]
        number = 0
        while len(token_ids) < tokens.num_tokens:
            length = tokens.num_tokens - len(token_ids)
            token_ids += self._block(f"{place}, part {number}")[:length]
            number += 1
        return token_ids

    def message(self, message: Mapping[str, Any], place: str) -> dict[str, Any]:
        """A message with the text of its `tokens`, if it has them instead of content."""
        resolved = dict(message)
        tokens = resolved.pop("tokens", None)
        if tokens is not None:
            resolved["content"] = self._tokenizer.decode(self.ids(tokens, place))
        return resolved

    def _block(self, name: str) -> Sequence[int]:
        random = Random(f"{self._run}/{name}")  # noqa: S311
        start = random.randrange(len(self._corpus) - self._block_tokens)
        return self._corpus[start : start + self._block_tokens]
