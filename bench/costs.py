"""What tokens cost a model, counted from its shape: bytes read and operations, and their shares of measured peaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmkit.bench.metrics import RequestTimeline
from llmkit.bench.peaks import Peaks
from llmkit.checkpoint.source import Checkpoint
from llmkit.model.layout import parameters
from llmkit.model.spec import ModelSpec
from llmkit.runtime.load import EngineOptions, plan_engine
from llmkit.runtime.memory import weight_bytes


@dataclass(frozen=True)
class Costs:
    """Of one model as it is served."""

    dense_bytes: int  # of weights that every step reads
    expert_bytes: int  # of all experts
    expert_share: float  # of the experts, those that one token reads
    token_flops: float  # of a token's products but the last, two for a multiplication and its addition
    head_flops: float  # of the product that gives a new token's logits
    context_flops: float  # of its attention, for each token before it
    kv_bytes: int  # of keys and values of a token

    def step_bytes(self, requests: float, context: float) -> float:
        """What a decode step of so many requests reads, with so many tokens of context each, experts as likely."""
        read: float = 1 - (1 - self.expert_share) ** requests
        return self.dense_bytes + self.expert_bytes * read + requests * context * self.kv_bytes

    def flops(self, start: int, stop: int) -> float:
        """Of computing a request's tokens [start, stop); each sees those before it and itself."""
        seen = (stop * (stop + 1) - start * (start + 1)) / 2
        return (stop - start) * self.token_flops + seen * self.context_flops


def count_costs(checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype, device: str) -> Costs:
    """Count them for a checkpoint served in `dtype` on "cpu" or "cuda"."""
    plan = plan_engine(checkpoint, EngineOptions(device=device, dtype=str(dtype).removeprefix("torch.")))
    rows = parameters(spec)
    linear = [row for row in rows if row.linear and row.expert is None]
    experts = [row for row in rows if row.expert is not None]
    head = [row for row in rows if row.head]
    dense = weight_bytes(checkpoint, spec, dtype, torch.device(device), [*linear, *head])
    if spec.tied:
        stored = checkpoint.tensors["model.embed_tokens.weight"].torch_dtype.itemsize
        dense += spec.vocab * spec.hidden * min(stored, dtype.itemsize)
    return Costs(
        dense,
        weight_bytes(checkpoint, spec, dtype, torch.device(device), experts),
        _expert_share(spec),
        token_flops(spec),
        2.0 * spec.vocab * spec.hidden,
        4.0 * len(spec.layers) * spec.heads * spec.head_dim,
        plan.memory.bytes_per_block // plan.memory.block_size,
    )


def token_flops(spec: ModelSpec) -> float:
    """Of a token's products but the last, two for a multiplication and its addition."""
    rows = parameters(spec)
    elements = sum(math.prod(row.shape) for row in rows if row.linear and row.expert is None)
    elements += round(_expert_share(spec) * sum(math.prod(row.shape) for row in rows if row.expert is not None))
    return 2.0 * elements


def _expert_share(spec: ModelSpec) -> float:
    return spec.experts.per_token / spec.experts.count if spec.experts else 0.0


def utilization(costs: Costs, peaks: Peaks, timelines: Sequence[RequestTimeline], wall_s: float) -> dict[str, float]:
    """mbu and mfu of a run; no mbu when no request had a second token. DEFINITIONS says what they are."""
    flops = sum(
        costs.flops(t.cached_tokens, t.prompt_tokens + t.output_tokens - 1) + t.output_tokens * costs.head_flops
        for t in timelines
    )
    found = {"mfu": flops / wall_s / peaks.flops_per_s}
    decoding = [(t, tpot) for t in timelines if (tpot := t.tpot_s)]
    if decoding:
        tpot_s = sum(tpot for _, tpot in decoding) / len(decoding)
        span_s = max(t.arrivals_s[-1] for t, _ in decoding) - min(t.arrivals_s[0] for t, _ in decoding)
        busy_s = sum(t.e2e_s - t.ttft_s for t, _ in decoding)
        context = sum((t.prompt_tokens + t.output_tokens / 2) * (t.e2e_s - t.ttft_s) for t, _ in decoding) / busy_s
        read = costs.step_bytes(max(1.0, busy_s / span_s), context)
        found["mbu"] = read / tpot_s / peaks.bytes_per_s
    return found
