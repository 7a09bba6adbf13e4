"""vLLM's `sharded_state` files.

`make interop-shard` compares them with what vLLM itself loads; this needs no vLLM.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.synthetic_checkpoint import LLAMA, synthetic_checkpoint
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.common.errors import InputError, UsageError
from llmkit.model.checkpoint_tensors import checkpoint_tensors
from llmkit.model.families import model_spec
from llmkit.shard import chunking as blocks
from llmkit.shard.merge import merge
from llmkit.shard.shard_checkpoint import shard
from llmkit.shard.verify import verify
from llmkit.shard.vllm_format import VllmPlan, plan_vllm

Tensors = dict[str, torch.Tensor]


def rank_files(folder: Path, tp: int) -> list[Tensors]:
    assert sorted(folder.glob("*.safetensors")) == [
        folder / f"model-rank-{r}-part-0.safetensors" for r in range(tp)
    ]
    return [load_file(folder / f"model-rank-{rank}-part-0.safetensors") for rank in range(tp)]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


@pytest.mark.parametrize("chunk", [100, 2**23])
def test_vllm_format_has_the_rows_and_columns_of_each_rank(
    chunk: int, tmp_path: Path, monkeypatch
) -> None:
    """8 query heads and 2 KV heads of 16 over 4 ranks: two query heads each, a KV head for two
    ranks.
    """
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 500,
    }
    source = tiny_checkpoint(tmp_path / "source", "qwen2", **sizes)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", chunk)
    shard(source, tmp_path / "out", 4, output_format="vllm")
    whole = load_file(source / "model.safetensors")
    heads = whole["model.layers.1.self_attn.q_proj.weight"].shape[0] // 4
    inner = 128 // 4
    kv = whole["model.layers.1.self_attn.k_proj.weight"].shape[0] // 2
    for rank, stored in enumerate(rank_files(tmp_path / "out", 4)):
        layer = {
            name.removeprefix("model.layers.1."): t
            for name, t in stored.items()
            if ".layers.1." in name
        }
        full = {
            name.removeprefix("model.layers.1."): t
            for name, t in whole.items()
            if ".layers.1." in name
        }
        q = slice(rank * heads, (rank + 1) * heads)
        features = slice(rank * inner, (rank + 1) * inner)
        shared = slice(rank // 2 * kv, (rank // 2 + 1) * kv)
        for kind in ("weight", "bias"):
            parts = [
                full[f"self_attn.{n}_proj.{kind}"][rows]
                for n, rows in (("q", q), ("k", shared), ("v", shared))
            ]
            assert same(layer.pop(f"self_attn.qkv_proj.{kind}"), torch.cat(parts))
        gate_up = torch.cat(
            [full["mlp.gate_proj.weight"][features], full["mlp.up_proj.weight"][features]]
        )
        assert same(layer.pop("mlp.gate_up_proj.weight"), gate_up)
        assert same(layer.pop("mlp.down_proj.weight"), full["mlp.down_proj.weight"][:, features])
        assert same(layer.pop("self_attn.o_proj.weight"), full["self_attn.o_proj.weight"][:, q])
        for name in ("k", "v", "q", "prob"):
            assert same(layer.pop(f"self_attn.attn._{name}_scale"), torch.tensor(1.0))
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        assert all(same(layer.pop(name), full[name]) for name in norms)
        assert layer == {}
        for name in (
            "model.embed_tokens.weight",
            "lm_head.weight",
        ):  # 500 rows, 512 with padding, 128 each
            padded = torch.cat([whole[name], torch.zeros(12, 64, dtype=torch.bfloat16)])
            assert same(stored[name], padded[rank * 128 : (rank + 1) * 128])
    assert verify(tmp_path / "out").ok


def test_vllm_format_stores_a_tied_embedding_as_lm_head(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "llama", tie_word_embeddings=True)
    shard(source, tmp_path / "out", 1, output_format="vllm")
    (stored,) = rank_files(tmp_path / "out", 1)
    assert "model.embed_tokens.weight" not in stored
    assert same(
        stored["lm_head.weight"],
        load_file(source / "model.safetensors")["model.embed_tokens.weight"],
    )


def test_vllm_format_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "llama")
    shard(source, tmp_path / "ranks", 4, 2)
    shard(tmp_path / "ranks", tmp_path / "one", 2, output_format="vllm")
    shard(source, tmp_path / "two", 2, output_format="vllm")
    for file in (tmp_path / "two").iterdir():
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes(), file.name


def test_vllm_format_writes_what_it_plans(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "llama")
    figures = shard(source, tmp_path / "out", 2, output_format="vllm").to_json()["ranks"]
    for rank, stored in zip(figures, rank_files(tmp_path / "out", 2), strict=True):
        assert (rank["tensors"], rank["bytes"]) == (
            len(stored),
            sum(t.nbytes for t in stored.values()),
        )
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()


GPTQ = QuantizationConfig("gptq", Scheme(4, 16))
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": True}
GEMMA2 = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "pad_token_id": 0}
REFUSALS: list[tuple[dict[str, Any], QuantizationConfig | None, str, int, str]] = [
    ({}, GPTQ, "BF16", 1, "--format vllm of a checkpoint in gptq format. A dense one"),
    (GEMMA2, None, "BF16", 1, "--format vllm of Gemma2ForCausalLM. One of LlamaForCausalLM"),
    (QWEN3, None, "BF16", 1, "--format vllm of a Qwen3 with attention_bias"),
    ({}, None, "F32", 1, "--format vllm of F32 tensors. All BF16 or all F16"),
    ({}, None, "BF16", 3, "--tp 3 does not divide q_proj: 4/3 = 1.333 heads"),
    (
        {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 96},
        None,
        "BF16",
        3,
        "--tp 3 does not divide the vocabulary: 128/3 = 42.667 rows, .*TP 1, 2 divide it",
    ),
]


@pytest.mark.parametrize(
    ("config", "quantization", "dtype", "tp", "text"), REFUSALS, ids=range(len(REFUSALS))
)
def test_vllm_format_refuses_other_models(
    config, quantization, dtype: str, tp: int, text: str, tmp_path: Path
) -> None:
    source = synthetic_checkpoint(tmp_path / "source", quantization, dtype=dtype, **config)
    with pytest.raises(InputError, match=text):
        shard(source, tmp_path / "out", tp, output_format="vllm")
    assert not (tmp_path / "out").exists()


def vllm_plan(dtypes: tuple[str, ...], tp: int, **config: Any) -> VllmPlan:
    """The plan of a Llama whose tensors have these dtypes in turn."""
    spec = model_spec(LLAMA | config)
    names = enumerate(checkpoint_tensors(spec, None).items())
    infos = {
        name: TensorInfo(name, dtypes[index % len(dtypes)], packed.shape)
        for index, (name, (_, packed)) in names
    }
    return plan_vllm(spec, None, infos, tp)


@pytest.mark.parametrize(
    ("vocab_size", "tp", "expected"),
    [
        (64, 2, [(((0, 32),), 0), (((32, 64),), 0)]),
        (65, 4, [(((0, 32),), 0), (((32, 64),), 0), (((64, 65),), 31), ((), 32)]),
        (96, 4, [(((0, 32),), 0), (((32, 64),), 0), (((64, 96),), 0), ((), 32)]),
        (70, 1, [(((0, 70),), 58)]),
    ],
)
def test_vllm_format_pads_the_whole_vocabulary(vocab_size: int, tp: int, expected: list) -> None:
    plan = vllm_plan(("BF16",), tp, vocab_size=vocab_size)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        pieces = [piece for rank in plan.ranks for piece in rank.slices if piece.name == name]
        assert [(piece.intervals, piece.padding) for piece in pieces] == expected


def test_vllm_format_has_one_dtype() -> None:
    assert vllm_plan(("F16",), 1).tp == vllm_plan(("BF16",), 1).tp == 1
    for dtypes, text in (
        (("BF16", "F16"), "BF16 and F16 tensors. All BF16 or all F16"),
        (("F32", "BF16"), "BF16 and F32 tensors"),
        (("F64",), "F64 tensors"),
    ):
        with pytest.raises(InputError, match=f"--format vllm of {text}"):
            vllm_plan(dtypes, 1)


def test_vllm_format_places_the_parts_of_a_fused_tensor() -> None:
    slices = vllm_plan(("BF16",), 2).slices_by_source()
    places = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        places[name] = [
            (piece.file, piece.target, piece.target_offset)
            for piece in slices[f"model.layers.1.self_attn.{name}.weight"]
        ]
    # 16 rows of q and 8 each of k and v on a rank, of 32 columns in bf16.
    for name, offset in (("q_proj", 0), ("k_proj", 1024), ("v_proj", 1536)):
        assert places[name] == [
            (
                f"model-rank-{rank}-part-0.safetensors",
                "model.layers.1.self_attn.qkv_proj.weight",
                offset,
            )
            for rank in range(2)
        ]


def test_vllm_format_verify_has_no_stages_or_replicas(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "llama")
    plan = shard(source, tmp_path / "out", 2, output_format="vllm").to_json()
    assert verify(tmp_path / "out").to_json() == {
        "ok": True,
        "tp": 2,
        "pp": 1,
        "ep": 1,
        "files": 2,
        "tensors": sum(rank["tensors"] for rank in plan["ranks"]),
        "bytes": plan["bytes"],
        "replica_groups": 0,
        "padding_bytes": 0,
        "problems": [],
    }


@pytest.mark.parametrize("more", [{"pp": 2}, {"ep": 2}, {"pp_layers": (1, 1)}], ids=str)
def test_vllm_format_refuses_other_parallelisms(more: dict[str, Any], tmp_path: Path) -> None:
    source = synthetic_checkpoint(tmp_path / "source")
    with pytest.raises(UsageError, match="Tensor-parallel ranks only"):
        shard(source, tmp_path / "out", 2, output_format="vllm", **more)


def test_vllm_format_can_be_verified_but_not_read(tmp_path: Path) -> None:
    shard(synthetic_checkpoint(tmp_path / "source"), tmp_path / "out", 2, output_format="vllm")
    for read in (
        lambda: merge(tmp_path / "out", tmp_path / "m"),
        lambda: shard(tmp_path / "out", tmp_path / "m", 1),
    ):
        with pytest.raises(InputError, match=r"holds the files of vllm .*made from"):
            read()
    assert not (tmp_path / "m").exists()
    file = tmp_path / "out" / "model-rank-1-part-0.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert any(file.name in problem for problem in verify(tmp_path / "out").problems)
