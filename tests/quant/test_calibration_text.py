"""Calibration text from every kind of source, and the windows that are cut from it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import tiny_models as tiny

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from llmkit.common.errors import InputError, ShortageError
from llmkit.quant.calibration_text import (
    BUILTIN,
    builtin_text,
    load_text,
    select_windows,
    split_builtin,
    windows_sha256,
)
from llmkit.quant.token_windows import calibration_windows, evaluation_windows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "model"
    return load_tokenizer(open_checkpoint(tiny.tiny_checkpoint(path)))


def lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def test_builtin_text_is_the_reference_of_cpython() -> None:
    text = load_text(BUILTIN)
    assert text.documents == [builtin_text()]
    assert "pydoc_data.topics" in text.name
    assert len(builtin_text()) > 400_000


def test_txt_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Grüße\n\nzwei", encoding="utf-8")
    assert load_text(str(path)).documents == ["Grüße\n\nzwei"]


def test_jsonl_file_has_a_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "id": 1}\n\n{"text": "two"}', encoding="utf-8")
    assert load_text(str(path)).documents == ["one", "two"]


def test_chat_messages_go_through_the_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = lines(tmp_path / "a.jsonl", {"messages": messages}, {"text": "plain"})

    def render(chat: list[dict[str, object]]) -> str:
        return tokenizer.render_chat(chat, add_generation_prompt=False)

    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    assert load_text(str(path), render).documents == [expected, "plain"]
    with pytest.raises(
        InputError, match=r"line 1 of .*a\.jsonl holds chat messages, and there is no chat template"
    ):
        load_text(str(path))
    bad = lines(tmp_path / "b.jsonl", {"messages": [{"role": "wizard", "content": "hi"}]})
    with pytest.raises(
        InputError, match=r"line 1 of .*does not fit the model's chat template.*wizard"
    ):
        load_text(str(bad), render)


def test_parquet_file_is_read_by_its_text_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2], "text": ["one", "two"]}), path)
    assert load_text(str(path)).documents == ["one", "two"]
    pq.write_table(pa.table({"id": [1], "body": ["one"]}), path)
    with pytest.raises(InputError, match=r"no column 'text' \(keys seen: id, body\)"):
        load_text(str(path))
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        load_text(str(path))


def test_reading_stops_at_the_limit(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"text": "x" * 10} for _ in range(10)))
    text = load_text(str(path), limit=25)
    assert len(text.documents) == 3
    assert text.truncated
    assert not load_text(str(path), limit=100).truncated
    assert text.sha256 != load_text(str(path)).sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n ", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.txt", b"abc\xff", r"is not UTF-8 \(byte 3 is 0xff\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"is not UTF-8 \(byte 24 is 0xff\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"line 2 of .* is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]', r"line 2 of .* is not a JSON object"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b", "id": 1}',
            r"line 2 .* no field 'text'.*keys seen: body, id",
        ),
        (
            "a.jsonl",
            b'{"text": 3}',
            r"line 1 .* no field 'text' that is a string \(keys seen: text\)",
        ),
        ("a.csv", b"text\nabc", "is of no known kind"),
    ],
)
def test_bad_files_are_refused_with_the_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_text(str(path))
    assert caught.value.exit_code == 3
    assert name in str(caught.value)


def test_absent_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl was not found"):
        load_text(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(InputError, match="was not found"):
        load_text("not/a/dataset/id")


def test_dataset_without_a_network_is_a_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ShortageError, match=r"owner/name cannot be downloaded.*builtin"):
        load_text("owner/name")


def test_dataset_is_streamed_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(*arguments: object, **options: object) -> object:
        asked.append((arguments, options))
        return ({"text": f"document {i}"} for i in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_text("owner/name:config", limit=30).documents == [
        "document 0",
        "document 1",
        "document 2",
    ]
    assert asked == [(("owner/name", "config"), {"split": "train", "streaming": True})]


def test_calibration_and_evaluation_parts_never_overlap() -> None:
    tokens = torch.arange(10_000)
    calibration, evaluation = split_builtin(tokens)
    assert torch.equal(torch.cat([calibration, evaluation]).sort().values, tokens)
    assert len(evaluation) == 2 * 1024
    assert int(evaluation[0]) == 3072


def test_windows_are_full_distinct_and_chosen_by_the_seed() -> None:
    tokens = torch.arange(1050)
    chosen = select_windows(tokens, 4, 100, seed=0)
    assert chosen.shape == (4, 100)
    starts = chosen[:, 0].tolist()
    assert starts == sorted(set(starts))
    assert torch.equal(chosen, torch.stack([tokens[start : start + 100] for start in starts]))
    assert torch.equal(chosen, select_windows(tokens, 4, 100, seed=0))
    assert not torch.equal(chosen, select_windows(tokens, 4, 100, seed=1))
    assert select_windows(tokens, 99, 100, seed=0).shape == (10, 100)
    assert windows_sha256(chosen) != windows_sha256(select_windows(tokens, 4, 100, seed=1))


def test_calibration_windows_of_a_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = lines(tmp_path / "a.jsonl", *({"text": f"the quick brown fox {i}"} for i in range(40)))
    text = load_text(str(path))
    stream = [
        i
        for document in text.documents
        for i in tokenizer.encode(document, add_special_tokens=False)
    ]
    chosen = calibration_windows(tokenizer, text, False, 1000, 16, seed=3)
    assert chosen.flatten().tolist() == stream[: len(stream) // 16 * 16]
    with pytest.raises(
        InputError, match=rf"too short: {len(stream)} tokens, and one window needs 4096"
    ):
        calibration_windows(tokenizer, text, False, 4, 4096, seed=0)


def test_evaluation_windows_are_never_calibrated_with(tokenizer: Tokenizer) -> None:
    text = load_text(BUILTIN)
    calibration = calibration_windows(tokenizer, text, True, 10**6, 64, seed=0)
    evaluation = evaluation_windows(tokenizer, 8, 64)
    assert evaluation.shape == (8, 64)
    seen = {tuple(row) for row in calibration.tolist()}
    assert not any(tuple(row) in seen for row in evaluation.tolist())
    assert torch.equal(evaluation, evaluation_windows(tokenizer, 8, 64))
