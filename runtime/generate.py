"""Generates the outputs of a checkpoint for a few prompts, in this process.

Used to compare checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.model.device import resolve_device
from llmkit.model.families import checkpoint_spec
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.engine_plan import resolve_dtype

MAX_KV_CACHE_BYTES = 1 << 30  # KV cache of all running prompts together
MAX_SEQUENCES = 64  # prompts that run at the same time
STEP_TOKENS = 2048
_SEED_RANGE = 1 << 63  # seeds are int64


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
    """The output token ids of each prompt, at most `max_tokens`.

    temperature: 0 is greedy. seed: prompt i samples with `seed + i`, so that its output does not
    depend on the other prompts. stop_at_eos: an output ends with the EOS token, which is part of
    it; otherwise every output has `max_tokens` tokens. device: "auto", "cuda" or "cpu"; the dtype
    is the engine's default (float32 on a CPU).

    The model is loaded for this call and freed afterwards. Raises InputError for a model that
    cannot be run or whose logits are not finite, and for prompts and outputs beyond its positions;
    ShortageError when it does not fit; RequestError for an empty prompt.
    """
    if not prompts:
        return []
    sampling_params = [
        SamplingParams(
            temperature=temperature,
            seed=(seed + index) % _SEED_RANGE,
            max_tokens=max_tokens,
            ignore_eos=not stop_at_eos,
        )
        for index in range(len(prompts))
    ]
    max_model_len = max(map(len, prompts)) + max_tokens
    _release_cached_memory(device)
    try:
        options = _engine_options(checkpoint, device, len(prompts), max_model_len)
        engine = load_engine(checkpoint, options)
        outputs = engine.generate([list(prompt) for prompt in prompts], sampling_params)
        del engine
    finally:
        _release_cached_memory(device)
    return outputs


def _engine_options(
    checkpoint: Checkpoint, device: str, num_prompts: int, max_model_len: int
) -> EngineOptions:
    """Run as many prompts at once as can finish without preemption."""
    dtype = resolve_dtype("auto", checkpoint, resolve_device(device))
    elements_per_token = checkpoint_spec(checkpoint).kv_elements_per_token
    sequence_bytes = max_model_len * elements_per_token * dtype.itemsize
    num_sequences = min(num_prompts, MAX_SEQUENCES, MAX_KV_CACHE_BYTES // max(1, sequence_bytes))
    return EngineOptions(
        device=device,
        threads=torch.get_num_threads(),  # those of the command that generates
        cpu_activations="float32",  # calibration texts come from the model as it is
        max_model_len=max_model_len,
        max_num_seqs=max(1, num_sequences),
        max_num_batched_tokens=STEP_TOKENS,
    )


def _release_cached_memory(device: str) -> None:
    """Return memory that PyTorch caches on a GPU, so that the next memory plan sees it as free."""
    if resolve_device(device).type == "cuda":
        torch.cuda.empty_cache()
