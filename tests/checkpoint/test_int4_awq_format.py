"""INT4 of Model-Optimizer (W4A16_AWQ): packing, pre_quant_scale, what is written and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.compare_ranks import compare_ranks
from support.int4_awq_files import dequantize_plain, write_int4_awq
from support.paged_sequences import Sequences, close, tokens_of
from support.quantized_files import quantized_weights
from support.tiny_families import family_oracle, oracle_logits
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_formats import FORMATS
from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.cli.main import run
from llmkit.common.errors import InputError
from llmkit.model.linear import Linear, PackedLinear, serving_linear
from llmkit.model.weight_loader import load_model
from llmkit.quant.convert_checkpoint import convert
from llmkit.shard.shard_checkpoint import shard

DATA = Path(__file__).parents[1] / "data"
FORM = FORMATS["modelopt"]
EXPORT = DATA / "modelopt_int4_awq"
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
ALONE = r"(o_proj|down_proj|w2)$"  # the linears that engines fuse with no other
Read = pytest.CaptureFixture[str]


# Model-Optimizer's own packer and export, see tests/peers


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_awq_bytes_are_those_of_model_optimizer(group_size: int) -> None:
    case = f"groups of {group_size}."
    with safe_open(DATA / "int4_awq.safetensors", "pt") as file:
        assert file.metadata()["nvidia-modelopt"] == "0.47.0"
        names = [name for name in file.keys() if name.startswith(case)]  # noqa: SIM118
        found = {name.removeprefix(case): file.get_tensor(name) for name in names}
    dense = found.pop("dense")
    scheme = Scheme(4, group_size)
    weight = FORM.unpack(scheme, found)
    assert torch.equal(weight.dequantize(), dense)
    scales = found["weight_scale"]
    q = dense / scales.float().repeat_interleave(group_size, 1) + 8
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    packed = FORM.pack(scheme, QuantizedWeight(q.to(torch.uint8), scales, zeros, scheme))
    assert packed.keys() == found.keys()
    for suffix, tensor in packed.items():
        assert tensor.dtype == found[suffix].dtype and torch.equal(tensor, found[suffix])


def dequantized_oracle(path: Path) -> torch.nn.Module:
    """transformers' model of a W4A16_AWQ checkpoint, with dense weights."""
    stored = load_file(path / "model.safetensors")
    dense = {}
    for name, tensor in stored.items():
        module = name.removesuffix(".weight")
        if tensor.dtype == torch.uint8:
            scale = stored.get(f"{module}.pre_quant_scale")
            dense[name] = dequantize_plain(tensor, stored[f"{module}.weight_scale"], scale)
        elif name.endswith(".weight"):
            dense[name] = tensor.float()
    config = transformers.AutoConfig.from_pretrained(path)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.float().eval().load_state_dict(dense)
    return model


@pytest.mark.parametrize("packed", [False, True])
def test_export_of_model_optimizer_has_the_logits_of_transformers(packed: bool) -> None:
    oracle = dequantized_oracle(EXPORT)
    tokens = tokens_of(24, 3)
    model = load_model(open_checkpoint(EXPORT), torch.float32, packed=packed)
    run = Sequences(model, [tokens])
    logits = [run.step([20])[0], *(run.step([1])[0] for _ in range(4))]
    close(torch.cat(logits), oracle_logits(oracle, tokens))


def test_export_of_model_optimizer_is_dequantized_by_quantize(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--method", "fp16", "--no-eval", "--device", "cpu", "--quiet"]
    assert run(["quantize", str(EXPORT), *words, "-o", str(out)]) == 0
    written = load_file(out / "model.safetensors")
    expected = dequantized_oracle(EXPORT).state_dict()
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, expected[name].to(torch.float16)), name


# Models of several families


def count_scales(path: Path) -> int:
    names = open_checkpoint(path).tensor_names
    return sum(name.endswith(".pre_quant_scale") for name in names)


@pytest.mark.parametrize(
    ("family", "scaled", "scale_of", "num_scales"),
    [
        ("qwen3", ALONE, ".*", 4),
        ("mixtral", ALONE, ".*", 10),
        ("phi3", "proj$", ".*", 8),
        # All linears, with the same values in q, k and v and in gate and up, and with others.
        ("llama", "proj$", r".*(self_attn|mlp)\.[od]?", 14),
        ("llama", "proj$", ".*", 14),
    ],
)
def test_pre_quant_scale_multiplies_the_inputs(
    family: str, scaled: str, scale_of: str, num_scales: int, tmp_path: Path
) -> None:
    family_oracle(family, tmp_path / "dense", **SIZES)
    write_int4_awq(tmp_path / "dense", tmp_path / "packed", 32, scaled, scale_of)
    assert count_scales(tmp_path / "packed") == num_scales
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, attn_implementation="eager"
    )
    tokens = tokens_of(24, 3)
    expected = oracle_logits(oracle, tokens)
    checkpoint = open_checkpoint(tmp_path / "packed")
    for packed in (False, True):
        model = load_model(checkpoint, torch.float32, packed=packed)
        close(Sequences(model, [tokens]).step([24])[0], expected)


@pytest.mark.parametrize(
    ("family", "scaled", "layout"),
    [
        ("qwen3", ALONE, (2, 1, 1)),
        ("qwen3", "proj$", (2, 2, 1)),
        ("minimax-m2", ALONE, (2, 1, 2)),
        ("phi3", "proj$", (2, 1, 1)),
    ],
)
def test_shard_int4_awq_ranks_have_the_values_of_the_whole(
    family: str, scaled: str, layout: tuple[int, int, int], tmp_path: Path
) -> None:
    family_oracle(family, tmp_path / "dense", **SIZES)
    write_int4_awq(tmp_path / "dense", tmp_path / "packed", 32, scaled)
    for checkpoint, row in compare_ranks(tmp_path / "packed", tmp_path, layout, min_linears=8):
        quantization = checkpoint.quantization
        assert quantization is not None
        for name in row.source_names:
            module = name.removesuffix(".weight")
            has_scale = quantization.has_pre_quant_scale(module)
            assert has_scale is (f"{module}.pre_quant_scale" in checkpoint.tensors)


def test_shard_int4_awq_refuses_slices_that_cut_a_group(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"o_proj: 128/2 = 0\.5 groups of 128"):
        shard(EXPORT, tmp_path / "out", 2)


def int4_weight(pre_quant_scale: torch.Tensor | None) -> QuantizedWeight:
    scheme = Scheme(4, 32)
    draw = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (8, 64), generator=draw, dtype=torch.uint8)
    zeros = torch.full((8, 2), 8, dtype=torch.uint8)
    weight = QuantizedWeight(q, torch.rand(8, 2, generator=draw), zeros, scheme)
    weight.pre_quant_scale = pre_quant_scale
    return weight


def test_serving_linear_keeps_the_weight_packed_when_its_parts_share_a_pre_quant_scale() -> None:
    scale = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5
    other = scale.flip(0)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    layer: Linear
    for scales, is_shared in (((scale, scale), True), ((scale, other), False)):
        parts = [int4_weight(one) for one in scales]
        layer = serving_linear(parts, None, None, torch.float32)
        assert isinstance(layer, PackedLinear)
        assert (layer.pre_quant_scale is not None) is is_shared
        assert layer.input_quant is None or not is_shared
        expected = x @ torch.cat([part.dequantize() for part in parts]).T
        torch.testing.assert_close(layer(x), expected)
    layer = serving_linear([int4_weight(scale), int4_weight(None)], None, None, torch.float32)
    expected = x @ torch.cat([int4_weight(scale).dequantize(), int4_weight(None).dequantize()]).T
    torch.testing.assert_close(layer(x), expected)


# What is written


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "model"
    return tiny_checkpoint(path, hidden_size=64, intermediate_size=128)


def quantize(dense: Path, out: Path, *words: str) -> int:
    samples = ["--samples", "2", "--seq-len", "32", "--no-eval", "--device", "cpu", "--quiet"]
    return run(["quantize", str(dense), *words, *samples, "-o", str(out)])


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_quantize_writes_the_values_of_compressed_tensors(
    method: str, dense: Path, tmp_path: Path
) -> None:
    words = ["--method", method, "--bits", "4", "--symmetric"]
    for form in ("modelopt", "compressed-tensors"):
        assert quantize(dense, tmp_path / form, *words, "--format", form) == 0
    out = tmp_path / "modelopt"
    weights = quantized_weights(out)
    others = quantized_weights(tmp_path / "compressed-tensors")
    assert weights.keys() == others.keys() and len(weights) == 14
    for name, weight in weights.items():
        assert torch.equal(weight.q, others[name].q)
        assert torch.equal(weight.dequantize(), others[name].dequantize())
    tensors = load_file(out / "model.safetensors")
    scales = {name: value for name, value in tensors.items() if "pre_quant_scale" in name}
    assert sorted({name.split(".")[-2] for name in scales}) == ["down_proj", "o_proj"]
    assert len(scales) == 4 and all(bool((value == 1).all()) for value in scales.values())
    document = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert document == {
        "quant_algo": "W4A16_AWQ",
        "group_size": 64,
        "has_zero_point": False,
        "pre_quant_scale": True,
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
    }
    # Ones cost no product.
    model = load_model(open_checkpoint(out), torch.float32, packed=True)
    assert all(linear.pre_quant_scale is None for linear in model.weights()[0])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ["--asymmetric"],
            2,
            "--format modelopt does not support --asymmetric. --symmetric goes with it. Use"
            " --format compressed-tensors",
        ),
        (
            ["--group-size", "-1"],
            3,
            "weight with one scale for each row. A size of groups that divides",
        ),
        (["--lm-head", "4"], 2, "the modelopt format has no place for a quantized one"),
        (["--kv", "int8"], 2, "--format modelopt has no place for the scales of an INT8 KV cache"),
        (
            ["--for", "vllm@h100"],
            2,
            "vllm does not read INT4 of the modelopt format. Use --format compressed-tensors",
        ),
        (["--for", "transformers"], 2, "transformers does not read the modelopt format"),
    ],
)
def test_quantize_refuses_what_the_format_has_no_place_for(
    words: list[str], code: int, message: str, dense: Path, tmp_path: Path, capsys: Read
) -> None:
    words = ["--method", "awq", "--format", "modelopt", *words]
    assert quantize(dense, tmp_path / "out", *words) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("bits", ["8", "3"])
def test_quantize_refuses_other_bits(bits: str, dense: Path, tmp_path: Path, capsys: Read) -> None:
    words = ["--method", "rtn", "--bits", bits, "--format", "modelopt"]
    assert quantize(dense, tmp_path / "out", *words) == 2
    assert "and --format modelopt do not go together" in capsys.readouterr().err


def test_int4_awq_refuses_an_odd_number_of_rows_and_uneven_groups() -> None:
    with pytest.raises(InputError, match=r"cannot store a \[7, 64\] weight. An even number"):
        FORM.tensors(Scheme(4, 32), 7, 64)
    with pytest.raises(InputError, match=r"\[8, 80\] weight in groups of 32. A size of groups"):
        FORM.tensors(Scheme(4, 32), 8, 80)


# What is refused


@pytest.mark.parametrize("target", ["compressed-tensors", "gguf"])
def test_convert_refuses_a_pre_quant_scale(target: Any, dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "dense")
    source = tmp_path / "source"
    write_int4_awq(tmp_path / "dense", source, 32, ALONE)
    message = "o_proj.weight does not carry over: its inputs are multiplied by a pre_quant_scale"
    with pytest.raises(InputError, match=message) as caught:
        convert(source, tmp_path / "out", target)
    assert caught.value.exit_code == 3
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_pre_quant_scale_that_is_no_scale_is_refused(value: float, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(EXPORT, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.pre_quant_scale"][5] = value
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"o_proj.weight: 1 of 128 values of pre_quant_scale are"):
        load_model(open_checkpoint(path), torch.float32)


def test_group_size_that_disagrees_with_the_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(EXPORT, path)
    document = json.loads((path / "hf_quant_config.json").read_text())
    document["quantization"]["group_size"] = 64
    (path / "hf_quant_config.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"weight_scale has shape \[\d+, \d\]. Shape \[\d+, \d\]"):
        load_model(open_checkpoint(path), torch.float32)
