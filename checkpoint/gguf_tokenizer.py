"""Makes the tokenizer files of a GGUF file from its vocabulary (byte-level BPE)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from llmkit.common.errors import InputError

# Values of tokenizer.ggml.token_type.
_CONTROL = 3
_USER_DEFINED = 4
_WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


@dataclass(frozen=True)
class _PreTokenizer:
    """How text is split before merges are applied. A GGUF file holds only its name."""

    split: str | None = None  # a pattern; None: GPT-2's, which is built into ByteLevel
    single_digits: bool = False  # each digit is a word
    nfc: bool = False
    ignore_merges: bool = False  # a word in the vocabulary is one token, without merges
    adds_bos: bool = False  # used when the file has no add_bos_token


_LLAMA3 = _PreTokenizer(
    _WORD_PATTERN.replace("DIGITS", r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True
)
_QWEN2 = _PreTokenizer(_WORD_PATTERN.replace("DIGITS", r"\p{N}"), nfc=True)
PRE_TOKENIZERS = {
    "smollm": _PreTokenizer(single_digits=True),
    "gpt-2": _PreTokenizer(),
    "default": _PreTokenizer(),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def tokenizer_files(path: Path, metadata: Mapping[str, Any], max_tokens: int) -> dict[str, bytes]:
    """The tokenizer files of a GGUF file, by name.

    max_tokens: the model's context length.
    Raises InputError when the vocabulary is malformed or its pre-tokenizer is unknown.
    """
    model = metadata.get("tokenizer.ggml.model")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise InputError(
            f"{path} has the tokenizer {model}/{pre}",
            f"gpt2 with one of {', '.join(PRE_TOKENIZERS)} was expected",
            "Take the tokenizer from the original model: convert the GGUF file or use that model",
        )
    pre_tokenizer = PRE_TOKENIZERS[pre]
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise InputError(f"{path} lacks tokenizer.ggml.tokens or tokenizer.ggml.merges")
    if not isinstance(types, list) or len(types) != len(tokens):
        types = [1] * len(tokens)
    special_tokens = _special_tokens(path, metadata, tokens)
    bos = None
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", pre_tokenizer.adds_bos)
    if adds_bos and "bos_token" in special_tokens:
        bos = special_tokens["bos_token"], metadata["tokenizer.ggml.bos_token_id"]
    try:
        tokenizer = _build_tokenizer(tokens, types, merges, pre_tokenizer, bos)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InputError(f"{path}: its vocabulary is malformed ({error})") from error
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
        **special_tokens,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "special_tokens_map.json": _json(special_tokens),
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
        files["chat_template.jinja"] = template.encode()
    files["tokenizer_config.json"] = _json(config)
    return files


def _special_tokens(path: Path, metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    """The file's bos_token, eos_token, unk_token and pad_token."""
    special_tokens = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if type(index) is not int or not 0 <= index < len(tokens):
            raise InputError(
                f"{path}: tokenizer.ggml.{key}_token_id is {index}",
                f"A token below {len(tokens)} was expected",
            )
        special_tokens[f"{role}_token"] = tokens[index]
    return special_tokens


def _build_tokenizer(
    tokens: list[str],
    types: list[int],
    merges: list[str],
    rules: _PreTokenizer,
    bos: tuple[str, int] | None,
) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError(f"{len(tokens) - len(vocabulary)} of {len(tokens)} tokens occur twice")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=rules.ignore_merges)
    )
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if rules.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if rules.split:
        steps.append(pre_tokenizers.Split(Regex(rules.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=[bos]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == _CONTROL
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == _USER_DEFINED
        ]
    )
    return tokenizer


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
