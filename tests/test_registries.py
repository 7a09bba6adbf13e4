"""Checkpoints from folder to folder, what is refused of them, and URLs. Real servers: test_registries_servers.py."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from synthetic import synthetic_checkpoint

from llmkit.checkpoint.errors import InputError, LlmkitError, OutputError, ShortageError, UsageError
from llmkit.checkpoint.files import locate
from llmkit.checkpoint.manifest import MANIFEST, verify_manifest
from llmkit.checkpoint.progress import SilentProgress
from llmkit.checkpoint.remote import cached, open_store, told
from llmkit.checkpoint.transfer import pull, push
from llmkit.cli import main

QUIET = SilentProgress()
Names = dict[str, bytes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a manifest, made by pushing one without."""
    root = tmp_path_factory.mktemp("registry")
    push(synthetic_checkpoint(root / "plain"), str(root / "whole"), QUIET)
    return root / "whole"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def contents(folder: Path) -> Names:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(folder: Path, change: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest["files"])
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_one_without_a_manifest_gets_one_and_is_not_touched(whole: Path) -> None:
    plain = whole.parent / "plain"
    assert sorted(contents(plain)) == ["config.json", "model.safetensors"]
    assert contents(plain) == {name: data for name, data in contents(whole).items() if name != MANIFEST}
    assert verify_manifest(whole) == []
    assert set(json.loads((whole / MANIFEST).read_text())["tensors"]) >= {"lm_head.weight", "model.norm.weight"}


def test_a_pull_is_the_same_to_the_byte_and_tells_what_it_left(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "modeling_evil.py").write_text("raise SystemExit")
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    out = tmp_path / "out"
    assert main.run(["pull", str(copy), "-o", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["left_out"] == ["modeling_evil.py", "pytorch_model.bin"]
    assert document["manifest_sha256"] == hashlib.sha256((copy / MANIFEST).read_bytes()).hexdigest()
    assert (document["files"], document["signature"]) == (3, "none")
    assert contents(out) == {name: data for name, data in contents(copy).items() if name not in document["left_out"]}
    assert main.run(["pull", str(copy), "-o", str(out)]) == 5  # it is there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "out"]  # no lock, no partial folder


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def naming(name: str) -> Any:
    """Lets a manifest name another file."""
    return lambda folder: edit(folder, lambda files: files.update({name: files["config.json"]}))


DAMAGE: dict[str, tuple[Any, str]] = {
    "changed byte": (flip, "model.safetensors has SHA-256"),
    "truncated": (lambda folder: os.truncate(folder / "model.safetensors", 1000), "has 1000 bytes, llmkit.json says"),
    "missing": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is absent"),
    "outside": (naming("../evil"), "names the file '../evil'"),
    "absolute": (naming("/etc/passwd"), "names the file"),
    "code": (naming("evil.py"), "no code and no pickle"),
    "pickle": (naming("model.bin"), "no code and no pickle"),
    "no config": (lambda folder: edit(folder, lambda f: f.pop("config.json")), "names no config.json"),
    "itself": (naming(MANIFEST), "names the file llmkit.json"),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text("{"), "is not valid JSON"),
    "own digest": (
        lambda folder: (folder / MANIFEST).write_text(
            json.dumps(json.loads((folder / MANIFEST).read_text()) | {"sha256": "0" * 64})
        ),
        "says that its SHA-256 is 0000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_neither_pulled_nor_pushed(kind: str, copy: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(copy)
    with pytest.raises(InputError, match=message):
        pull(str(copy), tmp_path / "out", QUIET)
    with pytest.raises(InputError):
        push(copy, str(tmp_path / "out"), QUIET)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_pull_is_continued_and_anothers_is_begun_anew(whole: Path, tmp_path: Path) -> None:
    class Stop(SilentProgress):
        def advance(self, n: int = 1, note: str = "") -> None:
            raise KeyboardInterrupt

    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(KeyboardInterrupt):
        pull(str(whole), out, Stop())
    weights = (whole / "model.safetensors").read_bytes()
    (partial / "model.safetensors").write_bytes(weights[:1001])
    fetched = list[int]()

    class Count(SilentProgress):
        def advance(self, n: int = 1, note: str = "") -> None:
            fetched.append(n)

    pull(str(whole), out, Count())
    assert 1001 in fetched  # hashed where it lay, not fetched
    assert contents(out) == contents(whole)
    assert not partial.exists()
    other = tmp_path / "other.partial"
    other.mkdir()
    (other / MANIFEST).write_text("{}")
    (other / "model.safetensors").write_bytes(b"of another checkpoint")
    pull(str(whole), tmp_path / "other", QUIET)
    assert contents(tmp_path / "other") == contents(whole)


def test_what_lay_there_of_an_interrupted_pull_is_compared_too(whole: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    shutil.copy(whole / MANIFEST, partial)
    (partial / "model.safetensors").write_bytes(b"x" * 1000)
    with pytest.raises(InputError, match="has SHA-256"):
        pull(str(whole), tmp_path / "out", QUIET)
    pull(str(whole), tmp_path / "out", QUIET)  # the bad piece has gone
    assert contents(tmp_path / "out") == contents(whole)


def test_a_check_that_fails_leaves_nothing(whole: Path, tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        assert contents(folder) == contents(whole)
        raise InputError("no")

    with pytest.raises(InputError):
        pull(str(whole), tmp_path / "out", QUIET, refuse)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_folder(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.gguf").touch()
    assert main.run(["pull", str(tmp_path / "x.gguf"), "-o", str(tmp_path / "out")]) == 3
    assert main.run(["push", str(tmp_path / "none"), str(tmp_path / "out")]) == 3
    assert "is a file" in (told := capsys.readouterr().err) and "does not exist" in told
    with pytest.raises(OutputError):
        push(whole, str(whole), QUIET)


@pytest.mark.parametrize(
    "reference",
    [
        "https://bucket.s3.amazonaws.com/model?X-Amz-Signature=secret", "s3://key:secret@bucket/model",
        "s3://bucket/../model", "s3://bucket/a//b", "s3://bucket/model?versionId=secret", "s3:///model", "gs://", "file:///etc",
        "models:/", "models:/a/../b", "hf://one", "hf://../x", "s3://Bucket#secret/x",
    ],
)  # fmt: skip
def test_urls_that_are_not_taken(reference: str, whole: Path, tmp_path: Path) -> None:
    for action in (
        lambda: cached(reference),
        lambda: pull(reference, tmp_path / "out", QUIET),
        lambda: push(whole, reference, QUIET),
        lambda: locate(reference),
    ):
        with pytest.raises(UsageError, match="is no address of a checkpoint") as caught:
            action()
        assert "secret" not in str(caught.value)


def test_errors_of_stores_are_ours_without_passwords() -> None:
    def failing(error: Exception) -> LlmkitError:
        with pytest.raises(LlmkitError) as caught, told("s3://bucket/model"):
            raise error
        return caught.value

    refused = failing(RuntimeError("cannot reach https://me:secret@server/x"))
    assert isinstance(refused, ShortageError)
    assert "https://server/x" in str(refused) and "secret" not in str(refused) and "AWS_PROFILE" in str(refused)
    assert isinstance(failing(PermissionError("Forbidden")), ShortageError)
    assert isinstance(failing(FileNotFoundError("bucket")), InputError)
    with pytest.raises(OSError, match="No space"), told("s3://bucket/model"):  # of a file here
        raise OSError(28, "No space left", "/out")


@pytest.mark.parametrize(
    ("package", "reference", "extra"),
    [("s3fs", "s3://b/m", "s3"), ("gcsfs", "gs://b/m", "gs"), ("mlflow", "models:/m/1", "mlflow")],
)
def test_a_library_that_is_absent_is_named(
    package: str, reference: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    for module in (package, f"{package}.artifacts", f"{package}.core"):
        monkeypatch.setitem(sys.modules, module, None)
    for scheme in fsspec.available_protocols():  # an earlier test may have had it
        monkeypatch.delitem(sys.modules["fsspec.registry"].__dict__["_registry"], scheme, raising=False)
    with pytest.raises(ShortageError, match=rf"pip install 'llmkit\[{extra}\]'"), open_store(reference):
        pass


def test_verify_on_the_command_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["verify", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "signature": "not checked"}
    flip(copy)
    assert main.run(["verify", str(copy)]) == 3
    assert "2 wrong, the first: model.safetensors: tensor" in capsys.readouterr().err
