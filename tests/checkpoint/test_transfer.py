"""Copies of checkpoints, step by step: limits, what is sent, what is compared, what stays."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmkit.checkpoint.manifest import make_manifest, manifest_digest, manifest_text
from llmkit.checkpoint.registry import transfer
from llmkit.checkpoint.registry.store_interface import Published
from llmkit.checkpoint.registry.transfer import FolderStore, pull, push, read_remote_manifest
from llmkit.common.errors import InputError, OutputError
from llmkit.common.progress import SilentProgress

QUIET = SilentProgress()
WEIGHTS = "model.safetensors"
MIB = 2**20


class Stages(SilentProgress):
    """Notes each stage, with its total and the bytes that were done."""

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []
        self.ends = 0

    def start(self, stage: str, total: int, unit: str) -> None:
        assert unit == "bytes"
        self.seen.append([stage, total, 0])

    def advance(self, n: int = 1, note: str = "") -> None:
        self.seen[-1][2] += n

    def finish(self) -> None:
        self.ends += 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.arange(10)}, folder / WEIGHTS)
    (folder / "config.json").write_text("{}")
    (folder / "llmkit.json").write_bytes(manifest_text(make_manifest(folder)))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class FakeSizes(FolderStore):
    """A folder whose files seem to have other sizes."""

    def __init__(self, folder: Path, **sizes: int) -> None:
        super().__init__(folder)
        self._fakes = {name.replace("_", "."): size for name, size in sizes.items()}

    def sizes(self) -> dict[str, int]:
        return super().sizes() | self._fakes


def test_remote_manifest_and_signature_have_limits(folder: Path) -> None:
    """So that no store fills the memory."""
    read_remote_manifest(FakeSizes(folder, llmkit_json=256 * MIB, model_sig=16 * MIB))
    with pytest.raises(InputError) as caught:
        read_remote_manifest(FakeSizes(folder, llmkit_json=256 * MIB + 1))
    assert str(caught.value) == (
        f"{folder}/llmkit.json has 268435457 bytes. At most 268435456 were expected."
    )
    with pytest.raises(InputError, match=r"model.sig has 16777217 bytes. At most 16777216 were"):
        read_remote_manifest(FakeSizes(folder, model_sig=16 * MIB + 1))


def test_remote_manifest_is_that_of_a_whole_checkpoint(folder: Path) -> None:
    document = json.loads((folder / "llmkit.json").read_text())

    def refused(message: str, **changes: Any) -> None:
        (folder / "llmkit.json").write_text(json.dumps(document | changes))
        with pytest.raises(InputError, match=message):
            read_remote_manifest(FolderStore(folder))

    digest = manifest_digest(document)
    refused(rf"says that its SHA-256 is x, and it is {digest}", sha256="x")
    files = document["files"]
    entry = files["config.json"]
    for name in ("llmkit.json", "model.sig", "evil.py"):
        refused(f"names the file {name}. Safetensors", files=files | {name: entry})
    refused(r"a.json is absent, llmkit.json says 2 bytes", files=files | {"a.json": entry})
    longer = {"config.json": entry | {"bytes": 3}}
    refused(r"config.json has 2 bytes, llmkit.json says 3 bytes", files=files | longer)
    refused("names no config.json", files={WEIGHTS: files[WEIGHTS]})
    (folder / "llmkit.json").write_text(json.dumps(document | {"sha256": digest}))
    assert read_remote_manifest(FolderStore(folder)).files == {
        WEIGHTS: (folder / WEIGHTS).stat().st_size,
        "config.json": 2,
    }


@pytest.mark.parametrize(
    ("names", "shown"), [("", "nothing"), ("ba", "a, b"), ("fedcba", "a, b, c, d, e")]
)
def test_remote_manifest_that_is_missing(names: str, shown: str, folder: Path) -> None:
    class Other(FolderStore):
        def sizes(self) -> dict[str, int]:
            return dict.fromkeys(names, 1)

    with pytest.raises(InputError, match=rf"^{folder} has no llmkit.json; it holds {shown}\. A"):
        read_remote_manifest(Other(folder))


def test_pull_result_counts_files_and_bytes(folder: Path, tmp_path: Path) -> None:
    (folder / "model.sig").write_bytes(b"signed")
    for name in ("z.txt", "notes.md"):
        (folder / name).touch()
    stages = Stages()
    result = pull(str(folder), tmp_path / "out", stages)
    text = (folder / "llmkit.json").read_bytes()
    size = (folder / WEIGHTS).stat().st_size + 2 + 6
    assert (result.source, result.target) == (str(folder), str(tmp_path / "out"))
    assert (result.files, result.bytes, result.signed) == (4, size + len(text), True)
    assert result.manifest_sha256 == hashlib.sha256(text).hexdigest()
    assert (result.left_out, result.already_there) == (["notes.md", "z.txt"], False)
    assert (stages.seen, stages.ends) == ([["fetch", size, size]], 1)
    assert contents(tmp_path / "out").keys() == {"llmkit.json", "config.json", WEIGHTS, "model.sig"}

    stages = Stages()
    assert push(folder, str(tmp_path / "out"), stages).already_there
    assert (stages.seen, stages.ends) == ([["compare", size, size]], 1)


def test_pull_removes_what_the_source_no_longer_has(folder: Path, tmp_path: Path) -> None:
    """From its partial folder: files that an earlier attempt left."""
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "llmkit.json").write_bytes((folder / "llmkit.json").read_bytes())
    for number in range(20):
        (partial / f"stray-{number}").touch()
    (tmp_path / "out.partial.journal").write_text("of another command")
    pull(str(folder), tmp_path / "out", QUIET)
    assert contents(tmp_path / "out") == contents(folder)
    pull(str(folder), tmp_path / "deep" / "out", QUIET)

    other = tmp_path / "other.partial"
    other.mkdir()
    (tmp_path / "other.partial.journal").write_text("of `llmkit quantize`")
    pull(str(folder), tmp_path / "other", QUIET)
    assert not (tmp_path / "other.partial.journal").exists()
    assert contents(tmp_path / "other") == contents(folder)


@pytest.mark.parametrize(
    "damage", ["none", "signature", "other signature", "size", "absent", "content"]
)
def test_push_compares_what_is_there(damage: str, folder: Path, tmp_path: Path) -> None:
    (folder / "model.sig").write_bytes(b"signed")
    out = tmp_path / "out"
    push(folder, str(out), QUIET)
    path = out / ("config.json" if damage in ("size", "absent", "content") else "model.sig")
    if damage in ("signature", "absent"):
        path.unlink()
    elif damage != "none":
        path.write_bytes({"size": b"{ }", "content": b"[]"}.get(damage, b"forged"))
    assert push(folder, str(out), QUIET).already_there is (damage == "none")
    assert contents(out) == contents(folder)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model", "out"]


def test_push_with_force_keeps_the_newer_of_other_files(folder: Path, tmp_path: Path) -> None:
    """A file that is in both folders is not taken from the old one."""
    out = tmp_path / "out"
    old = tmp_path / "out.replaced"
    push(folder, str(out), QUIET)
    shutil.copytree(out, old)
    (old / "llmkit.json").unlink()  # killed while it removed the old checkpoint
    (old / "notes.md").write_text("old")
    (old / "mine.md").write_text("mine")
    (out / "notes.md").write_text("new")
    assert push(folder, str(out), QUIET).already_there
    assert contents(out) == contents(folder) | {"notes.md": b"new", "mine.md": b"mine"}
    assert not old.exists()


def test_push_with_force_removes_the_old_manifest_last(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the next push can tell what belongs to the old checkpoint."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    push(folder, str(out), QUIET)
    (out / "notes.md").write_text("mine")
    (folder / "config.json").write_text("[]")
    (folder / "llmkit.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            push(folder, str(out), QUIET, force=True)
    assert contents(tmp_path / "out.replaced").keys() == {"llmkit.json", "config.json"}
    assert push(folder, str(out), QUIET).already_there
    assert contents(out).keys() == {"llmkit.json", "config.json", WEIGHTS, "notes.md"}


@pytest.mark.parametrize("manifest", ["{", None])
def test_push_replaces_a_checkpoint_without_a_good_manifest(
    manifest: str | None, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "old.safetensors").touch()
    (out / "notes.md").write_text("mine")
    if manifest is not None:
        (out / "llmkit.json").write_text(manifest)
    with pytest.raises(OutputError, match=f"^{out} holds another checkpoint"):
        push(folder, str(out), QUIET)
    push(folder, str(out), QUIET, force=True)
    assert contents(out) == contents(folder) | {"notes.md": b"mine"}


def test_push_refuses_a_folder_that_differs_from_its_manifest(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"does not verify \(1 wrong, the first"):
        push(folder, str(tmp_path / "out"), QUIET)


@pytest.mark.parametrize("signed", [False, True])
def test_push_to_a_store_sends_the_manifest_and_the_signature(
    signed: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[Any, ...]] = []

    class Store:
        def publish(
            self, source: Path, files: Mapping[str, Any], manifest: bytes, force: bool, _: object
        ) -> Published:
            sent.append((source, dict(files), manifest, force))
            return Published("s3://b/there", already_there=force)

    monkeypatch.setattr(transfer, "open_writable_store", lambda url: nullcontext(Store()))
    files = json.loads((folder / "llmkit.json").read_text())["files"]
    if signed:
        (folder / "model.sig").write_bytes(b"signed")
        digest = hashlib.sha256(b"signed").hexdigest()
        files["model.sig"] = {"bytes": 6, "sha256": digest}
    for force in (False, True):
        result = push(folder, "s3://b/m", QUIET, force=force)
        assert (result.target, result.already_there) == ("s3://b/there", force)
        assert result.signed is signed
    text = (folder / "llmkit.json").read_bytes()
    assert sent == [(folder, files, text, False), (folder, files, text, True)]
    assert push(folder, "s3://b/m", QUIET).already_there is False  # not forced unless asked


def test_pull_of_the_hub_is_a_copy_of_its_download(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(transfer, "download_from_hub", lambda name: asked.append(name) or folder)
    pull("hf://org/name", tmp_path / "out", QUIET)
    assert asked == ["org/name"]
    assert contents(tmp_path / "out") == contents(folder)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(InputError, match=r"x.gguf is a file. A checkpoint's folder was expected"):
        pull(str(tmp_path / "x.gguf"), tmp_path / "none", QUIET)
