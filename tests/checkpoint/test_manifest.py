"""The manifest: what it records, every difference from it, and what edits may change."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmkit.checkpoint import manifest as manifests
from llmkit.checkpoint.manifest import (
    Difference,
    accept_edits,
    check_files,
    check_manifest,
    differences_error,
    edit_warning,
    find_differences,
    is_plain_name,
    lines_by_file,
    make_manifest,
    manifest_digest,
    manifest_text,
    tensor_key,
)
from llmkit.common.errors import InputError
from llmkit.common.version import version

WEIGHTS = "model.safetensors"
TENSORS = {
    "a": torch.arange(10, dtype=torch.uint8),
    "b": torch.arange(8, dtype=torch.uint8),
    "c": torch.zeros(0, dtype=torch.uint8),
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint without a manifest, and files that do not belong to one."""
    monkeypatch.setattr(manifests, "DIGEST_BYTES", 4)
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, folder / WEIGHTS)
    for name in ("config.json", "LICENSE", "a.py", ".hidden", "model.sig", "vocab.txt"):
        (folder / name).write_text(name)
    (folder / "0.json").mkdir()
    return folder


@pytest.fixture
def folder(plain: Path) -> Path:
    (plain / "llmkit.json").write_bytes(manifest_text(make_manifest(plain)))
    return plain


def read(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "llmkit.json").read_text())
    return document


def test_manifest_is_made_of_the_files_of_a_checkpoint(plain: Path) -> None:
    assert make_manifest(plain) == {
        "format_version": 1,
        "tool": {"name": "llmkit", "version": version()},
        "files": {
            name: {"bytes": (plain / name).stat().st_size, "sha256": sha256(data)}
            for name in ("LICENSE", "config.json", WEIGHTS, "vocab.txt")
            for data in [(plain / name).read_bytes()]
        },
        "tensors": {
            name: {
                "file": WEIGHTS,
                "dtype": "U8",
                "shape": list(tensor.shape),
                "sha256": sha256(tensor.numpy().tobytes()),
            }
            for name, tensor in TENSORS.items()
        },
    }
    (plain / WEIGHTS).unlink()
    with pytest.raises(InputError, match=rf"{plain} has no weights in safetensors files; it holds"):
        make_manifest(plain)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0b", 5, None])
def test_manifest_names_files_of_its_folder_only(name: object) -> None:
    assert not is_plain_name(name)
    assert is_plain_name("..a")


def test_manifest_text_and_keys() -> None:
    assert manifest_text({"é": [1]}).decode() == '{\n  "é": [\n    1\n  ]\n}\n'
    assert (tensor_key("w", "f", True), tensor_key("w", "f", False)) == ("f::w", "w")
    assert manifest_digest({"b": 1, "a": 2, "sha256": "x"}) == sha256(b'{"a": 2, "b": 1}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "where has format_version 2"),
        ({"files": {"a": {"bytes": 1}}}, "where: files is malformed"),
        ({"files": {"a": []}}, "where: files is malformed"),
        ({"tensors": {"a": {"file": "x", "sha256": 1}}}, "where: tensors is malformed"),
        ({"tensors": None}, "where: tensors is malformed.* file and sha256 were"),
    ],
)
def test_manifest_is_checked(change: dict[str, Any], message: str) -> None:
    whole = {
        "format_version": 1,
        "files": {"a": {"bytes": 1, "sha256": ""}},
        "tensors": {"t": {"file": "a", "sha256": ""}},
    }
    assert check_manifest(whole, "where") is whole
    with pytest.raises(InputError, match=message):
        check_manifest(whole | change, "where")


def texts(folder: Path) -> list[str]:
    return [difference.text for difference in find_differences(folder)]


def test_differences_name_tensors_and_files(folder: Path) -> None:
    assert texts(folder) == []
    document = read(folder)
    entry = document["tensors"]["a"]
    document["tensors"] = {"a": entry | {"sha256": "0"}, "x": entry, "b": document["tensors"]["b"]}
    (folder / "llmkit.json").write_text(json.dumps(document))
    assert texts(folder) == [
        f"{WEIGHTS}: tensor a has SHA-256 {entry['sha256']}, the manifest says 0",
        f"{WEIGHTS}: tensor c is not in llmkit.json",
        "x is in llmkit.json but in no file",
    ]
    document["tensors"] = {}
    document["files"]["vocab.txt"]["bytes"] = 8
    document["files"]["config.json"]["sha256"] = "0"
    del document["files"][WEIGHTS]
    (folder / "llmkit.json").write_text(json.dumps(document))
    (folder / "LICENSE").unlink()
    (folder / "generation_config.json").write_text("{}")
    assert texts(folder) == [
        f"{folder}/LICENSE is in llmkit.json but absent",
        f"{folder}/config.json has SHA-256 {sha256(b'config.json')}, llmkit.json says 0",
        f"{folder}/vocab.txt has 9 bytes, llmkit.json says 8",
        f"{folder}/generation_config.json is not in llmkit.json",
    ]
    (folder / "llmkit.json").unlink()
    with pytest.raises(InputError, match=rf"^{folder} has no llmkit.json"):
        find_differences(folder)


def test_differences_of_a_file_with_a_bad_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**40) + data[8:])
    found = find_differences(folder)
    assert "its header claims" in found[0].text
    assert [difference.file for difference in found] == [WEIGHTS] * 4  # and its three tensors


def test_differences_of_ranks_have_the_files_in_their_keys(folder: Path) -> None:
    document = read(folder) | {"layout": {"tp": 1}}
    (folder / "llmkit.json").write_text(json.dumps(document))
    assert len(texts(folder)) == 6  # each tensor: not in the manifest, in no file
    keys = {f"{WEIGHTS}::{name}": entry for name, entry in document["tensors"].items()}
    (folder / "llmkit.json").write_text(json.dumps(document | {"tensors": keys}))
    assert texts(folder) == []


def test_opening_compares_sizes_of_weights_and_the_content_of_others(folder: Path) -> None:
    document = read(folder)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1] + b"?")  # too slow to compare
    check_files(folder, document)
    (folder / WEIGHTS).write_bytes(data + b"?")
    with pytest.raises(InputError, match=rf"{WEIGHTS} has {len(data) + 1} bytes, llmkit.json says"):
        check_files(folder, document)
    (folder / WEIGHTS).write_bytes(data)
    (folder / "vocab.txt").write_text("other.txt")  # of the same size
    with pytest.raises(InputError, match=r"vocab.txt has SHA-256 \w{64}, llmkit.json says"):
        check_files(folder, document)
    (folder / "vocab.txt").unlink()
    with pytest.raises(InputError, match=r"vocab.txt is in llmkit.json but absent"):
        check_files(folder, document)


def test_opening_warns_of_edits_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    document = read(folder)
    assert edit_warning(folder, document) is None
    (folder / "LICENSE").unlink()
    (folder / "chat_template.json").write_text("{}")
    text = (
        f"{folder} was edited after llmkit wrote it (LICENSE, chat_template.json); it is used as it"
        f" is, and `llmkit verify {folder} --update` accepts the edit"
    )
    assert edit_warning(folder, document) == text
    with caplog.at_level(logging.WARNING, "llmkit"):
        check_files(folder, document, warn=False)
        assert caplog.messages == []
        check_files(folder, document)
        check_files(folder, document)
    assert caplog.messages == [f"llmkit: warning: {text}."]


def test_edits_are_accepted_unless_another_file_differs(folder: Path) -> None:
    before = (folder / "llmkit.json").read_bytes()
    assert accept_edits(folder, []) == []
    (folder / "LICENSE").write_text("changed")
    (folder / "chat_template.jinja").write_text("new")
    found = find_differences(folder)
    edits_error = differences_error(folder, found)
    assert "--update` accepts such edits" in str(edits_error)
    wrong = Difference("config.json", "config.json is wrong")
    with pytest.raises(InputError) as caught:
        accept_edits(folder, [*found, wrong])
    assert str(caught.value) == (
        f"{folder} does not verify (3 wrong, the first: config.json is wrong). Files as llmkit.json"
        " records them. Write or copy the checkpoint again."
    )
    assert (folder / "llmkit.json").read_bytes() == before
    assert accept_edits(folder, found) == ["LICENSE", "chat_template.jinja"]
    assert read(folder)["files"]["LICENSE"] == {"bytes": 7, "sha256": sha256(b"changed")}
    assert "sha256" not in read(folder)
    assert find_differences(folder) == []

    document = read(folder) | {"sha256": "old"}
    (folder / "llmkit.json").write_text(json.dumps(document))
    (folder / "LICENSE").unlink()
    assert accept_edits(folder, find_differences(folder)) == ["LICENSE"]
    assert read(folder)["sha256"] == manifest_digest(read(folder))
    assert "LICENSE" not in read(folder)["files"]
    (folder / "llmkit.json").unlink()
    assert accept_edits(folder, [Difference("LICENSE", "")]) == []


def test_differences_are_shown_in_one_line_for_each_file() -> None:
    found = [("a", "a1"), ("b", "b1"), ("a", "a2"), ("a", "a3"), ("c", "c1"), ("b", "b2")]
    assert lines_by_file([Difference(*each) for each in found]) == [
        "a1; 2 more problems of a",
        "b1; 1 more problem of b",
        "c1",
    ]
