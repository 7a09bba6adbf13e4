"""`quantize --bits 2` and `3`: written, read again, sliced and served with equal values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.common.progress import SilentProgress
from llmkit.model.full_forward import window_logits
from llmkit.model.weight_loader import load_model
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.shard.shard_checkpoint import shard
from llmkit.shard.verify import verify

WINDOWS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("source"), hidden_size=128, intermediate_size=192, head_dim=32
    )


@pytest.mark.parametrize(
    ("method", "bits", "form"),
    [
        ("rtn", 3, "gptq"),
        ("rtn", 2, "compressed-tensors"),
        ("gptq", 3, "gptq"),
        ("gptq", 2, "gptq"),
    ],
)
def test_quantize_to_2_and_3_bits_is_served_exactly(
    method: str, bits: int, form: str, source: Path, tmp_path: Path
) -> None:
    options = QuantizeOptions(
        method,  # type: ignore[arg-type]
        bits=bits,
        format=form,  # type: ignore[arg-type]
        group_size=32,
        samples=2,
        seq_len=64,
        evaluate=False,
        device="cpu",
    )
    report = quantize(str(source), str(tmp_path / "out"), options, SilentProgress())
    assert [row["label"] for row in report["schemes"]] == [f"INT{bits} in groups of 32"]
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.quantization is not None
    assert checkpoint.quantization.schemes == (Scheme(bits, 32),)
    assert checkpoint.quantization.format == form
    logits = []
    for packed in (False, True):
        model = load_model(checkpoint, torch.float32, packed=packed)
        logits.append(torch.cat(list(window_logits(model, WINDOWS))))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    if form == "gptq" and bits == 3:
        shard(tmp_path / "out", tmp_path / "ranks", 2)
        assert verify(tmp_path / "ranks").ok
