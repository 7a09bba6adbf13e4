"""Quantized formats on disk: bit layouts against a plain loop over the words, and configs there and
back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llmkit.checkpoint.dtypes import DTYPES
from llmkit.checkpoint.packing import pack, unpack
from llmkit.checkpoint.quantized_formats import FORMATS, format_of, parse_quantization
from llmkit.checkpoint.quantized_weight import Format, QuantizationConfig, QuantizedWeight, Scheme
from llmkit.common.errors import InputError
from llmkit.kernels.activation_quant import FP8

Words = npt.NDArray[np.int64]
INT8 = Scheme(8, inputs="token")
FLOAT8 = Scheme(8, kind="float", inputs="token")
FIXED8 = Scheme(8, kind="float", inputs="tensor")
# Every way of storing a weight, [format, scheme].
STORED: list[tuple[Format, Scheme]] = [
    *(("gptq", Scheme(bits, size)) for bits in (2, 3, 4, 8) for size in (32, 96, -1)),
    *(("gptq_v2", Scheme(bits, 32, symmetric=False)) for bits in (2, 3, 4, 8)),
    *(("awq", Scheme(4, size, symmetric=False)) for size in (32, 96, -1)),
    *(
        ("compressed-tensors", Scheme(bits, size, symmetric))
        for bits in (2, 3, 4, 8)
        for size in (32, -1)
        for symmetric in (True, False)
    ),
    *(("compressed-tensors", scheme) for scheme in (INT8, FLOAT8, FIXED8)),
]
BY_LABEL = {"ids": lambda value: value.label if isinstance(value, Scheme) else value}


def random_weight(scheme: Scheme, out: int = 32, in_: int = 96) -> QuantizedWeight:
    source = torch.Generator().manual_seed(scheme.bits * 1000 + scheme.group_size)
    groups = scheme.groups(in_)
    q = torch.randint(0, 1 << scheme.bits, (out, in_), generator=source, dtype=torch.uint8)
    if scheme.kind == "float":
        q = (torch.randn(out, in_, generator=source) * 100).clamp(-448, 448).to(FP8)
    zeros = torch.full((out, groups), scheme.half, dtype=torch.uint8)
    if not scheme.symmetric:
        zeros = torch.randint(
            0, 1 << scheme.bits, (out, groups), generator=source, dtype=torch.uint8
        )
    scales = (torch.rand(out, groups, generator=source) + 0.5).to(torch.bfloat16)
    return QuantizedWeight(
        q, scales, zeros, scheme, torch.rand(1) if scheme.inputs == "tensor" else None
    )


def field(word: int, index: int, bits: int) -> int:
    return (word & 0xFFFFFFFF) >> (bits * index) & ((1 << bits) - 1)


def bits_at(words: npt.NDArray[Any], index: int, bits: int) -> int:
    """Value `index` of words without gaps, as one long number."""
    number = sum((int(word) & 0xFFFFFFFF) << (32 * at) for at, word in enumerate(words))
    return number >> (bits * index) & ((1 << bits) - 1)


def gptq_by_definition(
    tensors: dict[str, torch.Tensor], bits: int, offset: int = 1
) -> npt.NDArray[np.float64]:
    """W[o, i] = s * (q - z), one element at a time, z stored minus `offset`."""
    qweight = tensors["qweight"].numpy()
    qzeros = tensors["qzeros"].numpy()
    scales = tensors["scales"].double().numpy()
    g_idx = tensors["g_idx"].numpy()
    out = qweight.shape[1]
    in_ = qweight.shape[0] * 32 // bits
    dense = np.zeros((out, in_))
    for o in range(out):
        for i in range(in_):
            group = g_idx[i]
            code = bits_at(qweight[:, o], i, bits)
            zero = bits_at(qzeros[group], o, bits) + offset
            dense[o, i] = scales[group, o] * (code - zero)
    return dense


def awq_by_definition(tensors: dict[str, torch.Tensor], size: int) -> npt.NDArray[np.float64]:
    """W[o, i] = s * (q - z): eight outputs to a word, of which nibble n holds output 0, 2, 4, 6, 1,
    3, 5, 7.
    """
    qweight, qzeros, scales = (
        tensors[name].double().numpy() for name in ("qweight", "qzeros", "scales")
    )
    in_ = qweight.shape[0]
    out = qweight.shape[1] * 8
    dense = np.zeros((out, in_))
    for o in range(out):
        nibble = [0, 2, 4, 6, 1, 3, 5, 7].index(o % 8)
        for i in range(in_):
            group = 0 if size == -1 else i // size
            code, zero = (
                field(int(words[row, o // 8]), nibble, 4)
                for words, row in ((qweight, i), (qzeros, group))
            )
            dense[o, i] = scales[group, o] * (code - zero)
    return dense


def compressed_by_definition(
    tensors: dict[str, torch.Tensor], scheme: Scheme
) -> npt.NDArray[np.float64]:
    """W[o, i] = s * (q - z), both stored with 2^(bits - 1) added, zero points packed along the
    outputs.
    """
    half = 1 << (scheme.bits - 1)
    packed = tensors["weight_packed"].numpy()
    scales = tensors["weight_scale"].double().numpy()
    out, in_ = tensors["weight_shape"].tolist()
    dense = np.zeros((out, in_))
    for o in range(out):
        for i in range(in_):
            group = 0 if scheme.group_size == -1 else i // scheme.group_size
            q = bits_at(packed[o], i, scheme.bits) - half
            z = 0
            if not scheme.symmetric:
                words = tensors["weight_zero_point"].numpy()
                z = bits_at(words[:, group], o, scheme.bits) - half
            dense[o, i] = scales[o, group] * (q - z)
    return dense


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_reads_a_zero_point_of_0_which_is_stored_as_all_bits(bits: int) -> None:
    """Asymmetric files of other programs hold it: 0 - 1 wraps, and so must the sum with one."""
    scheme = Scheme(bits, 32, symmetric=False)
    stored = FORMATS["gptq"].pack(Scheme(bits, 32), random_weight(Scheme(bits, 32)))
    stored["qzeros"] = torch.full_like(stored["qzeros"], -1)
    weight = FORMATS["gptq"].unpack(scheme, stored)
    assert weight.zeros.tolist() == [[0] * 3] * 32
    scales = stored["scales"].t().repeat_interleave(32, dim=1).float()
    q = unpack(stored["qweight"].t(), bits, 96)
    assert torch.equal(weight.dequantize().float(), q.float() * scales)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 11, 33, 64, 96])
def test_pack_leaves_no_gaps(bits: int, count: int) -> None:
    q = torch.randint(
        0, 1 << bits, (3, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
    )
    words = pack(q, bits)
    assert words.dtype == torch.int32
    assert words.shape == (3, -(-count * bits // 32))
    for row in range(3):
        found = [bits_at(words[row].numpy(), index, bits) for index in range(count)]
        assert found == q[row].tolist()
        whole = sum(int(word) % 2**32 << 32 * place for place, word in enumerate(words[row]))
        assert whole >> count * bits == 0  # zeros after the last value
    assert torch.equal(unpack(words, bits, count), q)
    assert torch.equal(unpack(words.t().contiguous().t(), bits, count), q)


@pytest.mark.parametrize(("form", "scheme"), STORED, **BY_LABEL)
def test_formats_unpack_what_they_pack(form: Format, scheme: Scheme) -> None:
    weight = random_weight(scheme)
    stored = FORMATS[form].pack(scheme, weight)
    planned = FORMATS[form].tensors(scheme, *weight.shape)
    assert [part.suffix for part in planned] == list(stored)
    for part in planned:
        assert stored[part.suffix].shape == part.shape
        assert stored[part.suffix].dtype == DTYPES[part.dtype]
        assert stored[part.suffix].is_contiguous()
    again = FORMATS[form].unpack(scheme, stored)
    assert torch.equal(again.q.float(), weight.q.float())
    assert torch.equal(again.zeros, weight.zeros)
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert (again.input_scale is None) == (weight.input_scale is None)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [32, 96, -1, 40])
def test_gptq_agrees_with_a_loop_over_words(bits: int, size: int) -> None:
    scheme = Scheme(bits, size)
    weight = random_weight(scheme)
    form = FORMATS["gptq"]
    stored = form.pack(scheme, weight)
    np.testing.assert_array_equal(
        gptq_by_definition(stored, bits), weight.dequantize(torch.float64).numpy()
    )
    del stored["g_idx"]
    assert torch.equal(form.unpack(scheme, stored).q, weight.q)


def test_gptq_stores_symmetric_zero_points_as_sevens() -> None:
    stored = FORMATS["gptq"].pack(Scheme(4, 32), random_weight(Scheme(4, 32)))
    assert torch.equal(stored["qzeros"], torch.full((3, 4), 0x77777777, dtype=torch.int32))


@pytest.mark.parametrize(("form", "offset"), [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_stores_asymmetric_zero_points(form: Format, offset: int, bits: int) -> None:
    """v1 minus one, v2 as they are."""
    weight = random_weight(Scheme(bits, 32, symmetric=False))
    weight.zeros.clamp_(min=offset)
    stored = FORMATS[form].pack(weight.scheme, weight)
    np.testing.assert_array_equal(
        gptq_by_definition(stored, bits, offset), weight.dequantize(torch.float64).numpy()
    )
    assert torch.equal(FORMATS[form].unpack(weight.scheme, stored).zeros, weight.zeros)


def test_gptq_v1_refuses_a_zero_point_of_0() -> None:
    weight = random_weight(Scheme(4, 32, symmetric=False))
    weight.zeros[3, 1] = 0
    with pytest.raises(InputError, match=r"zero point of 0 .* GPTQ v1. .* Choose gptq_v2"):
        FORMATS["gptq"].pack(weight.scheme, weight)


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_formats_refuse_asymmetric_weights_of_symmetric_schemes(form: Format) -> None:
    weight = random_weight(Scheme(4, 32))
    weight.zeros[3, 1] = 0
    with pytest.raises(InputError, match="Asymmetric values cannot be stored"):
        FORMATS[form].pack(weight.scheme, weight)


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_formats_refuse_scales_beyond_float16(form: Format) -> None:
    weight = random_weight(Scheme(4, 32))
    weight.scales[0, 0] = 1e6
    with pytest.raises(InputError, match=f"too large for {form.upper()}'s float16"):
        FORMATS[form].pack(weight.scheme, weight)


def test_gptq_refuses_act_order_and_wrong_shapes() -> None:
    scheme = Scheme(4, 32)
    stored = FORMATS["gptq"].pack(scheme, random_weight(scheme))
    with pytest.raises(InputError, match="activation order"):
        FORMATS["gptq"].unpack(scheme, stored | {"g_idx": stored["g_idx"].flip(0)})
    with pytest.raises(InputError, match=r"scales has shape \[2, 32\]. \[3, 32\] was expected"):
        FORMATS["gptq"].unpack(scheme, stored | {"scales": stored["scales"][:2]})


@pytest.mark.parametrize(("out", "in_", "name"), [(16, 12, "input"), (12, 16, "output")])
def test_gptq_refuses_sizes_that_cannot_be_packed(out: int, in_: int, name: str) -> None:
    with pytest.raises(
        InputError, match=rf"\[{out}, {in_}\] weight. A multiple of 8 {name} features"
    ):
        FORMATS["gptq"].tensors(Scheme(4, 32), out, in_)


@pytest.mark.parametrize("size", [32, -1, 40])
def test_awq_agrees_with_a_loop_over_words(size: int) -> None:
    weight = random_weight(Scheme(4, size, symmetric=False))
    stored = FORMATS["awq"].pack(weight.scheme, weight)
    np.testing.assert_array_equal(
        awq_by_definition(stored, size), weight.dequantize(torch.float64).numpy()
    )


def test_awq_refuses_wrong_sizes_and_shapes() -> None:
    scheme = Scheme(4, 32, symmetric=False)
    with pytest.raises(InputError, match=r"\[12, 16\] weight. A multiple of 8 output features"):
        FORMATS["awq"].tensors(scheme, 12, 16)
    stored = FORMATS["awq"].pack(scheme, random_weight(scheme))
    with pytest.raises(InputError, match=r"qzeros has shape \[2, 4\]. \[3, 4\] was expected"):
        FORMATS["awq"].unpack(scheme, stored | {"qzeros": stored["qzeros"][:2]})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("size", "in_"), [(32, 96), (-1, 96), (-1, 93), (3, 93)])
def test_compressed_tensors_pack_quantized_agrees_with_a_loop_over_words(
    bits: int, symmetric: bool, size: int, in_: int
) -> None:
    weight = random_weight(Scheme(bits, size, symmetric), out=20, in_=in_)
    stored = FORMATS["compressed-tensors"].pack(weight.scheme, weight)
    dense = weight.dequantize(torch.float64).numpy()
    np.testing.assert_array_equal(compressed_by_definition(stored, weight.scheme), dense)
    again = FORMATS["compressed-tensors"].unpack(weight.scheme, stored)
    np.testing.assert_array_equal(again.dequantize(torch.float64).numpy(), dense)


def test_compressed_tensors_stores_w8a8_weights_unpacked() -> None:
    weight = random_weight(INT8)
    stored = FORMATS["compressed-tensors"].pack(INT8, weight)
    assert torch.equal(stored["weight"].int(), weight.q.int() - 128)
    torch.testing.assert_close(
        stored["weight"].float() * stored["weight_scale"], weight.dequantize()
    )
    weight = random_weight(FIXED8)
    stored = FORMATS["compressed-tensors"].pack(FIXED8, weight)
    torch.testing.assert_close(
        stored["weight"].float() * stored["weight_scale"], weight.dequantize()
    )
    assert weight.input_scale is not None
    assert torch.equal(stored["input_scale"], weight.input_scale)


def test_compressed_tensors_refuses_wrong_shapes() -> None:
    scheme = Scheme(4, 32)
    stored = FORMATS["compressed-tensors"].pack(scheme, random_weight(scheme))
    with pytest.raises(
        InputError, match=r"weight_packed has shape \[32, 11\]. \[32, 12\] was expected"
    ):
        FORMATS["compressed-tensors"].unpack(
            scheme, stored | {"weight_packed": stored["weight_packed"][:, 1:]}
        )
    with pytest.raises(InputError, match=r"weight_shape is \[0, 96\]"):
        FORMATS["compressed-tensors"].unpack(
            scheme, stored | {"weight_shape": torch.tensor([0, 96])}
        )


@pytest.mark.parametrize(("form", "scheme"), STORED, **BY_LABEL)
def test_packed_tensors_slice_like_the_dense_weight(form: Format, scheme: Scheme) -> None:
    """Slicing the stored tensors by `out` and `in_` gives what packing the slice of the weight
    gives.
    """
    weight = random_weight(scheme, out=320, in_=960)
    stored = FORMATS[form].pack(scheme, weight)
    for dimension, (start, stop) in ((0, (160, 320)), (1, (480, 960))):
        sliced = QuantizedWeight(weight.q, weight.scales, weight.zeros, scheme, weight.input_scale)
        sliced.q = weight.q.narrow(dimension, start, stop - start)
        if dimension == 0 or scheme.group_size != -1:
            per = 1 if dimension == 0 else scheme.group_size
            sliced.scales = weight.scales.narrow(dimension, start // per, (stop - start) // per)
            sliced.zeros = weight.zeros.narrow(dimension, start // per, (stop - start) // per)
        expected = FORMATS[form].pack(scheme, sliced)
        for part in FORMATS[form].tensors(scheme, 320, 960):
            if part.derived:
                continue
            tensor = stored[part.suffix]
            along = (part.out, part.in_)[dimension]
            if along is not None:
                assert start % along[1] == stop % along[1] == 0
                tensor = tensor.narrow(along[0], start // along[1], (stop - start) // along[1])
            assert torch.equal(tensor.float(), expected[part.suffix].float()), part.suffix


@pytest.mark.parametrize(("form", "scheme"), STORED, **BY_LABEL)
def test_config_dict_is_inverted_by_parse(form: Format, scheme: Scheme) -> None:
    method = {"gptq": "rtn", "gptq_v2": "gptq", "awq": "awq"}.get(form, "")
    kept = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
    for ignore in (("lm_head",), ("lm_head", *kept)):
        settings = QuantizationConfig(form, scheme, ignore, method=method)
        written = json.loads(json.dumps(format_of(settings).config_dict(settings)))
        assert written["quant_method"] == form.removesuffix("_v2")
        assert parse_quantization(written) == settings


@pytest.mark.parametrize("kv", ["", "fp8", "int8"])
def test_config_dict_of_mixed_schemes_is_inverted_by_parse(kv: Any) -> None:
    """One config group a scheme; what is named comes before what is of the type Linear."""
    names = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    overrides = tuple((name, Scheme(8, 128)) for name in names)
    settings = QuantizationConfig(
        "compressed-tensors", Scheme(4, 128), ("lm_head", "re:.*gate$"), overrides, kv=kv
    )
    written = json.loads(json.dumps(format_of(settings).config_dict(settings)))
    assert parse_quantization(written) == settings
    assert written["format"] == "pack-quantized"
    assert [group["targets"] for group in written["config_groups"].values()] == [
        ["Linear"],
        list(names),
    ]
    assert settings.scheme_of(names[0]) == Scheme(8, 128)
    assert settings.scheme_of("model.layers.2.mlp.down_proj") == Scheme(4, 128)
    assert settings.scheme_of("model.layers.2.mlp.gate") is None
    assert settings.scheme_of("lm_head") is None


def test_config_dict_of_a_kv_cache_alone_is_inverted_by_parse() -> None:
    settings = QuantizationConfig("compressed-tensors", None, kv="fp8")
    written = json.loads(json.dumps(format_of(settings).config_dict(settings)))
    assert parse_quantization(written) == settings
    assert settings.scheme_of("model.layers.0.mlp.down_proj") is None


def test_gptq_writes_quantize_config_json() -> None:
    settings = QuantizationConfig("gptq", Scheme(4, 128))
    (file,) = FORMATS["gptq"].extra_files(settings).items()
    assert file[0] == "quantize_config.json"
    written = json.loads(file[1])
    assert file[1].decode() == json.dumps(written, indent=2) + "\n"
    assert written == FORMATS["gptq"].config_dict(settings)
    for name in (
        "bits",
        "group_size",
        "damp_percent",
        "desc_act",
        "static_groups",
        "sym",
        "true_sequential",
        "quant_method",
        "checkpoint_format",
    ):
        assert name in written
    assert (
        FORMATS["compressed-tensors"].extra_files(settings)
        == FORMATS["awq"].extra_files(settings)
        == {}
    )


def gptq(**changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
    } | changes


def compressed(
    weights: dict[str, Any] | None = None, group: dict[str, Any] | None = None, **top: Any
) -> dict[str, Any]:
    scheme = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "dynamic": False,
    }
    groups = {
        "group_0": {"targets": ["Linear"], "weights": scheme | (weights or {})} | (group or {})
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
    } | top


def awq(**changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
    } | changes


FP8_KV = {"num_bits": 8, "type": "float", "strategy": "tensor"}
INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "quantized with a method it does not name"),
        ([], "quantized with a method it does not name"),
        (
            {"quant_method": "bitsandbytes"},
            "with bitsandbytes. One of gptq, awq, compressed-tensors, mxfp4, fp8, modelopt was",
        ),
        (awq(bits=8), "has 8 bits"),
        (awq(group_size=0), "group size 0"),
        (awq(version="gemv"), "version gemv"),
        (awq(zero_point=False), "no zero points"),
        (gptq(bits=5), "has 5 bits. 2, 3, 4 or 8 were expected"),
        (gptq(group_size=0), "group size 0"),
        (gptq(desc_act=True), "desc_act"),
        (gptq(checkpoint_format="marlin"), "checkpoint_format marlin. gptq .v1. or gptq_v2 was"),
        (gptq(bits=3, format="gptq_p"), "has format gptq_p. gptq .v1. or gptq_v2 was"),
        (gptq(pack_dtype="int64"), "pack_dtype int64. int32 was expected"),
        (gptq(dynamic={"+:.*": {"bits": 7}}), "has 7 bits"),
        (gptq(dynamic={"+:.*": {"group_size": 0}}), "the group size 0"),
        (gptq(dynamic={"+:.*": {"desc_act": True}}), "desc_act"),
        (gptq(dynamic={"+:.*": 8}), r"dynamic \+:\.\*: 8. Options such as bits"),
        (compressed(format="float-quantized"), "format float-quantized"),
        (compressed(kv_cache_scheme={"num_bits": 4}), "kv_cache_scheme num_bits 4"),
        (
            compressed(kv_cache_scheme=FP8_KV | {"strategy": "channel"}),
            "kv_cache_scheme strategy channel",
        ),
        (compressed(config_groups={}), "config_groups {}"),
        (compressed({"num_bits": 6}), "num_bits 6"),
        (compressed({"type": "float"}), "group_size 128. Expected 32"),
        (compressed({"actorder": "group"}), "actorder group"),
        (compressed({"group_size": None}), "group_size None"),
        (compressed({"strategy": "block"}), "strategy block"),
        (compressed(group={"targets": []}), "targets"),
        (compressed(group={"weights": None}), "config_groups"),
        (compressed(group={"output_activations": {"num_bits": 8}}), "output_activations set"),
        (compressed(group={"input_activations": {"num_bits": 4}}), "input_activations num_bits 4"),
        (
            compressed(group={"input_activations": INPUTS | {"strategy": "tensor"}}),
            "input_activations strategy tensor",
        ),
        (compressed({"num_bits": 8}, {"input_activations": INPUTS}), "format pack-quantized"),
    ],
)
def test_parse_refuses_unsupported_configs(settings: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_quantization(settings)


@pytest.mark.parametrize("field", ["checkpoint_format", "format"])
def test_gptq_parses_v2_under_both_names_of_the_field(field: str) -> None:
    assert parse_quantization(gptq(**{field: "gptq_v2"})).format == "gptq_v2"


def test_gptq_parses_act_order_with_a_single_group() -> None:
    assert parse_quantization(gptq(desc_act=True, group_size=-1)).scheme == Scheme(4)


def test_gptq_parses_options_per_module() -> None:
    """GPTQModel's mixed precision: the first pattern that matches a name's beginning counts."""
    found = parse_quantization(
        gptq(
            checkpoint_format="gptq_v2",
            dynamic={
                r"-:.*\.o_proj": {},
                r"+:.*\.1\..*down": {"bits": 8, "group_size": 32, "damp_percent": 0.1},
                r".*\.(gate|up)_proj": {"bits": 2, "sym": False},
                r"-:.*\.[1-3]\.mlp": {},
            },
        )
    )
    assert found.format == "gptq_v2"
    schemes = {
        name: found.scheme_of(f"model.layers.{name}")
        for name in (
            "0.mlp.down_proj",
            "1.mlp.down_proj",
            "2.mlp.down_proj",
            "2.mlp.up_proj",
            "1.self_attn.o_proj",
        )
    }
    assert schemes == {
        "0.mlp.down_proj": Scheme(4, 128),
        "1.mlp.down_proj": Scheme(8, 32),
        "2.mlp.down_proj": None,
        "2.mlp.up_proj": Scheme(2, 128, symmetric=False),
        "1.self_attn.o_proj": None,
    }


def test_gptq_config_dict_of_mixed_schemes_is_inverted_by_parse() -> None:
    settings = QuantizationConfig(
        "gptq",
        Scheme(4, 32),
        ("lm_head", "model.layers.0.mlp.up_proj"),
        (("model.layers.0.mlp.down_proj", Scheme(3, 64, symmetric=False)),),
        method="gptq",
    )
    assert parse_quantization(FORMATS["gptq"].config_dict(settings)) == settings


def test_parse_reads_configs_of_other_tools() -> None:
    """Keys of AutoAWQ, GPTQModel and llm-compressor that llmkit does not write."""
    found = parse_quantization(
        awq(version="GEMM", modules_to_not_convert=["visual", "model.layers.0.mlp.down_proj"])
    )
    assert found.scheme_of("model.visual.q_proj") is None
    assert found.scheme_of("model.layers.0.mlp.down_proj") is None
    assert found.scheme_of("model.layers.0.mlp.up_proj") == Scheme(4, 128, symmetric=False)
    assert found.scheme_of("lm_head") is None
    assert parse_quantization(awq(modules_to_not_convert=None)).ignore == ("lm_head",)
    dynamic = gptq(dynamic={r"-:.*\.1\..*down.*": {}})
    assert parse_quantization(dynamic).scheme_of("model.layers.1.mlp.down_proj") is None
    assert parse_quantization(dynamic).scheme_of("model.layers.2.mlp.down_proj") == Scheme(4, 128)
    weights = {
        "observer": "mse",
        "block_structure": None,
        "scale_dtype": None,
        "zp_dtype": "torch.int8",
    }
    settings = compressed(
        weights | {"symmetric": False, "actorder": "static"},
        {"format": "pack-quantized"},
        sparsity_config={},
    )
    assert parse_quantization(settings).scheme == Scheme(4, 128, symmetric=False)


def test_quantization_config_ignores_modules() -> None:
    settings = QuantizationConfig(
        "compressed-tensors", Scheme(4, 128), ("lm_head", r"re:.*\.gate$")
    )
    assert settings.scheme_of("lm_head") is None
    assert settings.scheme_of("model.layers.0.mlp.gate") is None
    assert settings.scheme_of("model.layers.0.mlp.gate_proj") == Scheme(4, 128)
    assert settings.scheme_of("model.lm_head") == Scheme(4, 128)


@pytest.mark.parametrize(("packer", "form"), [("autogptq", "gptq"), ("autoawq", "awq")])
def test_unpack_reads_the_original_packages_bit_for_bit(packer: str, form: Format) -> None:
    """tests/data was written by auto-gptq 0.7.1 and autoawq 0.2.9 themselves
    (tests/peers/*_pack.py).
    """
    file = Path(__file__).parents[1] / "data" / f"{packer}.safetensors"
    with safe_open(file, "pt") as handle:
        described = handle.metadata()
    tensors = load_file(file)
    cases = int(described["cases"])
    assert cases >= 5
    for index in range(cases):
        case = json.loads(described[f"case{index}"])
        stored = {
            k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"case{index}.")
        }
        dense = stored.pop("dense")
        scheme = Scheme(case["bits"], case["group_size"], case["sym"])
        if case.get("desc_act"):
            with pytest.raises(InputError, match="activation order"):
                FORMATS[form].unpack(scheme, stored)
            continue
        weight = FORMATS[form].unpack(scheme, stored)
        assert torch.equal(weight.dequantize(), dense), case
        if form == "awq" or case["sym"]:
            again = FORMATS[form].pack(scheme, weight)
            assert all(torch.equal(again[name], stored[name]) for name in again), case
