"""Tables on the device of what changes the logits of requests, with a row for each slot.

They have what does not change while a request runs, its logit bias, minimum length and penalties,
and what follows from its tokens: which ones its prompt has, and how often its output has each.
`sampling_triton` reads them beside the logits; `change_logits` states the arithmetic.
Legend: n rows, V vocabulary columns of this rank, S slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llmkit.kernels.triton_support import jit_without_specializing, runs_triton, tl

# In an entry of `token_counts`; the bits below count how often the token is in the output.
IN_PROMPT = 1 << 30
IS_END = 1 << 29  # the token may not be sampled before the minimum length
NO_SLOT = -1  # of a row whose logits do not change
# The logit of a token that may not be sampled: below every real logit, and finite.
MASKED_LOGIT = -1e30


class LogitsTables(NamedTuple):
    """The tables. A row is read only for requests that it was written for."""

    token_counts: torch.Tensor  # int32 [S, V]; read only with a penalty or a minimum length
    bias: torch.Tensor  # float32 [S, V]; read only with a bias
    # float32 [S, 5]: what the repetition penalty multiplies positive logits with, and others; the
    # presence and frequency penalties; 1 with a bias, else 0
    factors: torch.Tensor
    min_tokens: torch.Tensor  # int64 [S]

    @classmethod
    def empty(cls, num_slots: int, vocab_size: int, device: torch.device) -> LogitsTables:
        """Tables of no requests."""
        shape = (num_slots, vocab_size)
        return cls(
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(shape, device=device),
            torch.zeros((num_slots, 5), device=device),
            torch.zeros(num_slots, dtype=torch.int64, device=device),
        )


def change_logits(
    logits: torch.Tensor, tables: LogitsTables, slots: torch.Tensor, counters: torch.Tensor
) -> torch.Tensor:
    """The logits [n, V] after the changes of each row's slot, as float32.

    slots: int64 [n], or NO_SLOT. counters: int64 [n], the output tokens before the row's token.
    The order is vLLM's. The bias is added. Up to the minimum length, tokens that end the output are
    masked. Positive logits of tokens in the prompt or output are multiplied with the inverse of the
    repetition penalty, and the others with the penalty itself. The presence penalty is subtracted
    once from the logits of tokens in the output, and the frequency penalty once per occurrence.
    """
    logits = logits.float()
    used = slots.clamp_min(0)
    divided, multiplied, presence, frequency, has_bias = tables.factors[used].T[:, :, None]
    counts = tables.token_counts[used]
    values = torch.where(has_bias > 0, logits + tables.bias[used], logits)
    is_early = (counters < tables.min_tokens[used])[:, None]
    values = values.masked_fill(is_early & (counts & IS_END != 0), MASKED_LOGIT)
    repeated = values * torch.where(values > 0, divided, multiplied)
    values = repeated.where(counts & ~IS_END != 0, values)
    times = counts & (IS_END - 1)
    values = values - (presence + frequency * times).where(times > 0, 0.0)
    return torch.where((slots != NO_SLOT)[:, None], values, logits)


def count_tokens(tables: LogitsTables, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Count the output tokens, int64 [n], in the rows of their slots, int64 [n].

    Nothing is counted for NO_SLOT, and for a token that is not in 0 to V - 1.
    """
    table = tables.token_counts
    vocab_size = table.shape[1]
    if runs_triton(table):
        tile = 256
        with torch.cuda.device_of(table):
            _count_tokens_kernel[(-(-len(slots) // tile),)](
                table, slots, token_ids, len(slots), vocab_size, TILE=tile, num_warps=4
            )
        return
    is_counted = (slots != NO_SLOT) & (token_ids >= 0) & (token_ids < vocab_size)
    places = slots.clamp_min(0) * vocab_size + token_ids.where(is_counted, 0)
    table.view(-1).index_add_(0, places, is_counted.int())


@jit_without_specializing("slots", "token_ids", "num_rows")
def _count_tokens_kernel(
    token_counts: tl.tensor,
    slots: tl.tensor,
    token_ids: tl.tensor,
    num_rows: tl.tensor,
    vocab_size: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """A program counts the tokens of a tile of rows. A slot may have several rows."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    slot = tl.load(slots + row, mask=row < num_rows, other=-1)
    token = tl.load(token_ids + row, mask=row < num_rows, other=-1)
    is_counted = (slot >= 0) & (token >= 0) & (token < vocab_size)
    place = token_counts + slot * vocab_size + token
    tl.atomic_add(place, 1, mask=is_counted, sem="relaxed")
