"""Answers of a checkpoint to a handful of prompts, in this process: what comparing two checkpoints needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmkit.checkpoint.source import Checkpoint
from llmkit.model.device import resolve_device
from llmkit.model.families import model_spec
from llmkit.runtime.engine.types import SamplingParams
from llmkit.runtime.load import EngineOptions, load_engine, resolve_dtype

KV_BYTES = 1 << 30  # of KV cache that prompts in flight may come to fill together
MAX_SEQUENCES = 64  # prompts in flight
STEP_TOKENS = 2048
_SEEDS = 1 << 63  # they are stored as int64


def generate(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float,
    seed: int,
    *,
    device: str = "auto",
    stop_at_eos: bool = True,
) -> list[list[int]]:
    """The token ids that the model writes after each prompt of token ids, up to `max_tokens` each.

    `temperature` 0 takes the most probable tokens. Prompt i draws with the seed `seed + i`, so that an answer does
    not depend on the other prompts. An answer ends with a token that ends answers, which is part of it; without
    `stop_at_eos` every answer has `max_tokens` tokens. `device`: "auto", "cuda" or "cpu"; the dtype is the engine's
    choice (float32 on the CPU). The model is loaded for this call and let go of afterwards.
    Raises InputError for a model that cannot be run or whose logits are not finite, and for prompts and answers beyond
    its positions; ShortageError when it does not fit; RequestError for an empty prompt.
    """
    if not prompts:
        return []
    sampling = [
        SamplingParams(
            temperature=temperature, seed=(seed + index) % _SEEDS, max_tokens=max_tokens, ignore_eos=not stop_at_eos
        )
        for index in range(len(prompts))
    ]
    longest = max(map(len, prompts)) + max_tokens
    _give_back_memory(device)
    try:
        engine = load_engine(checkpoint, _options(checkpoint, device, len(prompts), longest))
        answers = engine.generate([list(prompt) for prompt in prompts], sampling)
        del engine
    finally:
        _give_back_memory(device)
    return answers


def _options(checkpoint: Checkpoint, device: str, prompts: int, longest: int) -> EngineOptions:
    """Room for as many of the prompts as can run to their end side by side, each of at most `longest` tokens."""
    dtype = resolve_dtype("auto", checkpoint, resolve_device(device))
    one = longest * model_spec(checkpoint.config).kv_elements_per_token * dtype.itemsize
    sequences = max(1, min(prompts, MAX_SEQUENCES, KV_BYTES // one))
    return EngineOptions(
        device=device, max_model_len=longest, max_num_seqs=sequences, max_num_batched_tokens=STEP_TOKENS
    )


def _give_back_memory(device: str) -> None:
    """Let the memory plan of the next model see what the last one has left free on a GPU."""
    if resolve_device(device).type == "cuda":
        torch.cuda.empty_cache()
