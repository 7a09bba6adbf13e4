"""SentencePiece vocabularies of GGUF files, against the algorithm written down naively."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoTokenizer

from llmkit.checkpoint.detokenizer import Detokenizer, TokenBytes
from llmkit.checkpoint.gguf_tokenizer import tokenizer_files
from llmkit.checkpoint.gguf_vocabulary import vocabulary_metadata
from llmkit.common.errors import InputError

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CORPUS = (
    "the cat sat on the mat and the other cat ate the hat, then they sat there together;"
    " naïve café, cool 12 123 1234 hello hello yellow fellow"
)
TEXTS = [
    "the cat",
    " the cat",
    "  the   cat  ",
    "the cat\nsat\n\n\ton the\r\nmat",
    "hello yellow, THE HAT?",
    "naïve café über",
    "日本語 😀 \u200d \x00 é",
    "",
    " ",
    "   ",
    "</s>the<|user|>the cat<tool>sat <|user|> the",
    "<0x0A><s",
    "ttthhheee catcat hellohello 1234123",
    f"a {SPACE} b{SPACE}c",
    "\n",
]


@dataclass
class Vocabulary:
    """Tokens with their types and scores, in the order of their ids."""

    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def add(self, token: str, kind: int = NORMAL, score: float = 0.0) -> None:
        self.tokens.append(token)
        self.types.append(kind)
        self.scores.append(score)

    def metadata(self, **changes: Any) -> dict[str, Any]:
        """The keys of a GGUF file; None leaves a key out."""
        keys = {
            "model": "llama",
            "tokens": self.tokens,
            "token_type": self.types,
            "scores": self.scores,
            "unknown_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        } | changes
        return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}

    def tokenizer(self, **changes: Any) -> Tokenizer:
        files = tokenizer_files(Path("a.gguf"), self.metadata(**changes), 77)
        return Tokenizer.from_str(files["tokenizer.json"].decode())

    def ids(self, text: str, prefix: bool = True) -> list[int]:
        """The ids of a text, by merging the pair with the highest score again and again."""
        special = [
            token
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
        ids = []
        fragment = ""
        while text:
            found = max((token for token in special if text.startswith(token)), key=len, default="")
            if found:
                ids += [*self.fragment_ids(fragment, prefix), self.tokens.index(found)]
                fragment = ""
            else:
                fragment += text[0]
            text = text[len(found) or 1 :]
        return ids + self.fragment_ids(fragment, prefix)

    def fragment_ids(self, text: str, prefix: bool) -> list[int]:
        if not text:
            return []
        pieces = list((" " + text if prefix else text).replace(" ", SPACE))
        scores = {
            token: score
            for token, kind, score in zip(self.tokens, self.types, self.scores, strict=True)
            if kind == NORMAL
        }
        while True:
            pairs = ["".join(pieces[i : i + 2]) for i in range(len(pieces) - 1)]
            known = [i for i, pair in enumerate(pairs) if pair in scores]
            if not known:
                break
            best = max(known, key=lambda i: (scores[pairs[i]], -i))
            pieces[best : best + 2] = [pairs[best]]
        ids = []
        for piece in pieces:
            if piece in scores:
                ids.append(self.tokens.index(piece))
            else:
                ids += [self.tokens.index(f"<0x{byte:02X}>") for byte in piece.encode()]
        return ids


def start(special: tuple[str, ...] = ("<|user|>",)) -> Vocabulary:
    """As in Llama 2: three special tokens and all bytes, then whatever the test adds."""
    vocabulary = Vocabulary()
    vocabulary.add("<unk>", UNKNOWN)
    vocabulary.add("<s>", CONTROL)
    vocabulary.add("</s>", CONTROL)
    for token in special:
        vocabulary.add(token, CONTROL)
    vocabulary.add("<tool>", USER_DEFINED)
    for byte in range(256):
        vocabulary.add(f"<0x{byte:02X}>", BYTE)
    return vocabulary


@pytest.fixture(scope="module")
def trained() -> Vocabulary:
    """Byte pair encoding of a small text: the first merge has the highest score."""
    vocabulary = start()
    words = [list(SPACE + word) for word in CORPUS.split(" ")]
    for merge in range(50):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        if left + right not in vocabulary.tokens:
            vocabulary.add(left + right, NORMAL, float(-merge))
        for word in words:
            for i in range(len(word) - 1, 0, -1):
                if (word[i - 1], word[i]) == (left, right):
                    word[i - 1 : i + 1] = [left + right]
    for index, character in enumerate(sorted({*CORPUS.replace(" ", SPACE)})):
        vocabulary.add(character, NORMAL, float(-1000 - index))
    vocabulary.add("[unused]", UNUSED, -5000.0)
    return vocabulary


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_ids_are_those_of_merging_by_score(
    trained: Vocabulary, text: str, prefix: bool
) -> None:
    tokenizer = trained.tokenizer(add_space_prefix=prefix)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == trained.ids(text, prefix)
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    # A prefix remains in the text after a special token.
    if SPACE not in text and not (prefix and "<" in text):
        assert decoded == text
    detokenizer = Detokenizer(TokenBytes(tokenizer, json.loads(tokenizer.to_str())["decoder"]))
    assert detokenizer.add(ids) + detokenizer.flush() == decoded


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabulary_is_written_back(trained: Vocabulary, prefix: bool) -> None:
    """A tokenizer.json has merges; the scores that are made of them give the same tokens."""
    files = tokenizer_files(Path("a.gguf"), trained.metadata(add_space_prefix=prefix), 77)
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3, 4], "pad_token_id": None}
    count = len(trained.tokens)
    found = vocabulary_metadata("a", files, ids, count + 2, "llama")
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.tokens"][:count] == trained.tokens
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.ggml.eot_token_id"] == 3
    assert found["tokenizer.ggml.eom_token_id"] == 4  # Llama 3.1 and GLM-4.5 have three
    types = found["tokenizer.ggml.token_type"]
    assert types[:4] == [UNKNOWN, CONTROL, CONTROL, CONTROL]
    assert types[4:6] == [USER_DEFINED, BYTE]
    assert types[count:] == [UNUSED, UNUSED]
    again = Tokenizer.from_str(
        tokenizer_files(Path("b.gguf"), found, 77)["tokenizer.json"].decode()
    )
    tokenizer = trained.tokenizer(add_space_prefix=prefix)
    for text in TEXTS:
        assert again.encode(text).ids == tokenizer.encode(text).ids
    # Gemma 4's files have the merges themselves.
    merges = vocabulary_metadata("a", files, ids, count, "gemma4")
    assert merges["tokenizer.ggml.model"] == "gemma4"
    assert "tokenizer.ggml.scores" not in merges


def test_sentencepiece_ids_of_many_random_texts() -> None:
    """Tokens of two letters in any order of scores: most ways to merge compete."""
    chance = random.Random(5)
    for _ in range(40):
        vocabulary = start()
        tokens = {"a", "b", "c", SPACE}
        while len(tokens) < 30:  # each token is made of two others, as training makes them
            tokens.add("".join(chance.choices(sorted(tokens), k=2)))
        for score, token in enumerate(chance.sample(sorted(tokens), len(tokens))):
            vocabulary.add(token, NORMAL, float(score))
        tokenizer = vocabulary.tokenizer()
        for _ in range(20):
            text = "".join(chance.choices("aabbc é ", k=chance.randint(1, 30)))
            assert tokenizer.encode(text, add_special_tokens=False).ids == vocabulary.ids(text)


def test_sentencepiece_gemma_has_tokens_of_spaces_and_newlines() -> None:
    """They are user-defined, and a run of spaces becomes the longest of them."""
    vocabulary = start()
    for token in ("\n", "\n\n", "  ", "   ", "    "):
        vocabulary.add(token, USER_DEFINED)
    for score, token in enumerate([SPACE, "a", "b", "ab", f"{SPACE}ab"]):
        vocabulary.add(token, NORMAL, float(score))
    tokenizer = vocabulary.tokenizer(add_space_prefix=False)
    for text in ("ab ab", "ab  ab", "     ab", "\n\n\nab\n    ab   b", "      "):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == vocabulary.ids(text, prefix=False)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizer_loads_in_transformers(
    tmp_path: Path, trained: Vocabulary, prefix: bool
) -> None:
    metadata = trained.metadata(add_space_prefix=prefix)
    for name, content in tokenizer_files(Path("a.gguf"), metadata, 77).items():
        (tmp_path / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == [1, *trained.ids(text, prefix)]
    text = "the cat sat  on 日本\nthe mat"
    assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1]),
        ({"add_bos_token": True}, [1]),
        ({"add_bos_token": False}, []),
        ({"bos_token_id": None}, []),
    ],
)
def test_sentencepiece_adds_the_token_before_a_text(
    trained: Vocabulary, changes: dict[str, Any], expected: list[int]
) -> None:
    tokenizer = trained.tokenizer(**changes)
    assert tokenizer.encode("the cat").ids == expected + trained.ids("the cat")


@pytest.mark.parametrize(
    ("name", "strips"), [("Phi 3 Mini", False), ("Phi-3 Mini", True), ("phi3", True), (None, False)]
)
def test_sentencepiece_phi_3_drops_white_space_after_special_tokens(
    trained: Vocabulary, name: str | None, strips: bool
) -> None:
    metadata = trained.metadata() | ({"general.name": name} if name else {})
    files = tokenizer_files(Path("a.gguf"), metadata, 77)
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    text = "<|user|>\n the cat<s> sat"
    stripped = "<|user|>the cat<s> sat"  # <s> is an exception
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == trained.ids(stripped if strips else text)


def test_sentencepiece_without_types_has_no_special_tokens(trained: Vocabulary) -> None:
    tokenizer = trained.tokenizer(token_type=None)
    assert tokenizer.get_added_tokens_decoder() == {}


def test_sentencepiece_without_byte_tokens_has_the_unknown_token() -> None:
    vocabulary = Vocabulary()
    vocabulary.add("<unk>", UNKNOWN)
    for token in (SPACE, "a"):
        vocabulary.add(token)
    tokenizer = vocabulary.tokenizer(bos_token_id=None, eos_token_id=None)
    assert tokenizer.encode("aéa").ids == [1, 2, 0, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "lacks tokenizer.ggml.tokens or tokenizer.ggml.scores"),
        ({"tokens": None}, "lacks tokenizer.ggml.tokens or tokenizer.ggml.scores"),
        ({"scores": [0.5]}, r"malformed \(\d+ tokens and 1 scores\)"),
        ({"eos_token_id": 100000}, "eos_token_id is 100000"),
    ],
)
def test_sentencepiece_refuses_vocabularies(
    trained: Vocabulary, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        trained.tokenizer(**changes)


def test_sentencepiece_refuses_tokens_that_occur_twice(trained: Vocabulary) -> None:
    tokens = [*trained.tokens[:-1], "<s>"]
    with pytest.raises(InputError, match=r"malformed \(1 of \d+ tokens occur twice\)"):
        trained.tokenizer(tokens=tokens)


@pytest.mark.parametrize("text", TEXTS)
def test_gemma4_vocabulary_with_merges_is_the_original_tokenizer(text: str) -> None:
    special = ["<unk>", "</s>", "<s>", "<|user|>"]
    original = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    original.normalizer = normalizers.Replace(" ", SPACE)
    original.train_from_iterator(
        [CORPUS, "a\n\n\nb\n\n\nc"],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
            show_progress=False,
        ),
    )
    model = json.loads(original.to_str())["model"]
    assert ["\n", "\n"] in model["merges"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [CONTROL if token in special else NORMAL for token in tokens]
    for index, token in enumerate(tokens):
        if token.startswith("<0x"):
            types[index] = BYTE
    vocabulary = Vocabulary(tokens, types)
    imported = vocabulary.tokenizer(
        model="gemma4",
        scores=None,
        merges=[" ".join(pair) for pair in model["merges"]],
        bos_token_id=2,
        add_space_prefix=False,
    )
    plain = Tokenizer(models.BPE(**(model_arguments(model))))
    plain.normalizer = original.normalizer
    plain.add_special_tokens(special)
    assert imported.encode(text, add_special_tokens=False).ids == plain.encode(text).ids
    assert imported.encode(text).ids[0] == 2


def model_arguments(model: dict[str, Any]) -> dict[str, Any]:
    """What tokenizers' BPE takes of a tokenizer.json."""
    names = ("unk_token", "fuse_unk", "byte_fallback")
    merges = [tuple(pair) for pair in model["merges"]]
    return {name: model[name] for name in names} | {"vocab": model["vocab"], "merges": merges}
