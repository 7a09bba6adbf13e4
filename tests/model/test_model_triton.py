"""Decoders as they run on a GPU, with all Triton kernels interpreted, against torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from support.expert_cases import stack_layer_experts
from support.tiny_families import family_oracle
from support.triton_checks import interpreted

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.kernels import elementwise, gated_delta_net, latent_attention_triton
from llmkit.kernels import paged_attention as paged
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.recurrent_state import NO_ROW, RecurrentBatch
from llmkit.model import decoder
from llmkit.model.decoder import Decoder
from llmkit.model.language_model import new_layer_caches
from llmkit.model.weight_loader import load_model

BLOCK = 16


@torch.inference_mode()
def chunks(model: Decoder, kv_cache_dtype: str | None) -> torch.Tensor:
    """The logits of two sequences: their prompts, and a step after them."""
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, model.spec.vocab_size, (2, 18), generator=draw)
    caches = new_layer_caches(model, lambda _: 6, BLOCK, kv_cache_dtype, num_state_rows=2)
    rows = [NO_ROW, NO_ROW]  # of recurrent states
    found = []
    done = [0, 0]
    for counts in ([5, 17], [1, 1]):
        stops = [start + count for start, count in zip(done, counts, strict=True)]
        writes = [[(count, row)] for row, count in enumerate(counts)]
        recurrent = RecurrentBatch.build(counts, rows, writes)
        batch = AttentionBatch.build(
            counts, stops, {None: [[4, 1], [0, 3]]}, BLOCK, recurrent=recurrent
        )
        rows = [0, 1]
        places = torch.cat(
            [torch.arange(start, stop) for start, stop in zip(done, stops, strict=True)]
        )
        step = torch.cat(
            [row[start:stop] for row, start, stop in zip(tokens, done, stops, strict=True)]
        )
        found.append(model.logits(model(step, places, batch, caches)))
        done = stops
    return torch.cat(found)


def both(path: str, kv_cache_dtype: str | None) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Logits by torch and by the kernels, and how often a layer asked if Triton runs."""
    cpu_kernels.library = None
    asked: list[bool] = []
    packed = path.endswith("deepseek-v3")  # latent attention in the form for serving
    model = load_model(open_checkpoint(Path(path)), torch.float32, packed=packed)
    by_torch = chunks(model, kv_cache_dtype)
    with pytest.MonkeyPatch.context() as patch:
        for module in (elementwise, decoder, gated_delta_net):
            patch.setattr(module, "runs_triton", lambda _: True)
        for module in (paged, latent_attention_triton):
            patch.setattr(module, "runs_triton", lambda _: not asked.append(True))
        patch.setattr(latent_attention_triton, "supports_cache", lambda _: True)
        patch.setattr(paged, "num_programs", lambda *_: 4)
        patch.setattr(decoder, "supports_fused_experts", lambda _: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        for layer in model.layers:
            if layer.layer.is_moe:
                stack_layer_experts(layer)
        return by_torch, chunks(model, kv_cache_dtype), len(asked)


CASES = [
    ("gemma3", None),
    ("gpt-oss", None),
    ("qwen3-moe", None),
    ("qwen3-next", None),
    ("deepseek-v3", None),
    ("qwen3", "int8"),
    ("llama", "fp8"),
]
# The others have their kernels.
SLOW_CASES = [
    ("qwen3", None),
    ("olmo2", None),
    ("granite", None),
    ("smollm3", None),
    ("mixtral", None),
]
Case = tuple[str, str | None]
Answer = tuple[torch.Tensor, torch.Tensor, int]


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Answer]:
    """Of a case, computed in one process with the others that are slow, or are not."""

    @cache
    def computed(is_slow: bool) -> dict[Case, Answer]:
        folder = tmp_path_factory.mktemp("models")
        cases = SLOW_CASES if is_slow else CASES
        for family in {family for family, _ in cases}:
            family_oracle(family, folder / family)
        calls = [(str(folder / one), kind) for one, kind in cases]
        found = interpreted("model.test_model_triton", "both", calls, folder)
        return dict(zip(cases, found, strict=True))

    return lambda case: computed(case in SLOW_CASES)[case]


@pytest.mark.parametrize(
    ("family", "kv_cache_dtype"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
)
def test_decoder_triton_matches_torch(
    family: str, kv_cache_dtype: str | None, logits: Callable[[Case], Answer]
) -> None:
    by_torch, by_kernels, asked = logits((family, kv_cache_dtype))
    attention_layers = 1 if family == "qwen3-next" else 4
    per_layer = 1 if family == "deepseek-v3" else 2  # for its attention, and for the place before
    assert asked == 2 * per_layer * attention_layers, "in two steps"
    error = 2e-4 if kv_cache_dtype is None else 5e-2  # a code may be its neighbour
    torch.testing.assert_close(by_kernels, by_torch, atol=error, rtol=error)
    assert not torch.equal(by_kernels, by_torch)
