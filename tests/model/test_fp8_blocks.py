"""FP8 with block scales: whole models against transformers with the dequantized weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.fp8_files import round_inputs, unpack_fp8, write_fp8
from support.tiny_families import family_oracle, oracle_logits
from support.tiny_wrappers import save_wrapper, tiny_wrapper, wrapper_logits

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import QuantizedWeight
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.fp8_block_linear import Fp8BlockLinear
from llmkit.model import decoder, weight_loader
from llmkit.model.families import checkpoint_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.linear import ActivationQuant, Linear, PackedLinear, _merge_parts
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import load_model, read_parameter

# Projections whose rows and columns are no multiples of the blocks.
QWEN3 = {"hidden_size": 160, "intermediate_size": 200, "num_hidden_layers": 2, "head_dim": 24}
MINIMAX = {"hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2}
BLOCK = {"qwen3": (128, 128), "minimax-m2": (32, 32), "ministral3": (48, 48)}


def tokens() -> torch.Tensor:
    return torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(1))


def dense_oracle(path: Path) -> torch.nn.Module:
    """transformers' model of a dense checkpoint."""
    kind = transformers.AutoModelForCausalLM
    if json.loads((path / "config.json").read_text())["model_type"] == "mistral3":
        kind = transformers.AutoModelForImageTextToText
    return kind.from_pretrained(path, attn_implementation="eager", dtype="float32").eval()


@pytest.fixture(scope="module", params=list(BLOCK))
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """A family's name, its dense checkpoint and the same values in FP8."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    dense = folder / "dense"
    if name == "ministral3":
        save_wrapper(tiny_wrapper(name), dense, hub_names=False)
        write_fp8(dense, folder / "fp8", BLOCK[name], linears=r"language_model.*_proj\.weight$")
    else:
        family_oracle(name, dense, **(QWEN3 if name == "qwen3" else MINIMAX))
        write_fp8(dense, folder / "fp8", BLOCK[name])
    return name, dense, folder / "fp8"


def all_linears(model: Any) -> Iterator[Linear]:
    for layer in model.layers:
        yield from layer.linears.values()


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return next(window_logits(model, tokens()[None]))


def test_fp8_blocks_agree_with_transformers(models: tuple[str, Path, Path]) -> None:
    """Weights only: inputs are not rounded, so that both compute the same."""
    name, dense, fp8 = models
    model = load_model(open_checkpoint(fp8), torch.float32)
    rounded = [linear for linear in all_linears(model) if linear.activation_quant is not None]
    assert rounded
    for linear in rounded:
        assert linear.activation_quant == ActivationQuant("fp8", None, BLOCK[name][1])
        linear.activation_quant = None
    oracle = oracle_logits(dense_oracle(dense), tokens())
    torch.testing.assert_close(logits_of(model), oracle, atol=1e-4, rtol=0)


def test_fp8_blocks_stay_packed_on_a_cpu(models: tuple[str, Path, Path]) -> None:
    """With the same rounded inputs, except for values between two steps."""
    _, _, fp8 = models
    expected = logits_of(load_model(open_checkpoint(fp8), torch.float32))
    logits = logits_of(load_model(open_checkpoint(fp8), torch.float32, packed=True))
    assert (logits - expected).abs().mean() < 2e-3 * expected.std()


def test_fp8_blocks_round_inputs_by_group(models: tuple[str, Path, Path]) -> None:
    name, dense, fp8 = models
    if name == "minimax-m2":
        pytest.skip("its experts are no modules in transformers")
    oracle = dense_oracle(dense)
    size = BLOCK[name][1]
    for module_name, module in oracle.named_modules():
        is_text = "vision" not in module_name and "projector" not in module_name
        if is_text and isinstance(module, torch.nn.Linear) and "lm_head" not in module_name:
            module.register_forward_pre_hook(lambda _, args: (round_inputs(args[0], size),))
    logits = logits_of(load_model(open_checkpoint(fp8), torch.float32, packed=True))
    expected = oracle_logits(oracle, tokens())
    # A value between two steps may be rounded to the other one.
    assert (logits - expected).abs().mean() < 2e-3 * expected.std()
    exact = oracle_logits(dense_oracle(dense), tokens())
    assert (expected - exact).abs().mean() > 1e-2 * expected.std()


def test_fp8_blocks_dequantize_to_the_same_values(models: tuple[str, Path, Path]) -> None:
    name, dense, fp8 = models
    checkpoint = open_checkpoint(fp8)
    stored = load_file(fp8 / "model.safetensors")
    values = load_file(dense / "model.safetensors")
    num_compared = 0
    for row in parameters(checkpoint_spec(checkpoint)):
        if not row.is_linear:
            continue
        parts = [
            unpack_fp8(
                stored[tensor],
                stored[f"{tensor.removesuffix('.weight')}.weight_scale_inv"],
                BLOCK[name],
            )
            for tensor in row.source_names
        ]
        assert torch.equal(torch.cat(parts), torch.cat([values[t] for t in row.source_names]))
        assert torch.equal(read_parameter(checkpoint, row, torch.float32), torch.cat(parts))
        num_compared += 1
    assert num_compared >= 8


def test_fp8_blocks_without_compiled_kernels(
    models: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, fp8 = models
    compiled = logits_of(load_model(open_checkpoint(fp8), torch.float32, packed=True))
    monkeypatch.setattr(cpu_kernels, "library", None)
    reference = logits_of(load_model(open_checkpoint(fp8), torch.float32, packed=True))
    assert (compiled - reference).abs().mean() < 2e-3 * reference.std()


def test_fp8_blocks_of_compressed_tensors(tmp_path: Path) -> None:
    family_oracle("qwen3", tmp_path / "dense", **QWEN3)
    write_fp8(tmp_path / "dense", tmp_path / "fp8", compressed_tensors=True)
    model = load_model(open_checkpoint(tmp_path / "fp8"), torch.float32)
    for linear in all_linears(model):
        assert linear.activation_quant == ActivationQuant("fp8", None, 128)
        linear.activation_quant = None
    oracle = oracle_logits(dense_oracle(tmp_path / "dense"), tokens())
    torch.testing.assert_close(logits_of(model), oracle, atol=1e-4, rtol=0)


def test_fp8_blocks_of_alternating_projections(tmp_path: Path) -> None:
    """Qwen3-Next stores projections head by head, and blocks here begin inside of heads."""
    family_oracle("qwen3-next", tmp_path / "dense")
    linears = r"\.(in_proj_qkvz|out_proj|[qkvo]_proj|gate_proj|up_proj|down_proj)\.weight$"
    write_fp8(tmp_path / "dense", tmp_path / "fp8", (48, 32), linears=linears)
    model = load_model(open_checkpoint(tmp_path / "fp8"), torch.float32)
    rounded = [linear for linear in all_linears(model) if linear.activation_quant is not None]
    assert model.layers[0].linears["gdn.qkvz"] in rounded
    for linear in rounded:
        linear.activation_quant = None
    oracle = oracle_logits(dense_oracle(tmp_path / "dense"), tokens())
    torch.testing.assert_close(logits_of(model), oracle, atol=1e-4, rtol=0)


def test_fp8_with_one_scale_per_weight(tmp_path: Path) -> None:
    """As Ministral 3 is released: scalars for the weight and for the inputs, in bfloat16."""
    save_wrapper(tiny_wrapper("ministral3"), tmp_path / "dense", hub_names=False)
    fp8 = tmp_path / "fp8"
    text = r"language_model.*_proj\.weight$"
    write_fp8(tmp_path / "dense", fp8, None, static=True, linears=text)
    model = load_model(open_checkpoint(fp8), torch.float32)
    for linear in all_linears(model):
        assert linear.activation_quant is not None and linear.activation_quant.scale is not None
        torch.testing.assert_close(linear.activation_quant.scale, torch.tensor([0.05]))
        linear.activation_quant = None
    oracle = wrapper_logits(dense_oracle(tmp_path / "dense"), tokens())
    torch.testing.assert_close(logits_of(model), oracle, atol=1e-4, rtol=0)
    tensors = load_file(fp8 / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            tensors[name] = tensor.bfloat16()
    save_file(tensors, fp8 / "model.safetensors", {"format": "pt"})
    assert logits_of(load_model(open_checkpoint(fp8), torch.float32)).isfinite().all()


def test_fp8_experts_stay_packed_on_a_gpu(
    models: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The linear layers of a GPU, here on the CPU: next to each other for `FusedExperts`."""
    name, dense, fp8 = models
    if name != "minimax-m2":
        pytest.skip("it has no experts")
    checkpoint = open_checkpoint(fp8)
    model = load_model(checkpoint, torch.float32)
    rows = {row.module: row for row in parameters(model.spec) if row.expert is not None}
    for capability, stays in (((9, 0), True), ((7, 5), False)):
        monkeypatch.setattr(weight_loader, "gpu_capability", lambda _, found=capability: found)
        row = rows["layers.0.mlp.experts.1.down"]
        can_stay = weight_loader.can_stay_packed("cuda", row, checkpoint.quantization, torch.half)
        assert can_stay is stays
    layer = model.layers[1]
    for module in [module for module in layer.linears if ".experts." in module]:
        parts = weight_loader._read_stored(checkpoint, rows[f"layers.1.{module}"], "cpu")
        joined = _merge_parts(parts)[0]
        assert isinstance(joined, QuantizedWeight) and joined.scheme.inputs == "group"
        kernel = Fp8BlockLinear(joined.q, joined.scales, joined.scheme.group_size)
        layer.linears[module] = PackedLinear(kernel, joined.shape)
    monkeypatch.setattr(decoder, "supports_fused_experts", lambda _: True)
    experts = layer.fused_experts
    assert experts is not None and experts.gate_up_scales is not None
    assert experts.gate_up.shape == (4, 80, 64) and experts.gate_up_scales.shape == (4, 2, 80)
    assert experts.down.shape == (4, 64, 40) and experts.down.dtype == torch.float8_e4m3fn
    assert experts.group_size == 32 and experts.input_quant is not None
    values = load_file(dense / "model.safetensors")
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    gate_up = torch.cat([values[f"{prefix}.w1.weight"], values[f"{prefix}.w3.weight"]])
    assert torch.equal(layer.linears["mlp.experts.2.gate_up"].kernel.dequantize(), gate_up)
