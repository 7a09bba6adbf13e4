"""FP8 with block scales on disk: configs, slices, packing, and what wrong files get."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fp8_files import block_group, edit_config, pack_fp8, unpack_fp8, write_fp8
from support.tiny_families import family_oracle

from llmkit.checkpoint.block_scales import realign_block_scales, realigned_scheme
from llmkit.checkpoint.fp8_format import Fp8Format
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_formats import FORMATS, parse_quantization
from llmkit.checkpoint.quantized_weight import Format, QuantizationConfig, QuantizedWeight, Scheme
from llmkit.common.errors import InputError
from llmkit.model.checkpoint_tensors import check_checkpoint
from llmkit.model.decoder import Decoder
from llmkit.model.families import checkpoint_spec
from llmkit.model.linear import pack_weight
from llmkit.model.weight_loader import load_model
from llmkit.quant.inspect_checkpoint import inspect_checkpoint
from llmkit.runtime.memory_plan import loaded_bytes, weight_bytes

BLOCKS = Scheme(8, 128, kind="float", inputs="group", block_rows=128)
STATIC = Scheme(8, kind="float", inputs="tensor", block_rows=-1)
DEEPSEEK = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}
FP8_BLOCK = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": block_group(128, 128)},
}
Q_PROJ = "model.layers.0.self_attn.q_proj"
K_SCALE = "model.layers.1.self_attn.k_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("d", "scheme", "label"),
    [
        (DEEPSEEK, BLOCKS, "FP8 in blocks of 128x128, inputs too in groups of 128"),
        (FP8_BLOCK, BLOCKS, "FP8 in blocks of 128x128, inputs too in groups of 128"),
        ({"quant_method": "fp8"}, BLOCKS, None),  # transformers' defaults
        (DEEPSEEK | {"scale_fmt": "ue8m0"}, BLOCKS, None),
        (
            DEEPSEEK | {"activation_scheme": "static", "weight_block_size": None},
            STATIC,
            "FP8 with one scale per weight, inputs too by a fixed scale",
        ),
        (
            DEEPSEEK | {"weight_block_size": None},
            Scheme(8, kind="float", inputs="token", block_rows=-1),
            "FP8 with one scale per weight, inputs too",
        ),
    ],
)
def test_fp8_configs_are_read(d: dict[str, Any], scheme: Scheme, label: str | None) -> None:
    config = parse_quantization(d)
    assert config.scheme == scheme and config.ignore[0] == "lm_head"
    assert label is None or scheme.label == label
    assert scheme.is_fp8 and not scheme.is_fp4


@pytest.mark.parametrize("field", ["modules_to_not_convert", "ignored_layers"])
def test_fp8_config_ignores_modules_as_transformers(field: str) -> None:
    entries = ["gate", "lm_head", "model.layers.1", "model.*.up_proj"]
    config = parse_quantization(DEEPSEEK | {field: entries})
    for module, is_dense in (
        ("model.layers.0.block_sparse_moe.gate", True),
        ("model.layers.0.mlp.gate_proj", False),
        ("model.layers.1.mlp.gate_proj", True),
        ("model.layers.11.mlp.gate_proj", False),
        ("model.layers.0.mlp.up_proj", True),
        ("model.layers.0.mlp.up_projection", False),
    ):
        assert (config.scheme_of(module) is None) is is_dense, module
    written = Fp8Format().config_dict(config)
    assert sorted(written["modules_to_not_convert"]) == sorted(entries)
    assert parse_quantization(written) == config


@pytest.mark.parametrize(
    ("d", "message"),
    [
        ({"weight_block_size": [128]}, r"weight_block_size \[128\]. Expected two positive numbers"),
        ({"weight_block_size": [128, 0]}, r"weight_block_size \[128, 0\]"),
        ({"weight_block_size": "128x128"}, "weight_block_size 128x128"),
        ({"weight_block_size": [True, 128]}, r"weight_block_size \[True, 128\]"),
        ({"fmt": "e5m2"}, "has fmt e5m2. Expected e4m3"),
        ({"activation_scheme": "both"}, "activation_scheme both. Expected dynamic or static"),
        ({"activation_scheme": "static"}, "static. Expected dynamic, as weight_block_size is not"),
        ({"expert_dtype": "fp4"}, "expert_dtype fp4"),
        ({"modules_to_convert": ["embed"]}, r"modules_to_convert \['embed'\]. Expected none"),
        ({"modules_to_not_convert": "gate"}, "modules_to_not_convert gate. Expected a list"),
        ({"modules_to_not_convert": ["("]}, "A regular expression was expected"),
    ],
)
def test_fp8_config_of_another_form_is_refused(d: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_quantization(DEEPSEEK | d)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("weights", {"block_structure": None}, "block_structure None"),
        ("weights", {"block_structure": [128, 128, 1]}, "two numbers such as"),
        ("weights", {"block_structure": [1, 128]}, r"block_structure \[1, 128\]"),
        ("input_activations", {"group_size": 64}, "group with group_size 64. Expected group with"),
        ("input_activations", {"strategy": "token"}, "token with group_size 128"),
        ("input_activations", {"dynamic": False}, "and dynamic true"),
    ],
)
def test_fp8_blocks_of_compressed_tensors_of_another_form_are_refused(
    part: str, values: dict[str, Any], message: str
) -> None:
    group = block_group(128, 128)
    group[part] |= values
    with pytest.raises(InputError, match=message):
        parse_quantization(FP8_BLOCK | {"config_groups": {"group_0": group}})


@pytest.mark.parametrize("name", ["fp8", "compressed-tensors"])
def test_fp8_blocks_are_packed_as_they_are_unpacked(name: Format) -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    packed = pack_fp8(weight, (128, 128))
    suffix = "weight_scale_inv" if name == "fp8" else "weight_scale"
    stored = {"weight": packed.q, suffix: packed.scales}
    unpacked = FORMATS[name].unpack(BLOCKS, stored)
    assert torch.equal(unpacked.dequantize(), packed.dense)
    assert torch.equal(unpacked.rows(slice(100, 150)).dequantize(), packed.dense[100:150])
    again = FORMATS[name].pack(BLOCKS, unpacked)
    assert again.keys() == stored.keys()
    for key, tensor in again.items():
        assert torch.equal(tensor.float(), stored[key].float())
    config = QuantizationConfig(name, BLOCKS)
    written = FORMATS[name].config_dict(config)
    assert parse_quantization(json.loads(json.dumps(written))).scheme == BLOCKS
    unpacked.scales[5, 0] *= 2
    with pytest.raises(InputError, match="rows of a block have different scales"):
        FORMATS[name].pack(BLOCKS, unpacked)


def test_fp8_has_no_place_for_kv_scales() -> None:
    with pytest.raises(InputError, match="no place for the scales of a FP8 KV cache"):
        Fp8Format().config_dict(QuantizationConfig("fp8", BLOCKS, kv="fp8"))


def test_fp8_with_one_scale_is_packed_as_it_is_unpacked() -> None:
    packed = pack_fp8(torch.randn(24, 40, generator=torch.Generator().manual_seed(0)), None)
    stored = {
        "weight": packed.q,
        "weight_scale_inv": packed.scales.reshape(()),
        "activation_scale": torch.tensor(0.5),
    }
    weight = Fp8Format().unpack(STATIC, stored)
    assert torch.equal(weight.dequantize(), packed.dense)
    assert weight.input_scale is not None and weight.input_scale.tolist() == [0.5]
    for key, tensor in Fp8Format().pack(STATIC, weight).items():
        assert torch.equal(tensor.float(), stored[key].float())


@pytest.mark.parametrize("start", [(0, 0), (128, 256), (96, 192), (40, 24), (100, 300)])
def test_block_scales_of_a_slice_in_smaller_blocks(start: tuple[int, int]) -> None:
    packed = pack_fp8(torch.randn(300, 500, generator=torch.Generator().manual_seed(0)), (128, 128))
    stop = 290, 470
    covering = packed.scales[
        start[0] // 128 : -(-stop[0] // 128), start[1] // 128 : -(-stop[1] // 128)
    ]
    shape = stop[0] - start[0], stop[1] - start[1]
    scheme = realigned_scheme(BLOCKS, start)
    scales = realign_block_scales(covering, BLOCKS, start, shape)
    q = packed.q[start[0] : stop[0], start[1] : stop[1]]
    dense = packed.dense[start[0] : stop[0], start[1] : stop[1]]
    assert torch.equal(unpack_fp8(q, scales, (scheme.block_rows, scheme.group_size)), dense)
    found = Fp8Format().unpack(scheme, {"weight": q, "weight_scale_inv": scales})
    assert torch.equal(found.dequantize(), dense)


def test_fp8_weight_with_a_smaller_last_block_stays_packed_on_a_cpu() -> None:
    packed = pack_fp8(torch.randn(32, 320, generator=torch.Generator().manual_seed(0)), (128, 128))
    stored = {"weight": packed.q, "weight_scale_inv": packed.scales}
    weight = Fp8Format().unpack(BLOCKS, stored)
    even = weight.with_even_groups()
    assert even.scheme.group_size == 64 and even.scales.shape == (32, 5)
    assert torch.equal(even.dequantize(), packed.dense)
    assert isinstance(even, QuantizedWeight)
    held = pack_weight(weight)
    assert held.nbytes == 32 * 320 + 32 * 5 * 4


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen 3 in blocks of 32 x 32."""
    folder = tmp_path_factory.mktemp("qwen3")
    family_oracle("qwen3", folder / "dense", num_hidden_layers=2)
    write_fp8(folder / "dense", folder / "fp8", (32, 32))
    return folder / "fp8"


def test_inspect_names_fp8_blocks(fp8: Path) -> None:
    entry = inspect_checkpoint(open_checkpoint(fp8))["quantization"]
    assert (entry["format"], entry["method"]) == ("fp8", "fp8")
    (scheme,) = entry["schemes"]
    assert scheme["label"] == "FP8 in blocks of 32x32, inputs too in groups of 32"
    assert (scheme["block_rows"], scheme["group_size"], scheme["inputs"]) == (32, 32, "group")


def test_memory_plan_counts_fp8_blocks_as_they_are_held(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    family_oracle("qwen3", tmp_path / "dense", **sizes)
    write_fp8(tmp_path / "dense", tmp_path / "fp8", (32, 32))
    checkpoint = open_checkpoint(tmp_path / "fp8")
    spec = checkpoint_spec(checkpoint)
    planned = weight_bytes(checkpoint, spec, torch.float32, torch.device("cpu"))
    held = loaded_bytes(load_model(checkpoint, torch.float32, packed=True))
    assert abs(planned - held) <= 0.01 * held


def broken(fp8: Path, folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """A copy of the checkpoint with some tensors changed, or removed (None)."""
    folder.mkdir()
    (folder / "config.json").write_bytes((fp8 / "config.json").read_bytes())
    tensors = load_file(fp8 / "model.safetensors") | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({K_SCALE: None}, rf"lacks 1 tensor \({K_SCALE}\)"),
        ({K_SCALE: torch.ones(2, 1)}, rf"tensor {K_SCALE} has shape \[2, 1\]. Shape \[1, 1\] was"),
        ({K_SCALE: torch.ones(())}, rf"tensor {K_SCALE} has shape \[\]. Shape \[1, 1\] was"),
        (
            {K_SCALE: torch.ones(1, 1, dtype=torch.uint8)},
            f"tensor {K_SCALE} has dtype U8. Dtype F32",
        ),
        ({f"{Q_PROJ}.weight": torch.ones(64, 32)}, f"{Q_PROJ}.weight has dtype F32. Dtype F8_E4M3"),
        ({f"{Q_PROJ}.weight_scale": torch.ones(1)}, rf"has 1 tensor \({Q_PROJ}.weight_scale\)"),
    ],
)
def test_fp8_checkpoint_with_wrong_tensors_is_refused(
    fp8: Path, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    checkpoint = open_checkpoint(broken(fp8, tmp_path / "broken", change))
    with pytest.raises(InputError, match=message):
        check_checkpoint(checkpoint, checkpoint_spec(checkpoint))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
def test_fp8_checkpoint_with_impossible_scales_is_refused(
    fp8: Path, tmp_path: Path, value: float
) -> None:
    scales = torch.tensor([[0.5], [value]])
    path = broken(fp8, tmp_path / "broken", {f"{Q_PROJ}.weight_scale_inv": scales})
    with pytest.raises(InputError) as caught:
        load_model(open_checkpoint(path), torch.float32)
    message = (
        f"{Q_PROJ}.weight: 1 of 2 values of weight_scale_inv are no scales, such as {value}."
        " Finite numbers of at least 0 were expected."
    )
    assert message in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("packed", [False, True])
def test_fp8_weights_with_the_scale_zero_are_zero(fp8: Path, tmp_path: Path, packed: bool) -> None:
    """Some writers give it to blocks of zeros; vLLM reads them."""
    scales = torch.tensor([[0.5], [0.0]])
    path = broken(fp8, tmp_path / "zeros", {f"{Q_PROJ}.weight_scale_inv": scales})
    model = load_model(open_checkpoint(path), torch.float32, packed=packed)
    assert isinstance(model, Decoder)
    qkv = model.layers[0].linears["attn.qkv"]
    y = qkv(torch.randn(5, 32, generator=torch.Generator().manual_seed(0)))
    assert (y[:, :32] != 0).all() and (y[:, 32:64] == 0).all()


def test_fp8_inputs_with_the_scale_zero_are_refused(tmp_path: Path) -> None:
    family_oracle("qwen3", tmp_path / "dense", num_hidden_layers=2)
    write_fp8(tmp_path / "dense", tmp_path / "fp8", None, static=True)
    path = broken(
        tmp_path / "fp8", tmp_path / "broken", {f"{Q_PROJ}.activation_scale": torch.tensor(0.0)}
    )
    with pytest.raises(InputError, match=r"activation_scale are no scales.*above 0 were expected"):
        load_model(open_checkpoint(path), torch.float32)


def test_fp8_checkpoint_with_blocks_of_another_size_is_refused(fp8: Path, tmp_path: Path) -> None:
    path = broken(fp8, tmp_path / "broken", {})
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    edit_config(path, quantization_config=config | {"weight_block_size": [16, 32]})
    checkpoint = open_checkpoint(path)
    with pytest.raises(InputError, match=re.escape("has shape [2, 1]. Shape [4, 1] was expected")):
        check_checkpoint(checkpoint, checkpoint_spec(checkpoint))
