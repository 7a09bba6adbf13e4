"""NVFP4, MXFP4 and MXFP8 in compressed-tensors: configs, values, packing, and wrong files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fp4_files import (
    INPUT_SCALE,
    MXFP4,
    MXFP4A16,
    MXFP8,
    NVFP4,
    NVFP4A16,
    as_bytes,
    pack_plain,
    unpack_plain,
    write_fp4,
)
from support.fp4_peers import peer_cases, read_peer_case
from support.tiny_families import family_oracle

from llmkit.checkpoint.microscaling import decode_e8m0, encode_e8m0
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_formats import FORMATS, parse_quantization, read_input_scale
from llmkit.checkpoint.quantized_weight import QuantizationConfig, QuantizedWeight, Scheme
from llmkit.common.errors import InputError
from llmkit.model.checkpoint_tensors import check_checkpoint
from llmkit.model.dequantized_checkpoint import dequantized_checkpoint
from llmkit.model.families import checkpoint_spec
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import load_model, read_parameter
from llmkit.quant.inspect_checkpoint import inspect_checkpoint

FORM = FORMATS["compressed-tensors"]
FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
E4M3_GROUPS = {
    "group_size": 16,
    "strategy": "tensor_group",
    "scale_dtype": "torch.float8_e4m3fn",
}
E8M0_GROUPS = {"group_size": 32, "strategy": "group", "scale_dtype": "torch.uint8"}
OBSERVER = {"observer": "memoryless_minmax", "observer_kwargs": {}, "zp_dtype": None}
TOKEN = {"strategy": "token", "group_size": None, "dynamic": True, "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def config(
    storage: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **top: Any
) -> dict[str, Any]:
    """A config as compressed-tensors 0.17 writes it."""
    group = {
        "targets": ["Linear"],
        "weights": {"dynamic": False, "actorder": None} | OBSERVER | weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": storage,
    }
    return {
        "config_groups": {"group_0": group},
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": None,
        "format": storage,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
    } | top


NVFP4_CONFIG = config(
    "nvfp4-pack-quantized", FP4 | E4M3_GROUPS, FP4 | E4M3_GROUPS | {"dynamic": "local"} | OBSERVER
)
NVFP4A16_CONFIG = config("nvfp4-pack-quantized", FP4 | E4M3_GROUPS)
MXFP4_CONFIG = config(
    "mxfp4-pack-quantized", FP4 | E8M0_GROUPS, FP4 | E8M0_GROUPS | {"dynamic": True}
)
MXFP8_CONFIG = config("mxfp8-quantized", FP8 | E8M0_GROUPS, FP8 | E8M0_GROUPS | {"dynamic": True})


@pytest.mark.parametrize(
    ("d", "scheme", "label"),
    [
        (NVFP4_CONFIG, NVFP4, "NVFP4, inputs too"),
        (NVFP4A16_CONFIG, NVFP4A16, "NVFP4"),
        (MXFP4_CONFIG, MXFP4, "MXFP4, inputs too"),
        (config("mxfp4-pack-quantized", FP4 | E8M0_GROUPS), MXFP4A16, "MXFP4"),
        (
            config("mxfp4-pack-quantized", FP4 | E8M0_GROUPS, FP8 | TOKEN),
            replace(MXFP4A16, inputs="token", input_type="fp8"),
            "MXFP4, inputs in FP8",
        ),
        (
            config(
                "mxfp4-pack-quantized",
                FP4 | E8M0_GROUPS,
                FP8 | E8M0_GROUPS | {"dynamic": True},
            ),
            replace(MXFP4, input_type="fp8"),
            "MXFP4, inputs in FP8",
        ),
        (MXFP8_CONFIG, MXFP8, "MXFP8, inputs too"),
        # Without a scale_dtype, the format says what scales are.
        (
            config("mxfp8-quantized", FP8 | E8M0_GROUPS | {"scale_dtype": None}),
            replace(MXFP8, inputs="none", input_type=None),
            "MXFP8",
        ),
        (
            config("pack-quantized", INT4, FP8 | TOKEN),
            Scheme(4, 128, inputs="token", input_type="fp8"),
            "INT4 in groups of 128, inputs in FP8",
        ),
        (
            config("pack-quantized", INT4, INT4 | TOKEN | {"num_bits": 8}),
            Scheme(4, 128, inputs="token"),
            "INT4 in groups of 128, inputs too",
        ),
        # llm-compressor stores W4A8 without packing: the values are INT8 then.
        (
            config("int-quantized", INT4, INT4 | TOKEN | {"num_bits": 8}),
            Scheme(8, 128, inputs="token"),
            "INT8 in groups of 128, inputs too",
        ),
        (
            config("float-quantized", FP8 | {"strategy": "channel"}),
            Scheme(8, kind="float"),
            "FP8",
        ),
        (
            config("naive-quantized", FP8 | {"strategy": "tensor"}),
            Scheme(8, kind="float", block_rows=-1),
            "FP8 with one scale per weight",
        ),
        (
            config(
                "int-quantized",
                INT4 | {"num_bits": 8, "strategy": "tensor", "group_size": None},
                {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False},
            ),
            Scheme(8, inputs="tensor", block_rows=-1),
            "INT8 with one scale per weight, inputs too by a fixed scale",
        ),
    ],
)
def test_compressed_tensors_formats_of_float_groups_are_read_and_written(
    d: dict[str, Any], scheme: Scheme, label: str
) -> None:
    found = parse_quantization(d)
    assert found == QuantizationConfig("compressed-tensors", scheme, ("lm_head",))
    assert scheme.label == label
    written = json.loads(json.dumps(FORM.config_dict(found)))
    assert parse_quantization(written) == found
    group, original = written["config_groups"]["group_0"], d["config_groups"]["group_0"]
    if scheme.scale_format != "float":
        for part in ("weights", "input_activations"):
            for name, value in (original[part] or {}).items():
                if name not in OBSERVER and value is not None:
                    assert group[part][name] == value, name


def test_compressed_tensors_with_nested_formats_has_a_scheme_for_each_group() -> None:
    groups = {}
    for index, (d, targets) in enumerate(
        ((NVFP4_CONFIG, ["Linear"]), (MXFP8_CONFIG, ["re:.*down_proj$"]))
    ):
        groups[f"group_{index}"] = d["config_groups"]["group_0"] | {"targets": targets}
    d = NVFP4_CONFIG | {"format": "mixed-precision", "config_groups": groups}
    found = parse_quantization(d)
    assert found.scheme_of(Q_PROJ) == NVFP4
    assert found.scheme_of("model.layers.0.mlp.down_proj") == MXFP8
    written = FORM.config_dict(found)
    assert written["format"] == "mixed-precision"
    formats = [group["format"] for group in written["config_groups"].values()]
    assert formats == ["nvfp4-pack-quantized", "mxfp8-quantized"]
    assert parse_quantization(written) == found


@pytest.mark.parametrize(
    ("d", "message"),
    [
        (config("nvfp4-pack-quantized", FP4 | E4M3_GROUPS | {"group_size": 32}), "group_size 32"),
        (config("mxfp4-pack-quantized", FP4 | E8M0_GROUPS | {"group_size": 64}), "group_size 64"),
        (
            config("nvfp4-pack-quantized", FP4 | E4M3_GROUPS | {"scale_dtype": "torch.uint8"}),
            "scale_dtype torch.uint8. Expected None or torch.float8_e4m3fn",
        ),
        (
            config("nvfp4-pack-quantized", FP4 | E4M3_GROUPS, FP4 | E4M3_GROUPS),
            "input_activations dynamic None. Expected local",
        ),
        (
            config("nvfp4-pack-quantized", FP4 | E4M3_GROUPS, FP8 | TOKEN),
            "input_activations num_bits 8. Expected 4",
        ),
        (
            config(
                "mxfp4-pack-quantized",
                FP4 | E8M0_GROUPS,
                FP8 | {"strategy": "group", "group_size": 128, "dynamic": True},
            ),
            "input_activations group_size 128. Expected 32",
        ),
        (
            config("mxfp4-pack-quantized", FP4 | E4M3_GROUPS),
            "format mxfp4-pack-quantized. Expected nvfp4-pack-quantized for NVFP4",
        ),
        (NVFP4_CONFIG | {"format": "pack-quantized"}, "format pack-quantized"),
        (NVFP4_CONFIG | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (
            NVFP4_CONFIG
            | {
                "transform_config": {
                    "config_groups": {"R4": {"apply": [{"location": "input"}]}},
                }
            },
            "transform_config with the location input.*computed at run time",
        ),
    ],
)
def test_compressed_tensors_formats_of_float_groups_that_are_not_known_are_refused(
    d: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_quantization(d)
    assert caught.value.exit_code == 3


def test_compressed_tensors_with_merged_transforms_is_read() -> None:
    merged = {"R1": {"apply": [{"location": "weight_input"}, {"location": "weight_output"}]}}
    d = NVFP4_CONFIG | {"transform_config": {"config_groups": merged}, "sparsity_config": {}}
    assert parse_quantization(d).scheme == NVFP4


def random_weight() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(6, 96, generator=draw) * torch.exp(torch.randn(6, 1, generator=draw))


@pytest.mark.parametrize("scheme", [NVFP4, NVFP4A16, MXFP4, MXFP8], ids=lambda s: s.label)
@pytest.mark.parametrize("form", ["compressed-tensors", "modelopt"])
def test_float_groups_are_unpacked_value_by_value_and_packed_again(
    form: str, scheme: Scheme
) -> None:
    plain = pack_plain(random_weight(), scheme, form)
    weight = FORMATS[form].unpack(scheme, plain.stored)
    assert torch.equal(weight.dequantize(), plain.dense)
    assert plain.dense.unique().numel() > 20
    assert (weight.global_scale is not None) is (scheme.scale_format == "e4m3")
    assert (weight.input_scale is not None) is scheme.has_input_scale
    if weight.input_scale is not None:
        assert weight.input_scale.tolist() == [INPUT_SCALE]
        read = read_input_scale(form, scheme, plain.stored.__getitem__)
        assert read.tolist() == [INPUT_SCALE]
    again = FORMATS[form].pack(scheme, weight)
    assert again.keys() == plain.stored.keys()
    for suffix, tensor in again.items():
        expected = plain.stored[suffix]
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), suffix
        assert as_bytes(tensor) == as_bytes(expected), suffix
    for packed in FORMATS[form].tensors(scheme, 6, 96):
        assert packed.accepts(tuple(plain.stored[packed.suffix].shape))


@pytest.mark.parametrize("scheme", [NVFP4, MXFP4, MXFP8], ids=lambda s: s.label)
@pytest.mark.parametrize("form", ["compressed-tensors", "modelopt"])
def test_float_groups_slice_like_the_dense_weight(form: str, scheme: Scheme) -> None:
    """Rows, and columns at the borders of groups, as `PackedTensor` says they lie."""
    plain = pack_plain(random_weight(), scheme, form)
    rows, columns = slice(2, 5), slice(32, 96)
    stored = {}
    for packed in FORMATS[form].tensors(scheme, 6, 96):
        tensor = plain.stored[packed.suffix]
        for axis, part in ((packed.out, rows), (packed.in_, columns)):
            if axis is not None:
                dim, size = axis
                assert part.start % size == part.stop % size == 0
                tensor = tensor.narrow(dim, part.start // size, (part.stop - part.start) // size)
        stored[packed.suffix] = tensor
    dense = plain.dense[rows, columns]
    assert torch.equal(FORMATS[form].unpack(scheme, stored).dequantize(), dense)
    assert torch.equal(unpack_plain(stored, scheme), dense)


@pytest.mark.parametrize("case", peer_cases())
def test_float_groups_of_other_packers_are_read_and_written_bit_for_bit(case: str) -> None:
    """The file is written by tests/peers/fp4_pack.py with the code of those projects."""
    peer = read_peer_case(case)
    form = FORMATS[peer.details["format"]]
    weight = form.unpack(peer.scheme, peer.stored)
    dense = peer.dense
    found = weight.dequantize()
    if case == "compressed-tensors NVFP4A16":  # its decompressor computes in bfloat16
        found, dense = found.bfloat16(), dense.bfloat16()
    assert torch.equal(found, dense)
    again = form.pack(peer.scheme, weight)
    assert again.keys() == peer.stored.keys()
    for suffix, tensor in again.items():
        assert as_bytes(tensor) == as_bytes(peer.stored[suffix]), suffix


def test_e8m0_scales_are_powers_of_two() -> None:
    encoded = torch.arange(255, dtype=torch.uint8)
    scales = decode_e8m0(encoded)
    assert scales[[0, 127, 254]].tolist() == [2.0**-127, 1.0, 2.0**127]
    assert torch.equal(encode_e8m0(scales), encoded)
    assert torch.equal(decode_e8m0(encoded.view(torch.float8_e8m0fnu)), scales)
    for wrong in (0.0, 3.0, -1.0, float("nan"), float("inf"), 2.0**-128):
        with pytest.raises(InputError, match="Powers of two from 2\\^-127 to 2\\^127"):
            encode_e8m0(torch.tensor([1.0, wrong]))


def test_nvfp4_scales_that_are_no_products_are_not_packed() -> None:
    plain = pack_plain(random_weight(), NVFP4, "compressed-tensors")
    weight = FORM.unpack(NVFP4, plain.stored)
    for factor in (1.01, 1e6, float("nan")):
        with pytest.raises(InputError, match="e4m3 times the weight's global scale"):
            FORM.pack(NVFP4, replace(weight, scales=weight.scales * factor))
    # The product of its two stored factors may be rounded.
    almost = replace(weight, scales=weight.scales * (1 + 2**-23))
    stored = FORM.pack(NVFP4, almost)["weight_scale"]
    assert as_bytes(stored) == as_bytes(plain.stored["weight_scale"])


def test_nvfp4_global_scale_comes_back_as_it_was_read() -> None:
    """1 / (1 / x) is not always x, but after the first time it does not change."""
    plain = pack_plain(random_weight(), NVFP4, "compressed-tensors")
    draw = torch.Generator().manual_seed(0)
    for inverse in (torch.rand(50, generator=draw) * 1000).unbind():
        stored = plain.stored | {"weight_global_scale": inverse.reshape(1)}
        first = FORM.unpack(NVFP4, stored)
        second = FORM.unpack(NVFP4, FORM.pack(NVFP4, first))
        assert torch.equal(first.scales, second.scales)


def test_nvfp4_global_scale_without_a_rounded_inverse_has_none_among_the_neighbours() -> None:
    """Where 1 / x read back is not x, no other float32 number is read as x."""
    draw = torch.Generator().manual_seed(0)
    scales = torch.exp(6 * torch.rand(10_000, generator=draw) - 9)  # from 1e-4 to 0.05
    stored = 1.0 / scales
    is_exact = 1.0 / stored == scales
    neighbours = [(stored.view(torch.int32) + step).view(torch.float32) for step in range(-4, 5)]
    assert torch.equal(torch.stack([1.0 / n == scales for n in neighbours]).any(0), is_exact)
    assert 8000 < int(is_exact.sum()) < 9000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen 3 in NVFP4, MXFP4 and MXFP8, each beside the same values."""
    folder = tmp_path_factory.mktemp("qwen3")
    for name, scheme, d in (
        ("nvfp4", NVFP4, NVFP4_CONFIG),
        ("mxfp4", MXFP4, MXFP4_CONFIG),
        ("mxfp8", MXFP8, MXFP8_CONFIG),
    ):
        sizes = {"num_hidden_layers": 2, "intermediate_size": 64}
        family_oracle("qwen3", folder / f"{name}-dense", **sizes)
        write_fp4(folder / f"{name}-dense", folder / name, scheme, d)
    return folder


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
def test_float_groups_of_a_checkpoint_have_the_values_of_the_dense_one(
    folder: Path, name: str
) -> None:
    checkpoint = open_checkpoint(folder / name)
    dense = open_checkpoint(folder / f"{name}-dense")
    spec = checkpoint_spec(checkpoint)
    check_checkpoint(checkpoint, spec)
    view = dequantized_checkpoint(checkpoint, spec)
    check_checkpoint(view, spec)
    for row in parameters(spec):
        expected = read_parameter(dense, row, torch.float32)
        assert torch.equal(read_parameter(checkpoint, row, torch.float32), expected), row.name
    for tensor in dense.tensors:
        assert torch.equal(view.read(tensor).float(), dense.read(tensor).float()), tensor
    (entry,) = inspect_checkpoint(checkpoint)["quantization"]["schemes"]
    labels = {"nvfp4": "NVFP4", "mxfp4": "MXFP4", "mxfp8": "MXFP8"}
    assert entry["label"] == f"{labels[name]}, inputs too"


def broken(source: Path, folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """A copy of the checkpoint with some tensors changed, or removed (None)."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors") | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_e8m0_scales_may_be_stored_with_their_own_dtype(folder: Path, tmp_path: Path) -> None:
    scales: dict[str, torch.Tensor | None] = {
        name: tensor.view(torch.float8_e8m0fnu)
        for name, tensor in load_file(folder / "mxfp4" / "model.safetensors").items()
        if name.endswith("weight_scale")
    }
    checkpoint = open_checkpoint(broken(folder / "mxfp4", tmp_path / "e8m0", scales))
    assert checkpoint.tensors[f"{Q_PROJ}.weight_scale"].dtype == "F8_E8M0"
    spec = checkpoint_spec(checkpoint)
    check_checkpoint(checkpoint, spec)
    original = open_checkpoint(folder / "mxfp4")
    for row in parameters(spec):
        expected = read_parameter(original, row, torch.float32)
        assert torch.equal(read_parameter(checkpoint, row, torch.float32), expected)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("nvfp4", {"weight_scale": None}, r"lacks 1 tensor \(.*q_proj.weight_scale\)"),
        ("nvfp4", {"input_global_scale": None}, r"lacks 1 tensor \(.*input_global_scale\)"),
        (
            "nvfp4",
            {"weight_packed": torch.zeros(64, 32, dtype=torch.uint8)},
            r"weight_packed has shape \[64, 32\]. Shape \[64, 16\] was expected",
        ),
        ("nvfp4", {"weight_scale": torch.ones(64, 2)}, "has dtype F32. Dtype F8_E4M3 was expected"),
        (
            "mxfp4",
            {"weight_scale": torch.ones(64, 2, dtype=torch.uint8)},
            r"weight_scale has shape \[64, 2\]. Shape \[64, 1\] was expected",
        ),
    ],
)
def test_float_groups_with_wrong_tensors_are_refused(
    folder: Path, tmp_path: Path, name: str, change: dict[str, torch.Tensor | None], message: str
) -> None:
    named = {f"{Q_PROJ}.{suffix}": tensor for suffix, tensor in change.items()}
    checkpoint = open_checkpoint(broken(folder / name, tmp_path / "broken", named))
    with pytest.raises(InputError, match=message) as caught:
        check_checkpoint(checkpoint, checkpoint_spec(checkpoint))
    assert caught.value.exit_code == 3


def e4m3_scales(code: int) -> torch.Tensor:
    scales = torch.full((64, 2), 0x38, dtype=torch.uint8)
    scales[5, 1] = code
    return scales.view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("name", "suffix", "value", "message"),
    [
        (
            "nvfp4",
            "weight_scale",
            e4m3_scales(0x7F),
            "1 of 128 values of weight_scale .*as nan",
        ),
        ("nvfp4", "weight_scale", e4m3_scales(0xB8), "values of weight_scale .* such as -1.0"),
        ("nvfp4", "weight_global_scale", torch.zeros(1), "weight_global_scale .*above 0 were"),
        ("nvfp4", "weight_global_scale", torch.tensor([float("nan")]), "weight_global_scale .*nan"),
        ("nvfp4", "input_global_scale", torch.zeros(1), "input_global_scale are no scales"),
        (
            "mxfp4",
            "weight_scale",
            torch.full((64, 1), 255, dtype=torch.uint8),
            "64 of 64 values of weight_scale are 255, not a number",
        ),
        (
            "mxfp8",
            "weight_scale",
            torch.full((64, 1), 255, dtype=torch.uint8),
            "64 of 64 values of weight_scale are 255, not a number",
        ),
    ],
)
def test_float_groups_with_impossible_scales_are_refused(
    folder: Path, tmp_path: Path, name: str, suffix: str, value: torch.Tensor, message: str
) -> None:
    path = broken(folder / name, tmp_path / "broken", {f"{Q_PROJ}.{suffix}": value})
    with pytest.raises(InputError, match=message) as caught:
        load_model(open_checkpoint(path), torch.float32)
    assert caught.value.exit_code == 3
    assert f"{Q_PROJ}.weight: " in str(caught.value)


def test_float_groups_that_do_not_divide_are_refused() -> None:
    for scheme, message in (
        (NVFP4, r"NVFP4 cannot store a \[8, 24\] weight.*multiple of 16"),
        (MXFP8, r"MXFP8 cannot store a \[8, 24\] weight.*multiple of 32"),
    ):
        for form in ("compressed-tensors", "modelopt"):
            with pytest.raises(InputError, match=message):
                FORMATS[form].tensors(scheme, 8, 24)


def test_int8_with_one_scale_is_packed_as_it_is_unpacked() -> None:
    scheme = Scheme(8, inputs="tensor", block_rows=-1)
    draw = torch.Generator().manual_seed(0)
    stored = {
        "weight": torch.randint(-128, 128, (6, 40), generator=draw, dtype=torch.int8),
        "weight_scale": torch.tensor([0.25]),
        "input_scale": torch.tensor([0.5]),
    }
    weight = FORM.unpack(scheme, stored)
    assert isinstance(weight, QuantizedWeight)
    assert torch.equal(weight.dequantize(), stored["weight"].float() * 0.25)
    for suffix, tensor in FORM.pack(scheme, weight).items():
        assert torch.equal(tensor, stored[suffix]), suffix


def test_int8_in_groups_is_packed_as_it_is_unpacked() -> None:
    scheme = Scheme(8, 20, inputs="token")
    draw = torch.Generator().manual_seed(0)
    stored = {
        "weight": torch.randint(-8, 8, (6, 40), generator=draw, dtype=torch.int8),
        "weight_scale": torch.rand(6, 2, generator=draw),
    }
    weight = FORM.unpack(scheme, stored)
    expected = stored["weight"].float() * stored["weight_scale"].repeat_interleave(20, 1)
    assert torch.equal(weight.dequantize(), expected)
    for suffix, tensor in FORM.pack(scheme, weight).items():
        assert torch.equal(tensor, stored[suffix]), suffix
