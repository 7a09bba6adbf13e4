"""Checks of a model against transformers' logits: paged sequences and the engine's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from llmkit.model.language_model import LanguageModel
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.sampling_params import SamplingParams
from support.paged_sequences import Sequences, close, tokens_of

# The logits [n, vocab] of one sequence of token ids [n], by transformers.
Reference = Callable[[torch.Tensor], torch.Tensor]
# Lengths of three sequences, and by how many tokens each step advances them.
MIXED_LENGTHS = (30, 100, 57)
MIXED_STEPS = ([29, 0, 0], [1, 40, 0], [0, 40, 17], [0, 19, 1], [0, 1, 39])


def check_decoding(model: LanguageModel, reference: Reference) -> None:
    """Compare a prompt and 40 tokens that follow it one by one."""
    tokens = tokens_of(60, 7)
    run = Sequences(model, [tokens])
    logits = [run.step([20])[0], *(run.step([1])[0] for _ in range(40))]
    close(torch.cat(logits), reference(tokens))


def check_mixed_batches(
    model: LanguageModel, reference: Reference, steps: Sequence[list[int]] = MIXED_STEPS
) -> None:
    """Prefill chunks and decodes share a batch; each sequence is computed as if alone."""
    sequences = [tokens_of(n, n) for n in MIXED_LENGTHS]
    run = Sequences(model, sequences)
    got: list[list[torch.Tensor]] = [[] for _ in sequences]
    for counts in steps:
        for i, logits in run.step(counts).items():
            got[i].append(logits)
    assert run.done == list(MIXED_LENGTHS)
    for tokens, logits in zip(sequences, got, strict=True):
        close(torch.cat(logits), reference(tokens))


def check_greedy_tokens(model: LanguageModel, reference: Reference) -> Engine:
    """Compare the engine's 64 greedy tokens after two prompts with the likeliest ones.

    Returns the engine, after it has answered.
    """
    prompts = [[5, 6, 7], [9, 8, 7, 6] * 5]
    config = EngineConfig(
        max_model_len=100,
        num_blocks=120,
        block_size=16,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    engine = Engine(model, config)
    answers = engine.generate(prompts, greedy)
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = reference(torch.tensor(prompt + answer))[len(prompt) - 1 : -1]
        assert len(answer) == 64
        assert logits.argmax(-1).tolist() == answer
    return engine
