"""What the model writes: the same prompts before and after, and calibration text of its own.

The generator is handed in (`llmkit.runtime.generate.generate`): this folder runs no engine.
Legend: `L` tokens of a window.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llmkit.checkpoint.errors import InputError, ShortageError
from llmkit.checkpoint.source import Checkpoint
from llmkit.checkpoint.tokenizer import ChatTemplateError, Tokenizer
from llmkit.model.families import model_spec

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "A train travels 60 km in 45 minutes. What is its average speed in km/h?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Name three differences between a list and a tuple in Python.",
    "Translate into German: The weather is nice today and we are going for a walk.",
    "Summarize in one sentence: Water evaporates from the sea, forms clouds, and falls as rain.",
    "How do I boil an egg so that the yolk stays soft?",
    "Once upon a time, in a village by the sea, there lived an old",
    "The three most important inventions of the twentieth century were",
)

GREEDY_TOKENS = 4  # most probable tokens after the first one of a text; LLM-QAT has 3 to 5
ROUNDS = 2  # of further texts where the first ones end early, before texts that may not end
MOST_TEXTS = 16  # for each missing window in a round: a model that ends every text at once would need too many
_WORD = re.compile(r" [^\W\d_]{2,}")


class Generate(Protocol):
    """Writes after prompts of token ids; see `llmkit.runtime.generate`."""

    def __call__(
        self,
        checkpoint: Checkpoint,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        temperature: float,
        seed: int,
        *,
        device: str = "auto",
        stop_at_eos: bool = True,
    ) -> list[list[int]]:
        """The new token ids after each prompt; with `stop_at_eos` one that ends an answer is its last.

        Raises ShortageError when the model does not fit and InputError when it cannot be run.
        """


def side_by_side(
    source: Checkpoint, output: Checkpoint, tokenizer: Tokenizer, generate: Generate, device: str, tokens: int = 48
) -> tuple[list[dict[str, Any]], str | None]:
    """What both checkpoints answer to PROMPTS with their most probable tokens, up to `tokens` each, and None.

    Each entry: `prompt`; `before` and `after`, the answers of source and output as text; `same_tokens`, how many
    tokens the answers have in common before they first differ; `tokens`, how many `before` has.
    When a checkpoint cannot be run whole on `device` ("auto", "cuda" or "cpu"): no entries, and the reason.
    """
    prompts = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    try:
        before, after = (
            generate(checkpoint, prompts, tokens, 0.0, 0, device=device, stop_at_eos=True)
            for checkpoint in (source, output)
        )
    except (ShortageError, InputError) as error:
        return [], str(error)
    return [
        {
            "prompt": prompt,
            "before": tokenizer.decode(ours),
            "after": tokenizer.decode(theirs),
            "same_tokens": _common(ours, theirs),
            "tokens": len(ours),
        }
        for prompt, ours, theirs in zip(PROMPTS, before, after, strict=True)
    ], None


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt as a user's message where there is a chat template that takes it, else as plain text."""
    if tokenizer.chat_template is not None:
        try:
            chat = tokenizer.render_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
            return tokenizer.encode(chat, add_special_tokens=False)
        except ChatTemplateError:
            pass
    return tokenizer.encode(prompt)


def sampled_windows(
    checkpoint: Checkpoint, tokenizer: Tokenizer, generate: Generate, count: int, length: int, seed: int, device: str
) -> torch.Tensor:
    """Windows int64 [count, L = length] of text that the model writes itself, the same for the same `seed`.

    A text begins with a random word; a few most probable tokens follow, the rest is sampled at temperature 1 (LLM-QAT,
    Liu et al., arXiv 2305.17888). Texts are concatenated, with the tokens that end them, and cut to full
    windows, each of which begins with the BOS token where the tokenizer begins texts with it.
    Raises what `generate` raises.
    """
    beginning = tokenizer.encode("")[:1]
    prefix = beginning if beginning and beginning[0] == tokenizer.bos_id else []
    writer = _Writer(checkpoint, tokenizer, generate, prefix, length - len(prefix), device)
    draw = torch.Generator().manual_seed(seed)
    needed = count * writer.size
    written = writer.texts(count, draw, may_end=True)
    for _ in range(ROUNDS):
        missing = needed - sum(map(len, written))
        if missing > 0:
            written += writer.texts(_texts_for(missing, written, writer.size), draw, may_end=True)
    missing = needed - sum(map(len, written))
    if missing > 0:
        written += writer.texts(-(-missing // writer.least), draw, may_end=False)
    tokens = torch.tensor([token for text in written for token in text][:needed], dtype=torch.int64)
    windows = tokens.view(count, writer.size)
    return torch.cat([torch.full((count, 1), prefix[0]), windows], dim=1) if prefix else windows


def first_tokens(tokenizer: Tokenizer, vocab: int | None = None) -> list[int]:
    """Token ids that a random text may begin with: a space and a word of letters; without any, whatever has letters.

    Ids from `vocab` on, which the model does not have, and special tokens are left out. Raises InputError for a
    tokenizer that has no other tokens.
    """
    known = min(tokenizer.vocab_size, vocab or tokenizer.vocab_size)
    usual = [index for index in range(known) if index not in tokenizer.special_ids]
    spelled = {index: tokenizer.token_bytes(index).decode("utf-8", "replace") for index in usual}
    words = [index for index, text in spelled.items() if _WORD.fullmatch(text)]
    words = words or [index for index, text in spelled.items() if text.strip().isalpha()] or usual
    if not words:
        raise InputError("the tokenizer has only special tokens", todo="Use --calibration FILE")
    return words


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _texts_for(missing: int, written: Sequence[Sequence[int]], size: int) -> int:
    """How many texts, as long as those written so far, should give the missing tokens; a bounded number."""
    mean = sum(map(len, written)) / len(written)
    return math.ceil(min(1.1 * missing / mean, MOST_TEXTS * missing / size))


@dataclass
class _Writer:
    """Lets the model write texts of at most `size` tokens after `prefix`, which is not part of them."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    generate: Generate
    prefix: list[int]
    size: int
    device: str

    def __post_init__(self) -> None:
        assert self.least > 1
        self.words = first_tokens(self.tokenizer, model_spec(self.checkpoint.config).vocab)

    @property
    def least(self) -> int:
        """Tokens of a text that may not end, at least."""
        return self.size - GREEDY_TOKENS

    def texts(self, count: int, draw: torch.Generator, may_end: bool) -> list[list[int]]:
        """`count` texts, their first words and the seed of all else drawn from `draw`."""
        words = torch.randint(len(self.words), (count,), generator=draw).tolist()
        seed = int(torch.randint(1 << 62, (1,), generator=draw))
        prompts = [[*self.prefix, self.words[word]] for word in words]
        greedy = self._run(prompts, GREEDY_TOKENS, 0.0, seed, may_end=True)
        starts = [
            [*prompt, *(token for token in answer if token not in self.tokenizer.eos_ids)]
            for prompt, answer in zip(prompts, greedy, strict=True)
        ]
        answers = self._run(starts, self.least - 1, 1.0, seed, may_end)
        return [[*start, *answer][len(self.prefix) :] for start, answer in zip(starts, answers, strict=True)]

    def _run(
        self, prompts: list[list[int]], tokens: int, temperature: float, seed: int, may_end: bool
    ) -> list[list[int]]:
        return self.generate(
            self.checkpoint, prompts, tokens, temperature, seed, device=self.device, stop_at_eos=may_end
        )
