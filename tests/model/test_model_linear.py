"""Serving linears: the form of each weight, and models with packed against dense weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny_models as tiny
from torch.nn.functional import linear

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.common.progress import SilentProgress
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_linear import CpuLinear
from llmkit.model.decoder import Decoder
from llmkit.model.full_forward import window_logits
from llmkit.model.linear import ActivationQuant, Linear, PackedLinear, serving_linear
from llmkit.model.weight_loader import load_model
from llmkit.quant.grid import round_to_nearest
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions

FLOAT = torch.float32
BRAIN = torch.bfloat16
PACKED = "packed" if cpu_kernels.library is not None else "dense"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(
    scheme: Scheme, out: int, columns: int, dtype: torch.dtype = BRAIN, seed: int = 0
) -> QuantizedWeight:
    return round_to_nearest(random(out, columns, seed=seed) * 0.1, scheme, dtype)


def form(one: Linear) -> str:
    """The form of a linear: "packed" or "dense"."""
    if not isinstance(one, PackedLinear):
        return "dense"
    assert isinstance(one.kernel, CpuLinear)
    return "packed"


GROUPS = Scheme(4, 32)
PER_ROW = Scheme(8)
UNEVEN = Scheme(4, 32, symmetric=False)
TOKENS = Scheme(8, inputs="token")
FP8 = Scheme(8, kind="float", inputs="token")
SHORT = QuantizedWeight(  # whose second group of 48 columns has 16
    torch.arange(32 * 64).view(32, 64).remainder(16).byte(),
    random(32, 2).half(),
    torch.full((32, 2), 8).byte(),
    Scheme(4, 48),
)
CASES = [
    ([random(5, 7).to(BRAIN)], FLOAT, PACKED),
    ([random(5, 7).to(BRAIN), random(1, 7, seed=1).half() * 1e-3], FLOAT, PACKED),
    ([random(5, 7)], FLOAT, PACKED),
    ([random(5, 7)], BRAIN, PACKED),
    ([random(5, 7), rounded(PER_ROW, 4, 7)], FLOAT, PACKED),
    ([rounded(GROUPS, 32, 64), rounded(GROUPS, 16, 64, seed=1)], FLOAT, PACKED),
    ([rounded(GROUPS, 32, 64, torch.float16)], FLOAT, PACKED),
    ([rounded(UNEVEN, 30, 64, torch.float16)], torch.float16, PACKED),
    ([SHORT], FLOAT, PACKED),
    ([rounded(Scheme(2, 32), 32, 64), rounded(Scheme(3, 32), 16, 64, seed=1)], FLOAT, PACKED),
    ([rounded(Scheme(3, 32, symmetric=False), 30, 64, torch.float16)], FLOAT, PACKED),
    ([rounded(GROUPS, 32, 64), rounded(Scheme(4, 64), 32, 64)], BRAIN, PACKED),
    ([rounded(PER_ROW, 33, 70), rounded(PER_ROW, 3, 70, seed=1)], FLOAT, PACKED),
    ([rounded(TOKENS, 33, 70, FLOAT), rounded(TOKENS, 3, 70, FLOAT, seed=1)], FLOAT, PACKED),
    ([rounded(FP8, 33, 70, FLOAT), rounded(FP8, 3, 70, FLOAT, seed=1)], FLOAT, PACKED),
]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("parts", "dtype", "expected"), CASES)
def test_serving_linear_form_and_output(
    parts: list[torch.Tensor | QuantizedWeight], dtype: torch.dtype, expected: str, biased: bool
) -> None:
    dense = torch.cat(
        [part.dequantize() if isinstance(part, QuantizedWeight) else part.float() for part in parts]
    )
    bias = random(len(dense), seed=8).to(dtype) if biased else None
    scheme = parts[0].scheme if isinstance(parts[0], QuantizedWeight) else None
    how = ActivationQuant.of(scheme) if scheme else None
    served = serving_linear(parts, bias, how, dtype)
    assert form(served) == expected
    assert served.weight.shape == dense.shape
    assert served.weight.is_meta == (expected != "dense")
    for tokens in (1, 2, 9):
        x = random(tokens, dense.shape[1], seed=9).to(dtype)
        y = served(x)
        assert y.dtype == dtype
        inputs = x.float() if how is None else how(x.float())
        wanted = linear(inputs.double(), dense.double(), None if bias is None else bias.double())
        limit = 2e-6 if dtype == FLOAT else 0.008
        assert (y.double() - wanted).abs().max() <= limit * wanted.abs().max()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_serving_linear_holds_2_and_3_bits_exactly_in_4(bits: int, symmetric: bool) -> None:
    weight = rounded(Scheme(bits, 32, symmetric), 32, 64)
    wider = weight.with_bits(4)
    assert torch.equal(wider.dequantize(), weight.dequantize())
    assert wider.q.max() < 16
    assert wider.zeros.max() < 16
    assert bool((wider.zeros == 8).all()) == symmetric
    served = serving_linear([weight], None, None, FLOAT)
    if isinstance(served, PackedLinear):
        in_4_bits = serving_linear([wider], None, None, FLOAT)
        assert isinstance(in_4_bits, PackedLinear)
        assert served.kernel.nbytes == in_4_bits.kernel.nbytes


def test_serving_linear_is_dense_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "library", None)
    for parts in (
        [random(5, 7).to(BRAIN)],
        [rounded(GROUPS, 32, 64)],
        [rounded(TOKENS, 33, 70, FLOAT)],
    ):
        assert form(serving_linear(parts, None, None, FLOAT)) == "dense"


WINDOWS = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(3))


def forms(model: Decoder) -> set[str]:
    return {
        form(one)
        for layer in model.layers
        for name, one in layer.linears.items()
        if name != "mlp.router"
    }


def both(path: Path, dtype: torch.dtype = FLOAT) -> tuple[Decoder, torch.Tensor, torch.Tensor]:
    """The packed model, and the logits of the dense one and of it."""
    checkpoint = open_checkpoint(path)
    served = load_model(checkpoint, dtype, packed=True)
    assert served.dtype == dtype
    dense = torch.cat(list(window_logits(load_model(checkpoint, FLOAT), WINDOWS)))
    return served, dense, torch.cat(list(window_logits(served, WINDOWS)))


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "dtype": "float16"}),
        ("qwen2", {}),
        ("phi3", {}),
        ("gemma2", {"tie_word_embeddings": True}),
        ("mixtral", {}),
    ],
)
def test_served_model_16_bit_matches_dense_logits(
    tmp_path: Path, architecture: str, config: dict[str, object]
) -> None:
    served, dense, logits = both(tiny.tiny_checkpoint(tmp_path, architecture, **config))
    assert forms(served) == {PACKED}
    assert form(served.head) == PACKED
    assert served.embedding.dtype.itemsize == 2
    torch.testing.assert_close(logits, dense, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that kernels' blocks divide, so that padding takes no memory."""
    return tiny.tiny_checkpoint(
        tmp_path_factory.mktemp("wide"),
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )


FORMATS = [
    (QuantizeOptions("rtn"), FLOAT, PACKED, 0.15),
    (QuantizeOptions("rtn", format="gptq"), BRAIN, PACKED, 0.15),
    (QuantizeOptions("rtn", format="awq"), FLOAT, PACKED, 0.15),
    (QuantizeOptions("int8"), FLOAT, PACKED, 0.26),
    (QuantizeOptions("int8", activations=True), FLOAT, PACKED, 0.26),
    (QuantizeOptions("fp8"), FLOAT, PACKED, 0.51),
    (QuantizeOptions("fp8", static_activations=True), FLOAT, PACKED, 0.51),
]


@pytest.mark.parametrize(("options", "dtype", "expected", "share"), FORMATS)
def test_served_model_quantized_stays_packed(
    wide: Path,
    tmp_path: Path,
    options: QuantizeOptions,
    dtype: torch.dtype,
    expected: str,
    share: float,
) -> None:
    options = replace(options, samples=2, seq_len=64, evaluate=False, device="cpu")
    quantize(str(wide), str(tmp_path / "out"), options, SilentProgress())
    served, dense, logits = both(tmp_path / "out", dtype)
    assert forms(served) == {expected}
    limit = 1e-4 if dtype == FLOAT and options.method != "fp8" and not options.activations else 0.1
    assert (logits - dense).norm() <= limit * dense.norm()
    linears = [one for layer in served.layers for one in layer.linears.values()]
    held = sum(
        one.kernel.nbytes if isinstance(one, PackedLinear) else one.weight.nbytes for one in linears
    )
    if expected != "dense":
        assert held <= share * sum(4 * one.weight.numel() for one in linears)


@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_writes_its_outputs_where_it_is_told(has_bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=draw)
    layer = Linear(weight, torch.randn(24, generator=draw) if has_bias else None)
    layer.pre_quant_scale = torch.rand(16, generator=draw)
    x = torch.randn(5, 16, generator=draw)
    buffer = torch.zeros(7, 24)
    with torch.inference_mode():
        found = layer.forward_into(x, buffer[:5])
        torch.testing.assert_close(found, layer(x))
    assert found.data_ptr() == buffer.data_ptr()
    assert not buffer[5:].any()
