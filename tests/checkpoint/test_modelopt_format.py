"""Model-Optimizer's checkpoints: both config files, values, KV scales, and wrong files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fp4_files import (
    FP8_STATIC,
    INPUT_SCALE,
    MXFP4A16,
    MXFP4AFP8,
    MXFP4AMXFP8,
    MXFP8,
    NVFP4,
    NVFP4A16,
    as_bytes,
    pack_plain,
    pack_plain_fp8,
    write_fp4,
    write_hf_quant_config,
)
from support.fp8_files import edit_config, pack_fp8
from support.tiny_families import family_oracle

from llmkit.checkpoint.local_checkpoints import describe_checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_formats import FORMATS, parse_quantization
from llmkit.checkpoint.quantized_weight import QuantizationConfig, QuantizedWeight, Scheme
from llmkit.common.errors import InputError
from llmkit.model.checkpoint_tensors import check_checkpoint
from llmkit.model.families import checkpoint_spec
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import load_model, read_activation_quant, read_parameter
from llmkit.quant.output_layout import output_config, output_files

FORM = FORMATS["modelopt"]
PER_CHANNEL = Scheme(8, kind="float", inputs="token")
BLOCKS = Scheme(8, 128, kind="float", inputs="group", block_rows=128)
# As Model-Optimizer 0.47 writes config.json.
CONFIG = {
    "config_groups": {
        "group_0": {
            "input_activations": {
                "dynamic": False,
                "num_bits": 4,
                "type": "float",
                "group_size": 16,
            },
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head", "model.embed_tokens"],
    "quant_algo": "NVFP4",
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quant_method": "modelopt",
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def hf_quant_config(**quantization: Any) -> dict[str, Any]:
    """A hf_quant_config.json as `parse_quantization` gets it."""
    defaults = {"kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
    return {
        "quant_method": "modelopt",
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": {"quant_algo": "NVFP4"} | defaults | quantization,
    }


@pytest.mark.parametrize(
    ("d", "scheme"),
    [
        (CONFIG, NVFP4),
        (hf_quant_config(), NVFP4),
        (hf_quant_config(quant_algo="W4A16_NVFP4"), NVFP4A16),
        (hf_quant_config(quant_algo="FP8", group_size=None), FP8_STATIC),
        (hf_quant_config(quant_algo="FP8_PER_CHANNEL_PER_TOKEN", group_size=None), PER_CHANNEL),
        (hf_quant_config(quant_algo="fp8_pb_wo", group_size=None), BLOCKS),
        (hf_quant_config(quant_algo="MXFP8", group_size=32), MXFP8),
        (hf_quant_config(quant_algo="W4A8_MXFP4_FP8", group_size=32), MXFP4AFP8),
        (hf_quant_config(quant_algo="W4A8_MXFP4_MXFP8", group_size=32), MXFP4AMXFP8),
        (hf_quant_config(quant_algo="W4A16_MXFP4", group_size=None), MXFP4A16),
        (hf_quant_config(quant_algo="W4A16_AWQ", group_size=64), Scheme(4, 64)),
        (CONFIG | {"quant_method": "modelopt_fp4"}, NVFP4),
    ],
)
def test_modelopt_configs_are_read_and_written(d: dict[str, Any], scheme: Scheme) -> None:
    found = parse_quantization(d)
    assert (found.format, found.scheme, found.kv) == ("modelopt", scheme, "")
    assert found.scheme_of(Q_PROJ) == scheme and found.scheme_of("lm_head") is None
    written = json.loads(json.dumps(FORM.config_dict(found)))
    assert parse_quantization(written) == found
    (name, data) = FORM.extra_files(found).popitem()
    document = json.loads(data)
    assert name == "hf_quant_config.json" and document["producer"]["name"] == "modelopt"
    assert parse_quantization({"quant_method": "modelopt"} | document) == found
    # vLLM asks for these in files with FP4.
    assert {"kv_cache_quant_algo", "exclude_modules"} <= document["quantization"].keys()
    sizes = {"e4m3": 16, "e8m0": 32, "float": 64 if scheme.kind == "int" else None}
    assert document["quantization"].get("group_size") == sizes[scheme.scale_format]


@pytest.mark.parametrize(
    ("entry", "module", "is_dense"),
    [
        ("lm_head", "lm_head", True),
        ("model.layers.0.self_attn*", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.0.self_attn*", "model.layers.0.mlp.up_proj", False),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.11.mlp.up_proj", False),
        ("*.mlp.gate", "model.layers.7.mlp.gate", True),
        ("*.mlp.gate", "model.layers.7.mlp.gate_proj", False),
        ("model.layers.?.mlp*", "model.layers.3.mlp.up_proj", True),
        ("model.layers.?.mlp*", "model.layers.13.mlp.up_proj", False),
        ("language_model.model.layers.0*", "model.language_model.layers.0.mlp.up_proj", True),
    ],
)
def test_modelopt_excludes_modules_by_wildcards(entry: str, module: str, is_dense: bool) -> None:
    found = parse_quantization(hf_quant_config(exclude_modules=[entry]))
    assert (found.scheme_of(module) is None) is is_dense
    assert FORM.config_dict(found)["ignore"] == [entry]


def test_modelopt_writes_patterns_of_other_formats_as_wildcards() -> None:
    ignore = ("lm_head", "re:.*gate$", r"re:model\.layers\.0\..*", "model.layers.1.mlp.up_proj")
    config = QuantizationConfig("modelopt", NVFP4, ignore, carried=("model.visual.",))
    assert FORM.config_dict(config)["ignore"] == [
        "lm_head",
        "*gate",
        "model.layers.0.*",
        "model.layers.1.mlp.up_proj",
        "model.visual*",
    ]
    for pattern in ("re:.*(gate|up)", "re:a+", r"re:layers\.[0-3]\..*"):
        with pytest.raises(InputError, match="no place for the regular expression"):
            FORM.config_dict(replace(config, ignore=(pattern,)))


MIXED = hf_quant_config(
    quant_algo="MIXED_PRECISION",
    group_size=None,
    quantized_layers={
        "model.layers.0.mlp.down_proj": {"quant_algo": "FP8"},
        "model.layers.0.mlp.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
    },
)


def test_modelopt_mixed_precision_has_a_scheme_for_each_module() -> None:
    found = parse_quantization(MIXED)
    assert found.scheme is None
    assert found.scheme_of("model.layers.0.mlp.down_proj") == FP8_STATIC
    assert found.scheme_of("model.layers.0.mlp.up_proj") == NVFP4
    assert found.scheme_of("model.layers.0.mlp.gate_proj") is None
    written = FORM.config_dict(found)
    assert written["quant_algo"] == "MIXED_PRECISION"
    assert written["quantized_layers"] == MIXED["quantization"]["quantized_layers"]
    assert parse_quantization(written) == found
    with pytest.raises(InputError, match="no place for re:"):
        FORM.config_dict(replace(found, overrides=(("re:.*up", NVFP4),)))


@pytest.mark.parametrize(
    ("d", "message"),
    [
        (hf_quant_config(quant_algo=None), "quant_algo none. Expected FP8, FP8_PER_CHANNEL"),
        (hf_quant_config(quant_algo="W8A16"), "quant_algo W8A16"),
        (
            hf_quant_config(quant_algo="NVFP4_SVD"),
            "quant_algo NVFP4_SVD. Expected FP8, .*NVFP4_AWQ",
        ),
        (
            hf_quant_config(quant_algo="W4A16_AWQ", has_zero_point=True),
            "has_zero_point True. Expected false for W4A16_AWQ",
        ),
        (
            hf_quant_config(quant_algo="W4A16_AWQ", group_size=0),
            "group_size 0. Expected a positive number for W4A16_AWQ",
        ),
        (hf_quant_config(group_size=32), "group_size 32. Expected 16 for NVFP4"),
        (
            hf_quant_config(quant_algo="W4A8_MXFP4_FP8"),
            "group_size 16. Expected 32 for W4A8_MXFP4_FP8",
        ),
        # Model-Optimizer writes this for MXFP4 weights, whether inputs are quantized or not.
        (hf_quant_config(quant_algo="mxfp4"), "quant_algo mxfp4. Expected FP8, .*W4A16_MXFP4"),
        (hf_quant_config(kv_cache_quant_algo="NVFP4"), "kv_cache_quant_algo NVFP4. Expected FP8"),
        (hf_quant_config(exclude_modules="lm_head"), "exclude_modules lm_head. Expected a list"),
        (hf_quant_config(quant_algo="MIXED_PRECISION"), "quantized_layers none"),
        (
            hf_quant_config(quant_algo="MIXED_PRECISION", quantized_layers={"a": "FP8"}),
            "quantized_layers .*Expected an object",
        ),
        (
            hf_quant_config(quant_algo="MIXED_PRECISION", quantized_layers={"a": {}}),
            "quant_algo none",
        ),
        (CONFIG | {"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "kv_cache_quant_algo"),
    ],
)
def test_modelopt_configs_of_another_form_are_refused(d: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_quantization(d)
    assert caught.value.exit_code == 3


def test_modelopt_has_no_name_for_integers() -> None:
    with pytest.raises(InputError, match=r"no name for INT4. One of FP8"):
        FORM.config_dict(QuantizationConfig("modelopt", Scheme(4)))
    with pytest.raises(InputError, match="INT8 KV cache"):
        FORM.config_dict(QuantizationConfig("modelopt", NVFP4, kv="int8"))


def test_modelopt_fp8_is_packed_as_it_is_unpacked() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    one = pack_plain_fp8(weight)
    blocks = pack_fp8(weight, (128, 128))
    rows = pack_fp8(weight, (1, 300))
    cases = (
        (FP8_STATIC, one.stored, one.dense),
        (
            BLOCKS,
            {"weight": blocks.q, "weight_scale": blocks.scales[:, None, :, None]},
            blocks.dense,
        ),
        (PER_CHANNEL, {"weight": rows.q, "weight_scale": rows.scales[:, 0]}, rows.dense),
    )
    for scheme, stored, dense in cases:
        unpacked = FORM.unpack(scheme, stored)
        assert isinstance(unpacked, QuantizedWeight)
        assert torch.equal(unpacked.dequantize(), dense)
        again = FORM.pack(scheme, unpacked)
        assert again.keys() == stored.keys()
        for packed in FORM.tensors(scheme, 200, 300):
            found = again[packed.suffix]
            assert packed.shape == tuple(found.shape) == tuple(stored[packed.suffix].shape)
            assert as_bytes(found) == as_bytes(stored[packed.suffix])
        wrong = stored | {"weight_scale": torch.ones(7)}
        with pytest.raises(InputError, match=r"weight_scale has shape \[7\]"):
            FORM.unpack(scheme, wrong)
        wrong = stored | {"weight_scale": stored["weight_scale"] * float("nan")}
        with pytest.raises(InputError, match="values of weight_scale are no scales"):
            FORM.unpack(scheme, wrong)
    with pytest.raises(InputError, match=r"input_scale are no scales.*above 0 were"):
        FORM.unpack(FP8_STATIC, one.stored | {"input_scale": torch.tensor(0.0)})


@pytest.mark.parametrize("scheme", [MXFP4AFP8, MXFP4AMXFP8, MXFP4A16])
def test_modelopt_mxfp4_is_packed_as_it_is_unpacked(scheme: Scheme) -> None:
    """The bytes of an independent packer are read with its values, and written again."""
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    plain = pack_plain(weight, scheme, "modelopt")
    assert (plain.dense - weight).norm() < 0.15 * weight.norm()
    unpacked = FORM.unpack(scheme, plain.stored)
    assert torch.equal(unpacked.dequantize(), plain.dense)
    assert (unpacked.input_scale is not None) is (scheme is MXFP4AFP8)
    again = FORM.pack(scheme, unpacked)
    assert again.keys() == plain.stored.keys()
    for packed in FORM.tensors(scheme, 48, 96):
        assert packed.shape == tuple(again[packed.suffix].shape)
        assert as_bytes(again[packed.suffix]) == as_bytes(plain.stored[packed.suffix])
    scales = plain.stored["weight_scale"].clone()
    scales[3, 1] = 255
    with pytest.raises(InputError, match="1 of 144 values of weight_scale are 255"):
        FORM.unpack(scheme, plain.stored | {"weight_scale": scales})
    with pytest.raises(InputError, match=r"MXFP4 cannot store a \[48, 80\]"):
        FORM.tensors(scheme, 48, 80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen 3 in NVFP4, FP8 and MXFP4, each with both files, beside the same values."""
    folder = tmp_path_factory.mktemp("qwen3")
    for name, scheme, algorithm in (
        ("nvfp4", NVFP4, "NVFP4"),
        ("fp8", FP8_STATIC, "FP8"),
        ("mxfp4", MXFP4AFP8, "W4A8_MXFP4_FP8"),
    ):
        sizes = {"num_hidden_layers": 2, "intermediate_size": 64}
        family_oracle("qwen3", folder / f"{name}-dense", **sizes)
        config = CONFIG | {"quant_algo": algorithm}
        write_fp4(folder / f"{name}-dense", folder / name, scheme, config, "modelopt")
        group = {} if name == "fp8" else {"group_size": scheme.group_size}
        excluded = {"exclude_modules": ["lm_head", "model.embed_tokens"]}
        write_hf_quant_config(folder / name, quant_algo=algorithm, **group, **excluded)
    return folder


@pytest.mark.parametrize("name", ["nvfp4", "fp8", "mxfp4"])
def test_modelopt_checkpoint_has_the_values_of_the_dense_one(folder: Path, name: str) -> None:
    checkpoint = open_checkpoint(folder / name)
    dense = open_checkpoint(folder / f"{name}-dense")
    spec = checkpoint_spec(checkpoint)
    check_checkpoint(checkpoint, spec)
    for row in parameters(spec):
        expected = read_parameter(dense, row, torch.float32)
        assert torch.equal(read_parameter(checkpoint, row, torch.float32), expected), row.name
        for found in read_activation_quant(checkpoint, row).values():
            assert found.scale is not None and found.scale.tolist() == [INPUT_SCALE]
            assert found.value_type == ("fp4" if name == "nvfp4" else "fp8")


def copy_of(source: Path, folder: Path, config: dict[str, Any] | None) -> Path:
    """A copy of a checkpoint with another `quantization_config`."""
    shutil.copytree(source, folder)
    edit_config(folder, quantization_config=config)
    return folder


def test_modelopt_checkpoint_with_hf_quant_config_alone_is_read(
    folder: Path, tmp_path: Path
) -> None:
    path = copy_of(folder / "nvfp4", tmp_path / "old", None)
    found = open_checkpoint(path)
    assert found.quantization == open_checkpoint(folder / "nvfp4").quantization
    assert "hf_quant_config.json" in found.side_files()
    assert describe_checkpoint("old", path).quantization == "modelopt"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"quant_algo": "W4A16_NVFP4"}, "disagree about .*: NVFP4, inputs too and NVFP4"),
        (CONFIG | {"quant_algo": "FP8"}, "NVFP4, inputs too and FP8 with one scale per weight"),
        (
            CONFIG | {"ignore": ["lm_head", "model.layers.1*"]},
            r"disagree about model.layers.1[.a-z_]*: NVFP4, inputs too and not quantized",
        ),
        (
            CONFIG | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}},
            "disagree about the KV cache: not quantized and FP8",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "hf_quant_config.json is of Model-Optimizer, and config.json has the quant_method fp8",
        ),
    ],
)
def test_modelopt_files_that_contradict_each_other_are_refused(
    folder: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    path = copy_of(folder / "nvfp4", tmp_path / "wrong", config)
    if "kv_cache_scheme" in config:
        tensors = load_file(path / "model.safetensors")
        scales = {f"{Q_PROJ[:-6]}k_proj.k_scale": torch.tensor(1.0)}
        save_file(tensors | scales, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 3


def test_modelopt_files_may_list_the_same_modules_in_other_words(
    folder: Path, tmp_path: Path
) -> None:
    path = copy_of(folder / "nvfp4", tmp_path / "same", CONFIG | {"ignore": ["*lm_head*"]})
    check_checkpoint(open_checkpoint(path), checkpoint_spec(open_checkpoint(path)))


def test_modelopt_nvfp4_without_input_scales_is_weight_only(folder: Path, tmp_path: Path) -> None:
    path = copy_of(folder / "nvfp4", tmp_path / "a16", CONFIG)
    tensors = load_file(path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.endswith("input_scale")}
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(path)
    assert checkpoint.quantization is not None and checkpoint.quantization.scheme == NVFP4A16
    load_model(checkpoint, torch.float32)


def test_modelopt_mxfp4_without_input_scales_rounds_inputs_by_token(
    folder: Path, tmp_path: Path
) -> None:
    """TensorRT-LLM reads no input scale, either, and finds one at run time."""
    path = shutil.copytree(folder / "mxfp4", tmp_path / "dynamic")
    tensors = load_file(path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.endswith("input_scale")}
    assert len(kept) < len(tensors)
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(path)
    assert checkpoint.quantization is not None
    assert checkpoint.quantization.scheme == replace(MXFP4AFP8, inputs="token")
    for row in parameters(checkpoint_spec(checkpoint)):
        for found in read_activation_quant(checkpoint, row).values():
            assert (found.value_type, found.scale, found.group_size) == ("fp8", None, 0)
    load_model(checkpoint, torch.float32)


@pytest.mark.parametrize("names", [("k_proj.k_scale", "v_proj.v_scale"), ("k_scale", "v_scale")])
def test_modelopt_kv_scales_are_read(folder: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    kv = {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
    path = copy_of(folder / "fp8", tmp_path / "kv", CONFIG | {"quant_algo": "FP8"} | kv)
    (path / "hf_quant_config.json").unlink()
    without = open_checkpoint(path).quantization
    assert without is not None and without.kv == ""  # as there are no scales
    scales = {
        f"model.layers.{layer}.self_attn.{name}": torch.tensor(0.5 + layer)
        for layer in range(2)
        for name in names
    }
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | scales, path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(path)
    assert checkpoint.quantization is not None
    assert (checkpoint.quantization.kv, checkpoint.quantization.kv_scales) == ("fp8", names)
    spec = checkpoint_spec(checkpoint)
    check_checkpoint(checkpoint, spec)
    found = {}
    for row in parameters(spec):
        found |= read_activation_quant(checkpoint, row)
    scale = found["layers.1.attn.v"].scale
    assert scale is not None and scale.tolist() == [1.5]


def test_modelopt_mixed_precision_is_written_with_every_module(folder: Path) -> None:
    """Other formats have a scheme of all linear layers, and overrides."""
    source = open_checkpoint(folder / "nvfp4-dense")
    fp8 = ("model.layers.1.mlp.down_proj",)
    quantization = QuantizationConfig(
        "modelopt", NVFP4, ("lm_head",), tuple((name, FP8_STATIC) for name in fp8)
    )
    config = output_config(source, quantization, "BF16")["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION" and len(config["quantized_layers"]) == 14
    files = output_files(source, quantization)
    document = json.loads(files["hf_quant_config.json"])
    assert document["quantization"]["quantized_layers"] == config["quantized_layers"]
    found = parse_quantization(config)
    assert found.scheme_of(fp8[0]) == FP8_STATIC and found.scheme_of(Q_PROJ) == NVFP4
    # An output of a Model-Optimizer checkpoint in another format has no such file.
    stale = output_files(open_checkpoint(folder / "nvfp4"), None)
    assert "hf_quant_config.json" not in stale
