"""FP8 with one scale for each weight, in the names of AutoFP8 and of compressed-tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.fp8_files import edit_config, write_fp8
from support.synthetic_checkpoint import stored_bytes
from support.tiny_families import family_oracle, oracle_logits
from support.tiny_models import write_tokenizer
from support.tiny_wrappers import save_wrapper, tiny_wrapper

from llmkit.checkpoint.model_files import load_json
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_formats import FORMATS, parse_quantization
from llmkit.checkpoint.quantized_weight import Format, QuantizationConfig, Scheme
from llmkit.common.errors import InputError
from llmkit.common.progress import SilentProgress
from llmkit.model.checkpoint_tensors import check_checkpoint
from llmkit.model.families import checkpoint_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.linear import ActivationQuant, Linear
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import load_model, read_activation_quant, read_parameter
from llmkit.quant.inspect_checkpoint import inspect_checkpoint
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.shard.merge import merge
from llmkit.shard.rank_part import rank_parts
from llmkit.shard.shard_checkpoint import shard
from llmkit.shard.verify import verify

SIZES = {"num_hidden_layers": 2}
ATTENTION = "model.layers.0.self_attn"
Q_PROJ = f"{ATTENTION}.q_proj"
OPTIONS = QuantizeOptions("bf16", samples=4, seq_len=32, evaluate=False, device="cpu")
STATIC = Scheme(8, kind="float", inputs="tensor", block_rows=-1)


def tokens() -> torch.Tensor:
    return torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(1))


def write_pair(folder: Path, family: str = "qwen3", **options: Any) -> Path:
    """A checkpoint in FP8; `dense` beside it has the same values."""
    family_oracle(family, folder / "dense", **SIZES)
    write_fp8(folder / "dense", folder / "fp8", None, **options)
    return folder / "fp8"


def changed(path: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """The checkpoint with other tensors, or without those that are None."""
    tensors = load_file(path / "model.safetensors") | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    return path


def check(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    check_checkpoint(checkpoint, checkpoint_spec(checkpoint))


def all_linears(model: Any) -> Iterator[Linear]:
    for layer in model.layers:
        yield from layer.linears.values()


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return next(window_logits(model, tokens()[None]))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["autofp8", "compressed_tensors"])
def test_fp8_per_tensor_agrees_with_transformers(tmp_path: Path, name: str, static: bool) -> None:
    """Weights only: inputs are not rounded, so that both compute the same."""
    fp8 = write_pair(tmp_path, **{name: True}, static=static)
    quantization = open_checkpoint(fp8).quantization
    assert quantization is not None
    assert quantization.scheme == dataclasses.replace(
        STATIC, inputs="tensor" if static else "token"
    )
    model = load_model(open_checkpoint(fp8), torch.float32)
    rounded = [linear for linear in all_linears(model) if linear.activation_quant is not None]
    assert len(rounded) == 8
    for linear in rounded:
        assert isinstance(linear.activation_quant, ActivationQuant)
        scale = linear.activation_quant.scale
        assert (scale is not None) is static
        if scale is not None:
            torch.testing.assert_close(scale, torch.tensor([0.05]))
        linear.activation_quant = None
    dense = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", attn_implementation="eager", dtype="float32"
    )
    expected = oracle_logits(dense.eval(), tokens())
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["autofp8", "compressed-tensors"])
def test_fp8_per_tensor_is_packed_as_it_is_unpacked(name: Format) -> None:
    stored = {
        "weight": torch.randn(24, 40).to(torch.float8_e4m3fn),
        "weight_scale": torch.tensor([0.25]),
        "input_scale": torch.tensor(0.5),
    }
    weight = FORMATS[name].unpack(STATIC, stored)
    assert torch.equal(weight.dequantize(), stored["weight"].float() * 0.25)
    assert weight.input_scale is not None and weight.input_scale.tolist() == [0.5]
    again = FORMATS[name].pack(STATIC, weight)
    assert again.keys() == stored.keys()
    for key, tensor in again.items():
        assert torch.equal(tensor.float().flatten(), stored[key].float().flatten()), key
    written = FORMATS[name].config_dict(QuantizationConfig(name, STATIC))
    parsed = parse_quantization(written, [f"{Q_PROJ}.weight_scale"])
    assert (parsed.format, parsed.scheme) == (name, STATIC)


def test_autofp8_merged_linear_rounds_inputs_by_the_largest_scale(tmp_path: Path) -> None:
    """As vLLM does: q, k and v read the same inputs. Scales are [] or [1], in any float type."""
    fp8 = write_pair(tmp_path, autofp8=True, static=True)
    scales = (("q_proj", torch.tensor([0.25])), ("k_proj", torch.tensor(0.5).bfloat16()))
    changed(fp8, {f"{ATTENTION}.{name}.input_scale": scale for name, scale in scales})
    changed(fp8, {f"{Q_PROJ}.weight_scale": torch.tensor([2.0])})
    checkpoint = open_checkpoint(fp8)
    check(fp8)
    rows = {row.name: row for row in parameters(checkpoint_spec(checkpoint))}
    row = rows["layers.0.attn.qkv.weight"]
    quant = read_activation_quant(checkpoint, row)[row.module]
    assert quant.scale is not None and quant.scale.tolist() == [0.5]
    q = load_file(fp8 / "model.safetensors")[f"{Q_PROJ}.weight"]
    found = read_parameter(checkpoint, row, torch.float32)[: len(q)]
    assert torch.equal(found, q.float() * 2)


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("kv_scale",)])
def test_autofp8_scales_of_the_kv_cache_are_read(tmp_path: Path, names: tuple[str, ...]) -> None:
    fp8 = write_pair(tmp_path, autofp8=True)
    values = {
        f"model.layers.{layer}.self_attn.{name}": torch.tensor(0.5 + index)
        for layer in range(2)
        for index, name in enumerate(names)
    }
    checkpoint = open_checkpoint(changed(fp8, values))
    check(fp8)
    assert checkpoint.quantization is not None and checkpoint.quantization.kv == "fp8"
    rows = {row.name: row for row in parameters(checkpoint_spec(checkpoint))}
    quants = read_activation_quant(checkpoint, rows["layers.1.attn.qkv.weight"])
    for index, name in enumerate(("k", "v")):
        quant = quants[f"layers.1.attn.{name}"]
        assert quant.scale is not None and quant.value_type == "fp8"
        assert quant.scale.tolist() == [0.5 + index * (len(names) > 1)]
    assert logits_of(load_model(checkpoint, torch.float32, packed=True)).isfinite().all()


def test_autofp8_ignored_layers_are_dense(tmp_path: Path) -> None:
    ignored = ["lm_head", "model.layers.1.mlp.down_proj", "re:.*o_proj"]
    family_oracle("qwen3", tmp_path / "dense", **SIZES)
    linears = r"layers\.(0\.mlp.*|1\.mlp\.(gate|up)|\d\.self_attn\.[qkv])_proj\.weight$"
    write_fp8(
        tmp_path / "dense",
        tmp_path / "fp8",
        None,
        autofp8=True,
        linears=linears,
        ignored_layers=ignored,
    )
    check(tmp_path / "fp8")
    assert inspect_checkpoint(open_checkpoint(tmp_path / "fp8"))["quantization"]["schemes"]
    edit_config(tmp_path / "fp8", quantization_config={"quant_method": "fp8"})
    with pytest.raises(InputError, match=r"lacks 3 tensors \(.*weight_scale"):
        check(tmp_path / "fp8")


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            {f"{Q_PROJ}.weight_scale": torch.ones(64, 1)},
            {},
            r"weight_scale has shape \[64, 1\]. Shape \[\] was expected",
        ),
        ({}, {"weight_block_size": [32, 32]}, "and tensors with the name weight_scale. Expected"),
        ({}, {"activation_scheme": "static"}, r"lacks 14 tensors \(.*q_proj.input_scale"),
        (
            {},
            {"ignored_layers": ["lm_head", Q_PROJ]},
            rf"1 tensor \({Q_PROJ}.weight_scale\) of quantized layers, and the"
            " quantization_config in config.json says that these layers are not quantized",
        ),
    ],
)
def test_autofp8_checkpoint_with_wrong_tensors_is_refused(
    tmp_path: Path,
    change: dict[str, torch.Tensor | None],
    config: dict[str, Any],
    message: str,
) -> None:
    fp8 = changed(write_pair(tmp_path, autofp8=True, **config), change)
    with pytest.raises(InputError, match=message) as caught:
        check(fp8)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_autofp8_checkpoint_is_split_and_merged(tmp_path: Path, family: str) -> None:
    fp8 = write_pair(tmp_path, family, autofp8=True, static=True)
    shard(fp8, tmp_path / "ranks", 2)
    assert not verify(tmp_path / "ranks").problems
    dense_parts = rank_parts(open_checkpoint(tmp_path / "dense"), 2)
    parts = rank_parts(open_checkpoint(tmp_path / "ranks"))
    for dense, part in zip(dense_parts, parts, strict=True):
        for row in parameters(dense.spec):
            expected = read_parameter(dense.checkpoint, row, torch.float32)
            assert torch.equal(read_parameter(part.checkpoint, row, torch.float32), expected)
            if row.is_linear:
                assert row.module in read_activation_quant(part.checkpoint, row)
    merge(tmp_path / "ranks", tmp_path / "merged")
    assert stored_bytes(tmp_path / "merged") == stored_bytes(fp8)


def run(source: Path, out: Path, method: str = "bf16") -> Path:
    options = dataclasses.replace(OPTIONS, method=method)
    quantize(str(source), str(out), options, SilentProgress())
    return out


def test_quantize_autofp8_source_gives_the_tensors_of_the_dense_one(tmp_path: Path) -> None:
    fp8 = write_pair(tmp_path, autofp8=True, static=True)
    write_tokenizer(tmp_path / "dense")
    write_tokenizer(fp8)
    expected = load_file(run(tmp_path / "dense", tmp_path / "a") / "model.safetensors")
    found = load_file(run(fp8, tmp_path / "b") / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", ["bf16", "fp8"])
def test_quantize_replaces_a_quantization_config_of_the_text_model(
    tmp_path: Path, method: str
) -> None:
    dense = save_wrapper(tiny_wrapper("ministral3"), tmp_path / "dense", hub_names=False)
    fp8 = tmp_path / "fp8"
    write_fp8(dense, fp8, (16, 16), linears=r"language_model.*_proj\.weight$")
    config = load_json(fp8 / "config.json")
    entry = config["quantization_config"]
    text_config = config["text_config"] | {"quantization_config": entry}
    edit_config(fp8, quantization_config=None, text_config=text_config)
    check(fp8)
    out = run(fp8, tmp_path / "out", method)
    written = load_json(out / "config.json")
    assert "quantization_config" not in written["text_config"]
    assert ("quantization_config" in written) is (method == "fp8")
    check(out)


def test_quantization_of_modules_in_the_names_of_another_version(tmp_path: Path) -> None:
    """The checkpoint has the names of transformers 5, and the config those of vLLM's modules."""
    dense = save_wrapper(tiny_wrapper("ministral3"), tmp_path / "dense", hub_names=False)
    linears = r"model\.language_model\.layers\.(0\.mlp|\d\.self_attn).*_proj\.weight$"
    ignored = [f"language_model.model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    ignored += ["language_model.lm_head", "vision_tower", "multi_modal_projector"]
    write_fp8(dense, tmp_path / "fp8", (16, 16), linears=linears, modules_to_not_convert=ignored)
    check(tmp_path / "fp8")


def stacked_experts(folder: Path) -> Path:
    """A checkpoint in compressed-tensors whose experts are dense, all of a layer in one tensor."""
    dense = save_wrapper(tiny_wrapper("qwen3-vl-moe"), folder / "dense", hub_names=False)
    write_fp8(
        dense,
        folder / "fp8",
        None,
        compressed_tensors=True,
        linears=r"language_model.*self_attn\.\w_proj\.weight$",
    )
    return folder / "fp8"


def test_experts_in_one_tensor_are_dense_beside_quantized_linears(tmp_path: Path) -> None:
    """They are no linear layers, whatever `targets: [Linear]` and `ignore` say."""
    fp8 = stacked_experts(tmp_path)
    check(fp8)
    model = load_model(open_checkpoint(fp8), torch.float32)
    for linear in all_linears(model):
        linear.activation_quant = None
    expected = load_model(open_checkpoint(tmp_path / "dense"), torch.float32)
    torch.testing.assert_close(logits_of(model), logits_of(expected), atol=1e-4, rtol=0)


def test_experts_in_one_tensor_of_fp8_are_refused(tmp_path: Path) -> None:
    fp8 = stacked_experts(tmp_path)
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    values = load_file(fp8 / "model.safetensors")[name]
    changed(fp8, {name: values.to(torch.float8_e4m3fn)})
    message = f"{name} has dtype F8_E4M3. It holds all experts of a layer, and config.json says"
    with pytest.raises(InputError, match=message):
        check(fp8)


def test_quantized_experts_of_a_model_without_a_family_are_refused(tmp_path: Path) -> None:
    config = transformers.PhimoeConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        pad_token_id=0,
    )
    transformers.PhimoeForCausalLM(config).save_pretrained(tmp_path / "dense")
    write_fp8(tmp_path / "dense", tmp_path / "fp8", (32, 32))
    with pytest.raises(InputError) as caught:
        check(tmp_path / "fp8")
    message = str(caught.value)
    assert "w1.weight_scale_inv" in message and "of quantized layers that run only as" in message
    assert "Experts and routers of a PhimoeForCausalLM were expected in 16 or 32 bits" in message
