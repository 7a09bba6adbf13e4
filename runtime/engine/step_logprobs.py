"""The log probabilities that requests ask for: which positions of a step, and their values.

A step's log probabilities are one table: first the rows of all prompts, in the order of the
requests, then the rows of all sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch

from llmkit.kernels.device_copy import to_device
from llmkit.kernels.sampling import gather_logprobs
from llmkit.model.language_model import LanguageModel
from llmkit.runtime.engine.engine_outputs import Logprobs
from llmkit.runtime.engine.scheduler_output import ScheduledRequest

PROMPT_POSITIONS = 64  # positions of a prompt whose logits are in memory at once


class LogprobsTensors(NamedTuple):
    """A table of log probabilities; see `gather_logprobs`."""

    logprobs: torch.Tensor  # float32 [n], of the token itself
    top_logprobs: torch.Tensor  # float32 [n, k], in falling order
    top_token_ids: torch.Tensor  # int64 [n, k]


def num_prompt_logprobs(request: ScheduledRequest) -> int:
    """How many logprobs of the prompt this step computes for the request.

    Each of the request's prompt tokens in the step gives the logprob of the prompt token after it.
    """
    if request.sequence.request.sampling_params.prompt_logprobs is None:
        return 0
    return max(0, min(request.stop, request.sequence.num_prompt_tokens - 1) - request.start)


def num_sampled_logprobs(request: ScheduledRequest) -> int:
    """How many of the request's sampled tokens need a logprob."""
    wanted = request.sequence.request.sampling_params.logprobs is not None
    return request.num_sampled_rows if request.samples_next_token and wanted else 0


def max_alternatives(requests: SequenceOf[ScheduledRequest]) -> int:
    """The largest number of alternatives that a request wants."""
    most = 0
    for request in requests:
        params = request.sequence.request.sampling_params
        most = max(most, params.logprobs or 0, params.prompt_logprobs or 0)
    return most


def sampled_logprob_rows(requests: SequenceOf[ScheduledRequest]) -> list[int]:
    """The indices of the sampled rows whose tokens need a logprob."""
    rows: list[int] = []
    first = 0
    for request in requests:
        rows += range(first, first + num_sampled_logprobs(request))
        first += request.num_sampled_rows
    return rows


def empty_logprobs(requests: SequenceOf[ScheduledRequest]) -> LogprobsTensors | None:
    """A table on the host for another rank to fill; None when no request wants logprobs."""
    num_rows = sum(num_prompt_logprobs(r) + num_sampled_logprobs(r) for r in requests)
    if not num_rows:
        return None
    top_token_ids = torch.zeros(num_rows, max_alternatives(requests), dtype=torch.int64)
    return LogprobsTensors(torch.zeros(num_rows), top_token_ids.float(), top_token_ids)


def compute_prompt_logprobs(
    model: LanguageModel, requests: SequenceOf[ScheduledRequest], hidden: torch.Tensor
) -> list[LogprobsTensors]:
    """The logprobs of the prompts in a step, a few positions at a time.

    hidden: [T, H], of all tokens of the step.
    """
    num_alternatives = max_alternatives(requests)
    tables = []
    first_row = 0
    for request in requests:
        num_positions = num_prompt_logprobs(request)
        prompt = request.sequence.request.prompt_token_ids
        for start in range(0, num_positions, PROMPT_POSITIONS):
            stop = min(start + PROMPT_POSITIONS, num_positions)
            next_tokens = prompt[request.start + start + 1 : request.start + stop + 1]
            token_ids = to_device(torch.tensor(next_tokens), hidden.device)
            logits = model.logits(hidden[first_row + start : first_row + stop])
            table = gather_logprobs(logits, token_ids, num_alternatives, model.parallel_group)
            tables.append(LogprobsTensors(*table))
        first_row += request.num_tokens
    return tables


def concatenate(tables: SequenceOf[LogprobsTensors]) -> LogprobsTensors | None:
    """The rows of all tables, one after the other; None for no table."""
    if not tables:
        return None
    return LogprobsTensors(*(torch.cat(parts) for parts in zip(*tables, strict=True)))


def split_logprobs(
    requests: SequenceOf[ScheduledRequest], table: LogprobsTensors
) -> tuple[list[list[Logprobs]], list[list[Logprobs]]]:
    """The prompt's and the sampled tokens' logprobs of each request, from the table of a step."""
    rows = zip(*(column.tolist() for column in table), strict=True)
    of_prompts = []
    of_sampled = []
    for request in requests:
        num_alternatives = request.sequence.request.sampling_params.prompt_logprobs
        of_prompts.append(_take(rows, num_prompt_logprobs(request), num_alternatives))
    for request in requests:
        num_alternatives = request.sequence.request.sampling_params.logprobs
        of_sampled.append(_take(rows, num_sampled_logprobs(request), num_alternatives))
    return of_prompts, of_sampled


def _take(
    rows: Iterator[tuple[float, list[float], list[int]]], count: int, num_alternatives: int | None
) -> list[Logprobs]:
    """The next `count` rows, with as many alternatives as the request wants."""
    taken = []
    for _ in range(count):
        logprob, top_logprobs, top_token_ids = next(rows)
        top = list(zip(top_token_ids, top_logprobs, strict=True))[:num_alternatives]
        taken.append(Logprobs(logprob, top))
    return taken
