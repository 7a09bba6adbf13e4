"""Makes the tokenizer part of a GGUF file from tokenizer files: the reverse of gguf_tokenizer.py.

A GGUF file has only the name of how text is split into words. It is found by comparing the splits
of a text with those of every known name, and the tokenizer that a reader would make is compared
with the original one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from llmkit.checkpoint.gguf_sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from llmkit.checkpoint.gguf_tokenizer import (
    BYTE_LEVEL,
    GEMMA4,
    PRE_TOKENIZERS,
    SENTENCEPIECE,
    pre_tokenizer,
    tokenizer_files,
)
from llmkit.checkpoint.tokenizer import chat_templates
from llmkit.common.errors import InputError

_UNUSED = 5
_BYTE = 6
# Words, numbers, white space, punctuation and scripts that pre-tokenizers split in different ways.
_PROBE = (
    "Hello, World! It's 12345 o'clock; they'll pay $3.50 (or 1,234,567.89) -- don't YOU'RE?\n"
    "  def add(a, b):\n\t\treturn a+b  # HTMLParser, camelCase, snake_case, XMLHttpRequest2\n\n\n"
    "caf\u00e9 na\u00efve e\u0301 \u00fcber \u4f60\u597d\u4e16\u754c\u3002 \u3053\u3093 "
    "\u30ab\u30bf \u0645\u0631\u062d\u0628\u0627 "
    "\u041f\u0440\u0438\u0432\u0435\u0442 12\u0663\u0664 "
    '\U0001f600\U0001f680 \u00bd\u00b2 a/b\\c ...\r\n   \u00a0 end!!!\n/path/to//file  x="y" <tag/>'
    "\n    x += 1; \n\ty\n \n"
)


@dataclass(frozen=True)
class _Source:
    """The tokenizer files of a checkpoint."""

    reference: str
    files: Mapping[str, bytes]
    tokenizer: dict[str, Any]  # tokenizer.json
    config: dict[str, Any]  # tokenizer_config.json

    @property
    def model(self) -> dict[str, Any]:
        """How words become tokens."""
        model: dict[str, Any] = self.tokenizer["model"]
        return model

    def error(self, problem: str) -> InputError:
        """The error for a tokenizer that a GGUF file cannot hold."""
        return InputError(
            f"{self.reference}: the tokenizer {problem}",
            "A BPE tokenizer that GGUF files know was expected",
            "Use another --format",
        )


def vocabulary_metadata(
    reference: str,
    files: Mapping[str, bytes],
    token_ids: Mapping[str, Any],
    vocab_size: int,
    architecture: str,
) -> dict[str, Any]:
    """The metadata of a tokenizer, with its special tokens and the chat template.

    files: the checkpoint's tokenizer files, by name. token_ids: bos_token_id, eos_token_id and
    pad_token_id of the model. vocab_size: the rows of the embedding. architecture: GGUF's.
    Raises InputError when a GGUF file cannot hold the tokenizer.
    """
    source = _read(reference, files)
    tokens, types = _tokens(source, vocab_size)
    is_byte_level = "ByteLevel" in json.dumps(source.tokenizer.get("pre_tokenizer"))
    metadata: dict[str, Any]
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in source.model.get("merges", ())
    ]
    tokenizer = Tokenizer.from_str(json.dumps(source.tokenizer))
    if is_byte_level:
        metadata = {
            "tokenizer.ggml.model": BYTE_LEVEL,
            "tokenizer.ggml.pre": _pre_tokenizer_name(source, tokenizer),
            "tokenizer.ggml.merges": merges,
        }
    elif source.model.get("byte_fallback") and architecture == GEMMA4:
        metadata = {"tokenizer.ggml.model": GEMMA4, "tokenizer.ggml.merges": merges}
    elif source.model.get("byte_fallback"):
        metadata = {
            "tokenizer.ggml.model": SENTENCEPIECE,
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": _scores(tokens, merges),
        }
    else:
        raise source.error("is neither byte-level BPE nor SentencePiece with byte tokens")
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if not is_byte_level:
        metadata["tokenizer.ggml.add_space_prefix"] = _adds_space_prefix(source)
    metadata |= _special_tokens(source, tokenizer, token_ids)
    template = chat_templates(Path(reference), files, source.config).get("default")
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    _check(source, tokenizer, metadata)
    return metadata


def _read(reference: str, files: Mapping[str, bytes]) -> _Source:
    if "tokenizer.json" not in files:
        raise InputError(
            f"{reference} has no tokenizer.json, and a GGUF file holds the tokenizer",
            "A checkpoint with its tokenizer was expected",
            "Save the tokenizer beside the model, or use another --format",
        )
    config = files.get("tokenizer_config.json", b"{}")
    try:
        source = _Source(reference, files, json.loads(files["tokenizer.json"]), json.loads(config))
    except ValueError as error:
        raise InputError(f"{reference}: its tokenizer files are malformed ({error})") from error
    if source.tokenizer.get("model", {}).get("type", "BPE") != "BPE":
        raise source.error(f"is {source.model['type']}")
    return source


def _tokens(source: _Source, vocab_size: int) -> tuple[list[str], list[int]]:
    """The tokens by id, and their types. Rows of the embedding without a token are unused."""
    by_id = {index: token for token, index in source.model["vocab"].items()}
    types = dict.fromkeys(by_id, NORMAL)
    unknown = source.model.get("unk_token")
    if source.model.get("byte_fallback"):
        types |= {
            index: _BYTE
            for index, token in by_id.items()
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        }
    for added in source.tokenizer.get("added_tokens", ()):
        by_id[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if added["content"] == unknown:
            types[added["id"]] = UNKNOWN
    if by_id and max(by_id) >= vocab_size:
        raise InputError(
            f"{source.reference}: the tokenizer has the id {max(by_id)}, and the model's embedding"
            f" has {vocab_size} rows",
            "A tokenizer that belongs to the model was expected",
        )
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    return tokens, [types.get(index, _UNUSED) for index in range(vocab_size)]


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """A score for each token: the earlier its first merge, the higher."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges) + index)) for index, token in enumerate(tokens)]


def _pre_tokenizer_name(source: _Source, tokenizer: Tokenizer) -> str:
    """GGUF's name of how the tokenizer splits text into words."""
    splits = _splits(tokenizer.normalizer, tokenizer.pre_tokenizer)
    ignores_merges = bool(source.model.get("ignore_merges"))
    found = []
    for name, rules in PRE_TOKENIZERS.items():
        if _splits(rules.normalizer, pre_tokenizer(rules)) == splits:
            found.append((rules.ignore_merges != ignores_merges, name))
    if not found:
        raise source.error("splits text into words in a way that has no name in GGUF")
    # Of several names, the first one of the table whose other rules agree, too.
    return min(found, key=lambda pair: pair[0])[1]


def _splits(normalizer: Normalizer | None, splitter: PreTokenizer | None) -> list[str]:
    text = _PROBE if normalizer is None else normalizer.normalize_str(_PROBE)
    if splitter is None:
        return [text]
    return [word for word, _ in splitter.pre_tokenize_str(text)]


def _adds_space_prefix(source: _Source) -> bool:
    """Whether a text begins with a space that it does not have."""
    steps = json.dumps([source.tokenizer.get("normalizer"), source.tokenizer.get("pre_tokenizer")])
    return (
        '"Prepend"' in steps
        or '"prepend_scheme": "always"' in steps
        or ('"prepend_scheme": "first"' in steps)
    )


def _special_tokens(
    source: _Source, tokenizer: Tokenizer, token_ids: Mapping[str, Any]
) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = source.config.get(f"{role}_token")
        if role == "unk" and token is None:
            token = source.model.get("unk_token")
        text = token.get("content") if isinstance(token, dict) else token
        index = tokenizer.token_to_id(text) if isinstance(text, str) else None
        given = token_ids.get(f"{role}_token_id")
        numbers = given if isinstance(given, list) else [given]
        if index is None or (role == "eos" and index not in numbers and numbers[0] is not None):
            index = numbers[0]
        if type(index) is int and index >= 0:
            metadata[f"tokenizer.ggml.{name}_token_id"] = index
        others = [number for number in numbers if type(number) is int and number != index]
        if role == "eos":  # a file has a place for three of them
            keys = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
            metadata |= zip(keys, others, strict=False)
    ids = tokenizer.encode("").ids
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    metadata["tokenizer.ggml.add_bos_token"] = bos is not None and ids[:1] == [bos]
    metadata["tokenizer.ggml.add_eos_token"] = (
        eos is not None and ids[-1:] == [eos] and (len(ids) > 1 or bos != eos)
    )
    return metadata


def _check(source: _Source, tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """Raises InputError when the tokenizer of a reader gives other tokens."""
    files = tokenizer_files(Path(source.reference), metadata, 0)
    found = Tokenizer.from_str(files["tokenizer.json"].decode())
    specials = "".join(
        token
        for token, kind in zip(
            metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True
        )
        if kind in (CONTROL, USER_DEFINED)
    )
    for text in (_PROBE, f"Hi{specials[:2000]}there"):
        expected_ids = tokenizer.encode(text, add_special_tokens=False).ids
        found_ids = found.encode(text, add_special_tokens=False).ids
        if found_ids != expected_ids:
            pairs = zip(found_ids, expected_ids, strict=False)
            index = next((at for at, pair in enumerate(pairs) if pair[0] != pair[1]), 0)
            raise source.error(
                "gives other tokens when a reader makes it of a GGUF vocabulary"
                f" (from token {index} of a test on)"
            )
