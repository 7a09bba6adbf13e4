"""The fallback through transformers' modeling code, against transformers and the native decoder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.paged_sequences import close, tokens_of
from support.parity import check_mixed_batches
from support.tiny_fallback import MODELS, make_oracle
from support.tiny_families import COMMON, family_oracle, oracle_logits

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.model.checkpoint_tensors import check_checkpoint, scheme_of
from llmkit.model.families import model_spec, support
from llmkit.model.full_forward import window_logits
from llmkit.model.language_model import LanguageModel
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.model.transformers_model import TransformersModel
from llmkit.model.transformers_spec import UnsupportedError, transformers_spec
from llmkit.model.weight_loader import load_model
from llmkit.quant.methods import MethodOptions, build_quantization_config


def load_fallback(path: Path, *, packed: bool = True) -> LanguageModel:
    checkpoint = open_checkpoint(path)
    spec = transformers_spec(checkpoint.config, checkpoint.tensor_names)
    check_checkpoint(checkpoint, spec)
    model = load_model(checkpoint, torch.float32, packed=packed, spec=spec)
    assert isinstance(model, TransformersModel)
    return model


def check_model(oracle: torch.nn.Module, model: LanguageModel) -> None:
    """Compare a whole prompt, and chunks and decoded tokens of three sequences in one cache."""
    tokens = tokens_of(100, 5)
    close(next(window_logits(model, tokens[None])), oracle_logits(oracle, tokens))
    decoding = [[1, 0, 0]] * 3
    steps = [[25, 0, 0], *decoding, [1, 40, 0], [1, 40, 17], [0, 19, 1], [0, 1, 39]]
    check_mixed_batches(model, partial(oracle_logits, oracle), steps)


@pytest.mark.parametrize("kind", MODELS)
def test_fallback_agrees_with_transformers(kind: str, tmp_path: Path) -> None:
    check_model(make_oracle(kind, tmp_path), load_fallback(tmp_path))


def test_fallback_agrees_with_the_native_decoder(tmp_path: Path) -> None:
    oracle = family_oracle("llama", tmp_path)
    check_model(oracle, load_fallback(tmp_path))
    tokens = tokens_of(40, 3)[None]
    native = load_model(open_checkpoint(tmp_path), torch.float32)
    for packed in (False, True):
        fallback = load_fallback(tmp_path, packed=packed)
        close(next(window_logits(fallback, tokens)), next(window_logits(native, tokens)))


def test_fallback_reads_a_checkpoint_without_the_decoders_prefix(tmp_path: Path) -> None:
    oracle = make_oracle("gpt2", tmp_path)
    oracle.transformer.save_pretrained(tmp_path)  # names without "transformer."
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("GPT2Model", "GPT2LMHeadModel"))
    assert "h.0.ln_1.weight" in open_checkpoint(tmp_path).tensor_names
    check_model(oracle, load_fallback(tmp_path))


def test_fallback_8_bit_cache_is_close(tmp_path: Path) -> None:
    oracle = make_oracle("stablelm", tmp_path)
    model = load_fallback(tmp_path)
    tokens = tokens_of(40, 3)
    batch = AttentionBatch.for_sequences([40])
    caches = [model.new_kv_cache(batch.num_blocks, 16, "int8") for _ in model.spec.layers]
    assert all(cache.scales is not None for cache in caches)
    with torch.inference_mode():
        hidden = model(tokens, torch.arange(40), batch, caches)
        difference = model.logits(hidden) - oracle_logits(oracle, tokens)
    assert 0 < difference.abs().max() < 0.1


def spec_of(kind: str, architecture: str, **differences: Any) -> ModelSpec:
    config = transformers.AutoConfig.for_model(kind, **(COMMON | differences))
    return transformers_spec(config.to_dict() | {"architectures": [architecture]})


def test_fallback_spec_says_what_the_engine_plans_with() -> None:
    spec = spec_of(
        "gemma2",
        "Gemma2ForCausalLM",
        head_dim=16,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    sizes = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.hidden_size, spec.vocab_size)
    assert sizes == (4, 2, 16, 32, 128)
    assert [layer.sliding_window for layer in spec.layers] == [12, None, 12, None]
    assert spec.max_position_embeddings == 128
    assert spec.tie_word_embeddings
    assert support(spec)[0] == "fallback"


def test_fallback_spec_has_the_checkpoints_name_of_the_output_projection() -> None:
    spec = spec_of("gpt_neox", "GPTNeoXForCausalLM")
    assert spec.lm_head_name == "embed_out"
    (head,) = [row for row in parameters(spec) if row.is_lm_head]
    assert head.source_names == ("embed_out.weight",)
    quantization = build_quantization_config(spec, MethodOptions("rtn", group_size=-1))
    assert quantization is not None
    quantized = {
        row.name.split(".", 2)[2]
        for row in parameters(spec)
        if scheme_of(row, row.source_names[0], quantization)
    }
    assert quantized == {
        "attention.query_key_value.weight",
        "attention.dense.weight",
        "mlp.dense_h_to_4h.weight",
        "mlp.dense_4h_to_h.weight",
    }


@pytest.mark.parametrize(
    ("kind", "architecture", "differences", "reason"),
    [
        ("mamba", "MambaForCausalLM", {}, "recurrent state"),
        ("t5", "T5ForConditionalGeneration", {}, "not as a causal language model"),
        ("bloom", "BloomForCausalLM", {}, "takes no position_ids"),
        ("falcon", "FalconForCausalLM", {}, "registry of attention functions"),
        ("youtu", "YoutuForCausalLM", {}, "its keys have 192 and its values 128"),
        ("lfm2", "Lfm2ForCausalLM", {"layer_types": ["conv"] * 4}, "layers of the type conv"),
        ("llama4_text", "Llama4ForCausalLM", {}, "more than causal attention within a window"),
        ("bert", "BertLMHeadModel", {}, "its attention is not causal"),
        (
            "stablelm",
            "StableLmForCausalLM",
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "partial_rotary_factor": 1.0,
                }
            },
            "its dynamic RoPE",
        ),
        # The mask of these has a window that the attention function is not told of, or none.
        ("phimoe", "PhimoeForCausalLM", {"sliding_window": 12}, "not told the window"),
        ("olmoe", "OlmoeForCausalLM", {"sliding_window": 12}, "not told the window"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.islower() else "",
)
def test_fallback_refuses_a_model_with_the_reason(
    kind: str, architecture: str, differences: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        spec_of(kind, architecture, **differences)


def test_fallback_error_names_reason_and_nearest_architecture() -> None:
    config = {"architectures": ["Mistral9ForCausalLM"], "model_type": "mistral9"}
    with pytest.raises(InputError) as caught:
        model_spec(config | {"auto_map": {"AutoModelForCausalLM": "evil.Mistral9"}})
    message = str(caught.value)
    assert message.startswith("unsupported architecture (Mistral9ForCausalLM): ")
    assert "has no causal language model Mistral9ForCausalLM of model_type mistral9" in message
    assert "the most similar name is MistralForCausalLM" in message
    assert "nor does its auto_map (AutoModelForCausalLM): remote code is never run" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.dense_4h_to_h.bias"), r"lacks 1 tensor "),
        (lambda tensors: tensors.update(more=torch.zeros(2)), r"has 1 tensor \(more\)"),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(128, 8)}),
            r"lm_head.weight has shape \[128, 8\]. Shape \[128, 32\] was expected",
        ),
        # Old buffers of attention, and frequencies that are computed, may lie in a checkpoint.
        (
            lambda tensors: tensors.update(
                {"model.layers.0.attention.masked_bias": torch.zeros(1)}
            ),
            "",
        ),
    ],
    ids=["missing", "extra", "shape", "ignored"],
)
def test_fallback_checks_the_checkpoints_tensors(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    make_oracle("persimmon", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if message:
        with pytest.raises(InputError, match=message):
            load_fallback(tmp_path)
    else:
        load_fallback(tmp_path)


def test_fallback_error_of_a_wrong_config_is_an_input_error(tmp_path: Path) -> None:
    make_oracle("persimmon", tmp_path)
    config = open_checkpoint(tmp_path).config | {"num_attention_heads": 5}
    with pytest.raises(InputError, match=r"no PersimmonForCausalLM that transformers can build"):
        transformers_spec(config)
