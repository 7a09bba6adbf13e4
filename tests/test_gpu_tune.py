"""On a CUDA device: what is tuned is right, no slower than before, and used from then on (`make gpu`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized_products import Case, assert_close
from tiny import tiny_checkpoint

from llmkit.bench import tune
from llmkit.bench.steps import time_ms
from llmkit.checkpoint.progress import SilentProgress
from llmkit.checkpoint.source import open_checkpoint
from llmkit.kernels import tuning
from llmkit.kernels.quantized_linear import CROSSOVER, TILE, TILES, GroupedProduct
from llmkit.model.loader import load_model
from llmkit.model.sequence import logits_of
from llmkit.quant.plan import QuantizeOptions
from llmkit.quant.quantize import quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BRAIN = torch.bfloat16


@pytest.fixture(autouse=True)
def _nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuning.entries.cache_clear()
    tuning._measured.cache_clear()


def test_a_product_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "ROWS", (1, 64))
    case, device = Case(4, 128, 64, 4096, 4096, dtype=BRAIN), torch.device("cuda", 0)
    weight = case.weight().to("cuda")
    product = GroupedProduct(weight.codes, weight.scales, weight.zeros, 4, 128)
    found = tune.tune_product(product, 4096, BRAIN, device, lambda run: time_ms(run, device, 5))
    assert len(found) >= 2
    for one in found[:2]:
        assert one.tried > 8 and one.refused < one.tried
        assert one.safe_ms is None or one.ms <= one.safe_ms  # Triton 3.6 spills 8 bytes of some, which is refused
    tune.keep(found, tuning.user_file())
    shape = (4, 128, 4096, 4096, BRAIN, 16)
    assert TILE.config(shape, TILES[0][1:], device) == found[0].config
    for rows in (1, 64):
        one = replace(case, rows=rows)
        assert_close(product(one.inputs()[0].cuda()), one.expected(weight.dequantize().cpu()), 1.2e-2)
    assert max(tile[0] for tile in TILES) == CROSSOVER


def test_a_model_is_tuned_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "ROWS", (1,))
    monkeypatch.setattr(tune, "CONTEXT", 128)
    options = QuantizeOptions("rtn", samples=2, seq_len=64, evaluate=False, device="cpu")
    quantize(str(tiny_checkpoint(tmp_path / "source")), str(tmp_path / "out"), options, SilentProgress())
    checkpoint = open_checkpoint(tmp_path / "out")
    windows = torch.randint(3, 500, (2, 100), generator=torch.Generator().manual_seed(3))
    before = torch.cat(list(logits_of(load_model(checkpoint, BRAIN, "cuda", packed=True), windows)))
    lines: list[str] = []
    found = tune.tune(checkpoint, lines.append)
    kernels = {one.name.split("; ")[2] for one in found}
    assert kernels - {"grouped_rows"} == {"attention", "grouped_product"} and len(lines) == 2 + 4
    assert tuning.entries(tuning.user_file()).keys() == {one.name for one in found}
    after = torch.cat(list(logits_of(load_model(checkpoint, BRAIN, "cuda", packed=True), windows)))
    assert (after - before).norm() <= 0.02 * before.norm()
