"""What a server gets right, from the log probabilities it tells of prompts: perplexity, and what they say of KL.

A server tells of the most probable tokens only. Perplexity needs no others and is exact. Of the KL divergence it leaves
a lower bound: that of the same distributions with all tokens that one side does not tell of taken as one
(Cover and Thomas, Elements of Information Theory, 2nd ed., theorem 2.7.1, the log sum inequality).
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import torch

from llmkit.bench.load import SILENCE_TIMEOUT_S, Server, error_text, open_session
from llmkit.bench.metrics import BOUNDS
from llmkit.checkpoint.errors import InputError, ShortageError

TOP = 20  # tokens that are told of at each place: what servers allow without being asked to allow more
_WAYS: dict[str, dict[str, Any]] = {"ids": {"prompt_logprobs": TOP}, "echo": {"echo": True, "logprobs": 1}}
_LEAST = 1e-9  # probability of all tokens that are not told of: what rounding leaves of none


@dataclass(frozen=True)
class Told:
    """What is known of the predictions at the first L - 1 places of a window of L tokens."""

    own: torch.Tensor  # [L-1] log probabilities of the tokens that followed
    tokens: torch.Tensor  # [L-1, K] those told of, the most probable first; -1: none
    logs: torch.Tensor  # [L-1, K] their log probabilities


class Asked:
    """A server as something that windows are scored on. `way` is what `way_to_ask` found."""

    def __init__(self, server: Server, way: str) -> None:
        self.server, self.way = server, way
        self._kept: dict[int, Told] = {}  # by place of the window: a baseline is asked for each target

    def told(self, windows: torch.Tensor) -> Iterator[Told]:
        """What it tells of each window of [n, L]. Raises InputError for an answer of another form."""
        for index, window in enumerate(windows.tolist()):
            if index not in self._kept:
                status, content = asyncio.run(_ask(self.server, window, _WAYS[self.way]))
                self._kept[index] = _read(self.server, self.way, status, content, window)
            yield self._kept[index]


def way_to_ask(server: Server) -> str:
    """How a server tells of prompts: "ids" (vLLM's `prompt_logprobs`), "echo" (OpenAI's `echo` with `logprobs`), or "".

    Found out by asking for a prompt of three tokens. With "echo" tokens are told by their text, so that only perplexity
    is known.
    """
    for way, fields in _WAYS.items():
        prompt = [3, 4, 5]
        try:
            status, content = asyncio.run(_ask(server, prompt, fields))
            _read(server, way, status, content, prompt)
        except (InputError, ShortageError):
            continue
        return way
    return ""


def score_told(
    ours: Iterator[Told | torch.Tensor], theirs: Iterator[Told | torch.Tensor] | None, windows: torch.Tensor
) -> tuple[dict[str, float], float | None]:
    """Figures of a target and the baseline's perplexity, over windows [n, L]: what was told, or logits [L, V].

    The figures are perplexity and, with a baseline, BOUNDS where both sides tell of tokens.
    """
    losses: list[torch.Tensor] = []
    base_losses: list[torch.Tensor] = []
    divergences: list[torch.Tensor] = []
    agree: list[torch.Tensor] = []
    for window, mine in zip(windows, ours, strict=True):
        q = _known(mine, window)
        losses.append(-q.own)
        if theirs is None:
            continue
        p = _known(next(theirs), window)
        base_losses.append(-p.own)
        if p.tokens.shape[1] and q.tokens.shape[1]:
            divergences.append(_divergence(p, q))
            agree.append(p.tokens[:, 0] == q.tokens[:, 0])
    figures = {"perplexity": _perplexity(losses)}
    if divergences:
        kl = torch.cat(divergences)
        p99 = float(kl.kthvalue(max(1, math.ceil(0.99 * len(kl)))).values)
        share = float(torch.cat(agree).double().mean())
        figures |= dict(zip(BOUNDS, (float(kl.mean()), p99, float(kl.max()), share), strict=True))
    return figures, _perplexity(base_losses) if base_losses else None


def _perplexity(losses: Sequence[torch.Tensor]) -> float:
    return math.exp(min(float(torch.cat(list(losses)).mean()), 700.0))  # e^700 is finite yet


@dataclass(frozen=True)
class _Known(Told):
    every: torch.Tensor | None = None  # [L-1, V] log probabilities of all tokens, of a model at hand

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log probabilities [L-1, K] of tokens, NaN where they are not known."""
        if self.every is not None:
            return self.every.gather(1, tokens.clamp(min=0)).masked_fill(tokens < 0, math.nan)
        same = (tokens[:, :, None] == self.tokens[:, None, :]) & (tokens >= 0)[:, :, None]
        found = torch.where(same, self.logs[:, None, :], -math.inf).amax(-1)
        return found.masked_fill(~same.any(-1), math.nan)


def _known(one: Told | torch.Tensor, window: torch.Tensor) -> _Known:
    if isinstance(one, Told):
        return _Known(one.own, one.tokens, one.logs)
    every = torch.log_softmax(one[:-1].float(), dim=-1).double().cpu()
    logs, tokens = every.topk(1)
    return _Known(every.gather(1, window[1:, None].cpu())[:, 0], tokens, logs, every)


def _divergence(p: _Known, q: _Known) -> torch.Tensor:
    """KL(p || q) [L-1], with all tokens that not both sides know as one: at most the true one."""
    if p.every is None:
        tokens, top = p.tokens, p.tokens.max()
        width = q.every.shape[1] if q.every is not None else top + 1
    else:
        tokens, top = q.tokens, q.tokens.max()
        width = p.every.shape[1]
    if top >= width:
        raise InputError(f"a server tells of token {int(top)} and the baseline or target has {int(width)} tokens")
    ours, others = p.of(tokens), q.of(tokens)
    both = ~(ours.isnan() | others.isnan())
    ours, others = ours.masked_fill(~both, -math.inf), others.masked_fill(~both, -math.inf)
    parts = torch.where(both, ours.exp() * (ours - others), 0.0).sum(-1)
    rest, other_rest = ((1 - side.exp().sum(-1)).clamp(min=_LEAST) for side in (ours, others))
    return (parts + rest * (rest / other_rest).log()).clamp(min=0)


async def _ask(server: Server, prompt: Sequence[int], fields: dict[str, Any]) -> tuple[int, bytes]:
    body = {"model": server.model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0, **fields}
    try:
        async with (
            open_session(SILENCE_TIMEOUT_S) as one,
            one.post(f"{server.url}/v1/completions", data=json.dumps(body).encode(), allow_redirects=False) as answer,
        ):
            return answer.status, await answer.read()
    except (aiohttp.ClientError, OSError) as error:
        raise ShortageError(f"{server.url} did not answer ({type(error).__name__}: {error})") from error


def _read(server: Server, way: str, status: int, content: bytes, window: Sequence[int]) -> Told:
    """What an answer tells. Raises InputError when it is no such answer."""
    if status != 200:
        raise InputError(
            f"{server.url} answered HTTP {status} to a prompt of {len(window)} tokens: {error_text(content)}"
        )
    try:
        document = json.loads(content)
        choice = document["choices"][0]
        if way == "echo":
            own = [float(value) for value in choice["logprobs"]["token_logprobs"][1 : len(window)]]
            entries: list[dict[int, float]] = [{} for _ in own]
        else:
            told = choice.get("prompt_logprobs") or document["prompt_logprobs"]
            entries = [{int(token): float(one["logprob"]) for token, one in place.items()} for place in told[1:]]
            own = [entry[token] for entry, token in zip(entries, window[1:], strict=True)]
        if len(own) != len(window) - 1:
            raise ValueError(f"{len(own)} places")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{server.url} does not tell of a prompt's tokens as it was asked to ({type(error).__name__}: {error})"
        ) from error
    ranked = [sorted(entry.items(), key=lambda item: -item[1]) for entry in entries]
    width = max(map(len, ranked), default=0)
    padded = [[*one, *([(-1, -math.inf)] * (width - len(one)))] for one in ranked]
    return Told(
        torch.tensor(own, dtype=torch.float64),
        torch.tensor([[token for token, _ in one] for one in padded], dtype=torch.int64).reshape(len(own), width),
        torch.tensor([[log for _, log in one] for one in padded], dtype=torch.float64).reshape(len(own), width),
    )
