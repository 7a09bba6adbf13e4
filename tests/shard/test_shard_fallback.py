"""Sharding models that run by transformers' modeling code, as their tp_plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.paged_sequences import close, tokens_of
from support.synthetic_checkpoint import stored_bytes
from support.thread_group import ThreadGroup, run_ranks
from support.tiny_fallback import make_oracle
from support.tiny_families import COMMON, oracle_logits

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError, UsageError
from llmkit.common.progress import SilentProgress
from llmkit.model import families
from llmkit.model.full_forward import window_logits
from llmkit.model.split import Split
from llmkit.model.transformers_model import TransformersModel
from llmkit.model.transformers_spec import transformers_spec
from llmkit.model.weight_loader import load_model
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.shard.layout_capacity import plan_report
from llmkit.shard.merge import merge
from llmkit.shard.rank_part import RankPart, rank_parts
from llmkit.shard.shard_checkpoint import open_source, shard
from llmkit.shard.shard_plan import CARRIED_FILE
from llmkit.shard.valid_layouts import valid_tp
from llmkit.shard.verify import verify

# Each has something that the others have not: biases also of the output projection; one linear for
# QKV; a tied embedding, and KV heads; gathered outputs, and experts that transformers stacks;
# experts whose gate and up are two parts of one tensor of three dimensions.
KINDS = ("phi", "gpt_neox", "gemma2", "olmoe", "aria_text")


@pytest.fixture(autouse=True)
def no_native_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let families that the table knows run by the fallback, too."""
    for architecture in ("Gemma2ForCausalLM", "OlmoeForCausalLM"):
        monkeypatch.delitem(families.SUPPORTED, architecture)


def logits_of_ranks(parts: list[RankPart], tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The logits of a prompt, which the ranks compute on a thread each."""

    def run(rank: int, group: ThreadGroup) -> torch.Tensor:
        part = parts[rank]
        model = load_model(
            part.checkpoint, torch.float32, packed=True, spec=part.spec, parallel_group=group
        )
        assert isinstance(model, TransformersModel)
        return next(window_logits(model, tokens[None]))

    logits = torch.cat(run_ranks([part.spec for part in parts], run), -1)
    assert (logits[..., vocab_size:] < -1e29).all()  # padding
    return logits[..., :vocab_size]


@pytest.mark.parametrize("kind", KINDS)
def test_shard_fallback_gives_the_bytes_back_and_ranks_compute_what_the_model_does(
    kind: str, tmp_path: Path
) -> None:
    # The last rank of two has padding in its part of the vocabulary.
    oracle = make_oracle(kind, tmp_path / "model", vocab_size=100)
    plan = shard(tmp_path / "model", tmp_path / "ranks", 2)
    assert verify(tmp_path / "ranks").problems == []
    merge(tmp_path / "ranks", tmp_path / "merged")
    assert stored_bytes(tmp_path / "merged") == stored_bytes(tmp_path / "model")
    sizes = [rank["bytes"] for rank in plan.to_json()["ranks"]]
    assert max(sizes) < 0.8 * sum(path.stat().st_size for path in (tmp_path / "model").glob("*.s*"))
    tokens = tokens_of(30, 5) % 100
    parts = rank_parts(open_checkpoint(tmp_path / "ranks"))
    close(logits_of_ranks(parts, tokens, 100), oracle_logits(oracle, tokens))


def test_shard_fallback_ranks_share_kv_heads(tmp_path: Path) -> None:
    oracle = make_oracle("phi", tmp_path)  # 4 heads, and 2 KV heads
    parts = rank_parts(open_checkpoint(tmp_path), tp=4)
    assert {(part.spec.num_heads, part.spec.num_kv_heads) for part in parts} == {(1, 1)}
    tokens = tokens_of(20, 5)
    close(logits_of_ranks(parts, tokens, 128), oracle_logits(oracle, tokens))


def test_shard_fallback_of_a_quantized_model(tmp_path: Path) -> None:
    make_oracle("phi", tmp_path / "model")
    options = QuantizeOptions(method="rtn", group_size=8, device="cpu", evaluate=False)
    quantize(str(tmp_path / "model"), str(tmp_path / "int4"), options, SilentProgress())
    shard(tmp_path / "int4", tmp_path / "ranks", 2)
    merge(tmp_path / "ranks", tmp_path / "merged")
    assert stored_bytes(tmp_path / "merged") == stored_bytes(tmp_path / "int4")
    whole = load_model(open_checkpoint(tmp_path / "int4"), torch.float32, packed=True)
    tokens = tokens_of(20, 5)
    parts = rank_parts(open_checkpoint(tmp_path / "ranks"))
    close(logits_of_ranks(parts, tokens, 128), next(window_logits(whole, tokens[None])))


def test_shard_fallback_plan_says_what_a_rank_holds(tmp_path: Path) -> None:
    make_oracle("phi", tmp_path / "phi")
    report = plan_report(open_source(tmp_path / "phi"), 2)
    kv_bytes = {rank["kv_bytes_per_token"] for rank in report["ranks"]}
    assert kv_bytes == {4 * 2 * 8 * 4}  # of layers, K and V of one head of 8, in float32
    # The attention of OLMoE is whole on every rank, because its norms read all heads.
    make_oracle("olmoe", tmp_path / "olmoe")
    report = plan_report(open_source(tmp_path / "olmoe"), 2)
    kv_bytes = {rank["kv_bytes_per_token"] for rank in report["ranks"]}
    assert kv_bytes == {4 * 2 * 2 * 8 * 4}


def splits_of(kind: str, **differences: Any) -> dict[str, Split]:
    config = transformers.AutoConfig.for_model(kind, **(COMMON | differences))
    architecture = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    spec = transformers_spec(config.to_dict() | {"architectures": [architecture]})
    assert spec.transformers is not None
    assert not spec.transformers.tp_refusal
    return {tensor.source: tensor.split for tensor in spec.transformers.tensors}


def test_tp_plan_gives_the_splits_of_checkpoint_tensors() -> None:
    splits = splits_of("aria_text", moe_num_experts=4)
    layer = "model.layers.0"
    assert splits["model.embed_tokens.weight"] == Split("vocab", 0, 128)
    assert splits[f"{layer}.self_attn.q_proj.weight"] == Split("heads", 0, 4, 8)
    assert splits[f"{layer}.self_attn.k_proj.weight"] == Split("kv_heads", 0, 2, 8)
    assert splits[f"{layer}.self_attn.o_proj.weight"] == Split("heads", 1, 4, 8)
    assert splits[f"{layer}.mlp.experts.fc1.weight"] == Split("features", 2, 48, 1, parts=2)
    assert splits[f"{layer}.mlp.experts.fc2.weight"] == Split("features", 1, 48)
    assert splits[f"{layer}.input_layernorm.weight"] == Split()
    # transformers makes one parameter of these.
    splits = splits_of("mixtral", num_local_experts=4)
    experts = f"{layer}.block_sparse_moe.experts.3"
    assert splits[f"{experts}.w1.weight"] == Split("features", 0, 48)
    assert splits[f"{experts}.w2.weight"] == Split("features", 1, 48)
    assert splits[f"{experts}.w3.weight"] == Split("features", 0, 48)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tp": 3}, InputError, r"q_proj: 4/3 = 1.333 heads; TP 1, 2, 4 work"),
        ({"tp": 2, "pp": 2}, UsageError, r"transformers' modeling code, which is not divided"),
        ({"tp": 2, "ep": 2}, InputError, r"tp_plan of PhiForCausalLM splits every expert over all"),
        ({"tp": 2, "output_format": "vllm"}, InputError, r"^--format vllm is not possible with"),
    ],
    ids=["heads", "stages", "experts", "vllm"],
)
def test_shard_fallback_refuses_sizes(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    make_oracle("phi", tmp_path / "model")
    with pytest.raises(error, match=message):
        shard(tmp_path / "model", tmp_path / "ranks", **options)
    assert not (tmp_path / "ranks").exists()


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (None, "its class has no tp_plan"),
        ({"layers.*.mlp.up_proj": "sequence_parallel"}, "has the style sequence_parallel for"),
        ({"layers.*.input_layernorm": "rowwise"}, "has the style rowwise for the vector"),
        ({"embed_tokens": "embedding_colwise"}, "lm_head.weight and model.embed_tokens.weight"),
        ({"layers.*.self_attn.q_proj": "packed_colwise"}, "has the style packed_colwise for"),
    ],
    ids=["none", "style", "vector", "tied", "parts of attention"],
)
def test_shard_fallback_refuses_a_tp_plan_by_name(
    plan: dict[str, str] | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_class = transformers.CONFIG_MAPPING["cwm"]
    monkeypatch.setattr(config_class, "base_model_tp_plan", plan)
    # The spec of a config is kept: each case has a config of its own.
    make_oracle("cwm", tmp_path, tie_word_embeddings=True, rms_norm_eps=1e-6 * len(reason))
    if plan is None:
        monkeypatch.setattr(transformers.CwmForCausalLM, "_tp_plan", None)
    with pytest.raises(InputError) as caught:
        rank_parts(open_checkpoint(tmp_path), tp=2)
    message = str(caught.value)
    assert message.startswith("sharding is not possible with CwmForCausalLM: ")
    assert reason in message


def test_shard_fallback_carries_what_transformers_does_not_load(tmp_path: Path) -> None:
    make_oracle("phi", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    extra = {
        "mtp.fc.weight": torch.randn(4, 4),
        "model.layers.4.eh_proj.weight": torch.randn(3, 3).to(torch.bfloat16),
    }
    save_file(tensors | extra, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"has 2 tensors \(mtp.fc.weight, model.layers.4.eh_proj"):
        shard(tmp_path / "model", tmp_path / "ranks", 2)
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("{", '{"num_nextn_predict_layers": 1,', 1))
    shard(tmp_path / "model", tmp_path / "ranks", 2)
    assert load_file(tmp_path / "ranks" / CARRIED_FILE).keys() == extra.keys()
    merge(tmp_path / "ranks", tmp_path / "merged")
    assert stored_bytes(tmp_path / "merged") == stored_bytes(tmp_path / "model")


def test_valid_tp_of_the_fallback(tmp_path: Path) -> None:
    make_oracle("gpt_neox", tmp_path / "neox")
    make_oracle("persimmon", tmp_path / "persimmon")  # it has no tp_plan
    found = [
        valid_tp(families.checkpoint_spec(open_checkpoint(tmp_path / name)), None)
        for name in ("neox", "persimmon")
    ]
    assert found == [[1, 2, 4], [1]]
