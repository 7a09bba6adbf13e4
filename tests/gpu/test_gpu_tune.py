"""On a CUDA device: tuned configurations are correct, no slower than the default, and used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.quantized_linear_cases import Case, assert_close
from support.tiny_models import tiny_checkpoint

from llmkit.bench.gpu import tune_kernels as tune
from llmkit.bench.gpu.timing import time_ms
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.progress import SilentProgress
from llmkit.kernels import tuned_configs as tuning
from llmkit.kernels.quantized_linear import (
    LARGE_TILES,
    MAX_FUSED_ROWS,
    TILE,
    TILES,
    WeightOnlyLinear,
)
from llmkit.model.full_forward import window_logits
from llmkit.model.weight_loader import load_model
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BRAIN = torch.bfloat16


@pytest.fixture(autouse=True)
def _nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuning.read_configs.cache_clear()
    tuning.measured_config.cache_clear()


def test_tune_weight_only_linear_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "ROWS", (1, 64))
    case = Case(4, 128, 64, 4096, 4096, dtype=BRAIN)
    device = torch.device("cuda", 0)
    weight = case.weight().to("cuda")
    product = WeightOnlyLinear(weight.q, weight.scales, weight.zeros, 4, 128)
    found = tune.tune_weight_only_linear(
        product, 4096, BRAIN, device, lambda run: time_ms(run, device, 5)
    )
    assert len(found) >= 2
    for one in found[:2]:
        assert one.tried > 8 and one.refused < one.tried
        assert (
            one.safe_ms is None or one.ms <= one.safe_ms
        )  # Triton 3.6 spills 8 bytes of some, which is refused
    tune.save_results(found, tuning.user_file())
    shape = (4, 128, 4096, 4096, BRAIN, 8)
    assert TILE.config(shape, TILES[0][1:], device) == found[0].config
    for rows in (1, 64):
        one = replace(case, rows=rows)
        assert_close(
            product(one.inputs()[0].cuda()), one.expected(weight.dequantize().cpu()), 1.2e-2
        )
    assert max(tile[0] for tile in LARGE_TILES) == MAX_FUSED_ROWS


def test_tune_model_keeps_outputs_on_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "ROWS", (1,))
    monkeypatch.setattr(tune, "CONTEXT", 128)
    options = QuantizeOptions("rtn", samples=2, seq_len=64, evaluate=False, device="cpu")
    quantize(
        str(tiny_checkpoint(tmp_path / "source")), str(tmp_path / "out"), options, SilentProgress()
    )
    checkpoint = open_checkpoint(tmp_path / "out")
    windows = torch.randint(3, 500, (2, 100), generator=torch.Generator().manual_seed(3))
    before = torch.cat(
        list(window_logits(load_model(checkpoint, BRAIN, "cuda", packed=True), windows))
    )
    lines: list[str] = []
    found = tune.tune(str(tmp_path / "out"), lines.append)
    kernels = {one.name.split("; ")[2] for one in found}
    assert kernels - {"grouped_rows"} == {"attention", "grouped_product"} and len(lines) == 2 + 4
    assert tuning.read_configs(tuning.user_file()).keys() == {one.name for one in found}
    after = torch.cat(
        list(window_logits(load_model(checkpoint, BRAIN, "cuda", packed=True), windows))
    )
    assert (after - before).norm() <= 0.02 * before.norm()
