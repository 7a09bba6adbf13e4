"""Makes the tokenizer files of a GGUF file from its vocabulary.

Byte-level BPE is here, SentencePiece in gguf_sentencepiece.py.
"""

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

from llmkit.checkpoint.gguf_sentencepiece import (
    CONTROL,
    USER_DEFINED,
    merges_by_score,
    sentencepiece_tokenizer,
)
from llmkit.common.errors import InputError

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

    # Patterns, applied one after the other; none: GPT-2's, which is built into ByteLevel.
    splits: tuple[str, ...] = ()
    single_digits: bool = False  # each digit is a word
    nfc: bool = False
    ignore_merges: bool = False  # a word in the vocabulary is one token, without merges
    adds_bos: bool = False  # used when the file has no add_bos_token

    @property
    def normalizer(self) -> normalizers.Normalizer | None:
        """What happens to text before it is split."""
        return normalizers.NFC() if self.nfc else None


_THREE_DIGITS = _WORD_PATTERN.replace("DIGITS", r"\p{N}{1,3}")
_ONE_DIGIT = _WORD_PATTERN.replace("DIGITS", r"\p{N}")
# Words whose capital letters come first: "HTMLParser" is "HTMLParser", "helloWorld" two words.
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORD_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+SUFFIX"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*SUFFIX"
    r"|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
_GPT_4O = _CASED_WORD_PATTERN.replace("SUFFIX", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace(
    "DIGITS", r"\p{N}{1,3}"
)
_TEKKEN = _CASED_WORD_PATTERN.replace("SUFFIX", "").replace("DIGITS", r"\p{N}")
_SEED = _ONE_DIGIT.replace(r"| ?[^\s\p{L}\p{N}]+[\r\n]*", r"| ?[^\s\p{L}\p{N}\r\n]+")
_QWEN35 = _ONE_DIGIT.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+",
)
# Words begin with line breaks, not end with them.
_LAGUNA = (r"(?:\r?\n)+(?:[^\r\n]|\r(?!\n))*", _ONE_DIGIT)
_GPT2 = _PreTokenizer()
_GPT2_DIGITS = _PreTokenizer(single_digits=True)
_GPT4 = _PreTokenizer((_THREE_DIGITS,))
_LLAMA3 = _PreTokenizer((_THREE_DIGITS,), ignore_merges=True, adds_bos=True)
_QWEN2 = _PreTokenizer((_ONE_DIGIT,), nfc=True)
# By tokenizer.ggml.pre.
PRE_TOKENIZERS = {
    "smollm": _GPT2_DIGITS,
    "gpt-2": _GPT2,
    "default": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "lfm2": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "qwen35": _PreTokenizer((_QWEN35,), nfc=True),
    "gpt-4o": _PreTokenizer((_GPT_4O,)),
    "llama4": _PreTokenizer((_GPT_4O,)),
    "tekken": _PreTokenizer((_TEKKEN,), ignore_merges=True, adds_bos=True),
    "glm4": _GPT4,
    "dbrx": _GPT4,
    "smaug-bpe": _GPT4,
    "starcoder": _GPT2_DIGITS,
    "refact": _GPT2_DIGITS,
    "command-r": _GPT2_DIGITS,
    "codeshell": _GPT2_DIGITS,
    "exaone": _GPT2_DIGITS,
    "exaone4": _GPT2,
    "olmo": _GPT2,
    "hunyuan": _PreTokenizer((_ONE_DIGIT,)),
    "hunyuan-dense": _PreTokenizer(_DEEPSEEK3),
    "seed-coder": _PreTokenizer((_SEED,)),
    "laguna": _PreTokenizer(_LAGUNA),
}
# The models in tokenizer.ggml.model.
BYTE_LEVEL = "gpt2"
SENTENCEPIECE = "llama"
GEMMA4 = "gemma4"  # SentencePiece with a list of merges in place of scores
_OTHER_TOKENIZER = (
    "Take the tokenizer from the original model: convert the GGUF file or use that model"
)


def tokenizer_files(path: Path, metadata: Mapping[str, Any], max_tokens: int) -> dict[str, bytes]:
    """The tokenizer files of a GGUF file, by name.

    max_tokens: the model's context length.
    Raises InputError when the vocabulary is malformed or its pre-tokenizer is unknown.
    """
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    if model not in (BYTE_LEVEL, SENTENCEPIECE, GEMMA4):
        raise InputError(
            f"{path} has the tokenizer {model}",
            f"{BYTE_LEVEL} (byte-level BPE), {SENTENCEPIECE} (SentencePiece) or {GEMMA4} was"
            " expected",
            _OTHER_TOKENIZER,
        )
    if model == SENTENCEPIECE:
        ranking = "scores"
        adds_bos = True
    elif model == GEMMA4:
        ranking = "merges"
        adds_bos = True
    else:
        pre = metadata.get("tokenizer.ggml.pre", "default")
        if pre not in PRE_TOKENIZERS:
            raise InputError(
                f"{path} has the tokenizer {model}/{pre}",
                f"{model} with one of {', '.join(PRE_TOKENIZERS)} was expected",
                _OTHER_TOKENIZER,
            )
        ranking = "merges"
        adds_bos = PRE_TOKENIZERS[pre].adds_bos
    ranks = metadata.get(f"tokenizer.ggml.{ranking}")
    if not isinstance(tokens, list) or not isinstance(ranks, list):
        raise InputError(f"{path} lacks tokenizer.ggml.tokens or tokenizer.ggml.{ranking}")
    if not isinstance(types, list) or len(types) != len(tokens):
        types = [1] * len(tokens)
    special_tokens = _special_tokens(path, metadata, tokens)
    bos = None
    if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in special_tokens:
        bos = special_tokens["bos_token"], metadata["tokenizer.ggml.bos_token_id"]
    try:
        if model in (SENTENCEPIECE, GEMMA4):
            by_score = model == SENTENCEPIECE
            tokenizer = sentencepiece_tokenizer(
                tokens,
                types,
                merges_by_score(tokens, types, ranks) if by_score else _pairs(ranks),
                unknown=special_tokens.get("unk_token"),
                bos=bos,
                adds_space_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True) is True,
                strips_after=_strips_after(metadata, tokens),
            )
        else:
            tokenizer = _build_tokenizer(tokens, types, ranks, PRE_TOKENIZERS[pre], bos)
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


def pre_tokenizer(rules: _PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """What splits text into words."""
    steps: list[pre_tokenizers.PreTokenizer] = []
    if rules.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps += [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in rules.splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rules.splits))
    return pre_tokenizers.Sequence(steps)


def _strips_after(metadata: Mapping[str, Any], tokens: list[str]) -> list[str]:
    """The special tokens that take the white space after them.

    Those of Phi-3 do. No key says so; llama.cpp goes by the model's name too.
    """
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return []
    return [token for token in tokens if token not in ("<unk>", "<s>", "<|endoftext|>")]


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


def _pairs(merges: list[str]) -> list[tuple[str, str]]:
    """The pairs of tokens of merges such as "th e"."""
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]


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
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_pairs(merges), ignore_merges=rules.ignore_merges)
    )
    if rules.normalizer is not None:
        tokenizer.normalizer = rules.normalizer
    tokenizer.pre_tokenizer = pre_tokenizer(rules)
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
            if token_type == CONTROL
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == USER_DEFINED
        ]
    )
    return tokenizer


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
