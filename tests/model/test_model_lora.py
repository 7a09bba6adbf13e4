"""Reading LoRA adapters: the updates they stand for, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_adapters import PREFIX, WEIGHTS, merged, write_adapter
from support.tiny_families import family_oracle

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.model.families import model_spec
from llmkit.model.lora import LoraManager, load_adapter
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.model.weight_loader import load_model, read_parameter

Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    family_oracle("llama", path)
    return path


@pytest.fixture(scope="module")
def spec(base: Path) -> ModelSpec:
    return model_spec(open_checkpoint(base).config)


def same_as_merged(base: Path, adapter: Path, path: Path, scale: Callable[[str], float]) -> None:
    """Every linear's update is what merging changes in its weight; no other parameter changes."""
    before = open_checkpoint(base)
    after = open_checkpoint(merged(base, adapter, path, scale))
    spec = model_spec(before.config)
    updates = load_adapter(adapter, spec, torch.float32)
    for row in parameters(spec):
        difference = read_parameter(after, row, torch.float32) - read_parameter(
            before, row, torch.float32
        )
        lora = updates.pop(row.module, None)
        assert (lora is None) == (not difference.any())
        if lora is not None:
            torch.testing.assert_close(lora.lora_b @ lora.lora_a, difference, atol=2e-6, rtol=0)
    assert not updates


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "phi3",
        "qwen3-moe",
        "mixtral",
        "glm4",
        "starcoder2",
        "apertus",
        "afmoe",
        "glm4-moe",
        "qwen2-moe",
        "ernie4.5-moe",
        "gemma4",
        "qwen3-next",
        "qwen3.5",
    ],
)
@pytest.mark.parametrize("wanted", ["", r"layers\.[12].*(v_proj|qkv_proj|up_proj|w3)"])
def test_load_adapter_weights_follow_the_parameter_table(
    tmp_path: Path, family: str, wanted: str
) -> None:
    family_oracle(family, tmp_path / "base")
    adapter = write_adapter(tmp_path / "base", tmp_path / "adapter", wanted)
    same_as_merged(tmp_path / "base", adapter, tmp_path / "merged", lambda _: 2.0)


@pytest.mark.parametrize("rslora", [False, True])
def test_load_adapter_with_alpha_and_rank_patterns(
    base: Path, tmp_path: Path, rslora: bool
) -> None:
    def rank(module: str) -> int:
        return 7 if module.endswith("k_proj") else 3 if ".1.mlp." in module else 4

    def alpha(module: str) -> float:
        return (
            1.5
            if module == "model.layers.2.self_attn.k_proj"
            else 5
            if module.endswith("v_proj")
            else 8
        )

    patterns = {
        "rank_pattern": {"k_proj": 7, r"layers\.1\.mlp\.\w+": 3, "proj": 99},
        "alpha_pattern": {"^model.layers.2.self_attn.k_proj": 1.5, "v_proj|nothing": 5, "roj": 99},
    }
    adapter = write_adapter(base, tmp_path / "a", rank=rank, use_rslora=rslora, **patterns)

    def scale(module: str) -> float:
        return alpha(module) / (math.sqrt(rank(module)) if rslora else rank(module))

    same_as_merged(base, adapter, tmp_path / "merged", scale)


def test_load_adapter_ignores_harmless_fields_and_converts_dtypes(
    base: Path, spec: ModelSpec, tmp_path: Path
) -> None:
    adapter = write_adapter(
        base,
        tmp_path / "a",
        "q_proj",
        lora_dropout=0.1,
        megatron_core="megatron.core",
        qalora_group_size=16,
        task_type="CAUSAL_LM",
        use_dora=False,
        modules_to_save=None,
        init_lora_weights="gaussian",
        new_field=[],
    )
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, adapter / WEIGHTS)
    lora = load_adapter(adapter, spec, torch.float16)["layers.0.attn.qkv"]
    assert lora.lora_a.dtype == lora.lora_b.dtype == torch.float16
    assert torch.equal(lora.lora_a, tensors[f"{Q}.lora_A.weight"].bfloat16().half())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, r"has peft_type LOHA. Plain LoRA was expected, with 'LORA' there"),
        ({"peft_type": None}, r"has peft_type None"),
        (
            {"use_dora": True},
            r"has use_dora True. Plain LoRA was expected, with nothing there. Merge it",
        ),
        ({"bias": "lora_only"}, r"has bias lora_only. Plain LoRA was expected, with 'none' there"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save \['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, r"has init_lora_weights pissa"),
        ({"layer_replication": [[0, 4], [2, 5]]}, r"has layer_replication"),
        ({"invented_tomorrow": 1}, r"has invented_tomorrow 1"),
        ({"use_rslora": "yes"}, r"has use_rslora yes"),
        ({"r": 0}, r"has r 0. A positive integer was expected"),
        ({"r": True}, r"has r True. A positive integer was expected"),
        ({"lora_alpha": math.nan}, r"has lora_alpha nan. A positive number was expected"),
        ({"lora_alpha": None}, r"has lora_alpha None. A positive number was expected"),
        ({"rank_pattern": {"q_proj": 2.5}}, r"has rank_pattern .*A positive integer was expected"),
        (
            {"alpha_pattern": {"q_proj(": 2}},
            r"has alpha_pattern .*An object of regular expressions and numbers",
        ),
        (
            {"alpha_pattern": ["q_proj"]},
            r"has alpha_pattern .*An object of regular expressions and numbers",
        ),
        (
            {"rank_pattern": {"q_proj": 2}},
            r"q_proj.lora_A.weight has shape \[4, 32\]. Shape \[2, 32\] was expected",
        ),
    ],
)
def test_load_adapter_refuses_configs(
    base: Path, spec: ModelSpec, tmp_path: Path, config: dict[str, object], message: str
) -> None:
    adapter = write_adapter(base, tmp_path / "a", **config)
    with pytest.raises(InputError, match=message):
        load_adapter(adapter, spec, torch.float32)


def rewritten(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)
    return adapter


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({f"{PREFIX}lm_head.lora_A.weight": torch.ones(4, 32)}),
            r"1 tensors of no.*\(.*lm_head",
        ),
        (
            lambda t: t.update(
                {f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, 128)}
            ),
            r"embed_tokens.lora_embedding_A\). "
            r"Names like .*layers.0.self_attn.q_proj.lora_A.weight were expected",
        ),
        (
            lambda t: t.update(
                {f"{PREFIX}model.layers.4.self_attn.q_proj.lora_A.weight": torch.ones(1)}
            ),
            r"layers\.4",
        ),
        (
            lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(1)}),
            r"lora_magnitude_vector",
        ),
        (
            lambda t: t.update({f"{PREFIX}model.layers.0.input_layernorm.weight": torch.ones(32)}),
            r"input_layernorm",
        ),
        (
            lambda t: t.update({f"{PREFIX}odd{i}": torch.ones(1) for i in range(7)}),
            r"has 7 tensors .*odd4\)",
        ),
        (lambda t: t.clear(), r"has no tensors"),
        (lambda t: t.pop(f"{Q}.lora_A.weight"), r"lacks .*q_proj.lora_A.weight. lora_A and lora_B"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), r"lacks .*q_proj.lora_B.weight. lora_A and lora_B"),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 31)}),
            r"has shape \[4, 31\]. Shape \[4, 32\] was",
        ),
        (
            lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(33, 4)}),
            r"has shape \[33, 4\]. Shape \[32, 4\] was",
        ),
        (
            lambda t: t[f"{Q}.lora_A.weight"][1].fill_(math.nan),
            r"q_proj.lora_A.weight has values that are not finite",
        ),
        (
            lambda t: t[f"{Q}.lora_B.weight"][1].fill_(4e4),
            r"q_proj.lora_B.weight has values .* in torch.float16",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32).int()}),
            r"has dtype I32. Dtype F32 or F16 or BF16",
        ),
    ],
)
def test_load_adapter_refuses_tensors(
    base: Path,
    spec: ModelSpec,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    adapter = rewritten(write_adapter(base, tmp_path / "a", "self_attn"), change)
    with pytest.raises(InputError, match=message) as caught:
        load_adapter(adapter, spec, torch.float16)
    assert str(adapter / WEIGHTS) in str(caught.value)


def test_load_adapter_refuses_a_bias_that_has_two_dimensions(tmp_path: Path) -> None:
    """ERNIE stores the biases that choose experts as [1, experts]."""
    family_oracle("ernie4.5-moe", tmp_path / "base")
    spec = model_spec(open_checkpoint(tmp_path / "base").config)
    adapter = write_adapter(tmp_path / "base", tmp_path / "a", "q_proj")
    module = f"{PREFIX}model.layers.1.mlp.moe_statics.e_score_correction_bias"
    pair = {
        f"{module}.lora_A.weight": torch.ones(4, 4),
        f"{module}.lora_B.weight": torch.ones(1, 4),
    }
    with pytest.raises(InputError, match=r"2 tensors of no linear layer .*correction_bias"):
        load_adapter(rewritten(adapter, lambda t: t.update(pair)), spec, torch.float32)


def test_load_adapter_refuses_files(base: Path, spec: ModelSpec, tmp_path: Path) -> None:
    adapter = write_adapter(base, tmp_path / "a")
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:-1])
    with pytest.raises(InputError, match=f"the file has {len(whole)} bytes|data bytes"):
        load_adapter(adapter, spec, torch.float32)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(
        InputError,
        match=r"a pickled one \(adapter_model.bin\) can run code and is never loaded. Save it",
    ):
        load_adapter(adapter, spec, torch.float32)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"adapter_config.json holds a JSON list"):
        load_adapter(adapter, spec, torch.float32)
    with pytest.raises(InputError, match=r"adapter_config.json cannot be read"):
        load_adapter(tmp_path / "nowhere", spec, torch.float32)


def test_lora_manager_remove_restores_the_linears(
    base: Path, spec: ModelSpec, tmp_path: Path
) -> None:
    model = load_model(open_checkpoint(base), torch.float32)
    before = [dict(layer.linears) for layer in model.layers]
    adapters = LoraManager(model)
    for name, wanted in (("a", "layers.1.*q_proj"), ("b", "layers.[12].*(v_proj|up_proj)")):
        adapters.add(
            name, load_adapter(write_adapter(base, tmp_path / name, wanted), spec, torch.float32)
        )
    wrapped = {
        (i, n)
        for i, layer in enumerate(model.layers)
        for n in before[i]
        if layer.linears[n] is not before[i][n]
    }
    assert wrapped == {(1, "attn.qkv"), (1, "mlp.gate_up"), (2, "attn.qkv"), (2, "mlp.gate_up")}
    x = torch.randn(3, 32)
    assert torch.equal(model.layers[1].linears["attn.qkv"](x), before[1]["attn.qkv"](x)), (
        "no rows are theirs"
    )
    adapters.remove("b")
    assert model.layers[1].linears["attn.qkv"] is not before[1]["attn.qkv"], (
        "the other adapter is still there"
    )
    assert model.layers[2].linears == before[2]
    adapters.remove("a")
    assert [layer.linears for layer in model.layers] == before


@pytest.mark.parametrize(
    "owners", [[(0, 2), (1, 3), (2, 1)], [(1, 1), (0, 1), (2, 1), (1, 1), (0, 1), (2, 1)]]
)
def test_lora_manager_applies_each_adapter_to_its_rows(
    base: Path, spec: ModelSpec, tmp_path: Path, owners: list[tuple[int, int]]
) -> None:
    model = load_model(open_checkpoint(base), torch.float32)
    linear = model.layers[1].linears["attn.o"]
    adapters = LoraManager(model)
    loaded = [
        load_adapter(write_adapter(base, tmp_path / n, "o_proj", seed=ord(n)), spec, torch.float32)
        for n in "ab"
    ]
    for name, updates in zip("ab", loaded, strict=True):
        adapters.add(name, updates)
    x = torch.randn(6, 32)
    expected = linear(x)
    for row, key in enumerate(key for key, count in owners for _ in range(count)):
        if key:
            lora = loaded[key - 1]["layers.1.attn.o"]
            expected[row] += lora.lora_b @ (lora.lora_a @ x[row])
    adapted = model.layers[1].linears["attn.o"]
    with adapters.activate(owners, torch.tensor):
        torch.testing.assert_close(adapted(x), expected)
        with (
            pytest.raises(RuntimeError, match="mat1 and mat2"),
            adapters.activate([(2, 6)], torch.tensor),
        ):
            adapted(x[:, :-1])  # a step that fails
    assert torch.equal(adapted(x), linear(x))


def rank_of_a_model(**sizes: Any) -> Any:
    group = SimpleNamespace(tp_size=sizes.get("tp_size", 1), pp_size=sizes.get("pp_size", 1))
    spec = SimpleNamespace(moe=sizes["moe"])
    return SimpleNamespace(device=torch.device("meta"), spec=spec, parallel_group=group)


@pytest.mark.parametrize("ranks", [{"tp_size": 2}, {"pp_size": 2}])
def test_lora_slots_are_the_same_on_all_ranks_of_a_model_with_experts(
    ranks: dict[str, int],
) -> None:
    """An adapter of some experts or layers changes experts of one rank only."""
    for sizes, has_slots in (
        ({"moe": 1}, True),
        ({"moe": 1} | ranks, False),
        ({"moe": None} | ranks, True),
    ):
        adapters = LoraManager(rank_of_a_model(**sizes), uses_slots=True)
        adapters.add("of another rank", {})
        assert (adapters.slot(1) is not None) == has_slots


def test_lora_slots_are_on_the_models_device_without_weights() -> None:
    """A pipeline stage may have no layer that the adapter changes."""
    model = rank_of_a_model(moe=None, tp_size=2)
    adapters = LoraManager(model, uses_slots=True)
    adapters.add("of another stage", {})
    with adapters.activate_slots(torch.ones(3, dtype=torch.int64, device="meta")):
        assert adapters.rows_of_slots is not None
        assert adapters.rows_of_slots.device == model.device


def test_load_adapter_reads_a_real_config(base: Path, spec: ModelSpec, tmp_path: Path) -> None:
    """All fields that peft 0.21 writes."""
    adapter = write_adapter(base, tmp_path / "a", "self_attn.(q|v)_proj")
    config = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": "somewhere/else",
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.05,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "monteclora_config": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": 4,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert load_adapter(adapter, spec, torch.float32).keys() == {
        f"layers.{i}.attn.qkv" for i in range(4)
    }
