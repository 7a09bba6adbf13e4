"""On a CUDA device: the same decoder and engine give what they give on the CPU (`make gpu`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model.full_forward import window_logits
from llmkit.model.weight_loader import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen3_moe"])
def gpu_checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("gpu"), request.param)


def windows(length: int = 200) -> torch.Tensor:
    return torch.randint(3, 512, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.25)])
def test_logits_equal_those_of_the_cpu(
    gpu_checkpoint: Path, dtype: torch.dtype, tolerance: float
) -> None:
    source = open_checkpoint(gpu_checkpoint)
    cpu = load_model(source, torch.float32)
    gpu = load_model(source, dtype, "cuda")
    for expected, got in zip(
        window_logits(cpu, windows()), window_logits(gpu, windows()), strict=True
    ):
        torch.testing.assert_close(got.cpu(), expected, atol=tolerance, rtol=tolerance)


def test_generated_tokens_equal_those_of_the_cpu(gpu_checkpoint: Path) -> None:
    from llmkit.runtime.engine.engine_options import EngineOptions
    from llmkit.runtime.engine.sampling_params import SamplingParams
    from llmkit.runtime.engine_loader import load_engine

    prompts = [window.tolist() for window in windows(20)] * 4
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    answers = []
    for device in ("cpu", "cuda"):
        options = EngineOptions(device=device, dtype="float32", kv_cache_memory=64 * 2**20)
        answers.append(
            load_engine(open_checkpoint(gpu_checkpoint), options).generate(prompts, sampling)
        )
    assert answers[0] == answers[1]
