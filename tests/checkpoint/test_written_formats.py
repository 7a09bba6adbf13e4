"""What `quantize --scheme` writes is read again, whole and by ranks, with the same values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.fp4_files import FP8_STATIC, MXFP4A16, MXFP4AFP8, MXFP8, NVFP4, NVFP4A16
from support.quantized_files import quantized_weights
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.common.errors import InputError
from llmkit.common.progress import SilentProgress
from llmkit.model.checkpoint_tensors import check_checkpoint
from llmkit.model.families import checkpoint_spec
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import read_parameter
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.shard.rank_part import rank_parts
from llmkit.shard.shard_checkpoint import shard

pytestmark = pytest.mark.usefixtures("short_builtin_text")

BLOCKS = Scheme(8, 128, kind="float", inputs="group", block_rows=128)
W4AFP8 = Scheme(4, 64, inputs="token", input_type="fp8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with blocks of 128 rows and columns, and a smaller one at the end."""
    sizes = {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny_checkpoint(tmp_path_factory.mktemp("llama") / "source", **sizes, **heads)


@pytest.mark.parametrize(
    ("name", "form", "scheme"),
    [
        ("fp8-block", "fp8", BLOCKS),
        ("fp8-block", "compressed-tensors", BLOCKS),
        ("fp8-static", "modelopt", FP8_STATIC),
        ("fp8", "modelopt", Scheme(8, kind="float", inputs="token")),
        ("mxfp8", "modelopt", MXFP8),
        ("nvfp4", "modelopt", NVFP4),
        ("mxfp4afp8", "modelopt", MXFP4AFP8),
        ("mxfp4a16", "modelopt", MXFP4A16),
        ("nvfp4a16", "compressed-tensors", NVFP4A16),
        ("mxfp8", "compressed-tensors", MXFP8),
        ("w4afp8", "compressed-tensors", W4AFP8),
    ],
)
def test_written_formats_are_read_whole_and_by_ranks(
    source: Path, tmp_path: Path, name: str, form: str, scheme: Scheme
) -> None:
    options = QuantizeOptions(
        "rtn", scheme=name, format=form, evaluate=False, device="cpu", samples=2, seq_len=32
    )
    out = tmp_path / "out"
    quantize(str(source), str(out), options, SilentProgress())
    checkpoint = open_checkpoint(out)
    assert checkpoint.quantization is not None
    assert (checkpoint.quantization.format, checkpoint.quantization.scheme) == (form, scheme)
    assert (out / "hf_quant_config.json").exists() is (form == "modelopt")
    spec = checkpoint_spec(checkpoint)
    check_checkpoint(checkpoint, spec)
    dense = open_checkpoint(source)
    for row in parameters(spec):
        if row.is_linear:
            expected = read_parameter(dense, row, torch.float32)
            found = read_parameter(checkpoint, row, torch.float32)
            error = (found - expected).norm() / expected.norm()
            assert error < (0.13 if scheme.bits == 4 else 0.04), row.name
    shard(out, tmp_path / "ranks", 2)
    sliced = rank_parts(checkpoint, 2)
    for stored, part in zip(rank_parts(open_checkpoint(tmp_path / "ranks")), sliced, strict=True):
        check_checkpoint(stored.checkpoint, stored.spec)
        for row in parameters(part.spec):
            expected = read_parameter(part.checkpoint, row, torch.float32)
            found = read_parameter(stored.checkpoint, row, torch.float32)
            assert torch.equal(found, expected), row.name


def test_written_fp8_blocks_of_modelopt_have_the_values_of_the_fp8_format(
    source: Path, tmp_path: Path
) -> None:
    for form in ("fp8", "modelopt"):
        options = QuantizeOptions(
            "rtn", scheme="fp8-block", format=form, evaluate=False, device="cpu"
        )
        quantize(str(source), str(tmp_path / form), options, SilentProgress())
    assert open_checkpoint(tmp_path / "modelopt").config["quantization_config"]["quant_algo"] == (
        "fp8_pb_wo"
    )
    expected = quantized_weights(tmp_path / "fp8")
    found = quantized_weights(tmp_path / "modelopt")
    assert found.keys() == expected.keys() and len(found) == 7
    for name, weight in found.items():
        assert torch.equal(weight.dequantize(), expected[name].dequantize())
    # The format's scales of blocks are not cut.
    with pytest.raises(InputError, match=r"k_proj: 128/2 = 0\.5 blocks of 128; TP 1 works"):
        shard(tmp_path / "modelopt", tmp_path / "ranks", 2)


def test_written_fp8_blocks_have_the_config_of_deepseek(source: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(
        "rtn", scheme="fp8-block", format="fp8", evaluate=False, device="cpu", keep="down_proj"
    )
    quantize(str(source), str(tmp_path / "out"), options, SilentProgress())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.down_proj"],
    }
    tensors = open_checkpoint(tmp_path / "out").tensors
    assert tensors["model.layers.0.mlp.gate_proj.weight_scale_inv"].shape == (2, 2)
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == "BF16"


def test_written_modelopt_files_have_the_scales_of_an_fp8_kv_cache(
    source: Path, tmp_path: Path
) -> None:
    options = QuantizeOptions(
        "rtn", scheme="nvfp4", format="modelopt", kv="fp8", evaluate=False, device="cpu"
    )
    out = tmp_path / "out"
    quantize(str(source), str(out), replace(options, samples=2, seq_len=32), SilentProgress())
    document = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert document["kv_cache_quant_algo"] == "FP8"
    checkpoint = open_checkpoint(out)
    check_checkpoint(checkpoint, checkpoint_spec(checkpoint))
    assert checkpoint.quantization is not None and checkpoint.quantization.kv == "fp8"
    for name in ("k_proj.k_scale", "v_proj.v_scale"):
        assert checkpoint.read(f"model.layers.0.self_attn.{name}").item() > 0
    shard(out, tmp_path / "ranks", 2)
    for part in rank_parts(open_checkpoint(tmp_path / "ranks")):
        check_checkpoint(part.checkpoint, part.spec)
