"""gpt-oss: MXFP4 experts against the same values in transformers, on ranks, and wrong inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.mxfp4_files import pack_mxfp4, write_gpt_oss
from support.synthetic_checkpoint import stored_bytes
from support.tiny_adapters import write_adapter
from support.tiny_families import oracle_logits
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from llmkit.checkpoint.mxfp4_format import SCHEME
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_formats import FORMATS
from llmkit.common.errors import InputError
from llmkit.common.progress import SilentProgress
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_kernels import DEPTH_MULTIPLE
from llmkit.kernels.fp4_expert import Fp4Expert
from llmkit.model import decoder, weight_loader
from llmkit.model.families import checkpoint_spec, model_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.linear import PackedLinear
from llmkit.model.lora import load_adapter
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import load_model
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.memory_plan import weight_bytes
from llmkit.runtime.parallel.leader import LeadEngine
from llmkit.shard.merge import merge
from llmkit.shard.shard_checkpoint import shard
from llmkit.shard.valid_layouts import valid_ep, valid_layouts
from llmkit.shard.verify import verify

GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
PROMPTS = [[5, 6, 7], [9, 8, 7, 6] * 8]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@dataclass(frozen=True)
class GptOss:
    """One model in two checkpoints: `dense`, and `mxfp4` with the same values."""

    oracle: torch.nn.Module
    dense: Path
    mxfp4: Path

    def path(self, kind: str) -> Path:
        return self.mxfp4 if kind == "mxfp4" else self.dense


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> GptOss:
    folder = tmp_path_factory.mktemp("gpt_oss")
    dense, mxfp4 = folder / "dense", folder / "mxfp4"
    return GptOss(write_gpt_oss(dense, mxfp4), dense, mxfp4)


def tokens() -> torch.Tensor:
    return torch.randint(3, 128, (70,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["dense", "mxfp4"])
@pytest.mark.parametrize("packed", [False, True], ids=["dequantized", "packed"])
def test_gpt_oss_agrees_with_transformers(gpt_oss: GptOss, kind: str, packed: bool) -> None:
    model = load_model(open_checkpoint(gpt_oss.path(kind)), torch.float32, packed=packed)
    with torch.inference_mode():
        logits = next(window_logits(model, tokens()[None]))
    torch.testing.assert_close(logits, oracle_logits(gpt_oss.oracle, tokens()), atol=1e-4, rtol=0)


@pytest.mark.skipif(cpu_kernels.library is None, reason="without the compiled kernels")
def test_mxfp4_experts_stay_packed(gpt_oss: GptOss) -> None:
    model = load_model(open_checkpoint(gpt_oss.mxfp4), torch.float32, packed=True)
    linear = model.layers[0].linears["mlp.experts.1.gate_up"]
    assert isinstance(linear, PackedLinear)
    rows, columns = linear.weight.shape
    # Half a byte for a value, a byte for a block of 32, and a float32 for a row. Inputs are padded
    # to multiples of 64.
    padded = columns + -columns % DEPTH_MULTIPLE
    assert linear.kernel.nbytes == rows * (padded // 2 + columns // 32 + 4)


def test_gpt_oss_without_compiled_kernels(gpt_oss: GptOss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "library", None)
    model = load_model(open_checkpoint(gpt_oss.mxfp4), torch.float32, packed=True)
    with torch.inference_mode():
        logits = next(window_logits(model, tokens()[None]))
    torch.testing.assert_close(logits, oracle_logits(gpt_oss.oracle, tokens()), atol=1e-4, rtol=0)


@pytest.mark.skipif(cpu_kernels.library is None, reason="without the compiled kernels")
def test_memory_plan_counts_mxfp4_experts_as_they_are_held(gpt_oss: GptOss) -> None:
    checkpoint = open_checkpoint(gpt_oss.mxfp4)
    spec = checkpoint_spec(checkpoint)
    rows = [row for row in parameters(spec) if row.expert is not None and row.is_linear]
    cpu = torch.device("cpu")
    planned = weight_bytes(checkpoint, spec, torch.float32, cpu, rows)
    model = load_model(checkpoint, torch.float32, packed=True)
    held = 0
    for layer in model.layers:
        for name, linear in layer.linears.items():
            if ".experts." in name:
                assert isinstance(linear, PackedLinear)
                held += linear.kernel.nbytes
    assert planned == held


def test_mxfp4_experts_stay_packed_on_a_gpu(
    gpt_oss: GptOss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The linear layers of a GPU, here on the CPU: one by one, and next to each other."""
    checkpoint = open_checkpoint(gpt_oss.mxfp4)
    model = load_model(checkpoint, torch.float32)
    quantization = checkpoint.quantization
    row = next(row for row in parameters(model.spec) if row.expert == 1 and row.is_linear)
    for dtype, capability, stays in (
        (torch.bfloat16, (9, 0), True),
        (torch.bfloat16, (7, 5), False),
        (torch.float32, (9, 0), False),
    ):
        monkeypatch.setattr(weight_loader, "gpu_capability", lambda _, found=capability: found)
        assert weight_loader.can_stay_packed("cuda", row, quantization, dtype) is stays
    stored = load_file(gpt_oss.mxfp4 / "model.safetensors")
    for index, layer in enumerate(model.layers):
        for name in [name for name in layer.linears if ".experts." in name]:
            row = next(
                row for row in parameters(model.spec) if row.name == f"layers.{index}.{name}.weight"
            )
            parts = weight_loader._read_stored(checkpoint, row, "cpu")
            weight = torch.cat([part.q for part in parts])  # type: ignore[union-attr]
            scales = torch.cat([part.scales for part in parts])  # type: ignore[union-attr]
            linear = layer.linears[name]
            kernel = Fp4Expert(weight, scales, linear.bias)
            assert torch.equal(kernel.dequantize(), linear.weight)
            layer.linears[name] = PackedLinear(kernel, (linear.weight.shape[0], weight.shape[1]))
    oracle = oracle_logits(gpt_oss.oracle, tokens())
    with torch.inference_mode():
        torch.testing.assert_close(
            next(window_logits(model, tokens()[None])), oracle, atol=1e-4, rtol=0
        )
        monkeypatch.setattr(decoder, "supports_fused_experts", lambda _: True)
        experts = model.layers[0].fused_experts
        assert experts is not None and experts.gate_up_scales is not None
        assert experts.gate_up.shape == (4, 128, 16) and experts.down.shape == (4, 32, 32)
        gates_first = torch.cat((torch.arange(0, 128, 2), torch.arange(1, 128, 2)))
        blocks = stored[f"{GATE_UP}_blocks"][:, gates_first].flatten(-2)
        assert torch.equal(experts.gate_up, blocks)
        assert torch.equal(experts.gate_up_scales, stored[f"{GATE_UP}_scales"][:, gates_first])
        assert experts.gate_up_bias is not None and experts.down_bias is not None
        assert torch.equal(experts.gate_up_bias, stored[f"{GATE_UP}_bias"][:, gates_first])
        assert experts.swiglu == (pytest.approx(0.7), pytest.approx(1.702))
        kernel = model.layers[0].linears["mlp.experts.2.down"].kernel  # type: ignore[assignment]
        assert kernel.blocks.data_ptr() == experts.down[2].data_ptr(), "nothing is held twice"
        torch.testing.assert_close(
            next(window_logits(model, tokens()[None])), oracle, atol=1e-4, rtol=0
        )


def answers(path: Path, **options: object) -> list[list[int]]:
    chosen = {"device": "cpu", "kv_cache_memory": 1 << 20} | options
    running = load_engine(path, EngineOptions(**chosen))
    try:
        return running.generate(PROMPTS, [GREEDY] * len(PROMPTS))
    finally:
        if isinstance(running, LeadEngine):
            running.close()


@pytest.fixture(scope="module")
def expected(gpt_oss: GptOss) -> list[list[int]]:
    """transformers' greedy answers."""
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(GREEDY.max_tokens or 0):
            ids.append(int(oracle_logits(gpt_oss.oracle, torch.tensor(ids))[-1].argmax()))
        found.append(ids[len(prompt) :])
    return found


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("mxfp4", {}),
        ("mxfp4", {"tp": 2}),
        pytest.param("mxfp4", {"tp": 2, "ep": 2}, marks=pytest.mark.slow),
        pytest.param("dense", {"tp": 2}, marks=pytest.mark.slow),
        pytest.param("dense", {"tp": 2, "ep": 2}, marks=pytest.mark.slow),
    ],
)
def test_gpt_oss_ranks_answer_as_transformers(
    gpt_oss: GptOss, expected: list[list[int]], kind: str, layout: dict[str, int]
) -> None:
    assert answers(gpt_oss.path(kind), **layout) == expected


@pytest.mark.slow
def test_gpt_oss_sharded_ranks_answer_as_transformers(
    gpt_oss: GptOss, expected: list[list[int]], tmp_path: Path
) -> None:
    shard(gpt_oss.mxfp4, tmp_path / "out", 2, 2)
    assert answers(tmp_path / "out") == expected


@pytest.mark.parametrize("kind", ["dense", "mxfp4"])
@pytest.mark.parametrize(("tp", "pp", "ep"), [(2, 1, 1), (2, 2, 2), (1, 2, 1)])
def test_gpt_oss_shards_merge_to_the_same_bytes(
    gpt_oss: GptOss, kind: str, tp: int, pp: int, ep: int, tmp_path: Path
) -> None:
    source = gpt_oss.path(kind)
    shard(source, tmp_path / "ranks", tp, pp, ep)
    assert verify(tmp_path / "ranks").problems == []
    merge(tmp_path / "ranks", tmp_path / "merged")
    assert stored_bytes(tmp_path / "merged") == stored_bytes(source)


def test_gpt_oss_rank_has_its_rows_of_gate_and_up(gpt_oss: GptOss, tmp_path: Path) -> None:
    """Rows of gate and up alternate, so that a rank's rows lie together."""
    whole = load_file(gpt_oss.mxfp4 / "model.safetensors")
    shard(gpt_oss.mxfp4, tmp_path / "tp", 2)
    rank = load_file(tmp_path / "tp" / "rank-pp0-tp1.safetensors")
    assert torch.equal(rank[f"{GATE_UP}_blocks"], whole[f"{GATE_UP}_blocks"][:, 64:])
    assert torch.equal(rank[f"{GATE_UP}_bias"], whole[f"{GATE_UP}_bias"][:, 64:])
    down = GATE_UP.replace("gate_up", "down")
    assert torch.equal(rank[f"{down}_scales"], whole[f"{down}_scales"][:, :, 1:])
    assert torch.equal(rank[f"{down}_bias"], whole[f"{down}_bias"])
    sinks = "model.layers.0.self_attn.sinks"
    assert torch.equal(rank[sinks], whole[sinks][2:])
    shard(gpt_oss.mxfp4, tmp_path / "ep", 2, ep=2)
    rank = load_file(tmp_path / "ep" / "rank-pp0-tp1.safetensors")
    assert torch.equal(rank[f"{down}_blocks"], whole[f"{down}_blocks"][2:])


def test_experts_in_one_tensor_are_split_in_one_way(gpt_oss: GptOss, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(gpt_oss.mxfp4)
    spec = checkpoint_spec(checkpoint)
    assert valid_ep(spec, checkpoint.quantization, 4) == [4]  # 64 columns are two blocks of 32
    assert valid_layouts(spec, checkpoint.quantization)[2] == [1, 2]
    with pytest.raises(InputError, match=r"all experts in one tensor.*but not over both; EP 4 w"):
        shard(gpt_oss.mxfp4, tmp_path / "out", 4, ep=2)
    with pytest.raises(InputError, match=r"down_proj: 64/4 = 0\.5 groups of 32"):
        shard(gpt_oss.mxfp4, tmp_path / "out", 4)


def test_cast_keeps_experts_in_one_tensor(gpt_oss: GptOss, tmp_path: Path) -> None:
    options = QuantizeOptions(method="bf16", evaluate=False)
    quantize(str(gpt_oss.dense), tmp_path / "out", options, SilentProgress())
    cast = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(
        cast[GATE_UP], load_file(gpt_oss.dense / "model.safetensors")[GATE_UP].bfloat16()
    )


def test_gpt_oss_adapters_are_of_attention(gpt_oss: GptOss, tmp_path: Path) -> None:
    """Experts in one tensor are no linear modules, which an adapter could be of."""
    spec = checkpoint_spec(open_checkpoint(gpt_oss.mxfp4))
    attention = write_adapter(gpt_oss.mxfp4, tmp_path / "a", r"self_attn\.\w+\.weight")
    loaded = load_adapter(attention, spec, torch.float32)
    assert set(loaded) == {f"layers.{n}.attn.{name}" for n in range(4) for name in ("qkv", "o")}
    experts = write_adapter(gpt_oss.dense, tmp_path / "b", "experts.down_proj_bias")
    with pytest.raises(InputError, match="experts"):
        load_adapter(experts, spec, torch.float32)


Tensors = dict[str, torch.Tensor]


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def replaced(
    name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, change(tensors[name]).contiguous())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("model.layers.1.self_attn.sinks"), r"lacks 1 tensor \(.*1\.self_attn\.sinks\)"),
        (without("model.layers.1.mlp.router.bias"), r"lacks 1 tensor \(.*1\.mlp\.router\.bias\)"),
        (without(f"{GATE_UP}_bias"), r"lacks 1 tensor \(.*gate_up_proj_bias\)"),
        (
            replaced(f"{GATE_UP}_blocks", lambda blocks: blocks[..., :8]),
            r"gate_up_proj_blocks has shape \[4, 128, 1, 8\]. Shape \[4, 128, 1, 16\] was",
        ),
        (
            replaced(f"{GATE_UP}_scales", lambda scales: scales[:3]),
            r"gate_up_proj_scales has shape \[3, 128, 1\]. Shape \[4, 128, 1\] was",
        ),
        (
            replaced(f"{GATE_UP}_blocks", lambda blocks: blocks.to(torch.int8)),
            "gate_up_proj_blocks has dtype I8. Dtype U8 was expected",
        ),
        (
            replaced(f"{GATE_UP}_scales", lambda scales: torch.full_like(scales, 255)),
            "values of scales are 255, not a number",
        ),
    ],
)
def test_gpt_oss_wrong_tensors_are_named(
    gpt_oss: GptOss, damage: Callable[[Tensors], None], message: str, tmp_path: Path
) -> None:
    tensors = load_file(gpt_oss.mxfp4 / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(gpt_oss.mxfp4 / "config.json", tmp_path)
    with pytest.raises(InputError, match=message):
        load_model(open_checkpoint(tmp_path), torch.float32)


def test_experts_in_one_tensor_need_a_format_for_them(gpt_oss: GptOss, tmp_path: Path) -> None:
    tensors = load_file(gpt_oss.dense / "model.safetensors")
    tensors[GATE_UP] = tensors[GATE_UP].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((gpt_oss.dense / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    message = r"gate_up_proj has dtype I8. It holds all experts of a layer.*in the format gptq"
    with pytest.raises(InputError, match=message):
        load_model(open_checkpoint(tmp_path), torch.float32)


def test_gpt_oss_config_without_a_limit_is_refused(gpt_oss: GptOss) -> None:
    config = json.loads((gpt_oss.dense / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(InputError, match=r"swiglu_limit -1\.0"):
        model_spec(config | {"swiglu_limit": -1.0})


def test_gpt_oss_20b_has_its_size() -> None:
    """The published sizes: 20.9 billion parameters, 36 of 24 layers' windows alternate."""
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_local_experts": 32,
        "max_position_embeddings": 131072,
    }
    spec = model_spec(config)
    total = sum(torch.Size(row.shape).numel() for row in parameters(spec))
    assert round(total / 1e9, 2) == 20.91
    assert [layer.sliding_window for layer in spec.layers[:3]] == [128, None, 128]


def test_mxfp4_values_are_those_of_transformers(gpt_oss: GptOss) -> None:
    stored = load_file(gpt_oss.mxfp4 / "model.safetensors")
    blocks, scales = stored[f"{GATE_UP}_blocks"], stored[f"{GATE_UP}_scales"]
    theirs = _convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    for expert in range(4):
        ours = FORMATS["mxfp4"].unpack(SCHEME, {"blocks": blocks[expert], "scales": scales[expert]})
        assert torch.equal(ours.dequantize(), theirs[expert].T)


def test_pack_mxfp4_of_the_tests_keeps_values_of_the_format() -> None:
    weight = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    packed = pack_mxfp4(weight)
    assert torch.equal(pack_mxfp4(packed.dense).dense, packed.dense)
    assert (packed.dense - weight).abs().max() < 1
