"""MTP and EAGLE-3 heads compute what other implementations compute; broken ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_draft_heads import (
    AUX_LAYERS,
    VOCAB,
    eagle3_output,
    family_with_mtp,
    glm_with_mtp,
    llama_with_eagle3,
    load_mtp,
    mtp_hidden,
    nemotron_with_mtp,
)
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.model.decoder import Decoder
from llmkit.model.draft_head import DraftHead, load_draft_head
from llmkit.model.draft_head_spec import (
    check_draft_head,
    eagle3_model_spec,
    is_eagle3,
    mtp_model_spec,
)
from llmkit.model.families import checkpoint_spec
from llmkit.model.full_forward import hidden_states, make_batch
from llmkit.model.language_model import scratch_layer_caches
from llmkit.model.weight_loader import load_model
from llmkit.runtime.draft_source import open_draft
from llmkit.runtime.engine.engine_options import EngineOptions

TOKENS = torch.randint(3, VOCAB, (25,), generator=torch.Generator().manual_seed(2))


def decoder(checkpoint: Checkpoint, packed: bool) -> Decoder:
    model = load_model(checkpoint, torch.float32, packed=packed)
    assert isinstance(model, Decoder)
    return model


def outputs(head: DraftHead, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """What the head computes of a whole text. hidden: [T, C]; tokens: [T], the next ones."""
    positions, batch = make_batch(head.target, [len(tokens)])
    caches = scratch_layer_caches(head, head.spec, batch.num_blocks, batch.block_size)
    head.reserve(len(tokens))
    head.hidden_states[:] = head.project(hidden)
    return head(tokens, positions, batch, caches)


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return glm_with_mtp(tmp_path_factory.mktemp("glm"))


@pytest.mark.parametrize("packed", [False, True])
def test_mtp_head_computes_what_transformers_computes(glm: Path, packed: bool) -> None:
    model, head = load_mtp(glm)
    with torch.no_grad():
        states = model(TOKENS[None, :-1], output_hidden_states=True).hidden_states[-1]
        wanted = mtp_hidden(head, states, TOKENS[None, 1:])
        wanted_logits = head.shared_head(wanted)[0]
    checkpoint = open_checkpoint(glm)
    target = decoder(checkpoint, packed)
    spec = mtp_model_spec(target.spec, checkpoint.tensor_shapes)
    assert spec is not None
    check_draft_head(checkpoint, spec)
    ours = load_draft_head(checkpoint, spec, target, packed=packed)
    output = outputs(ours, hidden_states(target, [TOKENS[:-1]]), TOKENS[1:])
    torch.testing.assert_close(output, wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.logits(output), wanted_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["deepseek-v3", "glm4-moe-lite", "qwen3-next", "qwen3.5", "qwen3.5-moe"]
)
def test_mtp_heads_of_families_compute_what_transformers_computes(
    tmp_path: Path, name: str
) -> None:
    model, head = family_with_mtp(name, tmp_path)
    tokens = TOKENS % 128
    with torch.no_grad():
        states = model(tokens[None, :-1], output_hidden_states=True).hidden_states[-1]
        wanted = mtp_hidden(head, states, tokens[None, 1:])[0]
    checkpoint = open_checkpoint(tmp_path)
    target = decoder(checkpoint, packed=True)
    draft = open_draft(checkpoint, target.spec, EngineOptions(device="cpu", speculate="mtp"))
    assert draft is not None
    ours = load_draft_head(checkpoint, draft.spec, target, packed=True)
    output = outputs(ours, hidden_states(target, [tokens[:-1]]), tokens[1:])
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["nemotron-3", "nemotron-3-latent"])
def test_mtp_head_of_single_blocks_computes_what_their_modules_do(
    tmp_path: Path, name: str
) -> None:
    model, head = nemotron_with_mtp(tmp_path, name)
    tokens = TOKENS % model.config.vocab_size
    with torch.no_grad():
        states = model.model(tokens[None, :-1]).last_hidden_state
        wanted = head(states, tokens[None, 1:])[0]
    checkpoint = open_checkpoint(tmp_path)
    target = decoder(checkpoint, packed=True)
    spec = mtp_model_spec(target.spec, checkpoint.tensor_shapes)
    assert spec is not None
    assert [layer.mixer for layer in spec.layers] == ["attention", "none"]
    check_draft_head(checkpoint, spec)
    ours = load_draft_head(checkpoint, spec, target, packed=True)
    output = outputs(ours, hidden_states(target, [tokens[:-1]]), tokens[1:])
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)


def test_mtp_head_with_recurrent_layers_is_carried_and_does_not_draft(tmp_path: Path) -> None:
    nemotron_with_mtp(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.startswith("mtp.layers.0.mixer.")]:
        del tensors[name]
    tensors["mtp.layers.0.mixer.in_proj.weight"] = torch.zeros(168, 32)
    save_file(tensors, file, {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    spec = checkpoint_spec(checkpoint)
    assert spec.mtp is None and "mtp." in spec.carried
    decoder(checkpoint, packed=False)


def renamed(glm: Path, path: Path) -> Path:
    """The same checkpoint with the names of Qwen3-Next's MTP heads."""
    path.mkdir()
    layer = "model.layers.2."
    names = {
        f"{layer}eh_proj.": "mtp.fc.",
        f"{layer}enorm.": "mtp.pre_fc_norm_embedding.",
        f"{layer}hnorm.": "mtp.pre_fc_norm_hidden.",
        f"{layer}shared_head.norm.": "mtp.norm.",
        layer: "mtp.layers.0.",
    }
    tensors = {}
    for name, tensor in load_file(glm / "model.safetensors").items():
        old = next((old for old in names if name.startswith(old)), "")
        tensors[names.get(old, "") + name.removeprefix(old)] = tensor
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((glm / "config.json").read_text())
    del config["num_nextn_predict_layers"]  # no config of Qwen3-Next says it
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_mtp_head_in_modules_of_its_own_is_the_same_head(glm: Path, tmp_path: Path) -> None:
    found = []
    for path in (glm, renamed(glm, tmp_path / "renamed")):
        checkpoint = open_checkpoint(path)
        target = decoder(checkpoint, packed=False)
        assert target.spec.carried
        spec = mtp_model_spec(target.spec, checkpoint.tensor_shapes)
        assert spec is not None
        head = load_draft_head(checkpoint, spec, target)
        found.append(outputs(head, hidden_states(target, [TOKENS[:-1]]), TOKENS[1:]))
    assert torch.equal(*found)


def test_mtp_head_that_lacks_a_tensor_is_refused(glm: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in glm.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    norm = tensors.pop("model.layers.2.hnorm.weight")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    options = EngineOptions(device="cpu", speculate="mtp")

    def opened() -> None:
        checkpoint = open_checkpoint(broken)
        open_draft(checkpoint, checkpoint_spec(checkpoint), options)

    with pytest.raises(InputError, match=r"a draft head without the tensor model.layers.2.hnorm"):
        opened()
    tensors["model.layers.2.hnorm.weight"] = norm[:-1].clone()
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"hnorm.weight of the draft head has shape \[63\]"):
        opened()
    none = tiny_checkpoint(tmp_path / "none")
    with pytest.raises(InputError, match=r"has no MTP head.*--speculate ngram or suffix"):
        open_draft(open_checkpoint(none), checkpoint_spec(open_checkpoint(none)), options)


@pytest.mark.parametrize(
    ("layout", "norm_before_residual"), [("original", False), ("speculators", True)]
)
def test_eagle3_head_computes_what_the_paper_says(
    tmp_path: Path, layout: str, norm_before_residual: bool
) -> None:
    target_path, head_path, model, head = llama_with_eagle3(
        tmp_path, layout=layout, norm_before_residual=norm_before_residual
    )
    with torch.no_grad():
        states = model(TOKENS[None, :-1], output_hidden_states=True).hidden_states
        wanted = eagle3_output(model, head, states, TOKENS[None, 1:])[0]
        wanted_logits = head.logits(wanted)
    checkpoint = open_checkpoint(head_path)
    assert is_eagle3(checkpoint.config)
    target = decoder(open_checkpoint(target_path), packed=True)
    spec = eagle3_model_spec(checkpoint, target.spec)
    check_draft_head(checkpoint, spec)
    ours = load_draft_head(checkpoint, spec, target, packed=True)
    hidden = hidden_states(target, [TOKENS[:-1]])
    inputs = target.draft_inputs(hidden)
    read = torch.cat([states[layer] for layer in AUX_LAYERS], -1)[0]
    torch.testing.assert_close(inputs, read, rtol=1e-4, atol=1e-4)
    output = outputs(ours, inputs, TOKENS[1:])
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)
    logits = ours.logits(output)
    assert logits.shape == (len(TOKENS) - 1, VOCAB)
    torch.testing.assert_close(logits[:, head.token_ids], wanted_logits, rtol=1e-4, atol=1e-4)
    assert logits.isfinite().all(), "samplers take others for errors"
    assert (logits < -1e20).sum() == (len(TOKENS) - 1) * (VOCAB - len(head.token_ids))


def test_eagle3_head_may_read_the_last_layers_output(model: Path) -> None:
    target = decoder(open_checkpoint(model), packed=True)
    target.aux_layers = (len(target.layers), 0)
    hidden = hidden_states(target, [TOKENS])
    last, first = target.draft_inputs(hidden).split(target.spec.hidden_size, dim=1)
    torch.testing.assert_close(target.normalize(last.contiguous()), hidden)
    assert torch.equal(first, target.embed_tokens(TOKENS))


@pytest.fixture(scope="module")
def eagle3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    target, head, _, _ = llama_with_eagle3(tmp_path_factory.mktemp("eagle3"))
    return target, head


def test_eagle3_head_reads_the_papers_layers_by_default(
    eagle3: tuple[Path, Path], tmp_path: Path
) -> None:
    head = copied(eagle3[1], tmp_path, lambda config, _: config.update({LAYER_IDS: []}))
    spec = checkpoint_spec(open_checkpoint(eagle3[0]))
    deep = replace(spec, layers=spec.layers * 8)
    found = eagle3_model_spec(open_checkpoint(head), deep).draft_head
    assert found is not None
    assert found.aux_layers == (2, 16, 29)


LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
Change = Callable[[dict[str, object], dict[str, torch.Tensor]], object]


def copied(head: Path, folder: Path, change: Change) -> Path:
    """A copy of a head with another config and other tensors."""
    path = folder / "changed"
    path.mkdir()
    config = json.loads((head / "config.json").read_text())
    tensors = load_file(head / "model.safetensors")
    change(config, tensors)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


BROKEN: dict[str, tuple[Change, str]] = {
    "layers": (
        lambda config, _: config.update({LAYER_IDS: [1, 2, 9]}),
        r"reads the layers \[1, 2, 9\].*expected, 0 to 4",
    ),
    "vocabulary": (
        lambda config, _: config.update(vocab_size=600),
        "is for 600 tokens and the model has 512",
    ),
    "without tokens": (lambda _, tensors: tensors.pop("d2t"), "has no tensor d2t"),
    "unknown tokens": (
        lambda _, tensors: tensors["d2t"].fill_(VOCAB),
        "the tensor d2t names tokens that the model does not have",
    ),
    "another size": (
        lambda _, tensors: tensors.update({"fc.weight": torch.zeros(64, 128)}),
        r"fc.weight of the draft head has shape \[64, 128\]",
    ),
    "another form": (
        lambda config, _: config.update(eagle_config={"norm_before_fc": True}),
        "has norm_before_fc. One layer as Llama's",
    ),
    "norms of queries": (
        lambda _, tensors: tensors.update({"midlayer.self_attn.q_norm.weight": torch.ones(16)}),
        "has midlayer.self_attn.q_norm.weight",
    ),
    "two layers": (
        lambda config, _: config.update(num_hidden_layers=2),
        "has num_hidden_layers 2",
    ),
    "no norm": (
        lambda _, tensors: tensors.pop("midlayer.hidden_norm.weight"),
        "an EAGLE-3 head without a hidden_norm",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_eagle3_head_of_another_model_is_refused(
    eagle3: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    change, message = BROKEN[name]
    head = copied(eagle3[1], tmp_path, change)
    checkpoint = open_checkpoint(eagle3[0])
    spec = checkpoint_spec(checkpoint)

    def load() -> None:
        draft = open_draft(checkpoint, spec, EngineOptions(device="cpu", draft_model=str(head)))
        assert draft is not None
        load_draft_head(draft.checkpoint, draft.spec, decoder(checkpoint, packed=True))

    with pytest.raises(InputError, match=message):
        load()
