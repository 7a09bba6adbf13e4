"""What requests change in their logits before a token is chosen, and what they ask to be told of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import torch

from llmkit.kernels.jit import sent
from llmkit.kernels.sampling import report
from llmkit.model.decoder import Decoder
from llmkit.runtime.engine.sequence import Chunk, Sequence
from llmkit.runtime.engine.types import Logprobs

PIECE = 64  # places of a prompt whose logits are in memory at once
Told = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # see `report`


def shape_(logits: torch.Tensor, sequences: SequenceOf[Sequence], counters: SequenceOf[int], first: int,
           ends: Iterable[int]) -> None:  # fmt: skip
    """Change rows of logits [n, V], of tokens from `first` on, for those of their sequences that ask for it.

    counters: tokens sampled before each row's; ends: tokens that end answers. The order is vLLM's: what may not
    come by a grammar, bias, what may not come yet, penalties.
    """

    def columns(tokens: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the tokens that lie here: their columns, and their places among all."""
        found = torch.tensor(list(tokens), dtype=torch.int64) - first
        here = ((found >= 0) & (found < logits.shape[-1])).nonzero()[:, 0]
        return sent(found[here], logits.device), here

    for line, sequence, counter in zip(logits, sequences, counters, strict=True):
        asked, prompt = sequence.request.sampling, len(sequence.request.prompt)
        if sequence.guide is not None:
            allowed = sequence.guide.allowed()[first : first + len(line)]
            line[: len(allowed)].masked_fill_(~sent(allowed, line.device), float("-inf"))
        if asked.logit_bias:
            where, here = columns(asked.logit_bias)
            line[where] += sent(torch.tensor([*asked.logit_bias.values()], dtype=torch.float32)[here], line.device)
        if counter < asked.min_tokens:
            line[columns({*asked.stop_token_ids, *(() if asked.ignore_eos else ends)})[0]] = float("-inf")
        if asked.repetition_penalty != 1:
            seen = line[where := columns(set(sequence.tokens))[0]]
            line[where] = torch.where(seen > 0, seen / asked.repetition_penalty, seen * asked.repetition_penalty)
        if asked.presence_penalty or asked.frequency_penalty:
            counts = Counter(sequence.tokens[prompt:])
            where, here = columns(counts)
            times = torch.tensor(list(counts.values()), dtype=torch.float32)[here]
            line[where] -= sent(asked.presence_penalty + asked.frequency_penalty * times, line.device)


def places(chunk: Chunk) -> tuple[int, int]:
    """After how many of a chunk's first tokens the prompt's next is told of, and how many new tokens are."""
    asked, prompt = chunk.sequence.request.sampling, chunk.sequence.request.prompt
    old = 0 if asked.prompt_logprobs is None else max(0, min(chunk.stop, len(prompt) - 1) - chunk.start)
    return old, 1 + chunk.drafts if chunk.samples and asked.logprobs is not None else 0


def most(chunks: SequenceOf[Chunk]) -> int:
    """The most alternatives that one of the requests wants to be told of."""
    asked = [chunk.sequence.request.sampling for chunk in chunks]
    return max(max(one.logprobs or 0, one.prompt_logprobs or 0) for one in asked)


def told_rows(chunks: SequenceOf[Chunk]) -> list[int]:
    """The rows, among those that a step samples from, whose new tokens are told of."""
    rows, at = list[int](), 0
    for chunk in chunks:
        rows += range(at, at + places(chunk)[1])
        at += 1 + chunk.drafts
    return rows


def blank(chunks: SequenceOf[Chunk]) -> Told | None:
    """A table on the host for all that a step tells, to be filled in by another rank; None when it tells nothing."""
    rows = sum(map(sum, map(places, chunks)))
    ids = torch.zeros(rows, most(chunks) if rows else 0, dtype=torch.int64)
    return (torch.zeros(rows), ids.float(), ids) if rows else None


def tell_prompts(model: Decoder, chunks: SequenceOf[Chunk], hidden: torch.Tensor, count: int) -> list[Told]:
    """Of each place in a step's prompts that is asked for, a piece at a time; hidden: [T, H], of all its tokens."""
    told, at = [], 0
    for chunk in chunks:
        for start in range(0, places(chunk)[0], PIECE):
            stop = min(start + PIECE, places(chunk)[0])
            following = chunk.sequence.request.prompt[chunk.start + start + 1 : chunk.start + stop + 1]
            ids = sent(torch.tensor(following), hidden.device)
            told.append(report(model.logits(hidden[at + start : at + stop]), ids, count, model.ranks))
        at += chunk.count
    return told


def pool(chunks: SequenceOf[Chunk], hidden: torch.Tensor) -> None:
    """Take the hidden states [T, H] of a step into what its sequences have `pooled`: float32 [H]."""
    for chunk, rows in zip(chunks, hidden.split([chunk.count for chunk in chunks]), strict=True):
        sequence = chunk.sequence
        if sequence.request.pooling == "mean":
            share = rows.sum(0, dtype=torch.float32) / len(sequence.request.prompt)
            sequence.pooled = sequence.pooled + share if chunk.start else share
        elif chunk.pools:
            sequence.pooled = rows[-1].float()


def unfold(chunks: SequenceOf[Chunk], told: Told) -> list[tuple[list[Logprobs], list[Logprobs]]]:
    """For each chunk what is told of its prompt and of its new tokens; the table has all prompts' rows first."""
    rows = zip(*(part.tolist() for part in told), strict=True)

    def take(count: int, alternatives: int | None) -> list[Logprobs]:
        return [
            Logprobs(own, list(zip(tokens, values, strict=True))[:alternatives])
            for own, values, tokens in (next(rows) for _ in range(count))
        ]

    old = [take(places(chunk)[0], chunk.sequence.request.sampling.prompt_logprobs) for chunk in chunks]
    new = [take(places(chunk)[1], chunk.sequence.request.sampling.logprobs) for chunk in chunks]
    return list(zip(old, new, strict=True))
