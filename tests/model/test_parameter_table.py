"""The parameter table, and what a checkpoint that does not fit it gets."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.tiny_families import family_oracle
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.model import weight_loader as loader
from llmkit.model.checkpoint_tensors import check_checkpoint, checkpoint_tensors
from llmkit.model.families import SUPPORTED, model_spec
from llmkit.model.parameter_table import parameters
from llmkit.model.split import Split
from llmkit.model.weight_loader import load_model
from llmkit.model.wrappers import WRAPPERS


def rewrite(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def rejected(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_model(open_checkpoint(path), torch.float32)
    assert caught.value.exit_code == 3
    return str(caught.value)


def configured(path: Path, **changes: object) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def test_parameter_has_sources_layers_and_input(checkpoint: Path) -> None:
    spec = model_spec(open_checkpoint(checkpoint).config)
    rows = {row.name: row for row in parameters(spec)}
    qkv = rows["layers.1.attn.qkv.weight"]
    assert qkv.shape == (64 + 32 + 32, 64)
    assert [p.name.split(".")[-2] for p in qkv.sources] == ["q_proj", "k_proj", "v_proj"]
    assert [p.split.kind for p in qkv.sources] == ["heads", "kv_heads", "kv_heads"]
    assert qkv.is_linear and qkv.layers == (1,) and qkv.input_from == "layers.1.attn_norm.weight"
    assert rows["layers.0.mlp.down.weight"].sources[0].split == Split("features", 1, 128)
    assert not rows["embed.weight"].is_linear and rows["embed.weight"].layers == (-1,)
    assert set(checkpoint_tensors(spec, None)) == set(open_checkpoint(checkpoint).tensors)


@given(st.integers(1, 8), st.integers(1, 16), st.integers(1, 9))
def test_split_covers_every_unit_once(count: int, unit: int, tp: int) -> None:
    split = Split("features", 0, count * tp, unit)
    assert split.divides_over(tp)
    intervals = [split.interval(rank, tp) for rank in range(tp)]
    assert [start for start, _ in intervals] == [0] + [stop for _, stop in intervals[:-1]]
    assert intervals[-1][1] == count * tp * unit


@given(st.integers(1, 500), st.integers(2, 9))
def test_split_of_the_vocabulary_covers_every_row_once_and_pads(vocab: int, tp: int) -> None:
    split = Split("vocab", 0, vocab)
    rows = [row for rank in range(tp) for row in range(*split.interval(rank, tp))]
    assert rows == list(range(vocab))
    assert split.padded_rows(tp) % 64 == 0 and split.padded_rows(tp) * tp >= vocab


def test_split_replicates_kv_heads_beyond_their_number() -> None:
    split = Split("kv_heads", 0, 2, 16)
    assert [split.interval(rank, 4) for rank in range(4)] == [(0, 16), (0, 16), (16, 32), (16, 32)]
    assert split.num_replicas(4) == 2 and split.divides_over(4) and not split.divides_over(3)


def test_check_checkpoint_names_missing_tensors(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda t: [t.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1)])
    message = rejected(checkpoint)
    assert (
        "lacks 2 tensors (model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight)"
        in message
    )


def test_check_checkpoint_counts_extra_tensors_after_five(checkpoint: Path) -> None:
    rewrite(
        checkpoint,
        lambda t: t.update({f"model.layers.0.odd_{i}": torch.zeros(2) for i in range(7)}),
    )
    message = rejected(checkpoint)
    assert "7 tensors (model.layers.0.odd_0, " in message and "odd_4 and 2 more)" in message


def test_check_checkpoint_names_wrong_shapes_and_dtypes(checkpoint: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(checkpoint, lambda t: t.update({name: torch.zeros(16, 64)}))
    assert f"tensor {name} has shape [16, 64]. Shape [32, 64]" in rejected(checkpoint)
    rewrite(checkpoint, lambda t: t.update({name: torch.zeros(32, 64, dtype=torch.int32)}))
    assert f"tensor {name} has dtype I32. Dtype F32 or F16 or BF16" in rejected(checkpoint)


def test_check_checkpoint_allows_a_repeated_tied_head(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    source = open_checkpoint(path)
    check_checkpoint(source, model_spec(source.config))
    model = load_model(source, torch.float32)
    assert model.head.weight is model.embedding


@pytest.mark.parametrize(
    ("architecture", "nearest"),
    [
        ("LLaMAForCausalLM", "LlamaForCausalLM"),
        ("Gemma9ForConditionalGeneration", "GemmaForCausalLM"),
        ("NemotronXForCausalLM", "NemotronForCausalLM"),
        ("MambaForCausalLM", "Mamba2ForCausalLM"),
        ("RwkvForCausalLM", None),
    ],
)
def test_model_spec_names_the_nearest_architecture(
    checkpoint: Path, architecture: str, nearest: str | None
) -> None:
    message = rejected(configured(checkpoint, architectures=[architecture]))
    assert f"unsupported architecture ({architecture})" in message
    assert ("most similar name" in message) == (nearest is not None)
    if nearest is not None:
        assert f"The supported architecture with the most similar name is {nearest}." in message
    number = len(SUPPORTED) + len(WRAPPERS)
    assert f"docs/models.md lists the {number} supported architectures" in message
    assert len(message) < 480


def test_check_checkpoint_allows_unused_keys_of_layers_that_read_others(tmp_path: Path) -> None:
    family_oracle("gemma4", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.5.self_attn.k_proj.weight"] = torch.ones(64, 32)
    save_file(tensors, file, {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    check_checkpoint(checkpoint, model_spec(checkpoint.config))
    tensors["model.layers.5.self_attn.k_proj.scale"] = torch.ones(1)
    tensors["model.layers.5.self_attn.sinks"] = torch.ones(4)
    save_file(tensors, file, {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"has 1 tensor \(model.layers.5.self_attn.sinks\)"):
        check_checkpoint(checkpoint, model_spec(checkpoint.config))


def test_check_checkpoint_names_the_missing_bias_that_chooses_experts(tmp_path: Path) -> None:
    family_oracle("glm4-moe", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    save_file(tensors, file, {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    missing = r"lacks 1 tensor \(model.layers.2.mlp.gate.e_score_correction_bias\)"
    with pytest.raises(InputError, match=missing):
        check_checkpoint(checkpoint, model_spec(checkpoint.config))


def test_model_spec_refuses_remote_code(checkpoint: Path) -> None:
    config = {"architectures": ["EvilModel"], "auto_map": {"AutoModel": "evil.Model"}}
    message = rejected(configured(checkpoint, **config))
    assert "auto_map (AutoModel)" in message and "remote code is never run" in message


def test_model_spec_ignores_an_auto_map_of_a_known_architecture(checkpoint: Path) -> None:
    config = open_checkpoint(checkpoint).config
    remote = {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    assert model_spec(config | remote) == model_spec(config)


def test_load_model_casts_tensors_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / "model"))
    table = parameters(model_spec(checkpoint.config))
    whole = [loader.read_parameter(checkpoint, row, torch.float32) for row in table]
    monkeypatch.setattr(loader, "CHUNK_BYTES", 1000)
    for row, expected in zip(table, whole, strict=True):
        assert torch.equal(loader.read_parameter(checkpoint, row, torch.float32), expected), (
            row.name
        )
