"""Changes to the logits before a token is sampled: bias, minimum length and penalties.

Those of grammars are in `grammar_bitmasks`; a GPU has `logits_processor_tables`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import torch

from llmkit.kernels.device_copy import to_device
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.sequence import Sequence


def apply_logits_processors(
    logits: torch.Tensor,
    sequences: SequenceOf[Sequence],
    num_sampled: SequenceOf[int],
    vocab_start: int,
    eos_token_ids: Iterable[int],
) -> None:
    """Change the rows of logits float32 [n, V] in place, each for its sequence.

    num_sampled: the output tokens before each row's token. vocab_start: the token of the first
    column; a tensor parallel rank has only some columns. The order is vLLM's: bias, minimum
    length, penalties. Tokens that a grammar has masked stay masked.
    """
    for row, sequence, num_output_tokens in zip(logits, sequences, num_sampled, strict=True):
        params = sequence.request.sampling_params
        if params.logit_bias:
            columns, indices = columns_of(params.logit_bias, vocab_start, row)
            bias = torch.tensor([*params.logit_bias.values()], dtype=torch.float32)
            row[columns] += to_device(bias[indices], row.device)
        if num_output_tokens < params.min_tokens:
            columns, _ = columns_of(end_tokens(params, eos_token_ids), vocab_start, row)
            row[columns] = float("-inf")
        if params.repetition_penalty != 1:
            columns, _ = columns_of(set(sequence.token_ids), vocab_start, row)
            penalty = params.repetition_penalty
            values = row[columns]
            row[columns] = torch.where(values > 0, values / penalty, values * penalty)
        if params.presence_penalty or params.frequency_penalty:
            counts = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
            columns, indices = columns_of(counts, vocab_start, row)
            times = torch.tensor(list(counts.values()), dtype=torch.float32)[indices]
            penalties = params.presence_penalty + params.frequency_penalty * times
            row[columns] -= to_device(penalties, row.device)


def end_tokens(params: SamplingParams, eos_token_ids: Iterable[int]) -> set[int]:
    """The tokens that may not come before `min_tokens`."""
    tokens = set(params.stop_token_ids)
    if not params.ignore_eos:
        tokens.update(eos_token_ids)
    return tokens


def columns_of(
    token_ids: Iterable[int], vocab_start: int, row: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of the tokens that this rank has.

    Returns the columns on the device, and the indices of these tokens on the CPU.
    """
    columns = torch.tensor(list(token_ids), dtype=torch.int64) - vocab_start
    is_here = (columns >= 0) & (columns < len(row))
    indices = is_here.nonzero()[:, 0]
    return to_device(columns[indices], row.device), indices
