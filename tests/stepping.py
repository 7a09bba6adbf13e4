"""An engine's steps, seen from outside: the logits of each, and what they would be without an engine."""

from __future__ import annotations

from typing import Any

import torch
from families import oracle_logits

from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.types import Request, SamplingParams


def run_watched(engine: Engine, prompts: list[list[int]], tokens: int) -> list[tuple[list[int], torch.Tensor]]:
    """Greedy answers of so many tokens, and the logits these were chosen from, float32 [tokens, V] on the CPU."""
    runner = engine.runner
    inner, rows = runner._logits, {f"{index}": list[torch.Tensor]() for index in range(len(prompts))}

    def noted(chunks: Any, *arguments: Any) -> Any:
        found = inner(chunks, *arguments)
        for chunk, row in zip(chunks, found[0], strict=True):
            if chunk.stop >= len(chunk.sequence.request.prompt):
                rows[chunk.sequence.request.id].append(row.float().cpu())
        return found

    runner._logits = noted  # type: ignore[method-assign]
    sampling, answers = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True), {name: [] for name in rows}
    for index, prompt in enumerate(prompts):
        engine.add(Request(f"{index}", prompt, sampling))
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            answers[output.request_id] += output.token_ids
    runner._logits = inner  # type: ignore[method-assign]
    return [(answers[name], torch.stack(rows[name][:tokens])) for name in rows]  # a step ahead may come too many


def errors(
    oracle: torch.nn.Module, prompts: list[list[int]], found: list[tuple[list[int], torch.Tensor]]
) -> torch.Tensor:
    """Of each step's logits: the distance from transformers' on the same tokens, as a share of their deviation."""
    shares = []
    device = next(oracle.parameters()).device
    for prompt, (answer, logits) in zip(prompts, found, strict=True):
        expected = oracle_logits(oracle, torch.tensor(prompt + answer[:-1], device=device))[len(prompt) - 1 :].cpu()
        assert expected.shape == logits.shape
        shares.append((logits - expected).square().mean(-1).sqrt() / expected.std(-1))
    return torch.cat(shares)
