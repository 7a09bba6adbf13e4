"""Shard plans: which sizes divide a model, the slices of each rank, the arithmetic of refusals."""

import json
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from support.synthetic_checkpoint import LLAMA, synthetic_checkpoint

from llmkit.checkpoint.modelopt_format import ALGORITHMS
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.checkpoint.safetensors_header import TensorInfo, byte_count, read_header
from llmkit.common.errors import InputError, OutputError, ShortageError, UsageError
from llmkit.model.checkpoint_tensors import checkpoint_tensors
from llmkit.model.families import model_spec
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import GatedDeltaNetSpec, LayerSpec, ModelSpec
from llmkit.shard.layout_capacity import gpu_bytes, plan_report
from llmkit.shard.pipeline_stages import balanced_stages
from llmkit.shard.shard_checkpoint import open_source, shard
from llmkit.shard.shard_plan import ShardPlan, plan_shards
from llmkit.shard.valid_layouts import (
    expert_count,
    explain_ep,
    explain_tp,
    valid_ep,
    valid_layouts,
    valid_tp,
)

INT4_64 = QuantizationConfig("gptq", Scheme(4, 64))
INT4_128 = QuantizationConfig("gptq", Scheme(4, 128))
SMOLLM2 = model_spec(
    LLAMA
    | {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
    }
)


def spec(**changes: object) -> ModelSpec:
    return replace(model_spec(LLAMA), **changes)  # type: ignore[arg-type]


def plan_of(
    model: ModelSpec,
    quantization: QuantizationConfig | None,
    tp: int,
    pp: int,
    ep: int = 1,
    pp_layers=(),
) -> ShardPlan:
    infos = {}
    for name, (_, packed) in checkpoint_tensors(model, quantization).items():
        dtype = packed.dtype or "BF16"
        nbytes = byte_count(dtype, packed.shape)
        infos[name] = TensorInfo(name, dtype, packed.shape, end=nbytes)
    return plan_shards(model, quantization, infos, tp, pp, ep, pp_layers)


def test_valid_tp_of_smollm2_is_one_or_three() -> None:
    for quantization in (None, INT4_64):
        assert valid_tp(SMOLLM2, quantization) == [1, 3]
        assert explain_tp(SMOLLM2, quantization, 1) is None
        assert explain_tp(SMOLLM2, quantization, 3) is None
        assert explain_tp(SMOLLM2, quantization, 2) == "q_proj: 9/2 = 4.5 heads; TP 1, 3 work"
    # Nine ranks have a head each and three share a KV head, but the MLP does not divide.
    assert explain_tp(SMOLLM2, None, 9) == "gate_proj: 1536/9 = 170.667 features; TP 1, 3 work"
    assert valid_tp(replace(SMOLLM2, intermediate_size=1152), None) == [1, 3, 9]


def test_plan_of_smollm2_shapes_of_a_rank() -> None:
    plan = plan_of(SMOLLM2, INT4_64, 3, 1)
    layer = {
        piece.name.removeprefix("model.layers.7."): piece
        for piece in plan.ranks[2].slices
        if piece.name.startswith("model.layers.7.")
    }
    shapes = {
        name: piece.shape for name, piece in layer.items() if "k_proj" in name or "down" in name
    }
    assert shapes == {
        "self_attn.k_proj.qweight": (72, 64),
        "self_attn.k_proj.qzeros": (9, 8),
        "self_attn.k_proj.scales": (9, 64),
        "self_attn.k_proj.g_idx": (576,),
        "mlp.down_proj.qweight": (64, 576),
        "mlp.down_proj.qzeros": (8, 72),
        "mlp.down_proj.scales": (8, 576),
        "mlp.down_proj.g_idx": (512,),
    }
    assert layer["mlp.down_proj.qweight"].intervals == ((128, 192),)
    assert layer["mlp.down_proj.scales"].intervals == ((16, 24),)
    assert (layer["mlp.down_proj.g_idx"].intervals, layer["mlp.down_proj.g_idx"].first_group) == (
        ((1024, 1536),),
        16,
    )
    assert layer["self_attn.o_proj.g_idx"].first_group == 6
    assert layer["self_attn.k_proj.g_idx"].first_group == 0
    assert layer["self_attn.k_proj.qzeros"].intervals == ((16, 24),)
    (embed,) = [piece for piece in plan.ranks[2].slices if "embed" in piece.name]
    assert (embed.intervals, embed.padding) == (((32768, 49152),), 0)


REFUSALS = [
    # Qwen2.5-72B's MLP with heads that three divides.
    (
        {"num_heads": 12, "num_kv_heads": 12, "head_dim": 128, "intermediate_size": 29568},
        INT4_128,
        2,
        "down_proj: 29568/2 = 115.5 groups of 128; TP 1, 3 work",
    ),
    (
        {"num_heads": 42, "num_kv_heads": 42, "head_dim": 128, "intermediate_size": 29568},
        INT4_128,
        2,
        "down_proj: 29568/2 = 115.5 groups of 128; TP 1, 3, 7, 21 work",
    ),
    (
        {"num_heads": 4, "num_kv_heads": 4, "head_dim": 4, "intermediate_size": 64},
        QuantizationConfig("gptq", Scheme(4, 8)),
        4,
        "q_proj: 16/4 = 0.5 packed words of 8; TP 1, 2 work",
    ),
    (
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 64},
        QuantizationConfig("gptq", Scheme(4, 16)),
        4,
        "o_proj: 32/4 = 0.5 groups of 16; TP 1, 2 work",
    ),
    (
        {"num_heads": 16, "num_kv_heads": 2, "head_dim": 4, "intermediate_size": 64},
        QuantizationConfig("gptq", Scheme(4, 16)),
        4,
        "k_proj: one KV head of 4 = 0.5 packed words of 8; TP 1 works",
    ),
    (
        {"num_heads": 8, "num_kv_heads": 4, "head_dim": 4, "intermediate_size": 64},
        QuantizationConfig("gptq", Scheme(4, 8)),
        4,
        "k_proj: 16/4 = 0.5 packed words of 8; TP 1, 2 work",
    ),
    (
        {"num_heads": 8, "num_kv_heads": 8, "head_dim": 16, "intermediate_size": 256},
        QuantizationConfig("modelopt", ALGORITHMS["FP8_PB_WO"]),
        2,
        "q_proj: 128/2 = 0.5 blocks of 128; TP 1 works",
    ),
    (
        {"num_heads": 16, "num_kv_heads": 8, "head_dim": 8, "intermediate_size": 256},
        QuantizationConfig("gptq", Scheme(3, 8)),
        4,
        "k_proj: 64/4 = 0.5 times 32 packed values; TP 1, 2 work",
    ),
    (
        {"num_heads": 24, "num_kv_heads": 8, "head_dim": 8, "intermediate_size": 96},
        None,
        12,
        "k_proj: 12/8 = 1.5 ranks per KV head; TP 1, 2, 4, 8, 24 work",
    ),
    (
        {"num_heads": 12, "num_kv_heads": 4, "head_dim": 8, "intermediate_size": 96},
        None,
        3,
        "k_proj: 4/3 = 1.333 KV heads; TP 1, 2, 4, 12 work",
    ),
    (
        {"num_heads": 4, "num_kv_heads": 4, "intermediate_size": 66},
        None,
        4,
        "gate_proj: 66/4 = 16.5 features; TP 1, 2 work",
    ),
]


@pytest.mark.parametrize(
    ("changes", "quantization", "tp", "text"), REFUSALS, ids=lambda value: str(value)[:30]
)
def test_explain_tp_shows_the_arithmetic(changes, quantization, tp: int, text: str) -> None:
    model = spec(**changes)
    assert explain_tp(model, quantization, tp) == text
    with pytest.raises(InputError, match=re.escape(f"--tp {tp} does not divide {text}")) as caught:
        plan_of(model, quantization, tp, 1)
    assert caught.value.exit_code == 3
    for works in valid_tp(model, quantization):
        assert explain_tp(model, quantization, works) is None
        plan_of(model, quantization, works, 1)


GATED_DELTA_NET = {
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "mlp_only_layers": [0, 1],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}


def hybrid(architecture: str, model_type: str) -> ModelSpec:
    names = {"architectures": [architecture], "model_type": model_type}
    return model_spec(LLAMA | GATED_DELTA_NET | names)


def test_explain_tp_counts_key_heads_of_a_gated_delta_net() -> None:
    qwen3_next = hybrid("Qwen3NextForCausalLM", "qwen3_next")
    assert explain_tp(qwen3_next, None, 3) == "in_proj_qkvz: 4/3 = 1.333 key heads; TP 1, 2 work"
    groups = QuantizationConfig("gptq", Scheme(4, 64))
    assert isinstance(qwen3_next.recurrent, GatedDeltaNetSpec)
    small = replace(qwen3_next, recurrent=replace(qwen3_next.recurrent, head_v_dim=8))
    assert explain_tp(small, groups, 2) == "out_proj: 64/2 = 0.5 groups of 64; TP 1 works"


def test_plan_gives_a_rank_the_value_heads_of_its_key_heads() -> None:
    """In Qwen3.5 parts follow one another; in Qwen3-Next a key head has a part of each."""
    rank_rows = {}
    for architecture, model_type in (
        ("Qwen3_5ForCausalLM", "qwen3_5_text"),
        ("Qwen3NextForCausalLM", "qwen3_next"),
    ):
        plan = plan_of(hybrid(architecture, model_type), None, 2, 1)
        rank_rows |= {piece.name.removeprefix("model."): piece for piece in plan.ranks[1].slices}
    rows = {name: piece.intervals for name, piece in rank_rows.items()}
    qkv = ((16, 32), (48, 64), (128, 192))  # queries, keys, values
    assert rows["layers.0.linear_attn.in_proj_qkv.weight"] == qkv
    assert rows["layers.0.linear_attn.conv1d.weight"] == qkv
    assert rank_rows["layers.0.linear_attn.conv1d.weight"].shape == (96, 1, 4)
    assert rows["layers.0.linear_attn.in_proj_z.weight"] == ((64, 128),)
    assert rows["layers.0.linear_attn.in_proj_b.weight"] == ((4, 8),)
    assert rows["layers.0.linear_attn.A_log"] == ((4, 8),)
    assert rows["layers.0.linear_attn.norm.weight"] == ((0, 16),)
    assert rank_rows["layers.0.linear_attn.out_proj.weight"].dim == 1
    assert rows["layers.0.linear_attn.out_proj.weight"] == ((64, 128),)
    assert rows["layers.0.linear_attn.in_proj_qkvz.weight"] == ((160, 320),)
    assert rows["layers.0.linear_attn.in_proj_ba.weight"] == ((8, 16),)
    assert rows["layers.1.self_attn.q_proj.weight"] == ((192, 384),), "queries and gates"


def test_valid_tp_needs_whole_groups_along_the_input_only() -> None:
    packed = QuantizationConfig("compressed-tensors", Scheme(4, 16))
    assert valid_tp(
        spec(num_heads=4, num_kv_heads=4, head_dim=4, intermediate_size=64), packed
    ) == [1]
    assert valid_tp(
        spec(num_heads=4, num_kv_heads=4, head_dim=16, intermediate_size=64), packed
    ) == [1, 2, 4]
    per_row = QuantizationConfig("compressed-tensors", Scheme(4))
    assert valid_tp(
        spec(num_heads=4, num_kv_heads=4, head_dim=8, intermediate_size=64), per_row
    ) == [1, 2, 4]


def test_plan_refuses_too_many_stages_and_no_ranks() -> None:
    with pytest.raises(InputError, match=r"3 pipeline stages for 2 layers. At most 2 stages"):
        plan_of(spec(), None, 1, 3)
    for tp, pp in ((0, 1), (1, 0), (-1, 1)):
        with pytest.raises(UsageError, match=f"--tp {tp} --pp {pp}"):
            plan_of(spec(), None, tp, pp)


def moe(experts: int, **changes: object) -> ModelSpec:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "mlp_only_layers": [0],
    }
    return replace(model_spec(LLAMA | config), **changes)


@pytest.mark.parametrize(
    ("experts", "tp", "ep", "text"),
    [
        (
            6,
            4,
            3,
            "--ep 3 does not divide: 4/3 = 1.333 tensor-parallel ranks; EP 1, 2 work with TP 4",
        ),
        (6, 4, 4, "--ep 4 does not divide: 6/4 = 1.5 experts; EP 1, 2 work with TP 4"),
        (
            6,
            2,
            4,
            "--ep 4 does not divide: 2/4 = 0.5 tensor-parallel ranks; EP 1, 2 work with TP 2",
        ),
        (6, 3, 3, "--tp 3 does not divide q_proj: 8/3 = 2.667 heads; no TP works"),
        (6, 6, 2, "--tp 6 does not divide q_proj: 8/6 = 1.333 heads; TP 2, 4, 8 work"),
    ],
)
def test_plan_refuses_experts_that_do_not_divide(experts: int, tp: int, ep: int, text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)) as caught:
        plan_of(moe(experts), None, tp, 1, ep)
    assert caught.value.exit_code == 3


def test_valid_sizes_of_experts() -> None:
    assert valid_tp(moe(6), None, 4) == []  # four groups do not divide six experts
    assert valid_tp(moe(6), None, 2) == [2, 4, 8]
    assert valid_ep(moe(6), None, 4) == [1, 2]
    assert valid_ep(moe(8), None, 8) == [1, 2, 4, 8]
    assert valid_ep(moe(8), None, 3) == valid_ep(moe(8), None, 16) == []
    assert explain_ep(moe(6), None, 4, 2) is None
    assert explain_ep(spec(), None, 4, 1) is None
    assert (
        explain_ep(moe(6), None, 3, 3) is None
    )  # two experts each; that TP 3 does not work is told later
    assert expert_count(moe(6)) == 6
    assert expert_count(spec()) == 0


def test_plan_refuses_expert_parallelism_of_a_dense_model() -> None:
    for model in (spec(), moe(4, layers=(LayerSpec(), LayerSpec()))):
        with pytest.raises(
            InputError, match=f"{model.architecture} has no experts; EP 1 works with TP 2"
        ):
            plan_of(model, None, 2, 1, 2)
        assert plan_of(model, None, 2, 1).layout()["experts"] == []


def test_plan_divides_groups_of_an_expert_over_its_own_ranks() -> None:
    # 16 features in groups of 8 divide between two ranks; between eight only when four hold other
    # experts.
    quantization = QuantizationConfig(
        "gptq", Scheme(4, 8), ("lm_head", r"re:.*self_attn", r"re:.*layers\.0")
    )
    assert valid_ep(moe(8), quantization, 8) == [4, 8]
    assert valid_ep(moe(8), quantization, 4) == [2, 4]
    assert valid_tp(moe(8), quantization) == [1, 2]
    assert valid_layouts(moe(8), quantization) == {1: [1], 2: [1, 2], 4: [2, 4], 8: [4, 8]}
    assert valid_tp(moe(8), quantization, 4) == [4, 8]
    assert (
        explain_tp(moe(8), quantization, 8, 2)
        == "gate_proj: 16/4 = 0.5 packed words of 8; TP 2, 4 work"
    )


def test_plan_assigns_experts_to_ranks() -> None:
    plan = plan_of(moe(4), None, 4, 1, 2)
    assert plan.experts == ((0, 1), (2, 3))
    assert [rank.ep for rank in plan.ranks] == [0, 0, 1, 1]
    for index, rank in enumerate(plan.ranks):
        up = {piece.name: piece for piece in rank.slices if piece.name.endswith("up_proj.weight")}
        held = [int(name.split(".")[5]) for name in up if ".experts." in name]
        assert held == [[0, 1], [2, 3]][index // 2]
        half = index % 2 * 8
        assert {piece.intervals for name, piece in up.items() if ".experts." in name} == {
            ((half, half + 8),)
        }
        # Layer 0 has no experts: its MLP, as attention, is split over all four ranks.
        assert up["model.layers.0.mlp.up_proj.weight"].intervals == ((index * 16, index * 16 + 16),)
    whole = plan_of(moe(4), None, 4, 1, 4)
    assert {
        p.shape for r in whole.ranks for p in r.slices if ".experts." in p.name and "up" in p.name
    } == {(16, 32)}
    assert whole.layout()["experts"] == [[0], [1], [2], [3]]


def test_explicit_stages_are_followed() -> None:
    plan = plan_of(SMOLLM2, None, 1, 1, 1, (8, 9, 9, 4))
    assert plan.pp == 4
    assert [len(stage) for stage in plan.stages] == [8, 9, 9, 4]
    assert plan.layout()["stages"][3] == [26, 27, 28, 29]
    assert plan_of(SMOLLM2, None, 1, 4, 1, (8, 9, 9, 4)) == plan
    for counts, text in (
        ((8, 9, 9, 6), "8 + 9 + 9 + 6 = 32 layers"),
        ((30, 0), "30 + 0 = 30 layers"),
    ):
        with pytest.raises(
            InputError, match=re.escape(f"{text}. 30 layers in all, at least one")
        ) as caught:
            plan_of(SMOLLM2, None, 1, len(counts), 1, counts)
        assert caught.value.exit_code == 3
    with pytest.raises(UsageError, match=r"--pp 3 and 4 numbers in --pp-layers"):
        plan_of(SMOLLM2, None, 1, 3, 1, (8, 9, 9, 4))


def test_plan_report_of_what_fits(tmp_path: Path) -> None:
    source = open_source(synthetic_checkpoint(tmp_path / "source"))
    report = plan_report(source, 2, 2, memory=2**20)
    assert report["refusal"] is None
    assert report["works"] == [{"tp": 1, "ep": [1]}, {"tp": 2, "ep": [1]}, {"tp": 4, "ep": [1]}]
    # K and V of one head of 8 in one layer, bf16.
    expected = [(int(0.9 * 2**20) - rank["bytes"]) // 32 for rank in report["ranks"]]
    assert [rank["tokens"] for rank in report["ranks"]] == expected
    assert report["tokens"] == min(expected)
    assert plan_report(source, 2, memory=1000)["tokens"] == 0
    refused = plan_report(source, 3, memory=2**20)
    assert refused["refusal"] == "--tp 3 does not divide q_proj: 4/3 = 1.333 heads; TP 1, 2, 4 work"
    assert refused["works"] == report["works"]
    assert "ranks" not in refused
    assert plan_report(source, 1, 2, pp_layers=(2, 1))["refusal"].startswith(
        "--pp-layers 2,1: 2 + 1 = 3 layers"
    )
    with pytest.raises(UsageError, match=r"--gpu h1000 is not known. One of .*h100-80"):
        gpu_bytes("h1000")
    assert gpu_bytes("H100-80") == 81559 * 2**20


def test_plan_counts_one_byte_for_8_bit_keys_and_values() -> None:
    for kv, itemsize in (("", 2), ("fp8", 1)):
        plan = plan_of(
            spec(), QuantizationConfig("compressed-tensors", Scheme(8, inputs="token"), kv=kv), 1, 1
        )
        assert set(plan.kv_bytes_per_layer) == {2 * 2 * 8 * itemsize}


def test_balanced_stages_give_the_ends_fewer_layers() -> None:
    assert [
        len(stage) for stage in balanced_stages([10] * 30, 4, embedding_bytes=50, head_bytes=50)
    ] == [
        7,
        8,
        8,
        7,
    ]
    assert [
        len(stage) for stage in balanced_stages([10] * 31, 3, embedding_bytes=0, head_bytes=50)
    ] == [11, 11, 9]
    assert [
        len(stage) for stage in balanced_stages([10] * 32, 4, embedding_bytes=50, head_bytes=50)
    ] == [
        8,
        8,
        8,
        8,
    ]


def test_plan_figures() -> None:
    plan = plan_of(spec(vocab_size=70), None, 4, 2).to_json()
    assert plan["stages"] == [[0], [1]]
    # 70 rows over 4 ranks are 18 each, padded to 64: 6 on the second, none beyond.
    rows = [64 * 32 * 2] * 4
    empty = [0, 58 * 64, 64 * 64, 64 * 64]
    layer = (8 * 32 + 2 * 8 * 32 + 32 * 8 + 3 * 16 * 32 + 2 * 32) * 2
    shared = (2 * 8 * 32 + 2 * 32) * 2  # a KV head on two ranks; the norms
    for index, rank in enumerate(plan["ranks"]):
        tp = index % 4
        norm = 32 * 2 if index >= 4 else 0
        assert rank["file"] == f"rank-pp{index // 4}-tp{tp}.safetensors"
        assert (rank["pp"], rank["tp"], rank["layers"]) == (index // 4, tp, [index // 4])
        assert rank["bytes"] == layer + rows[tp] + norm
        assert rank["replicated_bytes"] == shared + norm
        assert rank["padding_bytes"] == empty[tp]
        assert (
            rank["kv_bytes_per_token"] == 2 * 8 * 2
        )  # K and V of one head of 8 in one layer, bf16
    assert plan["bytes"] == sum(rank["bytes"] for rank in plan["ranks"])
    assert json.loads(json.dumps(plan)) == plan


def test_plan_counts_shared_kv_heads_of_a_fused_tensor_as_replicated() -> None:
    fused = spec(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        fused_qkv=True,
        fused_gate_up=True,
        layers=(LayerSpec(),),
    )
    apart = replace(fused, fused_qkv=False, fused_gate_up=False)
    figures = [
        [r["replicated_bytes"] for r in plan_of(model, None, 4, 1).to_json()["ranks"]]
        for model in (fused, apart)
    ]
    assert figures[0] == figures[1]


def test_shard_dry_run_writes_nothing(tmp_path: Path) -> None:
    source = synthetic_checkpoint(tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    plan = shard(source, tmp_path / "ranks", 2, 2, dry_run=True)
    assert len(plan.ranks) == 4
    assert sorted(tmp_path.rglob("*")) == before


def test_shard_manifest_describes_every_slice(tmp_path: Path) -> None:
    source = synthetic_checkpoint(
        tmp_path / "source", QuantizationConfig("compressed-tensors", Scheme(4, 16))
    )
    shard(source, tmp_path / "ranks", 2, 2)
    checkpoint = open_checkpoint(tmp_path / "ranks")
    manifest = checkpoint.manifest
    layout = checkpoint.layout
    assert manifest is not None
    assert layout is not None
    assert (layout["tp"], layout["pp"], layout["stages"]) == (2, 2, [[0], [1]])
    assert layout["ranks"][3] == {"file": "rank-pp1-tp1.safetensors", "pp": 1, "tp": 1, "ep": 0}
    assert layout["order"] == list(read_header(source / "model.safetensors"))
    assert layout["tensors"].keys() == manifest["tensors"].keys()
    key = "rank-pp1-tp1.safetensors::model.layers.1.mlp.down_proj."
    assert layout["tensors"][key + "weight_packed"] == {
        "source": "model.layers.1.mlp.down_proj.weight_packed",
        "source_shape": [32, 8],
        "dtype": "I32",
        "dim": 1,
        "intervals": [[4, 8]],
        "padding": 0,
        "replicas": [3],
    }
    shape = layout["tensors"][key + "weight_shape"]
    assert shape["derived"] == {"kind": "shape", "shape": [32, 32], "source_shape": [32, 64]}
    assert shape["replicas"] == [2, 3]
    assert len(manifest["tensors"][key + "weight_packed"]["sha256"]) == 64
    for file, entry in manifest["files"].items():
        data = (tmp_path / "ranks" / file).read_bytes()
        assert entry == {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    assert manifest["source"]["files"].keys() == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "ranks" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_shard_refuses_bad_sources_and_outputs(tmp_path: Path) -> None:
    source = synthetic_checkpoint(tmp_path / "source")
    shard(source, tmp_path / "ranks", 2)
    with pytest.raises(OutputError, match="exists and is not empty"):
        shard(source, tmp_path / "ranks", 2)
    with pytest.raises(OutputError, match="is the source"):
        shard(source, source, 2)
    with pytest.raises(InputError, match="absent does not exist"):
        shard(tmp_path / "absent", tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_shard_finds_a_small_disk_before_writing(tmp_path: Path, monkeypatch) -> None:
    source = synthetic_checkpoint(tmp_path / "source")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ShortageError, match=r"needs .* and the disk has 1000"):
        shard(source, tmp_path / "ranks", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_shard_refuses_a_source_that_changed(tmp_path: Path) -> None:
    from llmkit.shard.merge import merge

    shard(synthetic_checkpoint(tmp_path / "source"), tmp_path / "ranks", 2)
    merge(tmp_path / "ranks", tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        InputError, match=r"model\.safetensors has SHA-256 \w{64}, llmkit\.json says \w{64}"
    ):
        shard(tmp_path / "whole", tmp_path / "again", 2)
    assert not (tmp_path / "again").exists()


def test_split_kinds_agree_with_the_tp_plan_of_transformers() -> None:
    from transformers import LlamaConfig

    theirs = LlamaConfig().base_model_tp_plan
    assert theirs
    for parameter in parameters(model_spec(LLAMA)):
        for part in parameter.sources:
            module = re.sub(
                r"^model\.|\.\d+(?=\.)|\.weight$",
                lambda m: ".*" if m[0][1:].isdigit() else "",
                part.name,
            )
            style = theirs.get(module)
            if style == "colwise":
                assert part.split.kind in ("heads", "kv_heads", "features")
                assert part.split.dim == 0
            elif style == "rowwise":
                assert part.split.kind in ("heads", "features")
                assert part.split.dim == 1
            elif module in ("embed_tokens", "lm_head"):
                assert part.split.kind == "vocab"
            else:
                assert module.endswith("norm") or module.endswith("layernorm"), module
                assert part.split.kind == "replicated"
    used = {
        re.sub(r"\.\d+\.", ".*.", p.name.removeprefix("model.")).removesuffix(".weight")
        for row in parameters(model_spec(LLAMA))
        for p in row.sources
    }
    split = {module for module, style in theirs.items() if style in ("colwise", "rowwise")}
    assert split <= used
