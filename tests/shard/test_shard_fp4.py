"""Splitting checkpoints in NVFP4, MXFP4 and MXFP8: two values in a byte, groups, global scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.compare_ranks import compare_ranks
from support.fp4_files import (
    MXFP4A16,
    MXFP8,
    NVFP4,
    NVFP4A16,
    write_fp4,
    write_hf_quant_config,
)
from support.tiny_families import family_oracle

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_formats import FORMATS
from llmkit.checkpoint.quantized_weight import Format, QuantizationConfig, Scheme
from llmkit.common.errors import InputError
from llmkit.model.weight_loader import read_activation_quant
from llmkit.shard.shard_checkpoint import shard

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}


def write_pair(folder: Path, family: str, scheme: Scheme, form: Format, **sizes: Any) -> Path:
    """A quantized checkpoint; `dense` beside it has the same values."""
    family_oracle(family, folder / "dense", **sizes)
    config = FORMATS[form].config_dict(QuantizationConfig(form, scheme))
    write_fp4(folder / "dense", folder / "packed", scheme, config, form)
    return folder / "packed"


@pytest.mark.parametrize(
    ("family", "sizes", "scheme", "form", "layout"),
    [
        ("qwen3", SIZES, NVFP4, "compressed-tensors", (2, 1, 1)),
        ("qwen3", SIZES | {"num_key_value_heads": 1}, NVFP4A16, "modelopt", (4, 2, 1)),
        ("qwen3", SIZES, MXFP4A16, "compressed-tensors", (2, 2, 1)),
        ("minimax-m2", SIZES, NVFP4, "modelopt", (2, 1, 2)),
        ("phi3", SIZES, MXFP8, "compressed-tensors", (2, 1, 1)),
    ],
)
def test_shard_fp4_ranks_have_the_values_of_the_whole(
    tmp_path: Path,
    family: str,
    sizes: dict[str, Any],
    scheme: Scheme,
    form: Format,
    layout: tuple[int, int, int],
) -> None:
    packed = write_pair(tmp_path, family, scheme, form, **sizes)
    for checkpoint, row in compare_ranks(packed, tmp_path, layout, min_linears=8):
        quant = read_activation_quant(checkpoint, row).get(row.module)
        assert (quant is None) is not (row.is_linear and scheme.inputs == "group")


@pytest.mark.parametrize(
    ("family", "scaled", "layout"),
    [
        ("qwen3", "(o_proj|down_proj)$", (2, 2, 1)),
        ("phi3", "proj$", (2, 1, 1)),
        ("minimax-m2", "(o_proj|w2)$", (2, 1, 2)),
    ],
)
def test_shard_nvfp4_awq_ranks_have_the_values_of_the_whole(
    tmp_path: Path, family: str, scaled: str, layout: tuple[int, int, int]
) -> None:
    family_oracle(family, tmp_path / "dense", **SIZES)
    packed = tmp_path / "packed"
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ", "ignore": ["lm_head"]}
    write_fp4(tmp_path / "dense", packed, NVFP4, config, "modelopt", scaled=scaled)
    algorithm = {"quant_algo": "NVFP4_AWQ", "group_size": 16}
    write_hf_quant_config(packed, **algorithm, has_zero_point=False, pre_quant_scale=True)
    num_scaled = 0
    for checkpoint, row in compare_ranks(packed, tmp_path, layout, min_linears=8):
        quantization = checkpoint.quantization
        assert quantization is not None and quantization.scheme == NVFP4
        for name in row.source_names:
            module = name.removesuffix(".weight")
            has_scale = quantization.has_pre_quant_scale(module)
            assert has_scale is (f"{module}.pre_quant_scale" in checkpoint.tensors)
            num_scaled += has_scale
    assert num_scaled >= 4


@pytest.mark.parametrize(
    ("scheme", "columns", "tp", "message"),
    [
        (NVFP4A16, 48, 2, r"down_proj: 48/2 = 1\.5 groups of 16; TP 1 works"),
        (MXFP4A16, 96, 2, r"down_proj: 96/2 = 1\.5 groups of 32; TP 1 works"),
        (NVFP4A16, 96, 4, r"down_proj: 96/4 = 1\.5 groups of 16; TP 1, 2 work"),
    ],
)
def test_shard_fp4_refuses_slices_that_cut_a_group(
    tmp_path: Path, scheme: Scheme, columns: int, tp: int, message: str
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": columns, "num_hidden_layers": 1}
    packed = write_pair(tmp_path, "qwen3", scheme, "compressed-tensors", **sizes)
    with pytest.raises(InputError, match=message):
        shard(packed, tmp_path / "ranks", tp)
    assert not (tmp_path / "ranks").exists()


def test_shard_fp4_keeps_the_file_of_model_optimizer(tmp_path: Path) -> None:
    packed = write_pair(tmp_path, "qwen3", NVFP4, "modelopt", **SIZES)
    write_hf_quant_config(packed, quant_algo="NVFP4", group_size=16)
    shard(packed, tmp_path / "ranks", 2)
    stored = (tmp_path / "ranks" / "hf_quant_config.json").read_bytes()
    assert stored == (packed / "hf_quant_config.json").read_bytes()
    ranks = open_checkpoint(tmp_path / "ranks")
    assert ranks.quantization is not None and ranks.quantization.scheme == NVFP4
    (tmp_path / "ranks" / "hf_quant_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"hf_quant_config\.json"):
        open_checkpoint(tmp_path / "ranks")
