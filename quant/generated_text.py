"""Text that a model generates: answers before and after quantizing, and its own calibration text.

The caller passes the generator (`llmkit.runtime.generate.generate`): this folder runs no engine.
Legend: L tokens of a window.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.tokenizer import ChatTemplateError, Tokenizer
from llmkit.common.errors import InputError, ShortageError
from llmkit.model.families import checkpoint_spec

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

# The tokens after a text's first one that are chosen greedily. LLM-QAT uses 3 to 5.
GREEDY_TOKENS = 4
# How often more texts are generated when texts end early. After that, EOS does not end a text.
EXTRA_ROUNDS = 2
# The texts of a round for each missing window, at most: a model may end every text at once.
MAX_TEXTS_PER_WINDOW = 16
_WORD = re.compile(r" [^\W\d_]{2,}")


class GenerateFn(Protocol):
    """Continues prompts of token ids; see `llmkit.runtime.generate`."""

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
        """The new token ids after each prompt. With `stop_at_eos` an EOS token ends them.

        Raises ShortageError when the model does not fit and InputError when it cannot run.
        """


def compare_answers(
    source: Checkpoint,
    output: Checkpoint,
    tokenizer: Tokenizer,
    generate: GenerateFn,
    device: str,
    max_tokens: int = 48,
) -> tuple[list[dict[str, Any]], str | None]:
    """Generate greedy answers of both checkpoints to PROMPTS.

    Returns an entry for each prompt, and None. When a checkpoint cannot run on `device`, returns no
    entries, and the reason. An entry has `prompt`; `before` and `after`, the answers of source and
    output as text; `same_tokens`, the length of the answers' common prefix in tokens; and `tokens`,
    the length of `before`.
    """
    prompts = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    try:
        answers = [
            generate(checkpoint, prompts, max_tokens, 0.0, 0, device=device, stop_at_eos=True)
            for checkpoint in (source, output)
        ]
    except (ShortageError, InputError) as error:
        return [], str(error)
    entries = [
        {
            "prompt": prompt,
            "before": tokenizer.decode(before),
            "after": tokenizer.decode(after),
            "same_tokens": _common_prefix_length(before, after),
            "tokens": len(before),
        }
        for prompt, before, after in zip(PROMPTS, *answers, strict=True)
    ]
    return entries, None


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's token ids, as a chat message if the chat template accepts it, else as text."""
    if tokenizer.chat_template is not None:
        try:
            chat = tokenizer.render_chat(
                [{"role": "user", "content": prompt}], add_generation_prompt=True
            )
            return tokenizer.encode(chat, add_special_tokens=False)
        except ChatTemplateError:
            pass
    return tokenizer.encode(prompt)


def generated_windows(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    generate: GenerateFn,
    count: int,
    length: int,
    seed: int,
    device: str,
) -> torch.Tensor:
    """Windows int64 [count, L = length] of text that the model generates; repeatable by `seed`.

    A text begins with a random word. A few greedy tokens follow, and the rest is sampled at
    temperature 1 (LLM-QAT, Liu et al., arXiv 2305.17888). The texts are concatenated, with their
    EOS tokens, and cut to full windows. Each window begins with the BOS token if the tokenizer adds
    one. Raises what `generate` raises.
    """
    start = tokenizer.encode("")[:1]
    bos = start if start and start[0] == tokenizer.bos_token_id else []
    generator = _TextGenerator(checkpoint, tokenizer, generate, bos, length - len(bos), device)
    draw = torch.Generator().manual_seed(seed)
    needed = count * generator.max_tokens
    texts = generator.texts(count, draw, stop_at_eos=True)
    for _ in range(EXTRA_ROUNDS):
        missing = needed - sum(map(len, texts))
        if missing > 0:
            more = _num_texts(missing, texts, generator.max_tokens)
            texts += generator.texts(more, draw, stop_at_eos=True)
    missing = needed - sum(map(len, texts))
    if missing > 0:
        more = -(-missing // generator.min_tokens)
        texts += generator.texts(more, draw, stop_at_eos=False)
    token_ids = [token for text in texts for token in text][:needed]
    windows = torch.tensor(token_ids, dtype=torch.int64).view(count, generator.max_tokens)
    if not bos:
        return windows
    return torch.cat([torch.full((count, 1), bos[0]), windows], dim=1)


def start_tokens(tokenizer: Tokenizer, vocab_size: int | None = None) -> list[int]:
    """The token ids that a random text may begin with.

    They are a space and a word of letters; if there are none, any tokens with letters; else all.
    Special tokens are left out, and ids from `vocab_size` on, which the model does not have. Raises
    InputError for a tokenizer that has only special tokens.
    """
    known = min(tokenizer.vocab_size, vocab_size or tokenizer.vocab_size)
    ordinary = [token for token in range(known) if token not in tokenizer.special_ids]
    texts = {token: tokenizer.token_bytes(token).decode("utf-8", "replace") for token in ordinary}
    words = [token for token, text in texts.items() if _WORD.fullmatch(text)]
    if not words:
        words = [token for token, text in texts.items() if text.strip().isalpha()]
    if not words:
        words = ordinary
    if not words:
        raise InputError("the tokenizer has only special tokens", todo="Use --calibration FILE")
    return words


def _common_prefix_length(before: Sequence[int], after: Sequence[int]) -> int:
    """The number of tokens that two answers share at their beginning."""
    length = 0
    for a, b in zip(before, after, strict=False):
        if a != b:
            break
        length += 1
    return length


def _num_texts(missing: int, texts: Sequence[Sequence[int]], window: int) -> int:
    """How many texts of the mean length of `texts` give the missing tokens, within a bound."""
    mean_length = sum(map(len, texts)) / len(texts)
    return math.ceil(min(1.1 * missing / mean_length, MAX_TEXTS_PER_WINDOW * missing / window))


@dataclass
class _TextGenerator:
    """Generates texts of at most `max_tokens` tokens after `bos`, which is not part of them."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    generate: GenerateFn
    bos: list[int]
    max_tokens: int
    device: str

    def __post_init__(self) -> None:
        assert self.min_tokens > 1
        vocab_size = checkpoint_spec(self.checkpoint).vocab_size
        self.words = start_tokens(self.tokenizer, vocab_size)

    @property
    def min_tokens(self) -> int:
        """The fewest tokens of a text that does not stop at EOS."""
        return self.max_tokens - GREEDY_TOKENS

    def texts(self, count: int, draw: torch.Generator, stop_at_eos: bool) -> list[list[int]]:
        """`count` texts. `draw` gives their first words and the seed of the sampling."""
        words = torch.randint(len(self.words), (count,), generator=draw).tolist()
        seed = int(torch.randint(1 << 62, (1,), generator=draw))
        prompts = [[*self.bos, self.words[word]] for word in words]
        greedy = self._run(prompts, GREEDY_TOKENS, 0.0, seed, stop_at_eos=True)
        starts = []
        for prompt, tokens in zip(prompts, greedy, strict=True):
            without_eos = [token for token in tokens if token not in self.tokenizer.eos_token_ids]
            starts.append([*prompt, *without_eos])
        rests = self._run(starts, self.min_tokens - 1, 1.0, seed, stop_at_eos)
        return [[*start, *rest][len(self.bos) :] for start, rest in zip(starts, rests, strict=True)]

    def _run(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        temperature: float,
        seed: int,
        stop_at_eos: bool,
    ) -> list[list[int]]:
        return self.generate(
            self.checkpoint,
            prompts,
            max_tokens,
            temperature,
            seed,
            device=self.device,
            stop_at_eos=stop_at_eos,
        )
