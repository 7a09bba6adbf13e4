"""`quantize --scheme`: what is written, reopened and served, for every float scheme and format."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.tiny_models import VOCAB

from llmkit.checkpoint import tensor_reader
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_formats import FORMATS
from llmkit.common.progress import SilentProgress
from llmkit.model.decoder import Decoder
from llmkit.model.families import checkpoint_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.linear import ActivationQuant, Linear
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import load_model
from llmkit.quant import round_parameters
from llmkit.quant.algorithm import QuantTarget
from llmkit.quant.grid import FULL_SEARCH, round_to_nearest
from llmkit.quant.number_formats import NUMBER_FORMATS
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_linear import quant_target
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.quantize_report import Report

pytestmark = pytest.mark.usefixtures("short_builtin_text")

# q, k and v end within blocks of 128 rows.
MODEL: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
WRITTEN = [
    (name, format_name)
    for name, row in NUMBER_FORMATS.items()
    for format_name in row.formats
    if format_name in FORMATS and (row.scheme.kind == "float" or row.scheme.input_type == "fp8")
]
# How far rounding to nearest may move logits, relative to them.
MAX_ERROR = {
    "w4afp8": 0.4,
    "mxfp4": 0.65,
    "mxfp4afp8": 0.5,
    "mxfp4a16": 0.5,
    "nvfp4": 0.4,
    "nvfp4a16": 0.35,
}


def run(model: Path, out: Path, name: str, **options: Any) -> Report:
    defaults: dict[str, Any] = {"samples": 4, "seq_len": 32, "evaluate": False, "device": "cpu"}
    chosen = QuantizeOptions(**({"method": "rtn", "scheme": name} | defaults | options))
    return quantize(str(model), str(out), chosen, SilentProgress())


def decoder(path: Path, *, packed: bool = False) -> Decoder:
    model = load_model(open_checkpoint(path), torch.float32, packed=packed)
    assert isinstance(model, Decoder)
    return model


def logits_of(model: Decoder) -> torch.Tensor:
    tokens = torch.randint(3, VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return next(window_logits(model, tokens))


def quant_targets(path: Path) -> dict[str, QuantTarget]:
    """By runtime module."""
    checkpoint = open_checkpoint(path)
    rows = parameters(checkpoint_spec(checkpoint))
    found = (quant_target(row, checkpoint.quantization) for row in rows if row.is_linear)
    return {target.parameter.module: target for target in found if target is not None}


def linear_of(model: Decoder, target: QuantTarget) -> Linear:
    return model.layers[target.parameter.layers[0]].linears[target.name]


@pytest.mark.parametrize(("name", "format_name"), WRITTEN)
def test_scheme_is_written_reopened_and_served(
    model: Path, tmp_path: Path, name: str, format_name: str
) -> None:
    out = tmp_path / "out"
    report = run(model, out, name, format=format_name)
    assert (report["scheme"], report["format"]) == (name, format_name)
    source = decoder(model)
    written = decoder(out)
    targets = quant_targets(out)
    assert {target.name for target in targets.values()} == {
        "attn.qkv",
        "attn.o",
        "mlp.gate_up",
        "mlp.down",
    }
    for target in targets.values():
        assert target.scheme.scale_format == NUMBER_FORMATS[name].scheme.scale_format
        has_search = target.scheme.scale_format != "float"
        expected = round_to_nearest(
            linear_of(source, target).weight,
            target.scheme,
            target.scale_dtype,
            FULL_SEARCH if has_search else None,
            target.row_blocks,
        )
        linear = linear_of(written, target)
        assert torch.equal(linear.weight, expected.dequantize()), target.parameter.module
        quant = linear.activation_quant
        assert (quant is None) == (target.scheme.inputs == "none")
        assert quant is None or (quant.scale is not None) == target.scheme.has_input_scale
    logits = logits_of(written)
    served = logits_of(decoder(out, packed=True))
    # A value between two steps may be rounded to the other one.
    assert (served - logits).abs().mean() < 0.01 * logits.std()
    exact = logits_of(source)
    error = (logits - exact).norm() / exact.norm()
    assert 0 < error < MAX_ERROR.get(name, 0.17)


@pytest.mark.parametrize("format_name", ["compressed-tensors"])
def test_nvfp4_of_fused_weights_shares_a_global_scale(
    model: Path, tmp_path: Path, format_name: str
) -> None:
    """Engines fuse q, k and v, and keep one of their global scales."""
    run(model, tmp_path / "out", "nvfp4a16", format=format_name)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        prefix = "model.layers.0."
        for group in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        ):
            names = [f"{prefix}{module}.weight_global_scale" for module in group]
            assert len({file.get_tensor(name).item() for name in names}) == 1
    with safe_open(model / "model.safetensors", "pt") as file:
        weights = [file.get_tensor(f"{prefix}self_attn.{part}_proj.weight") for part in "qkv"]
        largest = max(weight.abs().max().item() for weight in weights)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = file.get_tensor(f"{prefix}self_attn.q_proj.weight_global_scale")
    assert stored.item() == pytest.approx(448 * 6 / largest)


def test_rounding_in_chunks_of_rows_gives_the_same_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nvfp4a16", "fp8-block"):
        run(model, tmp_path / f"{name}-whole", name)
    # 96 columns in bfloat16: 50 rows, and for blocks of rows at least one block.
    small = partial(tensor_reader.row_chunks, limit=9600)
    monkeypatch.setattr(round_parameters, "row_chunks", small)
    for name in ("nvfp4a16", "fp8-block"):
        run(model, tmp_path / f"{name}-chunks", name)
        whole, chunks = (
            (tmp_path / f"{name}-{kind}" / "model.safetensors").read_bytes()
            for kind in ("whole", "chunks")
        )
        assert whole == chunks


@pytest.mark.parametrize(
    ("name", "method", "effort"), [("mxfp4", "gptq", "normal"), ("nvfp4", "auto", "max")]
)
def test_calibrated_methods_quantize_to_fp4(
    model: Path, tmp_path: Path, name: str, method: str, effort: str
) -> None:
    report = run(model, tmp_path / "out", name, method=method, effort=effort)
    methods = {entry["method"] for entry in report["linears"]}
    assert methods <= ({"gptq", "gptq, learned"} if effort == "max" else {"gptq"})
    written = decoder(tmp_path / "out")
    for target in quant_targets(tmp_path / "out").values():
        quant = ActivationQuant.of(target.scheme, None)
        found = linear_of(written, target).activation_quant
        assert quant is not None and found is not None
        assert (found.value_type, found.group_size) == (quant.value_type, quant.group_size)
    exact = logits_of(decoder(model))
    # 128 tokens are few to calibrate with: this only finds what is broken.
    assert (logits_of(written) - exact).norm() / exact.norm() < 0.65
