"""The quality of a server, from the log probabilities that it returns for prompt tokens.

A server returns its most probable tokens only. Perplexity needs no others and is exact. The KL
divergence has a lower bound: merge all tokens that are not known on both sides into one token, and
the KL divergence of the merged distributions is at most the true one (Cover and Thomas, Elements of
Information Theory, 2nd ed., theorem 2.7.1, the log sum inequality).

Legend: L tokens of a window, K most probable tokens, V vocabulary.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmkit.bench.answer_stream import server_error_message
from llmkit.bench.bench_metrics import QUALITY_BOUND_METRICS
from llmkit.bench.load_client import READ_TIMEOUT_S, Server, open_session, post_json
from llmkit.common.errors import InputError, ShortageError

TOP_LOGPROBS = 20  # at each position; servers allow this many by default
# The request fields of each API that returns log probabilities of prompt tokens.
_API_FIELDS: dict[str, dict[str, Any]] = {
    "ids": {"prompt_logprobs": TOP_LOGPROBS},
    "echo": {"echo": True, "logprobs": 1},
}
_MIN_REST = 1e-9  # probability of all merged tokens; rounding may leave 0 or less


@dataclass(frozen=True)
class PromptLogprobs:
    """The known predictions at the first L - 1 positions of a window."""

    token_logprobs: torch.Tensor  # [L-1] of the tokens that follow in the window
    top_tokens: torch.Tensor  # [L-1, K] token ids, the most probable first; -1: none
    top_logprobs: torch.Tensor  # [L-1, K] of `top_tokens`


class PromptLogprobsClient:
    """Requests the log probabilities of windows from a server."""

    def __init__(self, server: Server, api: str) -> None:
        """api: what `detect_prompt_logprobs_api` returned."""
        self.server = server
        self.api = api
        # By index of the window: a baseline is compared with every other target.
        self._cache: dict[int, PromptLogprobs] = {}

    def prompt_logprobs(self, windows: torch.Tensor) -> Iterator[PromptLogprobs]:
        """The predictions for each window of [n, L]. Raises InputError for an unusable response."""
        for index, window in enumerate(windows.tolist()):
            if index not in self._cache:
                status, content = asyncio.run(_request(self.server, window, _API_FIELDS[self.api]))
                self._cache[index] = _parse_response(self.server, self.api, status, content, window)
            yield self._cache[index]


def detect_prompt_logprobs_api(server: Server) -> str:
    """Which API of a server returns log probabilities of prompt tokens, found by a short request.

    "ids" is vLLM's `prompt_logprobs`, "echo" is OpenAI's `echo` with `logprobs`, "" is none. With
    "echo" the tokens are given as text, so that only perplexity is known.
    """
    prompt = [3, 4, 5]
    for api, fields in _API_FIELDS.items():
        try:
            status, content = asyncio.run(_request(server, prompt, fields))
            _parse_response(server, api, status, content, prompt)
        except (InputError, ShortageError):
            continue
        return api
    return ""


def score_prompt_logprobs(
    target: Iterator[PromptLogprobs | torch.Tensor],
    baseline: Iterator[PromptLogprobs | torch.Tensor] | None,
    windows: torch.Tensor,
) -> tuple[dict[str, float], float | None]:
    """The metrics of a target, and the perplexity of the baseline, over windows [n, L].

    Both sides give a server's predictions or a model's logits [L, V] for each window. The metrics
    are perplexity and, where both sides have token ids, QUALITY_BOUND_METRICS.
    """
    losses: list[torch.Tensor] = []
    baseline_losses: list[torch.Tensor] = []
    divergences: list[torch.Tensor] = []
    same_top_token: list[torch.Tensor] = []
    for window, target_predictions in zip(windows, target, strict=True):
        q = _predictions(target_predictions, window)
        losses.append(-q.token_logprobs)
        if baseline is None:
            continue
        p = _predictions(next(baseline), window)
        baseline_losses.append(-p.token_logprobs)
        if p.top_tokens.shape[1] and q.top_tokens.shape[1]:
            divergences.append(_divergence_bound(p, q))
            same_top_token.append(p.top_tokens[:, 0] == q.top_tokens[:, 0])
    metrics = {"perplexity": _perplexity(losses)}
    if divergences:
        kl = torch.cat(divergences)
        p99_kl = float(kl.kthvalue(max(1, math.ceil(0.99 * len(kl)))).values)
        top1 = float(torch.cat(same_top_token).double().mean())
        values = (float(kl.mean()), p99_kl, float(kl.max()), top1)
        metrics |= dict(zip(QUALITY_BOUND_METRICS, values, strict=True))
    return metrics, _perplexity(baseline_losses) if baseline_losses else None


def _perplexity(losses: Sequence[torch.Tensor]) -> float:
    mean_loss = float(torch.cat(list(losses)).mean())
    return math.exp(min(mean_loss, 700.0))  # e^700 is still finite


@dataclass(frozen=True)
class _Predictions(PromptLogprobs):
    """Predictions of a server, or of a model in this process, which knows all tokens."""

    all_logprobs: torch.Tensor | None = None  # [L-1, V]; None: of a server

    def logprobs_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log probabilities [L-1, K] of token ids [L-1, K]; NaN where they are not known."""
        if self.all_logprobs is not None:
            logprobs = self.all_logprobs.gather(1, tokens.clamp(min=0))
            return logprobs.masked_fill(tokens < 0, math.nan)
        same = (tokens[:, :, None] == self.top_tokens[:, None, :]) & (tokens >= 0)[:, :, None]
        logprobs = torch.where(same, self.top_logprobs[:, None, :], -math.inf).amax(-1)
        return logprobs.masked_fill(~same.any(-1), math.nan)


def _predictions(source: PromptLogprobs | torch.Tensor, window: torch.Tensor) -> _Predictions:
    if isinstance(source, PromptLogprobs):
        return _Predictions(source.token_logprobs, source.top_tokens, source.top_logprobs)
    all_logprobs = torch.log_softmax(source[:-1].float(), dim=-1).double().cpu()
    top_logprobs, top_tokens = all_logprobs.topk(1)
    token_logprobs = all_logprobs.gather(1, window[1:, None].cpu())[:, 0]
    return _Predictions(token_logprobs, top_tokens, top_logprobs, all_logprobs)


def _divergence_bound(p: _Predictions, q: _Predictions) -> torch.Tensor:
    """A lower bound of KL(p || q) [L-1]: tokens that one side does not know are merged into one."""
    if p.all_logprobs is None:
        tokens = p.top_tokens
        max_token = p.top_tokens.max()
        vocab_size = q.all_logprobs.shape[1] if q.all_logprobs is not None else max_token + 1
    else:
        tokens = q.top_tokens
        max_token = q.top_tokens.max()
        vocab_size = p.all_logprobs.shape[1]
    if max_token >= vocab_size:
        raise InputError(
            f"a server returns token {int(max_token)} and the baseline or target has"
            f" {int(vocab_size)} tokens"
        )
    p_logprobs = p.logprobs_of(tokens)
    q_logprobs = q.logprobs_of(tokens)
    known = ~(p_logprobs.isnan() | q_logprobs.isnan())
    p_logprobs = p_logprobs.masked_fill(~known, -math.inf)
    q_logprobs = q_logprobs.masked_fill(~known, -math.inf)
    terms = torch.where(known, p_logprobs.exp() * (p_logprobs - q_logprobs), 0.0)
    p_rest = (1 - p_logprobs.exp().sum(-1)).clamp(min=_MIN_REST)
    q_rest = (1 - q_logprobs.exp().sum(-1)).clamp(min=_MIN_REST)
    return (terms.sum(-1) + p_rest * (p_rest / q_rest).log()).clamp(min=0)


async def _request(
    server: Server, prompt: Sequence[int], fields: dict[str, Any]
) -> tuple[int, bytes]:
    """Send a prompt with these fields. Returns the response's status and body."""
    body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0, **fields}
    async with open_session(READ_TIMEOUT_S) as session:
        return await post_json(session, server, "/v1/completions", body)


def _parse_response(
    server: Server, api: str, status: int, content: bytes, window: Sequence[int]
) -> PromptLogprobs:
    """The predictions in a response. Raises InputError when it has none or not all."""
    if status != 200:
        raise InputError(
            f"{server.url} answered HTTP {status} to a prompt of {len(window)} tokens:"
            f" {server_error_message(content)}"
        )
    try:
        document = json.loads(content)
        choice = document["choices"][0]
        positions: list[dict[int, float]]  # log probabilities by token id
        if api == "echo":
            entries = choice["logprobs"]["token_logprobs"][1 : len(window)]
            token_logprobs = [float(value) for value in entries]
            positions = [{} for _ in token_logprobs]
        else:
            entries = choice.get("prompt_logprobs") or document["prompt_logprobs"]
            positions = [
                {int(token): float(details["logprob"]) for token, details in entry.items()}
                for entry in entries[1:]
            ]
            token_logprobs = [
                logprobs[token] for logprobs, token in zip(positions, window[1:], strict=True)
            ]
        if len(token_logprobs) != len(window) - 1:
            raise ValueError(f"{len(token_logprobs)} positions")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{server.url} does not return the log probabilities of a prompt's tokens"
            f" ({type(error).__name__}: {error})"
        ) from error
    ranked = [sorted(logprobs.items(), key=lambda item: -item[1]) for logprobs in positions]
    width = max(map(len, ranked), default=0)
    top_tokens = torch.full((len(ranked), width), -1, dtype=torch.int64)
    top_logprobs = torch.full((len(ranked), width), -math.inf, dtype=torch.float64)
    for index, entry in enumerate(ranked):
        for rank, (token, logprob) in enumerate(entry):
            top_tokens[index, rank] = token
            top_logprobs[index, rank] = logprob
    return PromptLogprobs(
        torch.tensor(token_logprobs, dtype=torch.float64), top_tokens, top_logprobs
    )
