"""Quantized formats on disk: bit layouts against a plain loop over the words, and configs there and back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.formats import FORMATS, format_of, is_ignored, parse_quantization
from llmkit.checkpoint.packing import pack, unpack
from llmkit.checkpoint.quantized import Format, QuantizationConfig, QuantizedWeight
from llmkit.checkpoint.safetensors_header import DTYPES

Words = npt.NDArray[np.int64]


def config(form: Format, bits: int = 4, size: int = 32, symmetric: bool = True) -> QuantizationConfig:
    return QuantizationConfig(form, bits, size, symmetric)


def random_weight(bits: int, size: int, out: int = 16, in_: int = 96) -> QuantizedWeight:
    source = torch.Generator().manual_seed(bits * 1000 + size)
    groups = 1 if size == -1 else -(-in_ // size)
    return QuantizedWeight(
        torch.randint(0, 1 << bits, (out, in_), generator=source, dtype=torch.uint8),
        (torch.rand(out, groups, generator=source) + 0.5).to(torch.bfloat16),
        torch.full((out, groups), 1 << (bits - 1), dtype=torch.uint8),
        bits,
        size,
    )


def field(word: int, index: int, bits: int) -> int:
    return (word & 0xFFFFFFFF) >> (bits * index) & ((1 << bits) - 1)


def gptq_by_definition(tensors: dict[str, torch.Tensor], bits: int) -> npt.NDArray[np.float64]:
    """W[o, i] = s * (q - z), one element at a time, z stored minus one."""
    per_word = 32 // bits
    qweight, qzeros = tensors["qweight"].numpy(), tensors["qzeros"].numpy()
    scales, g_idx = tensors["scales"].double().numpy(), tensors["g_idx"].numpy()
    out, in_ = qweight.shape[1], qweight.shape[0] * per_word
    dense = np.zeros((out, in_))
    for o in range(out):
        for i in range(in_):
            group = g_idx[i]
            code = field(int(qweight[i // per_word, o]), i % per_word, bits)
            zero = field(int(qzeros[group, o // per_word]), o % per_word, bits) + 1
            dense[o, i] = scales[group, o] * (code - zero)
    return dense


def compressed_by_definition(tensors: dict[str, torch.Tensor], bits: int, size: int) -> npt.NDArray[np.float64]:
    """W[o, i] = s * q, stored as q + 2^(bits - 1)."""
    per_word = 32 // bits
    packed, scales = tensors["weight_packed"].numpy(), tensors["weight_scale"].double().numpy()
    out, in_ = tensors["weight_shape"].tolist()
    dense = np.zeros((out, in_))
    for o in range(out):
        for i in range(in_):
            q = field(int(packed[o, i // per_word]), i % per_word, bits) - (1 << (bits - 1))
            dense[o, i] = scales[o, 0 if size == -1 else i // size] * q
    return dense


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 33, 64])
def test_packing_against_a_loop(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    words = pack(codes, bits)
    per_word = 32 // bits
    assert words.dtype == torch.int32
    assert words.shape == (3, -(-count // per_word))
    for row in range(3):
        for index in range(count):
            assert field(int(words[row, index // per_word]), index % per_word, bits) == codes[row, index]
    assert torch.equal(unpack(words, bits, count), codes)
    assert torch.equal(unpack(words.t().contiguous().t(), bits, count), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, 96, -1, 40])
def test_gptq(bits: int, size: int) -> None:
    settings, weight = config("gptq", bits, size), random_weight(bits, size)
    form = format_of(settings)
    stored = form.pack(settings, weight)
    for part in form.tensors(settings, *weight.shape):
        assert stored[part.suffix].shape == part.shape
        assert stored[part.suffix].dtype == DTYPES[part.dtype]
        assert stored[part.suffix].is_contiguous()
    np.testing.assert_array_equal(gptq_by_definition(stored, bits), weight.dequantize(torch.float64).numpy())
    again = form.unpack(settings, stored)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.zeros, weight.zeros)
    assert torch.equal(again.dequantize(), weight.dequantize())
    del stored["g_idx"]
    assert torch.equal(form.unpack(settings, stored).codes, weight.codes)


def test_gptq_stores_symmetric_zero_points_as_sevens() -> None:
    stored = FORMATS["gptq"].pack(config("gptq"), random_weight(4, 32))
    assert torch.equal(stored["qzeros"], torch.full((3, 2), 0x77777777, dtype=torch.int32))


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_reads_asymmetric_zero_points(bits: int) -> None:
    settings, weight = config("gptq", bits, symmetric=False), random_weight(bits, 32)
    stored = FORMATS["gptq"].pack(settings, weight)
    weight.zeros = torch.randint(1, 1 << bits, weight.zeros.shape, generator=torch.Generator().manual_seed(0)).byte()
    stored["qzeros"] = pack((weight.zeros - 1).t(), bits)
    np.testing.assert_array_equal(gptq_by_definition(stored, bits), weight.dequantize(torch.float64).numpy())
    assert torch.equal(FORMATS["gptq"].unpack(settings, stored).zeros, weight.zeros)


@pytest.mark.parametrize("form", list(FORMATS))
def test_asymmetric_codes_are_not_written(form: Format) -> None:
    weight = random_weight(4, 32)
    weight.zeros[3, 1] = 0
    with pytest.raises(InputError, match="Asymmetric codes cannot be stored"):
        FORMATS[form].pack(config(form), weight)


def test_gptq_refuses_what_float16_cannot_hold() -> None:
    weight = random_weight(4, 32)
    weight.scales[0, 0] = 1e6
    with pytest.raises(InputError, match="too large for GPTQ's float16"):
        FORMATS["gptq"].pack(config("gptq"), weight)


def test_gptq_refuses_activation_order_and_wrong_shapes() -> None:
    settings, weight = config("gptq"), random_weight(4, 32)
    stored = FORMATS["gptq"].pack(settings, weight)
    with pytest.raises(InputError, match="activation order"):
        FORMATS["gptq"].unpack(settings, stored | {"g_idx": stored["g_idx"].flip(0)})
    with pytest.raises(InputError, match=r"scales has shape \[2, 16\]. \[3, 16\] was expected"):
        FORMATS["gptq"].unpack(settings, stored | {"scales": stored["scales"][:2]})


@pytest.mark.parametrize(("out", "in_", "name"), [(16, 12, "input"), (12, 16, "output")])
def test_gptq_sizes_that_cannot_be_packed(out: int, in_: int, name: str) -> None:
    with pytest.raises(InputError, match=rf"\[{out}, {in_}\] weight. A multiple of 8 {name} features"):
        FORMATS["gptq"].tensors(config("gptq"), out, in_)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("size", "in_"), [(32, 96), (-1, 96), (-1, 93), (3, 93)])
def test_compressed_tensors(bits: int, size: int, in_: int) -> None:
    settings, weight = config("compressed-tensors", bits, size), random_weight(bits, size, in_=in_)
    form = format_of(settings)
    stored = form.pack(settings, weight)
    for part in form.tensors(settings, *weight.shape):
        assert stored[part.suffix].shape == part.shape
        assert stored[part.suffix].dtype == DTYPES[part.dtype]
        assert stored[part.suffix].is_contiguous()
    dense = weight.dequantize(torch.float64).numpy()
    np.testing.assert_array_equal(compressed_by_definition(stored, bits, size), dense)
    again = form.unpack(settings, stored)
    assert torch.equal(again.codes, weight.codes)
    np.testing.assert_array_equal(again.dequantize(torch.float64).numpy(), dense)


def test_compressed_tensors_with_wrong_shapes() -> None:
    settings = config("compressed-tensors")
    stored = FORMATS["compressed-tensors"].pack(settings, random_weight(4, 32))
    with pytest.raises(InputError, match=r"weight_packed has shape \[16, 11\]. \[16, 12\] was expected"):
        FORMATS["compressed-tensors"].unpack(settings, stored | {"weight_packed": stored["weight_packed"][:, 1:]})
    with pytest.raises(InputError, match=r"weight_shape is \[0, 96\]"):
        FORMATS["compressed-tensors"].unpack(settings, stored | {"weight_shape": torch.tensor([0, 96])})


@pytest.mark.parametrize("form", list(FORMATS))
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, 96, -1])
def test_packed_tensors_split_where_they_say(form: Format, bits: int, size: int) -> None:
    """Slicing the stored tensors by `out` and `in_` gives what packing the slice of the weight gives."""
    settings, weight = config(form, bits, size), random_weight(bits, size, out=32, in_=192)
    stored = FORMATS[form].pack(settings, weight)
    for dimension, (start, stop) in ((0, (8, 24)), (1, (96, 192))):
        sliced = QuantizedWeight(weight.codes, weight.scales, weight.zeros, bits, size)
        sliced.codes = weight.codes.narrow(dimension, start, stop - start)
        if dimension == 0 or size != -1:
            per = 1 if dimension == 0 else size
            sliced.scales = weight.scales.narrow(dimension, start // per, (stop - start) // per)
            sliced.zeros = weight.zeros.narrow(dimension, start // per, (stop - start) // per)
        expected = FORMATS[form].pack(settings, sliced)
        for part in FORMATS[form].tensors(settings, 32, 192):
            if part.derived:
                continue
            tensor, along = stored[part.suffix], (part.out, part.in_)[dimension]
            if along is not None:
                assert start % along[1] == stop % along[1] == 0
                tensor = tensor.narrow(along[0], start // along[1], (stop - start) // along[1])
            assert torch.equal(tensor, expected[part.suffix]), part.suffix


@pytest.mark.parametrize("form", list(FORMATS))
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [128, -1])
def test_configs_there_and_back(form: Format, bits: int, size: int) -> None:
    settings = QuantizationConfig(form, bits, size, True, ("lm_head",), "rtn" if form == "gptq" else "")
    written = json.loads(json.dumps(format_of(settings).config_dict(settings)))
    assert written["quant_method"] == form
    assert parse_quantization(written) == settings


def test_gptq_writes_the_file_old_readers_want() -> None:
    settings = config("gptq", 4, 128)
    (file,) = FORMATS["gptq"].extra_files(settings).items()
    assert file[0] == "quantize_config.json"
    written = json.loads(file[1])
    assert written == FORMATS["gptq"].config_dict(settings)
    for name in (
        "bits", "group_size", "damp_percent", "desc_act", "static_groups", "sym", "true_sequential", "quant_method",
        "checkpoint_format",
    ):  # fmt: skip
        assert name in written
    assert FORMATS["compressed-tensors"].extra_files(config("compressed-tensors")) == {}


def gptq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False} | changes


def compressed(
    weights: dict[str, Any] | None = None, group: dict[str, Any] | None = None, **top: Any
) -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme | (weights or {})} | (group or {})}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups} | top


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "quantized with a method it does not name"),
        ([], "quantized with a method it does not name"),
        ({"quant_method": "awq"}, "quantized with awq. One of gptq, compressed-tensors was expected"),
        (gptq(bits=3), "has 3 bits"),
        (gptq(group_size=0), "group size 0"),
        (gptq(desc_act=True), "desc_act"),
        (gptq(checkpoint_format="gptq_v2"), "checkpoint_format gptq_v2"),
        (gptq(dynamic={"-:.*": {}}), "options per module"),
        (compressed(format="float-quantized"), "format float-quantized"),
        (compressed(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (compressed(config_groups={}), "config_groups {}"),
        (compressed({"symmetric": False}), "symmetric False"),
        (compressed({"num_bits": 3}), "num_bits 3"),
        (compressed({"type": "float"}), "type float"),
        (compressed({"actorder": "group"}), "actorder group"),
        (compressed({"group_size": None}), "group_size None"),
        (compressed({"strategy": "block"}), "strategy block"),
        (compressed(group={"targets": ["re:.*q_proj"]}), "config_groups"),
        (compressed(group={"weights": None}), "config_groups"),
        (compressed(group={"input_activations": {"num_bits": 8}}), "input_activations"),
    ],
)
def test_configs_that_cannot_be_read(settings: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_quantization(settings)


def test_single_group_in_activation_order_is_read() -> None:
    assert parse_quantization(gptq(desc_act=True, group_size=-1)).group_size == -1


def test_ignored_modules() -> None:
    settings = QuantizationConfig("compressed-tensors", 4, 128, True, ("lm_head", r"re:.*\.gate$"))
    assert is_ignored(settings, "lm_head")
    assert is_ignored(settings, "model.layers.0.mlp.gate")
    assert not is_ignored(settings, "model.layers.0.mlp.gate_proj")
    assert not is_ignored(settings, "model.lm_head")
