"""Tiny random checkpoints for tests: real Hugging Face files of a few hundred kilobytes.

Weights depend only on the arguments, so that a test may rely on what a seed generates.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

VOCAB = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
EOS_ID = 2
_TEXT = (
    "the quick brown fox jumps over the lazy dog and then the dog sleeps"
    " in the sun while the fox runs away",
    "a small model is loaded, quantized, sharded and served; each step is"
    " measured and written to a report",
    "hello world, how are you today? I am fine, thank you. What is the capital"
    " of France? Paris, of course.",
    "one two three four five six seven eight nine ten eleven twelve thirteen"
    " fourteen fifteen sixteen",
)
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": EOS_ID,
    "pad_token_id": 0,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
}


def tiny_checkpoint(
    path: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    max_shard_size: str = "5GB",
    classifier: bool = False,
    **config: Any,
) -> Path:
    """Write a random model of `architecture` (a transformers model_type) with its tokenizer.

    classifier: with a classification head; `num_labels` in `config` says how many labels it has.

    `config` overrides fields of the HF config. Norm weights and biases are random too, so that a
    decoder that forgets one is found out.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    auto_model = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    values = _SIZES | _FAMILY.get(architecture, {}) | config
    model_config = AutoConfig.for_model(architecture, **values)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = auto_model.from_config(model_config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.1)
                else:
                    base = 0.0 if name.endswith("bias") or "gemma" in architecture else 1.0
                    parameter.normal_(mean=base, std=0.1)
    finally:
        torch.random.set_rng_state(state)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    write_tokenizer(path, vocab=model_config.vocab_size)
    return path


def never_ends(path: Path) -> Path:
    """Change a checkpoint of one file so that greedy answers never end before their limit.

    The end token's logit is always 0, which some other token's logit exceeds.
    """
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][EOS_ID] = 0
    save_file(tensors, file, {"format": "pt"})
    return path


def write_tokenizer(
    path: Path, vocab: int = VOCAB, chat_template: str | None = CHAT_TEMPLATE
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`: byte-level BPE with exactly `vocab`
    tokens.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(_tokenizer_json(vocab), encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


@cache
def _tokenizer_json(vocab: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    missing = vocab - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<|extra_{index}|>" for index in range(missing)])
    text: str = tokenizer.to_str()
    return text
