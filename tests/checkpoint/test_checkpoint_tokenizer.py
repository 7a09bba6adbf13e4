"""Tokenizers and chat templates, compared with the libraries tokenizers and transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from support.tiny_models import write_tokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from llmkit.checkpoint.detokenizer import Detokenizer, TokenBytes
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import ChatTemplateError, Tokenizer, load_tokenizer
from llmkit.common.errors import InputError

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Grüß 😀"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"a": "<b>", "ü": [1, None, True]}},
    }
]


def model(
    path: Path, config: dict[str, Any] | None = None, generation: dict[str, Any] | None = None
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} | (config or {})))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    save_file({"w": torch.zeros(1)}, path / "model.safetensors")
    return path


def load(
    path: Path, config: dict[str, Any] | None = None, generation: dict[str, Any] | None = None
) -> Tokenizer:
    return load_tokenizer(open_checkpoint(model(path, config, generation)))


def write_roles(path: Path, settings: dict[str, Any]) -> None:
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path)
    return load(tmp_path)


def test_tokenizer_encodes_like_transformers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "the quick brown fox 😀\n<|im_start|>user"
    assert tokenizer.encode(text) == theirs(text)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(text)) == "the quick brown fox 😀\nuser"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.vocab_size == len(theirs) == 512
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.special_tokens == theirs.special_tokens_map
    assert (tokenizer.id_to_token(2), tokenizer.id_to_token(10**6)) == ("<|im_end|>", "")


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, (2,)),  # the tokenizer's own eos_token
        ({"eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": [7, 8]}, {}, (7, 8)),
        ({"eos_token_id": 7}, {"eos_token_id": 9}, (9, 7)),
        ({"eos_token_id": 9}, {"eos_token_id": [2, 9]}, (2, 9)),
        ({"eos_token_id": None}, {"eos_token_id": None}, (2,)),
    ],
)
def test_tokenizer_eos_ids_come_from_every_config(
    tmp_path: Path,
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    expected: tuple[int, ...],
) -> None:
    write_tokenizer(tmp_path)
    assert load(tmp_path, config, generation).eos_token_ids == expected


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, 0),  # the tokenizer's own bos_token
        ({"bos_token_id": 1}, None, 1),
        ({"bos_token_id": 1}, {"bos_token_id": 2}, 2),
        ({"bos_token_id": 1}, {"bos_token_id": 0}, 0),
        ({"bos_token_id": [5, 6]}, {"bos_token_id": True}, 5),
    ],
)
def test_tokenizer_bos_id_comes_from_the_configs(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, expected: int
) -> None:
    write_tokenizer(tmp_path)
    assert load(tmp_path, config, generation).bos_token_id == expected


def test_tokenizer_bos_id_of_the_config_may_be_zero(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    write_roles(tmp_path, {"bos_token": "<|im_end|>"})
    assert load(tmp_path).bos_token_id == 2
    assert load(tmp_path, {"bos_token_id": 0}).bos_token_id == 0


def test_tokenizer_disables_truncation_and_padding(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.enable_truncation(3)
    raw.enable_padding(length=8)
    raw.save(str(tmp_path / "tokenizer.json"))
    ids = load(tmp_path).encode("the quick brown fox jumps over")
    assert load(tmp_path).decode(ids) == "the quick brown fox jumps over"


@pytest.mark.parametrize(
    ("keep", "limit", "expected"),
    [
        ("first", 7, [0, 10, 11, 12, 13, 14, 2]),
        ("first", 6, [0, 10, 11, 12, 13, 2]),
        ("first", 3, [0, 10, 2]),
        ("first", 2, [0, 10]),  # no room for the text beside the special tokens
        ("first", 1, [0]),
        ("last", 8, [0, 10, 11, 12, 13, 14, 2]),
        ("last", 6, [0, 11, 12, 13, 14, 2]),
        ("last", 3, [0, 14, 2]),
        ("last", 2, [14, 2]),
        ("last", 1, [2]),
    ],
)
def test_tokenizer_truncates_the_text_beside_its_special_tokens(
    tokenizer: Tokenizer, keep: Literal["first", "last"], limit: int, expected: list[int]
) -> None:
    raw = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    raw.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>",
        special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)],
    )
    text = raw.decode(range(10, 15))
    both = Tokenizer(raw, {}, {}, None, ())
    assert both.encode(text) == [0, 10, 11, 12, 13, 14, 2]
    assert both.encode(text, max_tokens=limit, keep=keep) == expected
    plain = list(range(10, 15))
    kept = plain[:limit] if keep == "first" else plain[-limit:]
    assert both.encode(text, add_special_tokens=False, max_tokens=limit, keep=keep) == kept
    if keep == "last":
        assert both.encode(text, max_tokens=limit) == expected


def test_tokenizer_knows_tokens_added_to_its_vocabulary(tokenizer: Tokenizer) -> None:
    raw = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    raw.add_tokens(["<plain>"])
    raw.add_special_tokens(["<special>"])
    wider = Tokenizer(raw, {"bos_token": "<special>", "eos_token": "<unknown>"}, {}, None, ())
    assert wider.vocab_size == 514
    assert wider.special_ids == {0, 1, 2, 513}
    assert (wider.special_id("<special>"), wider.special_id("<plain>")) == (513, None)
    assert wider.special_id("<unknown>") is None
    assert (wider.bos_token_id, wider.eos_token_ids) == (513, ())
    assert (wider.token_bytes(512), wider.token_bytes(514)) == (b"<plain>", b"")
    ids = wider.encode("<plain><special>a<|im_end|>")
    assert wider.stream().add(ids) == "<plain>a"
    assert wider.stream(shown=["<|im_end|>", "<unknown>"]).add(ids) == "<plain>a<|im_end|>"
    assert Tokenizer(raw, {}, {}, 0, (5,)).bos_token_id == 0
    assert Tokenizer(raw, {"eos_token": "<special>"}, {}, 0, (5,)).eos_token_ids == (5,)


def test_tokenizer_missing_or_malformed_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no tokenizer"):
        load(tmp_path / "a")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write_tokenizer(tmp_path / name)
        (tmp_path / name / name).write_text("{")
        with pytest.raises(InputError, match=rf"{name} is (malformed|not valid JSON)"):
            load(tmp_path / name)
    (tmp_path / "tokenizer.json" / "special_tokens_map.json").write_text("[" * 10**5)
    with pytest.raises(InputError, match=r"special_tokens_map.json is not valid JSON \(maximum"):
        load(tmp_path / "tokenizer.json")


def test_tokenizer_runs_no_code_of_the_checkpoint(tmp_path: Path) -> None:
    model(tmp_path, {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}})
    (tmp_path / "own.tiktoken").touch()
    (tmp_path / "tokenization_own.py").write_text(f"open({str(tmp_path / 'has_run')!r}, 'w')")
    write_roles(tmp_path, {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}})
    with pytest.raises(InputError, match="its tokenizer could not be converted"):
        load_tokenizer(open_checkpoint(tmp_path))
    assert not (tmp_path / "has_run").exists()


def test_tokenizer_converts_slow_tokenizer_files(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "new")
    vocabulary = json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]
    old = model(tmp_path / "old", {"model_type": "gpt2"})
    (old / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    (old / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in vocabulary["merges"])
    )
    (old / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    text = "the quick brown fox 😀"
    tokenizer = load_tokenizer(open_checkpoint(old))
    assert tokenizer.encode(text, add_special_tokens=False) == load(tmp_path / "new").encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_refuses_slow_files_that_cannot_be_converted(tmp_path: Path) -> None:
    (model(tmp_path) / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(
        InputError, match=r"has no tokenizer.json, and its tokenizer could not be converted"
    ):
        load_tokenizer(open_checkpoint(tmp_path))


# Detokenizing


def pieces(stream: Detokenizer, ids: list[int], step: int) -> list[str]:
    return [*(stream.add(ids[i : i + step]) for i in range(0, len(ids), step)), stream.flush()]


@pytest.mark.parametrize("step", [1, 2, 7])
def test_detokenizer_streams_the_decoded_text(tokenizer: Tokenizer, step: int) -> None:
    text = "<|im_start|>héllo 😀👩‍👩‍👧 漢字, the quick\n\n brown  fox<|im_end|> é"
    ids = tokenizer.encode(text)
    found = pieces(tokenizer.stream(), ids, step)
    assert "".join(found) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in found)
    found = pieces(tokenizer.stream(skip_special_tokens=False), ids, step)
    assert "".join(found) == text


def test_detokenizer_holds_incomplete_characters_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    assert len(ids) == 4
    stream = tokenizer.stream()
    assert [stream.add([token]) for token in ids] == ["", "", "", "😀"]
    stream = tokenizer.stream()
    assert [stream.add(ids[:3]), stream.flush()] == ["", "\ufffd"]
    assert stream.flush() == ""


def test_detokenizer_streams_random_ids_as_they_decode(tokenizer: Tokenizer) -> None:
    """Invalid UTF-8 included, and ids that have no token."""
    source = random.Random(0)
    for _ in range(300):
        ids = [source.randrange(3, 530) for _ in range(source.randint(1, 20))]
        assert "".join(pieces(tokenizer.stream(), ids, 1)) == tokenizer.decode(ids)


def sentencepiece(strip: bool) -> tokenizers.Tokenizer:
    """A tokenizer of Llama 2's kind: spaces as U+2581 and bytes as tokens."""
    words = ["\u2581", "\u2581the", "\u2581fox", "s", "é", "<s>"]
    vocabulary = {
        token: index
        for index, token in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])
    }
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    return tokenizer


@pytest.mark.parametrize("strip", [True, False])
def test_detokenizer_supports_sentencepiece_decoders(strip: bool) -> None:
    raw = sentencepiece(strip)
    table = TokenBytes(raw, json.loads(raw.to_str())["decoder"])
    smile = [raw.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    for ids in ([1, 3, 2, *smile, 4, 0, 1], smile, [0, 0, 1], [3]):
        found = pieces(Detokenizer(table), ids, 1)
        assert "".join(found) == raw.decode(ids)
        assert not any("\ufffd" in piece for piece in found)


def test_detokenizer_supports_metaspace() -> None:
    raw = tokenizers.Tokenizer(models.BPE({"\u2581a": 0, "\u2581b": 1, "c": 2}, []))
    for scheme in ("always", "never"):
        raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
        table = TokenBytes(raw, json.loads(raw.to_str())["decoder"])
        assert "".join(pieces(Detokenizer(table), [0, 1, 2, 0], 1)) == raw.decode([0, 1, 2, 0])


def sequence(*kinds: str) -> dict[str, Any]:
    return {"type": "Sequence", "decoders": [{"type": kind} for kind in kinds]}


SENTENCEPIECE = ("Replace", "ByteFallback", "Fuse")


@pytest.mark.parametrize(
    ("decoder", "found", "strips"),
    [
        ({"type": "ByteLevel"}, b"\x81a", False),
        (sequence("ByteLevel"), b"\x81a", False),
        ({"type": "Metaspace"}, "\u0123a".encode(), True),
        ({"type": "Metaspace", "prepend_scheme": "first"}, "\u0123a".encode(), True),
        ({"type": "Metaspace", "prepend_scheme": "never"}, "\u0123a".encode(), False),
        (sequence(*SENTENCEPIECE), "\u0123a".encode(), False),
        (sequence(*SENTENCEPIECE, "Strip"), "\u0123a".encode(), True),
    ],
)
def test_detokenizer_reads_decoders(decoder: dict[str, Any], found: bytes, strips: bool) -> None:
    vocabulary = {"\u0123a": 0, "\u2581a": 1, "<0xfE>": 2, " ": 3}
    table = TokenBytes(tokenizers.Tokenizer(models.BPE(vocabulary, [])), decoder)
    assert table.bytes_of[0] == found
    assert table.strips_space is strips
    if decoder["type"] == "Metaspace" or "Fuse" in str(decoder):
        assert table.bytes_of[1] == b" a"
    assert table.bytes_of[2] == (b"\xfe" if "Fuse" in str(decoder) else b"<0xfE>")
    assert table.bytes_of[3] == b" "  # no character of GPT-2's alphabet: an added token
    stream = Detokenizer(table)
    texts = ["" if strips else " ", " ", " "]
    assert [stream.add([]), *(stream.add([3]) for _ in range(3))] == ["", *texts]


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (None, "None"),
        ({"type": "WordPiece"}, "WordPiece"),
        (sequence(), ""),
        (sequence("ByteLevel", "Strip"), r"ByteLevel \+ Strip"),
        (sequence("Replace", "ByteFallback"), r"Replace \+ ByteFallback"),
        (sequence("Replace", "Fuse", "Strip"), r"Replace \+ Fuse \+ Strip"),
        (sequence(*SENTENCEPIECE, "Other"), r"Replace \+ ByteFallback \+ Fuse \+ Other"),
        (sequence(*SENTENCEPIECE, "Strip", "Strip"), r"Fuse \+ Strip \+ Strip"),
    ],
)
def test_detokenizer_refuses_unknown_decoders(decoder: dict[str, Any] | None, name: str) -> None:
    raw = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(InputError, match=rf"The tokenizer has the decoder .*{name}\. ByteLevel, "):
        TokenBytes(raw, decoder)


def test_detokenizer_alphabet_covers_every_byte() -> None:
    raw = tokenizers.Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    raw.decoder = decoders.ByteLevel()
    table = TokenBytes(raw, {"type": "ByteLevel"})
    assert sorted(table.bytes_of.values()) == [bytes([byte]) for byte in range(256)]
    for index, data in table.bytes_of.items():
        assert raw.decode([index]) == data.decode(errors="replace")


# Chat templates

TEMPLATES = {
    "whitespace": "{%- for m in messages %}\n  {% if loop.first %}\n[a]\n  {% endif %}"
    "\n{{ m }}\n{% endfor %}",
    "tokens": "{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}"
    "{{ pad_token }}{{ unk_token }}",
    "tools": "{% for t in tools or [] %}{{ t | tojson }}{{ t | tojson(indent=2) }}{% endfor %}"
    "{{ tools is none }}",
    "loops": "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
    "{{ m.role }}{% endfor %}",
    "generation": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ messages[0].content }}"
    "{% endgeneration %}{{ x }}",
    "namespace": "{% set n = namespace(a=0) %}{% for m in messages %}{% set n.a = n.a + 1 %}"
    "{% endfor %}{{ n.a }}",
    "prompt": "{% if add_generation_prompt %}go{% endif %}{{ documents is none }}{{ dict(a=1) }}",
    "kwargs": "{{ enable_thinking }}{{ missing is defined }}{{ missing }}",
}


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_chat_templates_render_as_in_transformers(
    tmp_path: Path, name: str, tools: list[dict[str, Any]] | None
) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, chat_template=TEMPLATES[name])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load(tmp_path)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(
            MESSAGES,
            tools=tools,
            tokenize=False,
            add_generation_prompt=prompt,
            enable_thinking=False,
        )
        found = ours.render_chat(
            MESSAGES, tools, add_generation_prompt=prompt, enable_thinking=False
        )
        assert found == expected


def test_chat_templates_know_the_current_date(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="{{ strftime_now('%d') }}")
    assert load(tmp_path).render_chat([]).isdigit()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].content + 1 }}", "cannot render these messages"),
        ("{{ messages[0].content.nothing.more }}", "has no attribute 'nothing'"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ messages.__class__() }}", "unsafe|not safely callable"),
    ],
)
def test_chat_templates_that_fail_are_errors(tmp_path: Path, template: str, message: str) -> None:
    write_tokenizer(tmp_path, chat_template=template)
    with pytest.raises(ChatTemplateError, match=message):
        load(tmp_path).render_chat(MESSAGES)


def test_chat_template_missing_is_an_error(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=None)
    tokenizer = load(tmp_path)
    assert tokenizer.chat_template is None
    with pytest.raises(ChatTemplateError, match="this model has no chat template"):
        tokenizer.render_chat(MESSAGES)


def test_chat_templates_are_found_in_every_place(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=None)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "oldest"}')
    assert load(tmp_path).render_chat([]) == "oldest"
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    assert load(tmp_path).render_chat([]) == "plain"
    assert load(tmp_path).render_chat([], TOOLS) == "tools"
    odd = [*named, "text", {"name": "no template"}, {"template": "no name"}]
    write_roles(tmp_path, settings | {"chat_template": odd})
    assert load(tmp_path).chat_templates == {"default": "plain", "tool_use": "tools"}
    write_roles(tmp_path, settings | {"chat_template": named[:1]})
    assert load(tmp_path).render_chat([], TOOLS) == "plain"
    write_roles(tmp_path, settings | {"chat_template": 7})
    assert load(tmp_path).chat_templates == {}
    (tmp_path / "chat_template.jinja").write_text("newest")
    assert load(tmp_path).render_chat([], TOOLS) == "newest"


def test_chat_template_of_a_file_replaces_the_models(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model")
    files = open_checkpoint(model(tmp_path / "model"))
    file = tmp_path / "own.jinja"
    file.write_text("{{ add_generation_prompt }}ü", encoding="utf-8")
    tokenizer = load_tokenizer(files, file)
    assert tokenizer.chat_templates == {"default": "{{ add_generation_prompt }}ü"}
    assert tokenizer.render_chat([], TOOLS) == "Trueü"
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match=rf"the chat template is not UTF-8 \({file}\)"):
        load_tokenizer(files, file)
    with pytest.raises(InputError, match=rf"cannot be read \({tmp_path}/none: No such file"):
        load_tokenizer(files, tmp_path / "none")


def test_tokenizer_reads_special_tokens_written_as_objects(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": 3})
    )
    tokenizer = load(tmp_path)
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>"}
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.bos_token_id is None
