"""Dropping experts: what the view of a checkpoint computes, which experts it drops, the command."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from support.tiny_families import family_oracle, oracle_logits
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError, UsageError
from llmkit.common.progress import SilentProgress
from llmkit.model.checkpoint_tensors import check_checkpoint
from llmkit.model.families import checkpoint_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.pruned_experts import with_pruned_experts
from llmkit.model.spec import ModelSpec, MoeSpec
from llmkit.model.unstacked_experts import with_unstacked_experts
from llmkit.model.weight_loader import load_model
from llmkit.quant.expert_pruning import (
    ExpertSaliency,
    choose_experts,
    measure_saliency,
    num_kept_experts,
    report_entries,
)
from llmkit.quant.layer_stream import LayerStream
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions

TOKENS = torch.randint(3, 60, (11,), generator=torch.Generator().manual_seed(5))
GROUPED = ("glm4-moe", "deepseek-v3", "nemotron-3")
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def one_by_one(path: Path) -> tuple[Checkpoint, ModelSpec]:
    """A checkpoint whose experts are stored, or seem to be stored, one by one."""
    checkpoint = open_checkpoint(path)
    checkpoint = with_unstacked_experts(checkpoint, checkpoint_spec(checkpoint))
    return checkpoint, checkpoint_spec(checkpoint)


def pruned_oracle(oracle: torch.nn.Module, kept: dict[int, list[int]]) -> torch.nn.Module:
    """transformers' model with fewer experts: the weights of those that stay are copied."""
    config = copy.deepcopy(oracle.config)
    (count,) = {len(experts) for experts in kept.values()}
    for name in NUM_EXPERTS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, count)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    weights = dict(oracle.state_dict())
    for name, value in model.state_dict().items():
        if value.shape != weights[name].shape:
            layer = int(re.findall(r"layers\.(\d+)\.", name)[0])
            sizes = zip(value.shape, weights[name].shape, strict=True)
            dim = [new == old for new, old in sizes].index(False)
            weights[name] = weights[name].index_select(dim, torch.tensor(kept[layer]))
    model.load_state_dict(weights)
    return model.float().eval()


@pytest.mark.parametrize(
    "family",
    ["mixtral", "qwen2-moe", "olmoe", "glm4-moe", "ernie4.5-moe", "deepseek-v3", "nemotron-3"],
)
def test_pruned_view_computes_what_transformers_does_with_fewer_experts(
    family: str, tmp_path: Path
) -> None:
    groups = {"n_group": 2, "topk_group": 1} if family in GROUPED else {}
    oracle = family_oracle(family, tmp_path, **groups)
    checkpoint, spec = one_by_one(tmp_path)
    moe = spec.moe
    assert moe is not None and moe.num_groups == (2 if groups else 1)
    layers = [index for index, layer in enumerate(spec.layers) if layer.is_moe]
    generator = torch.Generator().manual_seed(1)
    saliency = {
        index: ExpertSaliency(
            tuple(torch.rand(moe.num_experts, generator=generator).tolist()),
            (1,) * moe.num_experts,
        )
        for index in layers
    }
    per_group = moe.num_experts // moe.num_groups
    num_kept = (per_group - 1) * moe.num_groups
    kept = choose_experts(saliency, moe, num_kept)
    pruned = with_pruned_experts(checkpoint, spec, kept)
    pruned_spec = checkpoint_spec(pruned)
    check_checkpoint(pruned, pruned_spec)
    assert pruned_spec.moe is not None and pruned_spec.moe.num_experts == num_kept
    model = load_model(pruned, torch.float32)
    logits = next(iter(window_logits(model, TOKENS[None])))
    expected = oracle_logits(pruned_oracle(oracle, kept), TOKENS)
    assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_saliency_is_the_mean_weighted_norm_of_an_expert(family: str, tmp_path: Path) -> None:
    oracle = family_oracle(family, tmp_path)
    checkpoint, spec = one_by_one(tmp_path)
    moe = spec.moe
    assert moe is not None
    inputs: dict[int, torch.Tensor] = {}
    layers = [index for index, layer in enumerate(spec.layers) if layer.is_moe]
    for index in layers:
        block = oracle.model.layers[index].mlp
        block.register_forward_pre_hook(
            lambda _, args, index=index: inputs.__setitem__(index, args[0].flatten(0, -2))
        )
    oracle_logits(oracle, TOKENS)
    stream = LayerStream.from_checkpoint(checkpoint, spec)
    found = measure_saliency(stream, TOKENS[None], SilentProgress())
    assert list(found) == layers
    for index in layers:
        prefix = f"model.layers.{index}.{moe.module}"
        gate = checkpoint.read(f"{prefix}.gate.weight")
        scores = torch.softmax(inputs[index] @ gate.T, dim=-1)
        best = scores.topk(moe.num_experts_per_tok)
        weights = best.values
        if moe.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        for expert in range(moe.num_experts):
            w1, w3, w2 = (
                checkpoint.read(f"{prefix}.experts.{expert}.{name}.weight")
                for name in (moe.gate, moe.up, moe.down)
            )
            norms = []
            for token, choice in (best.indices == expert).nonzero().tolist():
                x = inputs[index][token]
                out = (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
                norms.append((weights[token, choice] * out.norm()).item())
            assert found[index].tokens[expert] == len(norms)
            mean = sum(norms) / len(norms) if norms else 0.0
            assert found[index].saliency[expert] == pytest.approx(mean, rel=1e-4)


def moe_spec(num_experts: int, groups: int = 1, topk_groups: int = 1, top_k: int = 2) -> MoeSpec:
    return MoeSpec(num_experts, top_k, 8, True, num_groups=groups, topk_groups=topk_groups)


def test_num_kept_experts_rounds_up_and_leaves_what_a_token_needs() -> None:
    assert num_kept_experts(moe_spec(8), 0.5) == 4
    assert num_kept_experts(moe_spec(10), 0.25) == 8
    assert num_kept_experts(moe_spec(8), 0.01) == 8
    assert num_kept_experts(moe_spec(16, groups=4, topk_groups=2), 0.3) == 12
    for moe, share, told in (
        (moe_spec(8, top_k=4), 0.75, "a token needs 4"),
        (moe_spec(16, groups=4, topk_groups=1), 0.75, "from 1 of 4 groups"),
        (moe_spec(8), 1.0, "between 0 and 1"),
        (moe_spec(8), 0.0, "between 0 and 1"),
    ):
        with pytest.raises(UsageError, match=told):
            num_kept_experts(moe, share)
    with pytest.raises(InputError, match="no experts"):
        num_kept_experts(None, 0.5)


def test_choose_experts_takes_the_best_of_each_group() -> None:
    measured = ExpertSaliency((0.1, 0.4, 0.3, 0.2, 0.0, 0.9, 0.8, 0.7), (5,) * 8)
    assert choose_experts({3: measured}, moe_spec(8), 4) == {3: [1, 5, 6, 7]}
    grouped = moe_spec(8, groups=2, topk_groups=1)
    assert choose_experts({3: measured}, grouped, 4) == {3: [1, 2, 5, 6]}
    equal = ExpertSaliency((0.5,) * 4, (1,) * 4)
    assert choose_experts({0: equal}, moe_spec(4), 3) == {0: [0, 1, 2]}


def test_report_entries_say_what_dropped_experts_added() -> None:
    measured = ExpertSaliency((0.25, 0.5, 1.0), (4, 2, 2))
    (entry,) = report_entries({1: measured}, {1: [1, 2]})
    assert entry["dropped"] == [0] and entry["saliency"] == [0.25, 0.5, 1.0]
    assert entry["dropped_share"] == pytest.approx(0.25) and entry["dropped_tokens"] == 4


@pytest.mark.usefixtures("short_builtin_text")
@pytest.mark.parametrize("method", ["bf16", "rtn"])
def test_quantize_prunes_experts_and_compares_with_the_whole_source(
    method: str, tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path / "source", "qwen3_moe", dtype="float32")
    options = QuantizeOptions(
        method, samples=4, seq_len=64, prune_experts=0.5, device="cpu", eval_windows=1
    )
    report = quantize(str(source), str(tmp_path / "out"), options, SilentProgress())
    checkpoint, spec = one_by_one(source)
    assert spec.moe is not None
    num_kept = spec.moe.num_experts // 2
    layers = report["pruned_experts"]
    assert [layer["layer"] for layer in layers] == [0, 1]
    written = open_checkpoint(tmp_path / "out")
    written_spec = checkpoint_spec(written)
    assert written_spec.moe is not None and written_spec.moe.num_experts == num_kept
    check_checkpoint(written, written_spec)
    assert report["quality"]["mean_kl"] > 0.001, "the reference has all experts"
    assert report["sizes"]["source_bytes"] == checkpoint.weight_bytes
    for layer in layers:
        assert sorted(layer["kept"] + layer["dropped"]) == list(range(spec.moe.num_experts))
        saliency = layer["saliency"]
        least = min(saliency[expert] for expert in layer["kept"])
        assert all(saliency[expert] <= least for expert in layer["dropped"])
        prefix = f"model.layers.{layer['layer']}.mlp"
        gate = checkpoint.read(f"{prefix}.gate.weight")[layer["kept"]]
        assert torch.equal(written.read(f"{prefix}.gate.weight").float(), gate.bfloat16().float())
    if method == "bf16":
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32
        ).eval()
        ours = load_model(written, torch.float32)
        logits = next(iter(window_logits(ours, TOKENS[None])))
        assert torch.allclose(logits, oracle_logits(model, TOKENS), atol=1e-4, rtol=1e-4)


def test_prune_experts_refuses_models_without_experts(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    options = QuantizeOptions("rtn", prune_experts=0.5, device="cpu")
    with pytest.raises(InputError, match="has no experts"):
        quantize(str(source), str(tmp_path / "out"), options, SilentProgress())
    assert not (tmp_path / "out").exists()
