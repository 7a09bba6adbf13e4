"""MXFP4: blocks and scales against the values that the specification gives them, and bad ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmkit.checkpoint.mxfp4_format import SCHEME
from llmkit.checkpoint.quantized_formats import FORMATS, parse_quantization
from llmkit.checkpoint.quantized_weight import QuantizedWeight
from llmkit.common.errors import InputError

MXFP4 = FORMATS["mxfp4"]
GPT_OSS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def random_tensors(out: int = 6, blocks: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "blocks": torch.randint(0, 256, (out, blocks, 16), generator=draw).to(torch.uint8),
        "scales": torch.randint(100, 140, (out, blocks), generator=draw).to(torch.uint8),
    }


def e2m1(code: int) -> float:
    """The value of a 4-bit float: exponent bias 1; exponent 0 is subnormal."""
    exponent = code >> 1 & 3
    mantissa = code & 1
    size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if code & 8 else size


def test_mxfp4_weight_has_the_values_of_its_codes() -> None:
    stored = random_tensors()
    stored["blocks"][0, 0] = torch.arange(16, dtype=torch.uint8) * 16 + 15 - torch.arange(16)
    stored["scales"][1] = torch.tensor([0, 127, 254], dtype=torch.uint8)
    dense = MXFP4.unpack(SCHEME, stored).dequantize()
    assert dense.shape == (6, 96) and dense.dtype == torch.float32
    for row in range(6):
        for column in range(96):
            byte = int(stored["blocks"][row, column // 32, column % 32 // 2])
            code = byte >> 4 if column % 2 else byte & 15
            scale = 2.0 ** (int(stored["scales"][row, column // 32]) - 127)
            expected = torch.tensor(e2m1(code) * scale, dtype=torch.float64).float()
            assert dense[row, column] == expected
    assert dense[0, :8].unique().numel() > 4


def test_mxfp4_packs_what_it_unpacked() -> None:
    stored = random_tensors()
    weight = MXFP4.unpack(SCHEME, stored)
    again = MXFP4.pack(SCHEME, weight)
    assert all(torch.equal(again[name], stored[name]) for name in stored)
    wrong = QuantizedWeight(weight.q, weight.scales * 3, weight.zeros, SCHEME)
    with pytest.raises(InputError, match="Powers of two"):
        MXFP4.pack(SCHEME, wrong)
    assert torch.equal(weight.rows(slice(1, 3)).dequantize(), weight.dequantize()[1:3])


def test_mxfp4_stores_two_tensors_for_an_expert() -> None:
    blocks, scales = MXFP4.tensors(SCHEME, 10, 96)
    assert (blocks.suffix, blocks.dtype, blocks.shape) == ("blocks", "U8", (10, 3, 16))
    assert (scales.suffix, scales.dtype, scales.shape) == ("scales", "U8", (10, 3))
    assert blocks.out == scales.out == (0, 1) and blocks.in_ == scales.in_ == (1, 32)
    with pytest.raises(InputError, match=r"\[10, 80\] weight.*multiple of 32"):
        MXFP4.tensors(SCHEME, 10, 80)
    assert SCHEME.label == "MXFP4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": torch.zeros(6, 3, 8, dtype=torch.uint8)}, r"blocks has shape \[6, 3, 8\]"),
        ({"blocks": torch.zeros(6, 48, dtype=torch.uint8)}, r"blocks has shape \[6, 48\]"),
        ({"scales": torch.zeros(6, 4, dtype=torch.uint8)}, r"scales has shape.*\[6, 3\]"),
        (
            {"scales": torch.full((6, 3), 255, dtype=torch.uint8)},
            "18 of 18 values of scales are 255",
        ),
    ],
)
def test_mxfp4_refuses_what_does_not_fit(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MXFP4.unpack(SCHEME, random_tensors() | change)


def test_mxfp4_config_quantizes_the_experts_alone() -> None:
    config = parse_quantization(GPT_OSS)
    layer = "model.layers.3."
    assert config.scheme_of(f"{layer}mlp.experts.gate_up_proj") == SCHEME
    assert config.scheme_of(f"{layer}mlp.experts.down_proj") == SCHEME
    for module in ("self_attn.q_proj", "mlp.router", "mlp.experts.down_proj_bias"):
        assert config.scheme_of(f"{layer}{module}") is None
    assert config.scheme_of("lm_head") is None
    assert MXFP4.config_dict(config) == GPT_OSS
    kept = parse_quantization(GPT_OSS | {"modules_to_not_convert": ["model.layers.3"]})
    assert kept.scheme_of(f"{layer}mlp.experts.down_proj") is None
    assert kept.scheme_of("model.layers.31.mlp.experts.down_proj") == SCHEME


@pytest.mark.parametrize("words", ["lm_head", [1], ["a("]])
def test_mxfp4_config_refuses_words_that_it_cannot_read(words: Any) -> None:
    with pytest.raises(InputError, match="modules_to_not_convert"):
        parse_quantization({"quant_method": "mxfp4", "modules_to_not_convert": words})
