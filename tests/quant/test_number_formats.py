"""`quantize --scheme NAME`: what options mean together, before a weight is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.common.errors import InputError
from llmkit.model.families import model_spec
from llmkit.quant.methods import METHODS, MethodOptions, build_quantization_config
from llmkit.quant.number_formats import NUMBER_FORMATS
from llmkit.quant.quantize_options import SCHEMES


def test_number_formats_are_the_choices_of_the_option() -> None:
    assert tuple(NUMBER_FORMATS) == SCHEMES


@pytest.mark.parametrize(
    ("options", "name", "format_name"),
    [
        (MethodOptions("int8"), "w8a16", "compressed-tensors"),
        (MethodOptions("int8", activations=True), "w8a8", "compressed-tensors"),
        (MethodOptions("fp8"), "fp8", "compressed-tensors"),
        (MethodOptions("fp8", static_activations=True), "fp8-static", "compressed-tensors"),
        (MethodOptions("gptq"), "w4a16", "gptq"),
        (MethodOptions("gptq", bits=8), "w8a16", "gptq"),
        (MethodOptions("gptq", scheme_name="nvfp4"), "nvfp4", "compressed-tensors"),
        (MethodOptions("gptq", scheme_name="fp8", static_activations=True), "fp8-static", None),
        (MethodOptions("awq"), "w4a16", "awq"),
        (MethodOptions("awq", scheme_name="w4afp8"), "w4afp8", "compressed-tensors"),
        (MethodOptions("rtn"), "w4a16", "compressed-tensors"),
        (MethodOptions("rtn", scheme_name="w3a16"), "w3a16", "compressed-tensors"),
        (MethodOptions("rtn", scheme_name="fp8-block", format="fp8"), "fp8-block", "fp8"),
        (MethodOptions("bf16"), None, None),
    ],
)
def test_method_options_choose_a_scheme_and_a_format(
    options: MethodOptions, name: str | None, format_name: str | None
) -> None:
    options.check()
    assert options.chosen_scheme == name
    if format_name is not None:
        assert options.chosen_format == format_name


def test_method_options_accept_every_scheme_in_every_format_that_stores_it() -> None:
    for name, number_format in NUMBER_FORMATS.items():
        for format_name in number_format.formats:
            options = MethodOptions("rtn", format=format_name, scheme_name=name)
            options.check()
            scheme = options.scheme(128)
            assert scheme is not None
            assert scheme.input_type == number_format.scheme.input_type
            assert scheme.kind == number_format.scheme.kind
            assert dataclasses.replace(options, bits=scheme.bits).chosen_scheme == name
    assert set(METHODS["gptq"].schemes) == set(METHODS["rtn"].schemes) == set(NUMBER_FORMATS)


def test_static_fp8_has_one_weight_scale_in_the_modelopt_format() -> None:
    options = MethodOptions("fp8", static_activations=True)
    assert options.scheme(-1) == Scheme(8, kind="float", inputs="tensor")
    options = dataclasses.replace(options, format="modelopt")
    assert options.scheme(-1) == Scheme(8, kind="float", inputs="tensor", block_rows=-1)


@pytest.mark.parametrize(
    ("name", "calibrated"),
    [
        ("nvfp4", True),
        ("nvfp4a16", False),
        ("mxfp4", False),
        ("mxfp4afp8", True),
        ("fp8-static", True),
        ("w8a8", True),
    ],
)
def test_rtn_is_calibrated_where_inputs_need_it(name: str, calibrated: bool) -> None:
    assert MethodOptions("rtn", scheme_name=name).calibrated is calibrated


def test_layer_that_fixed_groups_do_not_divide_is_refused(model: Path) -> None:
    spec = dataclasses.replace(model_spec(open_checkpoint(model).config), intermediate_size=72)
    message = r"groups of 32, which do not divide layers\.0\.mlp\.down with 72 in_features.*--keep"
    with pytest.raises(InputError, match=message):
        build_quantization_config(spec, MethodOptions("rtn", scheme_name="mxfp4"))
    # A layer that stays as it is may have any size.
    ignore = [f"model.layers.{layer}.mlp.down_proj" for layer in range(len(spec.layers))]
    options = MethodOptions("rtn", scheme_name="mxfp4")
    assert build_quantization_config(spec, options, ignore) is not None
    # Blocks of rows and columns may be smaller at the end.
    options = MethodOptions("rtn", scheme_name="fp8-block")
    assert build_quantization_config(spec, options) is not None
