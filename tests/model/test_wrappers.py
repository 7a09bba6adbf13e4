"""The text models of multimodal checkpoints against transformers, under all their tensor names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.paged_sequences import close
from support.parity import check_decoding, check_greedy_tokens, check_mixed_batches
from support.tiny_adapters import PREFIX, WEIGHTS, write_adapter
from support.tiny_wrappers import WRAPPERS, save_wrapper, tiny_wrapper, wrapper_logits

from llmkit.checkpoint.config_defaults import FAMILIES, REQUIRED_SIZES
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.model import wrappers
from llmkit.model.checkpoint_tensors import check_checkpoint
from llmkit.model.families import checkpoint_spec, model_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.language_model import LanguageModel
from llmkit.model.lora import LoraManager, load_adapter
from llmkit.model.text_config_defaults import TEXT_DEFAULTS
from llmkit.model.weight_loader import load_model

TOKENS = torch.randint(3, 512, (40,), generator=torch.Generator().manual_seed(1))
FLOAT = torch.float32
SIZES = dict(zip(REQUIRED_SIZES, (512, 64, 128, 2, 4, 256), strict=True))
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {"model_type": "llama"},
}


@dataclass
class Pair:
    """A model of transformers, and its checkpoints with hub names and with its own."""

    oracle: Any
    paths: tuple[Path, Path]

    @cached_property
    def model(self) -> LanguageModel:
        return load_model(open_checkpoint(self.paths[0]), torch.float32)

    def reference(self, tokens: torch.Tensor) -> torch.Tensor:
        return wrapper_logits(self.oracle, tokens)


@pytest.fixture(scope="module", params=WRAPPERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp("wrapper")
    oracle = tiny_wrapper(request.param)
    hub, own = (save_wrapper(oracle, path / str(names), names) for names in (True, False))
    return Pair(oracle, (hub, own))


def test_wrapper_text_model_agrees_with_transformers(pair: Pair) -> None:
    expected = pair.reference(TOKENS)
    prefixes = set()
    for path in pair.paths:
        checkpoint = open_checkpoint(path)
        spec = checkpoint_spec(checkpoint)
        prefixes.add(spec.tensor_prefix)
        check_checkpoint(checkpoint, spec)
        logits = next(window_logits(load_model(checkpoint, torch.float32), TOKENS[None]))
        close(logits, expected)
        assert spec.architecture == type(pair.oracle).__name__
    known = wrappers.WRAPPERS[type(pair.oracle).__name__].names
    assert prefixes == {names.prefix for names in known}


def test_wrapper_agrees_with_transformers_when_decoding(pair: Pair) -> None:
    check_decoding(pair.model, pair.reference)


def test_wrapper_agrees_with_transformers_on_mixed_batches(pair: Pair) -> None:
    check_mixed_batches(pair.model, pair.reference)


def test_wrapper_greedy_tokens_equal_those_of_transformers(pair: Pair) -> None:
    check_greedy_tokens(pair.model, pair.reference)


def test_wrapper_reads_experts_as_the_hub_stores_them(tmp_path: Path) -> None:
    """Qwen3-VL-MoE's files have [experts, in, out]; transformers writes [experts, out, in]."""
    oracle = tiny_wrapper("qwen3-vl-moe")
    path = save_wrapper(oracle, tmp_path / "model", hub_names=True)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensors[name] = tensor.transpose(1, 2).contiguous()
    save_file(tensors, file, {"format": "pt"})
    logits = next(window_logits(load_model(open_checkpoint(path), torch.float32), TOKENS[None]))
    torch.testing.assert_close(logits, wrapper_logits(oracle, TOKENS), atol=1e-4, rtol=0)


def test_wrapper_reads_a_flat_config_of_older_files(tmp_path: Path) -> None:
    """The hub's Qwen2.5-VL has the text model's fields at the top level, and M-RoPE as a type."""
    oracle = tiny_wrapper("qwen2.5-vl")
    path = save_wrapper(oracle, tmp_path / "model", hub_names=True)
    file = path / "config.json"
    config = json.loads(file.read_text())
    config |= config.pop("text_config") | {"model_type": "qwen2_5_vl", "rope_theta": 10000.0}
    del config["rope_parameters"]
    config["rope_scaling"] = {"type": "mrope", "mrope_section": [4, 2, 2]}
    file.write_text(json.dumps(config))
    logits = next(window_logits(load_model(open_checkpoint(path), torch.float32), TOKENS[None]))
    torch.testing.assert_close(logits, wrapper_logits(oracle, TOKENS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("text_type", TEXT_DEFAULTS)
def test_wrapper_text_defaults_agree_with_transformers(text_type: str) -> None:
    theirs = transformers.CONFIG_MAPPING[text_type]()
    for name, value in TEXT_DEFAULTS[text_type].items():
        if name in ("norm_topk_prob", "intermediate_size") and not hasattr(theirs, name):
            continue
        if name == "rope_theta":
            assert value == theirs.rope_parameters["rope_theta"]
        else:
            assert value == getattr(theirs, name), name


@pytest.mark.parametrize("architecture", wrappers.WRAPPERS)
def test_wrapper_spec_of_an_empty_text_config(architecture: str) -> None:
    """What a text_config leaves out has the default of its config class."""
    wrapper = wrappers.WRAPPERS[architecture]
    for text_type in wrapper.text_types:
        family = wrapper.families.get(text_type, text_type)
        if family not in FAMILIES or text_type not in TEXT_DEFAULTS:
            continue
        config = {
            "architectures": [architecture],
            "model_type": wrapper.model_type,
            "text_config": {"model_type": text_type},
        }
        spec = model_spec(config)
        theirs = transformers.CONFIG_MAPPING[wrapper.model_type](**config)
        text = theirs.text_config
        assert spec.hidden_size == text.hidden_size
        assert spec.num_kv_heads == text.num_key_value_heads
        assert spec.rms_norm_eps == text.rms_norm_eps
        assert len(spec.layers) == text.num_hidden_layers
        assert spec.tie_word_embeddings == theirs.tie_word_embeddings
        assert spec.tensor_prefix == wrapper.names[0].prefix


@pytest.mark.parametrize(
    ("flags", "has_head", "tied"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"tie_word_embeddings": True}, True, False),
        ({"tie_word_embeddings": False}, False, False),
        ({"text_config": {"tie_word_embeddings": False}}, False, True),
        (
            {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}},
            False,
            True,
        ),
    ],
)
def test_wrapper_ties_embeddings_as_transformers(
    flags: dict[str, Any], has_head: bool, tied: bool
) -> None:
    """Mistral 3's flag is true by default, and its larger checkpoints have an lm_head."""
    tensors = ["language_model.model.embed_tokens.weight"]
    tensors += ["language_model.lm_head.weight"] * has_head
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        **flags,
        "text_config": SIZES | {"num_key_value_heads": 2} | flags.get("text_config", {}),
    }
    assert model_spec(config, dict.fromkeys(tensors, ())).tie_word_embeddings == tied


def edit_tensors(path: Path, change: dict[str, str | None]) -> None:
    """Rename tensors, or remove them (None)."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    renamed = {change.get(name, name): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in renamed.items() if name}, file, {"format": "pt"})


def test_wrapper_refuses_two_prefixes_and_unknown_tensors(tmp_path: Path) -> None:
    path = save_wrapper(tiny_wrapper("llava"), tmp_path / "model", hub_names=False)
    norm = "model.language_model.norm.weight"
    edit_tensors(path, {norm: "language_model.model.norm.weight"})
    with pytest.raises(InputError, match="names its text model in 2 ways") as mixed:
        checkpoint_spec(open_checkpoint(path))
    assert "One prefix for all tensors" in str(mixed.value)
    edit_tensors(path, {"language_model.model.norm.weight": norm})
    first = "model.vision_tower.embeddings.class_embedding"
    edit_tensors(path, {first: "model.audio_tower.class_embedding"})
    checkpoint = open_checkpoint(path)
    with pytest.raises(InputError, match=r"has 1 tensor \(model.audio_tower.class_embedding\)"):
        check_checkpoint(checkpoint, checkpoint_spec(checkpoint))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_config": None}, "has no text_config. An object with the config of the text model"),
        ({"text_config": "llama"}, "a text_config of another type"),
        ({"text_config": {"model_type": "gpt2"}}, "a text_config of model_type 'gpt2'. llama or"),
        ({"model_type": "llama"}, "model_type 'llama'. llava, as its architecture"),
        ({"text_config": {"model_type": "llama", "hidden_size": "64"}}, "hidden_size '64'"),
    ],
)
def test_wrapper_refuses_wrong_configs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_spec(LLAVA | values)


def peft_adapter(base: Path, path: Path, prefix: str, tower: bool = False, **config: Any) -> Path:
    """An adapter of all text linears, whose modules PEFT found below `prefix` in a model's class.

    tower: with a pair of the vision tower, which `target_modules=["q_proj"]` matches, too.
    """
    spec = checkpoint_spec(open_checkpoint(base))
    own = spec.tensor_prefix
    adapter = write_adapter(base, path, prefix=f"{own}.layers.", **config)
    tensors = {
        name.replace(f"{PREFIX}{own}.", f"{PREFIX}{prefix}."): tensor
        for name, tensor in load_file(adapter / WEIGHTS).items()
    }
    if tower:
        module = f"{PREFIX}{spec.carried[1]}encoder.layers.0.self_attn.q_proj"
        tensors |= {f"{module}.lora_A.weight": torch.ones(4, 16)}
        tensors |= {f"{module}.lora_B.weight": torch.ones(16, 4)}
    save_file(tensors, adapter / WEIGHTS)
    return adapter


@pytest.mark.parametrize("hub_names", [True, False])
@pytest.mark.parametrize("name", ["gemma3", "qwen2.5-vl", "smolvlm"])
def test_wrapper_adapter_has_any_of_its_names(name: str, hub_names: bool, tmp_path: Path) -> None:
    """PEFT's names are those of the modules of the transformers version that trained."""
    oracle = tiny_wrapper(name)
    base = save_wrapper(oracle, tmp_path / "base", hub_names)
    spec = checkpoint_spec(open_checkpoint(base))
    expected = load_adapter(peft_adapter(base, tmp_path / "a", spec.tensor_prefix), spec, FLOAT)
    assert {module.split(".", 2)[2] for module in expected} == {
        "attn.qkv",
        "attn.o",
        "mlp.gate_up",
        "mlp.down",
    }
    for index, names in enumerate(wrappers.WRAPPERS[spec.architecture].names):
        adapter = peft_adapter(base, tmp_path / str(index), names.prefix, tower=True)
        loaded = load_adapter(adapter, spec, FLOAT)
        assert loaded.keys() == expected.keys()
        for module, lora in loaded.items():
            assert torch.equal(lora.lora_a, expected[module].lora_a)
            assert torch.equal(lora.lora_b, expected[module].lora_b)


def test_wrapper_adapter_answers_as_the_merged_model(tmp_path: Path) -> None:
    """The text layers of transformers' model get the weights with the updates."""
    oracle = tiny_wrapper("gemma3")
    base = save_wrapper(oracle, tmp_path / "base", hub_names=True)
    pattern = {"model.language_model.layers.1.self_attn.q_proj": 4}
    adapter = peft_adapter(
        base, tmp_path / "a", "model.language_model", tower=True, alpha_pattern=pattern
    )
    modules = dict(oracle.named_modules())
    updates = load_file(adapter / WEIGHTS)
    for name in [name for name in updates if ".lora_A." in name and "language" in name]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        scale = pattern.get(module, 8) / 4
        update = updates[name.replace("lora_A", "lora_B")] @ updates[name]
        modules[module].weight.data += scale * update
    checkpoint = open_checkpoint(base)
    model = load_model(checkpoint, FLOAT)
    adapters = LoraManager(model)
    adapters.add("a", load_adapter(adapter, checkpoint_spec(checkpoint), FLOAT))
    with adapters.activate([(1, len(TOKENS))], torch.tensor):
        logits = next(window_logits(model, TOKENS[None]))
    close(logits, wrapper_logits(oracle, TOKENS))


def test_wrapper_adapter_of_towers_only_is_refused(tmp_path: Path) -> None:
    base = save_wrapper(tiny_wrapper("gemma3"), tmp_path / "base", hub_names=True)
    spec = checkpoint_spec(open_checkpoint(base))
    adapter = peft_adapter(base, tmp_path / "a", "model.language_model", tower=True)
    tensors = load_file(adapter / WEIGHTS)
    towers = {name: tensor for name, tensor in tensors.items() if "vision" in name}
    save_file(towers, adapter / WEIGHTS)
    with pytest.raises(InputError, match=r"no tensors of the text model.*language_model\.model"):
        load_adapter(adapter, spec, FLOAT)
    twice = {
        name.replace("model.language_model", "language_model.model"): tensor.clone()
        for name, tensor in tensors.items()
    }
    save_file(tensors | twice, adapter / WEIGHTS)
    with pytest.raises(InputError, match="28 tensors of no linear layer"):
        load_adapter(adapter, spec, FLOAT)
