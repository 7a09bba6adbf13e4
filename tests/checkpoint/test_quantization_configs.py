"""What each quantized format stores, writes and reads, value by value: tensors and configs."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from llmkit.checkpoint.quantized_formats import FORMATS, parse_quantization
from llmkit.checkpoint.quantized_weight import (
    Format,
    PackedTensor,
    QuantizationConfig,
    QuantizedWeight,
    Scheme,
)
from llmkit.common.errors import InputError

AWQ = Scheme(4, 32, symmetric=False)
FLOAT8 = Scheme(8, kind="float", inputs="tensor")


@pytest.mark.parametrize(
    ("scheme", "label", "half", "groups"),
    [
        (Scheme(4), "INT4", 8, 1),
        (Scheme(4, 32), "INT4 in groups of 32", 8, 3),
        (Scheme(8, 40), "INT8 in groups of 40", 128, 3),
        (Scheme(8, 96, symmetric=False), "INT8 in groups of 96 with zero points", 128, 1),
        (Scheme(8, inputs="token"), "INT8, inputs too", 128, 1),
        (FLOAT8, "FP8, inputs too by a fixed scale", 0, 1),
        (Scheme(4, 32, kind="float", scale_format="e8m0"), "MXFP4", 0, 3),
    ],
)
def test_scheme_describes_itself(scheme: Scheme, label: str, half: int, groups: int) -> None:
    assert (scheme.label, scheme.half, scheme.groups(96)) == (label, half, groups)


def test_quantization_config_prefers_ignored_modules_then_the_first_override() -> None:
    config = QuantizationConfig(
        "compressed-tensors",
        Scheme(4),
        ("a.b", "re:c$"),
        (("a.b", Scheme(8)), ("re:a", Scheme(8, 32)), ("a.c", Scheme(8))),
    )
    assert config.scheme_of("a.b") is None
    assert config.scheme_of("a.c") == Scheme(8, 32)
    assert config.scheme_of("c") is None
    assert config.scheme_of("x.c") == Scheme(4)  # a pattern matches from the beginning
    assert config.schemes == (Scheme(4), Scheme(8), Scheme(8, 32))
    assert QuantizationConfig("gptq", None).schemes == ()
    assert QuantizationConfig("gptq", None).damp == 0.01
    with pytest.raises(FrozenInstanceError):
        config.kv = "fp8"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("entry", "module", "matches"),
    [
        ("language_model.model.layers.0.up", "model.language_model.layers.0.up", True),
        ("model.language_model.layers.0.up", "language_model.model.layers.0.up", True),
        ("model.language_model.layers.0.up", "model.layers.0.up", True),
        ("model.layers.0.up", "model.language_model.layers.0.up", True),
        ("model.layers.0.up", "model.text_model.layers.0.up", True),
        ("re:language_model.*layers.0.*", "model.language_model.layers.0.up", True),
        (r"re:model\.layers\.0\..*", "language_model.model.layers.0.up", True),
        ("language_model.lm_head", "lm_head", True),
        ("lm_head", "language_model.lm_head", True),
        ("language_model.model.layers.0.up", "model.language_model.layers.1.up", False),
        ("language_model.model.layers.0.up", "model.language_model.layers.0.up_proj", False),
        ("re:.*vision.*", "model.language_model.layers.0.up", False),
        ("model.layers.0.up", "other.layers.0.up", False),
        ("layers.0.up", "model.layers.0.up", False),
    ],
)
def test_quantization_config_knows_the_names_of_other_versions(
    entry: str, module: str, matches: bool
) -> None:
    """A text model's modules have other names in other versions of transformers."""
    ignoring = QuantizationConfig("fp8", Scheme(8), (entry,))
    assert (ignoring.scheme_of(module) is None) is matches
    overriding = QuantizationConfig("compressed-tensors", Scheme(8), (), ((entry, Scheme(4)),))
    assert (overriding.scheme_of(module) == Scheme(4)) is matches


def test_quantized_weight_dequantizes_slices_and_moves() -> None:
    weight = QuantizedWeight(
        q=torch.tensor([[3, 5, 9], [8, 0, 15]], dtype=torch.uint8),
        scales=torch.tensor([[1.0, 10.0], [2.0, 0.5]]),
        zeros=torch.tensor([[1, 4], [8, 7]], dtype=torch.uint8),
        scheme=Scheme(4, 2, symmetric=False),
    )
    assert weight.shape == (2, 3)
    assert weight.dequantize().tolist() == [[2.0, 4.0, 50.0], [0.0, -16.0, 4.0]]
    assert weight.dequantize(torch.float16).dtype == torch.float16
    rows = weight.rows(slice(1, 2))
    assert rows.dequantize().tolist() == [[0.0, -16.0, 4.0]]
    assert (rows.scheme, rows.input_scale) == (weight.scheme, None)
    moved = weight.to("meta")
    assert {moved.q.device.type, moved.scales.device.type, moved.zeros.device.type} == {"meta"}
    assert moved.input_scale is None
    weight.input_scale = torch.tensor([0.5])
    assert weight.rows(slice(1)).input_scale is weight.input_scale
    scale = weight.to("meta").input_scale
    assert scale is not None
    assert scale.is_meta


def test_packed_tensor_is_dense_without_a_dtype() -> None:
    dense = PackedTensor("weight", "", (4, 8), (0, 1), (1, 1))
    assert not dense.is_quantized
    assert PackedTensor("qweight", "I32", (4, 8), (0, 1), (1, 1)).is_quantized
    assert (dense.derived, dense.name, dense.source_name, dense.source_shape) == ("", "", "", ())
    assert dense.group_size == -1
    assert len({dense, PackedTensor("weight", "", (4, 8), (0, 1), (1, 1))}) == 1


def test_packed_tensor_of_several_experts_has_them_in_its_first_dimension() -> None:
    one = PackedTensor("blocks", "U8", (4, 3, 16), (0, 1), (1, 32), group_size=32)
    assert one.over_experts(5) == PackedTensor(
        "blocks", "U8", (5, 4, 3, 16), (1, 1), (2, 32), group_size=32, num_experts=5
    )
    assert PackedTensor("input_scale", "F32", (1,), None, None).over_experts(2) == PackedTensor(
        "input_scale", "F32", (2, 1), None, None, num_experts=2
    )
    assert one.num_experts == 0


@pytest.mark.parametrize(
    ("form", "scheme", "expected"),
    [
        (
            "gptq",
            Scheme(4, 32),
            [
                ("qweight", "I32", (12, 16), (1, 1), (0, 8), ""),
                ("qzeros", "I32", (3, 2), (1, 8), (0, 32), ""),
                ("scales", "F16", (3, 16), (1, 1), (0, 32), ""),
                ("g_idx", "I32", (96,), None, (0, 1), "group_index"),
            ],
        ),
        (
            "gptq",
            Scheme(8),
            [
                ("qweight", "I32", (24, 16), (1, 1), (0, 4), ""),
                ("qzeros", "I32", (1, 4), (1, 4), None, ""),
                ("scales", "F16", (1, 16), (1, 1), None, ""),
                ("g_idx", "I32", (96,), None, (0, 1), "group_index"),
            ],
        ),
        (
            "gptq_v2",
            Scheme(2, 32),
            [
                ("qweight", "I32", (6, 16), (1, 1), (0, 16), ""),
                ("qzeros", "I32", (3, 1), (1, 16), (0, 32), ""),
                ("scales", "F16", (3, 16), (1, 1), (0, 32), ""),
                ("g_idx", "I32", (96,), None, (0, 1), "group_index"),
            ],
        ),
        (
            "awq",
            AWQ,
            [
                ("qweight", "I32", (96, 2), (1, 8), (0, 1), ""),
                ("qzeros", "I32", (3, 2), (1, 8), (0, 32), ""),
                ("scales", "F16", (3, 16), (1, 1), (0, 32), ""),
            ],
        ),
        (
            "compressed-tensors",
            Scheme(4, 40, symmetric=False),
            [
                ("weight_packed", "I32", (16, 12), (0, 1), (1, 8), ""),
                ("weight_scale", "BF16", (16, 3), (0, 1), (1, 40), ""),
                ("weight_zero_point", "I32", (2, 3), (0, 8), (1, 40), ""),
                ("weight_shape", "I64", (2,), None, None, "shape"),
            ],
        ),
        (
            "compressed-tensors",
            FLOAT8,
            [
                ("weight", "F8_E4M3", (16, 96), (0, 1), (1, 1), ""),
                ("weight_scale", "F32", (16, 1), (0, 1), None, ""),
                ("input_scale", "F32", (1,), None, None, ""),
            ],
        ),
    ],
)
def test_formats_describe_the_tensors_they_store(
    form: Format, scheme: Scheme, expected: list[tuple[Any, ...]]
) -> None:
    found = FORMATS[form].tensors(scheme, 16, 96)
    assert tuple(replace(row, scale="") for row in found) == tuple(
        PackedTensor(*row) for row in expected
    )
    rules = {row.suffix: row.scale for row in found if row.scale}
    weight_rule = "not negative" if scheme.kind == "float" else "finite"
    expected_rules = {"scales": weight_rule, "weight_scale": weight_rule, "input_scale": "positive"}
    suffixes = {row[0] for row in expected} & expected_rules.keys()
    assert rules == {suffix: expected_rules[suffix] for suffix in suffixes}


@pytest.mark.parametrize(
    ("bits", "size", "multiple"), [(4, 12, 8), (8, 6, 4), (2, 24, 16), (3, 48, 32)]
)
def test_gptq_says_which_features_cannot_be_packed(bits: int, size: int, multiple: int) -> None:
    form = FORMATS["gptq"]
    with pytest.raises(InputError, match=f"multiple of {multiple} input features"):
        form.tensors(Scheme(bits), 32, size)
    with pytest.raises(InputError, match=f"multiple of {multiple} output features"):
        form.tensors(Scheme(bits), size, 32)
    words = multiple * bits // 32
    assert form.tensors(Scheme(bits), multiple, multiple)[0].shape == (words, multiple)


@pytest.mark.parametrize("shape", [[16], [16, 96, 1], [16, 0], [-1, 96]])
def test_compressed_tensors_refuses_a_weight_shape_that_is_not_two_positive_sizes(
    shape: list[int],
) -> None:
    with pytest.raises(InputError, match=rf"weight_shape is \[{', '.join(map(str, shape))}\]"):
        FORMATS["compressed-tensors"].unpack(Scheme(4), {"weight_shape": torch.tensor(shape)})


def test_formats_store_a_weight_of_one_row_and_one_column() -> None:
    scheme = Scheme(8)
    weight = QuantizedWeight(
        torch.tensor([[130]], dtype=torch.uint8),
        torch.tensor([[0.5]]),
        torch.tensor([[128]], dtype=torch.uint8),
        scheme,
    )
    form = FORMATS["compressed-tensors"]
    assert form.unpack(scheme, form.pack(scheme, weight)).dequantize().tolist() == [[1.0]]


@pytest.mark.parametrize(
    "document",
    [
        {"quant_method": "gptq", "bits": 4, "dynamic": {"-:(": {}}},
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "g": {"targets": ["re:("], "weights": {"num_bits": 4, "strategy": "channel"}}
            },
        },
        {"quant_method": "mxfp4", "modules_to_not_convert": ["("]},
    ],
)
def test_parse_refuses_patterns_that_do_not_compile(document: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"\(missing \), unterminated subpattern at position 0"):
        parse_quantization(document)


# Configs that are written


def test_gptq_config_dict_is_what_gptqmodel_reads() -> None:
    ignore = ("lm_head", "model.layers.0.up", "re:.*gate")
    config = QuantizationConfig("gptq", Scheme(4, 32), ignore, method="rtn")
    assert FORMATS["gptq"].config_dict(config) == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": True,
        "damp_percent": 0.01,
        "lm_head": False,
        "dynamic": {r"-:model\.layers\.0\.up$": {}, "-:.*gate": {}},
        "meta": {"quantizer": ["llmkit"], "method": "rtn"},
    }
    quantized_head = FORMATS["gptq"].config_dict(QuantizationConfig("gptq", Scheme(8), ()))
    assert (quantized_head["lm_head"], "dynamic" in quantized_head) == (True, False)


def test_awq_config_dict_is_what_autoawq_reads() -> None:
    config = QuantizationConfig("awq", AWQ, ("lm_head", "a.b"))
    assert FORMATS["awq"].config_dict(config) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", "a.b"],
    }


@pytest.mark.parametrize(
    ("form", "values", "message"),
    [
        ("gptq", {"scheme": None}, "GPTQ quantizes weights"),
        ("gptq_v2", {"kv": "fp8"}, "GPTQ quantizes weights"),
        ("awq", {"scheme": None}, "AWQ has one scheme"),
        ("awq", {"overrides": (("a", Scheme(8)),)}, "AWQ has one scheme"),
        ("awq", {"kv": "fp8"}, "AWQ has one scheme"),
    ],
)
def test_formats_write_no_config_that_they_cannot_hold(
    form: Format, values: dict[str, Any], message: str
) -> None:
    config = QuantizationConfig(form, **({"scheme": AWQ} | values))
    with pytest.raises(AssertionError, match=message):
        FORMATS[form].config_dict(config)


INT4_WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "symmetric": False,
    "strategy": "group",
    "group_size": 32,
    "dynamic": False,
    "actorder": None,
}
FLOAT8_WEIGHTS = INT4_WEIGHTS | {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "channel",
    "group_size": None,
}
FLOAT8_INPUTS = FLOAT8_WEIGHTS | {"strategy": "tensor"}


def test_compressed_tensors_config_dict_is_what_vllm_reads() -> None:
    config = QuantizationConfig(
        "compressed-tensors",
        FLOAT8,
        ("lm_head",),
        (("a.b", AWQ), ("a.c", AWQ), ("a.d", FLOAT8)),
        kv="int8",
    )
    assert FORMATS["compressed-tensors"].config_dict(config) == {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "tensor",
            "dynamic": False,
        },
        "config_groups": {
            "group_0": {
                "targets": ["Linear", "a.d"],
                "weights": FLOAT8_WEIGHTS,
                "input_activations": FLOAT8_INPUTS,
                "output_activations": None,
                "format": "float-quantized",
            },
            "group_1": {
                "targets": ["a.b", "a.c"],
                "weights": INT4_WEIGHTS,
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            },
        },
    }
    token = FORMATS["compressed-tensors"].config_dict(
        QuantizationConfig("compressed-tensors", Scheme(8, inputs="token"))
    )
    assert (token["format"], token["kv_cache_scheme"]) == ("int-quantized", None)
    assert token["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    cache = QuantizationConfig("compressed-tensors", None, kv="fp8")
    assert FORMATS["compressed-tensors"].config_dict(cache)["format"] == "dense"


# Configs that are read


def gptq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4} | changes


def awq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4} | changes


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (gptq(), QuantizationConfig("gptq", Scheme(4), method="gptq")),
        (
            gptq(bits=8, group_size=1, sym=False, lm_head=True, damp_percent=0.1),
            QuantizationConfig("gptq", Scheme(8, 1, symmetric=False), (), method="gptq", damp=0.1),
        ),
        (
            gptq(group_size=-1, desc_act=True, meta={"method": "rtn"}, damp_percent=1),
            QuantizationConfig("gptq", Scheme(4), method="rtn"),
        ),
        (
            gptq(dynamic={r"-:a\.b$": {}, r"-:a.b$": {}, "-:.*c": {}}, checkpoint_format=None),
            QuantizationConfig(
                "gptq", Scheme(4), ("lm_head", "a.b", "re:a.b$", "re:.*c"), method="gptq"
            ),
        ),
        (awq(), QuantizationConfig("awq", Scheme(4, symmetric=False), method="awq")),
        (
            awq(group_size=1, modules_to_not_convert=["visual", "lm_head", "a.b"]),
            QuantizationConfig(
                "awq",
                Scheme(4, 1, symmetric=False),
                ("re:.*visual", "lm_head", "a.b"),
                method="awq",
            ),
        ),
        (
            awq(modules_to_not_convert=["a(b"]),  # a word, no pattern
            QuantizationConfig(
                "awq", Scheme(4, symmetric=False), ("lm_head", r"re:.*a\(b"), method="awq"
            ),
        ),
        (
            awq(modules_to_not_convert=["a.b"]),
            QuantizationConfig("awq", Scheme(4, symmetric=False), ("lm_head", "a.b"), method="awq"),
        ),
    ],
)
def test_parse_reads_gptq_and_awq_configs(
    document: dict[str, Any], expected: QuantizationConfig
) -> None:
    assert parse_quantization(document) == expected


@pytest.mark.parametrize("size", [0, -2, True, "128", 32.0, None])
@pytest.mark.parametrize("document", [gptq(), awq()])
def test_parse_refuses_group_sizes_that_are_not_positive_integers(
    document: dict[str, Any], size: object
) -> None:
    with pytest.raises(InputError, match=f"the group size {size}. -1 or a positive number"):
        parse_quantization(document | {"group_size": size})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (gptq(bits=None), "has None bits. 2, 3, 4 or 8 were expected"),
        (gptq(bits=5), "has 5 bits"),
        (gptq(desc_act=True, group_size=1), "activation order"),
        (gptq(dynamic=["-:a"]), "dynamic .'-:a'.. An object of patterns"),
        (gptq(dynamic={"-:a": {}, "a": None}), "dynamic a: None. Options such as bits"),
        (awq(bits=3), "has 3 bits. 4 were expected"),
        (awq(zero_point=None), "no zero points"),
        (awq(version=None), "version none"),
        ({"quant_method": ""}, "with a method it does not name"),
        ("gptq", "with a method it does not name"),
    ],
)
def test_parse_refuses_gptq_and_awq_configs(document: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_quantization(document)


WEIGHTS = {"num_bits": 4, "strategy": "channel"}
FLOAT_GROUP = {
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
}
INT_GROUP = {
    "weights": {"num_bits": 8, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
}


def changed(group: dict[str, Any], part: str, **values: Any) -> dict[str, Any]:
    """A config group with other values in its weights or its inputs."""
    return group | {part: group[part] | values}


def parse_group(group: Any, form: str | None = None) -> QuantizationConfig:
    if isinstance(group, dict):
        group = {"targets": ["Linear"]} | group
        if form is None:
            kind = group["weights"].get("type") if isinstance(group["weights"], dict) else None
            inputs = "int-quantized" if group.get("input_activations") else "pack-quantized"
            form = "float-quantized" if kind == "float" else inputs
    return FORMATS["compressed-tensors"].parse({"format": form, "config_groups": {"g": group}})


@pytest.mark.parametrize(
    ("group", "scheme"),
    [
        ({"weights": WEIGHTS}, Scheme(4)),
        ({"weights": WEIGHTS | {"num_bits": 8, "type": "int", "actorder": False}}, Scheme(8)),
        ({"weights": WEIGHTS | {"symmetric": None, "actorder": "weight"}}, Scheme(4)),
        ({"weights": WEIGHTS | {"symmetric": False}}, Scheme(4, symmetric=False)),
        ({"weights": WEIGHTS | {"strategy": "group", "group_size": 1}}, Scheme(4, 1)),
        ({"weights": WEIGHTS | {"strategy": "group", "group_size": -1}}, Scheme(4)),
        ({"weights": WEIGHTS, "input_activations": {}, "output_activations": {}}, Scheme(4)),
        (INT_GROUP, Scheme(8, inputs="token")),
        (changed(INT_GROUP, "weights", symmetric=True, dynamic=False), Scheme(8, inputs="token")),
        (FLOAT_GROUP, Scheme(8, kind="float", inputs="token")),
        (changed(FLOAT_GROUP, "input_activations", dynamic=False, strategy="tensor"), FLOAT8),
        (changed(FLOAT_GROUP, "input_activations", dynamic=None, strategy="tensor"), FLOAT8),
        # vLLM gives each token a scale where config.json says one dynamic scale for all.
        (
            changed(FLOAT_GROUP, "input_activations", strategy="tensor"),
            Scheme(8, kind="float", inputs="token"),
        ),
        (
            changed(FLOAT_GROUP, "weights", strategy="tensor"),
            Scheme(8, kind="float", inputs="token", block_rows=-1),
        ),
    ],
)
def test_compressed_tensors_parses_groups(group: dict[str, Any], scheme: Scheme) -> None:
    assert parse_group(group) == QuantizationConfig("compressed-tensors", scheme, ())


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("text", "config_groups text. Expected groups with weights"),
        ({"weights": [4]}, "config_groups .* Expected groups with weights"),
        ({"weights": WEIGHTS, "targets": "Linear"}, "targets Linear"),
        ({"weights": WEIGHTS, "targets": None}, "targets None"),
        ({"weights": WEIGHTS | {"num_bits": 5}}, "num_bits 5. Expected 2 or 3 or 4 or 8"),
        ({"weights": WEIGHTS | {"num_bits": 7}}, "num_bits 7"),
        ({"weights": WEIGHTS | {"type": "text"}}, "type text. Expected int or float or None"),
        ({"weights": WEIGHTS | {"symmetric": "no"}}, "symmetric no"),
        ({"weights": WEIGHTS | {"dynamic": True}}, "dynamic True. Expected False or None"),
        ({"weights": WEIGHTS | {"actorder": True}}, "actorder True"),
        ({"weights": WEIGHTS | {"strategy": "group", "group_size": 0}}, "group_size 0"),
        ({"weights": WEIGHTS | {"strategy": "group", "group_size": -2}}, "group_size -2"),
        ({"weights": WEIGHTS | {"strategy": "group", "group_size": True}}, "group_size True"),
        (INT_GROUP | {"input_activations": "x"}, "input_activations x. Expected an object"),
        (changed(INT_GROUP, "weights", num_bits=5), "num_bits 5. Expected 2 or 3 or 4 or 8"),
        (changed(FLOAT_GROUP, "weights", num_bits=9), "num_bits 9"),
        (changed(INT_GROUP, "weights", symmetric=False), "symmetric False. Expected True or None"),
        (changed(INT_GROUP, "input_activations", num_bits=7), "input_activations num_bits 7"),
        (changed(FLOAT_GROUP, "input_activations", type="int"), "type int. Expected float"),
        (changed(INT_GROUP, "input_activations", symmetric=False), "symmetric False"),
        (
            changed(INT_GROUP, "input_activations", dynamic=False),
            r"strategy token. Expected token with dynamic true, or tensor with dynamic false\.$",
        ),
        (
            changed(INT_GROUP, "input_activations", strategy="tensor"),
            "strategy tensor. Expected token with dynamic true, or tensor with dynamic false",
        ),
        (
            {
                "weights": WEIGHTS,
                "input_activations": INT_GROUP["input_activations"] | {"dynamic": False},
                "format": "pack-quantized",
            },
            r"strategy token. Expected token with dynamic true\.$",
        ),
        (INT_GROUP | {"format": "pack-quantized"}, "format pack-quantized. Expected int-quantized"),
        (
            changed(FLOAT_GROUP, "input_activations", strategy="group"),
            "strategy group. Expected token with dynamic true, or tensor with dynamic false",
        ),
        (changed(INT_GROUP, "weights", strategy="block"), "strategy block. Expected group or chan"),
        (changed(FLOAT_GROUP, "input_activations", dynamic=False), "strategy token"),
        (changed(FLOAT_GROUP, "input_activations", strategy="channel"), "strategy channel"),
    ],
)
def test_compressed_tensors_refuses_groups(group: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_group(group)


def test_compressed_tensors_parse_compares_the_format_with_its_groups() -> None:
    assert parse_group({"weights": WEIGHTS}, "mixed-precision").scheme == Scheme(4)
    for group in (FLOAT_GROUP, FLOAT_GROUP | {"targets": ["a.b"]}):
        with pytest.raises(
            InputError,
            match=r"format int-quantized. Expected float-quantized or naive-quantized, as its gr",
        ):
            parse_group(group, "int-quantized")
    groups = {
        "a": {"targets": ["Linear", "a.b"], "weights": WEIGHTS},
        "b": INT_GROUP | {"targets": ["a.c"]},
    }
    document: dict[str, Any] = {"config_groups": groups, "ignore": None}
    with pytest.raises(
        InputError, match=r"Expected int-quantized or naive-.* or pack-quantized, as"
    ):
        FORMATS["compressed-tensors"].parse(document)
    found = FORMATS["compressed-tensors"].parse(document | {"format": "pack-quantized"})
    overrides = (("a.b", Scheme(4)), ("a.c", Scheme(8, inputs="token")))
    assert found == QuantizationConfig("compressed-tensors", Scheme(4), (), overrides)


KV = {"num_bits": 8, "type": "float", "strategy": "tensor"}


@pytest.mark.parametrize(
    ("scheme", "kv"),
    [
        (None, ""),
        ({}, ""),
        (KV, "fp8"),
        (KV | {"dynamic": False, "symmetric": True}, "fp8"),
        (KV | {"type": "int", "dynamic": None, "symmetric": None}, "int8"),
    ],
)
def test_compressed_tensors_parses_kv_cache_schemes(scheme: object, kv: str) -> None:
    group = {"targets": ["Linear"], "weights": WEIGHTS}
    document = {
        "format": "pack-quantized",
        "config_groups": {"g": group},
        "kv_cache_scheme": scheme,
    }
    assert FORMATS["compressed-tensors"].parse(document).kv == kv


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("fp8", "kv_cache_scheme fp8. Expected an object"),
        (KV | {"num_bits": 7}, "kv_cache_scheme num_bits 7. Expected 8"),
        (KV | {"num_bits": 9}, "num_bits 9"),
        (KV | {"type": None}, "type None. Expected float or int"),
        (KV | {"dynamic": True}, "dynamic True. Expected False or None"),
        (KV | {"symmetric": False}, "symmetric False. Expected True or None"),
    ],
)
def test_compressed_tensors_refuses_kv_cache_schemes(scheme: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FORMATS["compressed-tensors"].parse({"config_groups": {}, "kv_cache_scheme": scheme})


def test_compressed_tensors_needs_groups_or_a_kv_cache() -> None:
    parse = FORMATS["compressed-tensors"].parse
    assert parse({"config_groups": {}, "kv_cache_scheme": KV}).scheme is None
    for groups in ([], None, "text"):
        with pytest.raises(InputError, match="Expected at least one group"):
            parse({"config_groups": groups, "kv_cache_scheme": KV})
    with pytest.raises(InputError, match=rf"config_groups {'x' * 200}\. Expected"):
        parse({"config_groups": "x" * 300})
