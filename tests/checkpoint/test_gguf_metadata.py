"""The config, tokenizer and tensors that follow from a GGUF file's header, value by value."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from support.gguf_files import raw_gguf, raw_tensor

from llmkit.checkpoint.gguf import GgufModel, open_gguf
from llmkit.checkpoint.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_files
from llmkit.common.errors import InputError

# Tokenizers

TOKENS = ["<s>", "</s>", "é", "a", "b", "1", "2", "12", "ab", "<t>", "<byte>", "<unused>"]
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 1, 1, 4, 6, 5],
    "tokenizer.ggml.merges": ["a b", "1 2"],
    "tokenizer.ggml.bos_token_id": 0,
}


def tokenizer(pre: str | None = None, **changes: Any) -> dict[str, Any]:
    """The tokenizer.json for the vocabulary with other values; None: without the key."""
    metadata = VOCABULARY | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    given = {key: value for key, value in metadata.items() if value is not None}
    document: dict[str, Any] = json.loads(
        tokenizer_files(Path("a.gguf"), given, 77)["tokenizer.json"]
    )
    return document


def byte_level(**values: bool) -> dict[str, Any]:
    defaults = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {"type": "ByteLevel"} | defaults | values


def split_at(digits: str) -> list[dict[str, Any]]:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return split_by(pattern)


def split_by(*patterns: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    steps = [split | {"pattern": {"Regex": pattern}} for pattern in patterns]
    return [*steps, byte_level(add_prefix_space=False, use_regex=False)]


BOS_FIRST = {
    "single": [("SpecialToken", "<s>", 0), ("Sequence", "A", 0)],
    "pair": [
        ("SpecialToken", "<s>", 0),
        ("Sequence", "A", 0),
        ("SpecialToken", "<s>", 1),
        ("Sequence", "B", 1),
    ],
}
LLAMA3 = (None, split_at(r"\p{N}{1,3}"), True, True)
QWEN2 = ("NFC", split_at(r"\p{N}"), False, False)
GPT2 = (None, [byte_level(add_prefix_space=False)], False, False)
GPT4 = (None, split_at(r"\p{N}{1,3}"), False, False)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
LAGUNA = r"(?:\r?\n)+(?:[^\r\n]|\r(?!\n))*"
DIGITS = {"type": "Digits", "individual_digits": True}
GPT2_DIGITS = (None, [DIGITS, byte_level(add_prefix_space=False)], False, False)
# normalizer, pre-tokenizers, whether words of the vocabulary need no merges, whether BOS is added
RULES: dict[str, tuple[str | None, list[dict[str, Any]], bool, bool]] = {
    "smollm": GPT2_DIGITS,
    "gpt-2": GPT2,
    "default": GPT2,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "lfm2": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "qwen35": ("NFC", split_by(QWEN35), False, False),
    "gpt-4o": (None, split_by(GPT4O), False, False),
    "llama4": (None, split_by(GPT4O), False, False),
    "tekken": (None, split_by(TEKKEN), True, True),
    "glm4": GPT4,
    "dbrx": GPT4,
    "smaug-bpe": GPT4,
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), GPT2_DIGITS),
    "exaone4": GPT2,
    "olmo": GPT2,
    "hunyuan": (None, split_at(r"\p{N}"), False, False),
    "hunyuan-dense": (None, split_by(*DEEPSEEK3), False, False),
    "seed-coder": (None, split_by(SEED), False, False),
    "laguna": (None, [split_by(LAGUNA)[0], *split_at(r"\p{N}")], False, False),
}


def template(document: dict[str, Any], name: str) -> list[tuple[str, str, int]]:
    steps = [next(iter(step.items())) for step in document["post_processor"][name]]
    return [(kind, step["id"], step["type_id"]) for kind, step in steps]


@pytest.mark.parametrize("pre", list(PRE_TOKENIZERS))
def test_gguf_tokenizer_follows_its_pre_tokenizer(pre: str) -> None:
    normalizer, steps, ignores_merges, adds_bos = RULES[pre]
    document = tokenizer(pre)
    assert (document["normalizer"] or {}).get("type") == normalizer
    assert document["pre_tokenizer"] == {"type": "Sequence", "pretokenizers": steps}
    assert document["decoder"] == byte_level()
    assert document["model"]["ignore_merges"] is ignores_merges
    assert document["model"]["vocab"] == {token: index for index, token in enumerate(TOKENS)}
    assert document["model"]["merges"] == [["a", "b"], ["1", "2"]]
    for given, is_added in ((None, adds_bos), (True, True), (False, False)):
        document = tokenizer(pre, add_bos_token=given)
        if is_added:
            assert {name: template(document, name) for name in BOS_FIRST} == BOS_FIRST
            assert document["post_processor"]["special_tokens"]["<s>"]["ids"] == [0]
        else:
            assert document["post_processor"] == byte_level(trim_offsets=False)
    assert tokenizer(pre, bos_token_id=None)["post_processor"]["type"] == "ByteLevel"


@pytest.mark.parametrize(
    ("types", "special", "added"),
    [
        (VOCABULARY["tokenizer.ggml.token_type"], ["<s>", "</s>"], ["<t>"]),
        ([3, *[1] * 10], [], []),  # one type too few
        (None, [], []),
    ],
)
def test_gguf_tokenizer_adds_control_and_user_defined_tokens(
    types: list[int] | None, special: list[str], added: list[str]
) -> None:
    """A token is found in the text as it is: NFC does not apply to it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    assert tokenizer("qwen2", token_type=types)["added_tokens"] == [
        {"id": TOKENS.index(token), "content": token, "special": token in special} | flags
        for token in (*special, *added)
    ]


def test_gguf_tokenizer_files_are_complete() -> None:
    metadata = VOCABULARY | {
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.padding_token_id": len(TOKENS) - 1,
        "tokenizer.chat_template": "{{ 'ü' }}",
    }
    files = tokenizer_files(Path("a.gguf"), metadata, 77)
    special = {"bos_token": "<s>", "unk_token": "é", "pad_token": "<unused>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 77,
        **special,
        "chat_template": "{{ 'ü' }}",
    }

    def text(value: dict[str, Any]) -> str:
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

    assert files.pop("tokenizer.json").startswith(b'{\n  "version"')
    assert {name: content.decode() for name, content in files.items()} == {
        "special_tokens_map.json": text(special),
        "chat_template.jinja": "{{ 'ü' }}",
        "tokenizer_config.json": text(config),
    }
    without = tokenizer_files(Path("a.gguf"), VOCABULARY, 77)
    assert "chat_template.jinja" not in without
    assert "chat_template" not in json.loads(without["tokenizer_config.json"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, r"a.gguf has the tokenizer bert. gpt2 \(byte-level BPE\), llama"),
        ({"model": None}, "the tokenizer None"),
        ({"model": "llama"}, "lacks tokenizer.ggml.tokens or tokenizer.ggml.scores"),
        ({"model": "llama", "scores": [0.5]}, r"malformed \(12 tokens and 1 scores\)"),
        ({"pre": "klingon"}, "the tokenizer gpt2/klingon"),
        ({"tokens": None}, "lacks tokenizer.ggml.tokens or tokenizer.ggml.merges"),
        ({"merges": None}, "lacks tokenizer.ggml.tokens or tokenizer.ggml.merges"),
        ({"eos_token_id": 12}, "eos_token_id is 12. A token below 12 was expected"),
        ({"unknown_token_id": -1}, "unknown_token_id is -1"),
        ({"padding_token_id": True}, "padding_token_id is True"),
        ({"tokens": ["<s>", "a", "a", "a"]}, r"malformed \(2 of 4 tokens occur twice\)"),
        ({"merges": ["a z"]}, "its vocabulary is malformed"),
    ],
)
def test_gguf_tokenizer_refuses_vocabularies(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokenizer(**changes)


# Configs

SIZES = {
    "embedding_length": 64,
    "attention.head_count": 2,
    "feed_forward_length": 96,
    "block_count": 1,
    "context_length": 512,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
EMBEDDING = ("token_embd.weight", (3, 64), 0)


def opened(
    path: Path,
    architecture: str = "llama",
    tensors: tuple[tuple[str, tuple[int, ...], int], ...] = (),
    vocabulary: dict[str, Any] | None = None,
    data: bytes = b"",
    **changes: Any,
) -> GgufModel:
    """A file with an embedding and `tensors`: their GGUF names, shapes and types."""
    given = SIZES | {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {"general.architecture": architecture} | (vocabulary or {})
    metadata |= {
        f"{architecture}.{key}": value for key, value in given.items() if value is not None
    }
    entries = []
    offset = 0
    for name, shape, kind in (*tensors, EMBEDDING):
        entries.append(raw_tensor(name, shape, kind, offset))
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        offset += math.prod(shape) // block * block_bytes
    file = path / "a.gguf"
    file.write_bytes(raw_gguf(metadata, entries, data + bytes(offset - len(data))))
    return open_gguf(file)


def test_gguf_config_of_a_file_with_required_keys_only(tmp_path: Path) -> None:
    assert opened(tmp_path).config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attention_bias": False,
        "mlp_bias": False,
    }
    assert opened(tmp_path).generation_config == {}


@pytest.mark.parametrize(
    ("architecture", "biases"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_gguf_config_of_biases_and_an_own_head(
    tmp_path: Path, architecture: str, biases: dict[str, bool]
) -> None:
    tensors = (
        ("output.weight", (3, 64), 0),
        ("blk.0.attn_q.bias", (64,), 0),
        ("blk.0.ffn_up.bias", (96,), 0),
    )
    model = opened(tmp_path, architecture, tensors)
    found = {key: value for key, value in model.config.items() if key.endswith("_bias")}
    assert found == biases
    assert model.config["tie_word_embeddings"] is False
    assert [*model.tensors] == [
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.up_proj.bias",
        "model.embed_tokens.weight",
    ]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({"eos": 1}, {"eos_token_id": 1}),
        ({"eot": 2}, {"eos_token_id": 2}),
        ({"eos": 1, "eot": 1}, {"eos_token_id": 1}),
        ({"eos": 2, "eot": 0}, {"eos_token_id": [2, 0]}),
        ({"eos": 2, "eot": 0, "eom": 1}, {"eos_token_id": [2, 0, 1]}),
        ({"bos": 0, "padding": 2}, {"bos_token_id": 0, "pad_token_id": 2}),
    ],
)
def test_gguf_config_of_token_ids(
    tmp_path: Path, ids: dict[str, int], expected: dict[str, Any]
) -> None:
    keys = {f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items()}
    model = opened(tmp_path, vocabulary=keys)
    assert model.generation_config == expected
    assert expected.items() <= model.config.items()


def test_gguf_side_files_hold_the_generation_config(tmp_path: Path) -> None:
    vocabulary = {key: value for key, value in VOCABULARY.items() if "type" not in key}
    model = opened(tmp_path, vocabulary=vocabulary)
    files = model.side_files()
    assert files["generation_config.json"] == b'{\n  "bos_token_id": 0\n}\n'
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 512
    files.clear()
    assert model.side_files()  # a copy was given


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope__scaling__type": "none"}, None),
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0},
            {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4,
                "rope__scaling__original_context_length": 128,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4,
                "rope__scaling__original_context_length": 128,
                "rope__scaling__attn_factor": 0.5,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 0.5 * (1 + 0.1 * math.log(4)),
            },
        ),
        (  # contexts that shrink scale nothing
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 0.5,
                "rope__scaling__original_context_length": 128,
                "rope__scaling__attn_factor": 0.5,
            },
            {
                "rope_type": "yarn",
                "factor": 0.5,
                "original_max_position_embeddings": 128,
                "attention_factor": 0.5,
            },
        ),
    ],
)
def test_gguf_config_of_rope_scaling(
    tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    assert opened(tmp_path, **changes).config.get("rope_scaling") == expected


def llama3_divisors() -> list[float]:
    """Of 16 frequencies with the base 10000: unchanged, interpolated, and divided by 8."""
    values = []
    for index in range(16):
        turns = 8192 / (2 * math.pi * 10000.0 ** (index / 16))
        smooth = min(max((turns - 1) / 3, 0), 1)
        values.append(1 / ((1 - smooth) / 8 + smooth))
    return values


def with_rope_factors(path: Path, values: list[float]) -> GgufModel:
    data = struct.pack(f"<{len(values)}f", *values)
    return opened(path, tensors=(("rope_freqs.weight", (len(values),), 0),), data=data)


def test_gguf_config_of_llama3_rope_factors(tmp_path: Path) -> None:
    values = llama3_divisors()
    assert [value for value in values if 1 < value < 8]
    values[12] *= 1 + 1e-5
    model = with_rope_factors(tmp_path, values)
    assert model.config["rope_scaling"]["factor"] == 8.0
    assert [*model.tensors] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    "values",
    [
        [8.0] * 16,
        [8.0],
        llama3_divisors()[:15],
        [*llama3_divisors()[:12], llama3_divisors()[12] * 0.999, *llama3_divisors()[13:]],
    ],
)
def test_gguf_refuses_other_rope_factors(tmp_path: Path, values: list[float]) -> None:
    with pytest.raises(InputError, match=r"rope_freqs.weight is not Llama 3's scaling"):
        with_rope_factors(tmp_path, values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": True}, "llama.block_count is True. A positive number was expected"),
        ({"block_count": 1.0}, "llama.block_count is 1.0"),
        ({"block_count": 0}, "llama.block_count is 0"),
        ({"attention__value_length": 31}, "attention.value_length is 31. 32 was expected"),
        ({"attention__key_length": 16, "rope__dimension_count": 32}, "count is 32. 16 was exp"),
        ({"rope__scaling__type": "linear"}, "lacks llama.rope.scaling.factor in its metadata"),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0},
            "lacks llama.rope.scaling.original_context_length",
        ),
        (
            {
                "rope__scaling__type": "linear",
                "rope__scaling__factor": 2.0,
                "rope__scaling__attn_factor": 0.5,
            },
            "llama.rope.scaling.attn_factor is 0.5. 1.0 was expected",
        ),
        ({"expert_count": 1}, "lacks llama.expert_used_count in its metadata"),
        (
            {"architecture": "qwen2", "expert_count": 1},
            "qwen2.expert_count is 1. A dense decoder was expected",
        ),
        ({"tensors": (("blk.0.output_norm.weight", (64,), 0),)}, "tensor blk.0.output_norm.weight"),
        ({"tensors": (("ffn_up.weight", (96, 64), 0),)}, "the tensor ffn_up.weight"),
        ({"tensors": (("output_norm.scale", (64,), 0),)}, "the tensor output_norm.scale"),
        ({"tensors": (("output_norm.weight", (64,), 26),)}, "output_norm.weight is stored as I32"),
    ],
)
def test_gguf_refuses_headers(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened(tmp_path, **changes)


def test_gguf_accepts_the_keys_of_a_dense_decoder(tmp_path: Path) -> None:
    changes = {"expert_count": 0, "attention__sliding_window": 0, "rope__dimension_count": 32}
    assert opened(tmp_path, **changes).config["head_dim"] == 32
    assert opened(tmp_path, context_length=1).config["max_position_embeddings"] == 1


def test_gguf_needs_an_embedding(tmp_path: Path) -> None:
    metadata = {f"llama.{key}": value for key, value in SIZES.items()}
    file = tmp_path / "a.gguf"
    file.write_bytes(raw_gguf({"general.architecture": "llama"} | metadata))
    with pytest.raises(InputError, match=r"a.gguf has no token_embd.weight"):
        open_gguf(file)


# Tensors


def test_gguf_reads_rows_of_few_and_of_quantized_values(tmp_path: Path) -> None:
    """A tensor of one row, one without rows, and a vector that is stored in blocks."""
    block = struct.pack("<e32b", 0.5, *range(32))
    tensors = (
        ("output_norm.weight", (64,), 8),
        ("blk.0.ffn_up.weight", (1, 2), 0),
        ("blk.0.ffn_down.weight", (0, 2), 0),
    )
    model = opened(tmp_path, tensors=tensors, data=2 * block + struct.pack("<2f", 3.0, -4.0))
    infos = model.tensors
    values = np.arange(32) * 0.5
    norm = infos["model.norm.weight"]
    assert model.rows(norm, 0, 64).tolist() == [*values, *values]
    assert model.rows(norm, 33, 35).tolist() == [0.5, 1.0]
    assert model.rows(infos["model.layers.0.mlp.up_proj.weight"], 0, 1).tolist() == [[3.0, -4.0]]
    assert model.rows(infos["model.layers.0.mlp.down_proj.weight"], 0, 0).shape == (0, 2)


@pytest.mark.parametrize(("architecture", "order"), [("llama", [0, 2, 1, 3]), ("qwen2", range(4))])
def test_gguf_orders_the_rows_of_q_and_k_by_halves(
    tmp_path: Path, architecture: str, order: list[int]
) -> None:
    """Two heads of q and one of k with four dimensions each: llama files interleave the halves."""
    sizes = {"attention.head_count_kv": 1, "attention.key_length": 4}
    tensors = (
        ("blk.0.attn_q.weight", (8, 1), 0),
        ("blk.0.attn_q.bias", (8,), 0),
        ("blk.0.attn_k.weight", (4, 1), 0),
        ("blk.0.attn_v.weight", (4, 1), 0),
    )
    data = struct.pack("<24f", *range(24))
    changes = {key.replace(".", "__"): value for key, value in sizes.items()}
    model = opened(tmp_path, architecture, tensors, data=data, **changes)

    def rows(name: str, start: int, stop: int) -> list[float]:
        info = model.tensors[f"model.layers.0.self_attn.{name}"]
        values: list[float] = model.rows(info, start, stop).flatten().tolist()
        return values

    q = [4 * head + row for head in range(2) for row in order]
    assert rows("q_proj.weight", 0, 8) == q
    assert rows("q_proj.weight", 1, 6) == q[1:6]
    assert rows("q_proj.bias", 0, 8) == [8 + row for row in q]
    assert rows("k_proj.weight", 0, 4) == [16 + row for row in order]
    assert rows("v_proj.weight", 0, 4) == [20, 21, 22, 23]
    assert model.rows(model.tensors["model.embed_tokens.weight"], 1, 2).dtype == torch.float32
