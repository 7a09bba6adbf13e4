"""Prompt datasets: which texts and conversations are read from which files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from support.tiny_models import tiny_checkpoint

from llmkit.bench.prompt_dataset import drop_long_conversations, load_prompt_dataset
from llmkit.bench.workload import PromptDataset, builtin_prompt_text
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from llmkit.common.errors import InputError

SHAREGPT = {
    "id": "x",
    "conversations": [
        {"from": "human", "value": "the quick fox"},
        {"from": "gpt", "value": "jumps"},
        {"from": "human", "value": "over"},
        {"from": "human", "value": " what?"},
        {"from": "gpt", "value": "the lazy dog"},
        {"from": "human", "value": "and then"},
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(
        open_checkpoint(tiny_checkpoint(tmp_path_factory.mktemp("data") / "tiny"))
    )


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = builtin_prompt_text()[:20_000]
    monkeypatch.setattr("llmkit.bench.prompt_dataset.builtin_prompt_text", lambda: text)


def decode_conversations(data: PromptDataset, tokenizer: Tokenizer) -> list[list[tuple[str, str]]]:
    return [
        [(tokenizer.decode(list(a)), tokenizer.decode(list(b))) for a, b in talk]
        for talk in data.conversations
    ]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_dataset_reads_conversations(tokenizer: Tokenizer, tmp_path: Path, suffix: str) -> None:
    messages = {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "world"},
        ]
    }
    pair = {"prompt": "one", "completion": "two"}
    silent = {"conversations": [{"from": "human", "value": "a"}]}
    records = [SHAREGPT, messages, pair, silent]
    path = tmp_path / f"talks.{suffix}"
    path.write_text(
        json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records))
    )
    data = load_prompt_dataset(str(path), tokenizer, 0)
    assert decode_conversations(data, tokenizer) == [
        [("the quick fox", "jumps"), ("over what?", "the lazy dog")],
        [("hello", "world")],
        [("one", "two")],
    ]
    lengths = [sum(len(a) + len(b) for a, b in talk) for talk in data.conversations]
    assert len(drop_long_conversations(data, lengths[1], 2).conversations) == sum(
        length <= lengths[1] for length in lengths
    )
    first = sum(map(len, data.conversations[0][0]))
    assert data.conversations[0] in drop_long_conversations(data, first, 1).conversations
    with pytest.raises(InputError, match=r"no conversation of .* fits a context of 1 tokens"):
        drop_long_conversations(data, 1, 1)


def test_dataset_reads_parquet_columns_and_folders(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    cache = tmp_path / "cache"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "one", "completion": "two"}\n')
    parquet.write_table(
        pa.table({"prompt": ["one"], "completion": ["two"], "score": [1.0]}), tmp_path / "x.parquet"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        for source in (folder, tmp_path / "x.parquet"):
            assert decode_conversations(
                load_prompt_dataset(str(source), tokenizer, 0), tokenizer
            ) == [[("one", "two")]]
        (folder / "train.jsonl").rename(folder / "run.py")
        with pytest.raises(InputError, match="cannot be read"):
            load_prompt_dataset(str(folder), tokenizer, 0)


def test_dataset_reads_texts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "the quick brown"}\n{"text": "fox jumps"}\n')
    data = load_prompt_dataset(str(path), tokenizer, 0)
    assert tokenizer.decode(list(data.tokens)) == "the quick brown\n\nfox jumps"
    assert not data.conversations
    assert load_prompt_dataset("builtin", tokenizer, 0).tokens == tokenizer.encode(
        builtin_prompt_text()[:20_000], False
    )


def test_dataset_of_random_tokens_is_seeded_and_has_no_special_tokens(tokenizer: Tokenizer) -> None:
    one, again, other = (
        load_prompt_dataset("random", tokenizer, seed).tokens for seed in (0, 0, 1)
    )
    assert one == again != other
    assert set(one) <= set(tokenizer.encode(builtin_prompt_text()[:20_000], False)), (
        "no special token"
    )
    assert len(set(one)) > 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"words": "a"}', "line 1 of .* has nothing to prompt with .keys seen: words"),
        ('{"conversations": []}', "holds no conversation with an answer"),
        ('{"text": "a"}\n{"prompt": "a", "output": "b"}', "mixed"),
    ],
)
def test_dataset_refuses_other_records(
    tokenizer: Tokenizer, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content + "\n")
    with pytest.raises(InputError, match=message):
        load_prompt_dataset(str(path), tokenizer, 0)


def test_dataset_refuses_json_that_is_no_list(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content, message in (
        ("{}", "is not a list of records"),
        ("[1]", "is not a list"),
        ("[", "cannot be read as JSON"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            load_prompt_dataset(str(path), tokenizer, 0)
