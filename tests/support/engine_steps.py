"""The logits of an engine's steps, and what they would be without an engine."""

from __future__ import annotations

import torch

from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.model_runner import StepInputs, StepResult
from llmkit.runtime.engine.sampling_params import SamplingParams
from support.tiny_families import oracle_logits


def run_watched(
    engine: Engine, prompts: list[list[int]], tokens: int
) -> list[tuple[list[int], torch.Tensor]]:
    """Greedy outputs of `tokens` tokens, and the logits that each token was chosen from.

    The logits are float32 [tokens, V] on the CPU.
    """
    runner = engine.runner
    execute = runner.execute
    rows = {f"{index}": list[torch.Tensor]() for index in range(len(prompts))}

    def execute_and_record(inputs: StepInputs) -> StepResult:
        result = execute(inputs)
        for request, row in zip(inputs.step.requests, result.logits, strict=True):
            if request.stop >= request.sequence.num_prompt_tokens:
                rows[request.sequence.request.request_id].append(row.float().cpu())
        return result

    runner.execute = execute_and_record  # type: ignore[method-assign]
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    answers = {name: [] for name in rows}
    for index, prompt in enumerate(prompts):
        engine.add(EngineRequest(f"{index}", prompt, sampling))
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            answers[output.request_id] += output.token_ids
    runner.execute = execute  # type: ignore[method-assign]
    return [
        (answers[name], torch.stack(rows[name][:tokens])) for name in rows
    ]  # a step ahead may come too many


def errors(
    oracle: torch.nn.Module, prompts: list[list[int]], found: list[tuple[list[int], torch.Tensor]]
) -> torch.Tensor:
    """The error of each step's logits against transformers' on the same tokens.

    It is a share of the standard deviation of the expected logits.
    """
    shares = []
    device = next(oracle.parameters()).device
    for prompt, (answer, logits) in zip(prompts, found, strict=True):
        expected = oracle_logits(oracle, torch.tensor(prompt + answer[:-1], device=device))[
            len(prompt) - 1 :
        ].cpu()
        assert expected.shape == logits.shape
        shares.append((logits - expected).square().mean(-1).sqrt() / expected.std(-1))
    return torch.cat(shares)
