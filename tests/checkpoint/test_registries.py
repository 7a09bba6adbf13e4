"""Checkpoints from folder to folder, what is refused of them, and URLs.

Real servers: checkpoint/test_registries_servers.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.synthetic_checkpoint import synthetic_checkpoint

from llmkit.checkpoint.manifest import MANIFEST, verify_manifest
from llmkit.checkpoint.open_model_files import resolve_model
from llmkit.checkpoint.registry.local_copies import local_copy
from llmkit.checkpoint.registry.open_store import open_store
from llmkit.checkpoint.registry.store_interface import store_errors
from llmkit.checkpoint.registry.transfer import pull, push
from llmkit.cli import main
from llmkit.common.errors import InputError, LlmkitError, OutputError, ShortageError, UsageError
from llmkit.common.progress import SilentProgress

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


def test_push_adds_a_manifest_and_leaves_the_source_alone(whole: Path) -> None:
    plain = whole.parent / "plain"
    assert sorted(contents(plain)) == ["config.json", "model.safetensors"]
    assert contents(plain) == {
        name: data for name, data in contents(whole).items() if name != MANIFEST
    }
    assert verify_manifest(whole) == []
    assert set(json.loads((whole / MANIFEST).read_text())["tensors"]) >= {
        "lm_head.weight",
        "model.norm.weight",
    }


def test_pull_copies_every_byte_and_lists_what_it_left_out(
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
    assert contents(out) == {
        name: data for name, data in contents(copy).items() if name not in document["left_out"]
    }
    assert main.run(["pull", str(copy), "-o", str(out)]) == 5  # it is there
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "copy",
        "out",
    ]  # no lock, no partial folder


def test_push_of_identical_files_is_already_there_and_writes_nothing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    words = ["push", str(whole.parent / "plain"), str(target)]
    assert main.run(words) == 0
    assert "already there" not in capsys.readouterr().out
    (target / "notes.md").write_text("mine")
    before = {path.name: path.stat() for path in target.iterdir()}
    for force in ([], ["--force"]):
        assert main.run([*words, *force, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["already_there"] is True
    assert main.run(words) == 0
    assert ": already there, 3 files, " in capsys.readouterr().out
    after = {path.name: path.stat() for path in target.iterdir()}
    assert {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in after.items()} == {
        name: (stat.st_ino, stat.st_mtime_ns) for name, stat in before.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target"]


def test_push_with_force_replaces_another_checkpoint(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = synthetic_checkpoint(tmp_path / "plain")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"rope_theta": 77}))
    (plain / "tokenizer.json").write_text("{}")  # only the old checkpoint has one
    target = tmp_path / "target"
    push(plain, str(target), QUIET)
    (target / "notes.md").write_text("mine")
    old = contents(target)
    words = ["push", str(whole), str(target)]
    assert main.run(words) == 5
    assert "holds another checkpoint. Choose another place or pass --force." in (
        capsys.readouterr().err
    )
    assert contents(target) == old
    assert main.run([*words, "--force"]) == 0
    assert "already there" not in capsys.readouterr().out
    assert contents(target) == contents(whole) | {"notes.md": b"mine"}
    assert verify_manifest(target) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "target"]


def test_push_repairs_a_damaged_copy_of_the_same_checkpoint(whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    push(whole, str(target), QUIET)
    flip(target)
    (target / "model.sig").write_text("a signature that the source does not have")
    assert not push(whole, str(target), QUIET).already_there
    assert contents(target) == contents(whole)
    assert push(whole, str(target), QUIET).already_there


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_push_never_replaces_what_is_no_checkpoint(
    whole: Path, tmp_path: Path, force: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    file = tmp_path / "file"
    file.touch()
    for place in (target, file):
        assert main.run(["push", str(whole), str(place), *force]) == 5
        assert "is no checkpoint. An absent or empty folder, or with --force a checkpoint" in (
            capsys.readouterr().err
        )
    assert contents(target) == {"thesis.txt": b"years of work"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "target"]


@pytest.mark.parametrize("killed_at", ["first rename", "removal"])
def test_push_finishes_a_replacement_that_was_killed(
    whole: Path, tmp_path: Path, killed_at: str
) -> None:
    plain = synthetic_checkpoint(tmp_path / "plain")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"rope_theta": 77}))
    target = tmp_path / "target"
    push(plain, str(target), QUIET)
    (target / "notes.md").write_text("mine")
    target.rename(tmp_path / "target.replaced")
    if killed_at == "removal":
        shutil.copytree(whole, target)
    result = push(whole, str(target), QUIET, force=True)
    assert result.already_there == (killed_at == "removal")
    assert contents(target) == contents(whole) | {"notes.md": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "target"]


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def naming(name: str) -> Any:
    """Lets a manifest name another file."""
    return lambda folder: edit(folder, lambda files: files.update({name: files["config.json"]}))


DAMAGE: dict[str, tuple[Any, str]] = {
    "changed byte": (flip, "model.safetensors has SHA-256"),
    "truncated": (
        lambda folder: os.truncate(folder / "model.safetensors", 1000),
        "has 1000 bytes, llmkit.json says",
    ),
    "missing": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "model.safetensors is absent",
    ),
    "outside": (naming("../evil"), "names the file '../evil'"),
    "absolute": (naming("/etc/passwd"), "names the file"),
    "code": (naming("evil.py"), "no code and no pickle"),
    "pickle": (naming("model.bin"), "no code and no pickle"),
    "no config": (
        lambda folder: edit(folder, lambda f: f.pop("config.json")),
        "names no config.json",
    ),
    "itself": (naming(MANIFEST), "names the file llmkit.json"),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text("{"), "is not valid JSON"),
    "own digest": (
        lambda folder: (folder / MANIFEST).write_text(
            json.dumps(json.loads((folder / MANIFEST).read_text()) | {"sha256": "0" * 64})
        ),
        "says that its SHA-256 is 0000",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_pull_and_push_refuse_a_damaged_checkpoint(kind: str, copy: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(copy)
    with pytest.raises(InputError, match=message):
        pull(str(copy), tmp_path / "out", QUIET)
    with pytest.raises(InputError):
        push(copy, str(tmp_path / "out"), QUIET)
    assert not (tmp_path / "out").exists()


def test_pull_continues_an_interrupted_pull_of_the_same_checkpoint(
    whole: Path, tmp_path: Path
) -> None:
    class Stop(SilentProgress):
        def advance(self, n: int = 1, note: str = "") -> None:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    partial = tmp_path / "out.partial"
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


def test_pull_compares_what_an_interrupted_pull_left(whole: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    shutil.copy(whole / MANIFEST, partial)
    (partial / "model.safetensors").write_bytes(b"x" * 1000)
    with pytest.raises(InputError, match="has SHA-256"):
        pull(str(whole), tmp_path / "out", QUIET)
    pull(str(whole), tmp_path / "out", QUIET)  # the bad piece has gone
    assert contents(tmp_path / "out") == contents(whole)


def test_pull_leaves_nothing_when_its_check_fails(whole: Path, tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        assert contents(folder) == contents(whole)
        raise InputError("no")

    with pytest.raises(InputError):
        pull(str(whole), tmp_path / "out", QUIET, refuse)
    assert list(tmp_path.iterdir()) == []


def test_pull_and_push_refuse_what_is_no_folder(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.gguf").touch()
    assert main.run(["pull", str(tmp_path / "x.gguf"), "-o", str(tmp_path / "out")]) == 3
    assert main.run(["push", str(tmp_path / "none"), str(tmp_path / "out")]) == 3
    assert "is a file" in (reported := capsys.readouterr().err) and "does not exist" in reported
    assert push(whole, str(whole), QUIET).already_there
    with pytest.raises(OutputError, match="is the source or lies in it"):
        push(whole, str(whole / "inside"), QUIET)


@pytest.mark.parametrize(
    "reference",
    [
        "https://bucket.s3.amazonaws.com/model?X-Amz-Signature=secret",
        "s3://key:secret@bucket/model",
        "s3://bucket/../model",
        "s3://bucket/a//b",
        "s3://bucket/model?versionId=secret",
        "s3:///model",
        "gs://",
        "file:///etc",
        "models:/",
        "models:/a/../b",
        "hf://one",
        "hf://../x",
        "s3://Bucket#secret/x",
    ],
)
def test_open_store_refuses_malformed_urls(reference: str, whole: Path, tmp_path: Path) -> None:
    for action in (
        lambda: local_copy(reference),
        lambda: pull(reference, tmp_path / "out", QUIET),
        lambda: push(whole, reference, QUIET),
        lambda: resolve_model(reference),
    ):
        with pytest.raises(UsageError, match="is not the address of a checkpoint") as caught:
            action()
        assert "secret" not in str(caught.value)


def test_store_errors_are_translated_without_passwords() -> None:
    def failing(error: Exception) -> LlmkitError:
        with pytest.raises(LlmkitError) as caught, store_errors("s3://bucket/model"):
            raise error
        return caught.value

    refused = failing(RuntimeError("cannot reach https://me:secret@server/x"))
    assert isinstance(refused, ShortageError)
    assert (
        "https://server/x" in str(refused)
        and "secret" not in str(refused)
        and "AWS_PROFILE" in str(refused)
    )
    assert isinstance(failing(PermissionError("Forbidden")), ShortageError)
    assert isinstance(failing(FileNotFoundError("bucket")), InputError)
    with (
        pytest.raises(OSError, match="No space"),
        store_errors("s3://bucket/model"),
    ):  # of a file here
        raise OSError(28, "No space left", "/out")


@pytest.mark.parametrize(
    ("package", "reference", "extra"),
    [("s3fs", "s3://b/m", "s3"), ("gcsfs", "gs://b/m", "gs"), ("mlflow", "models:/m/1", "mlflow")],
)
def test_open_store_names_a_missing_library(
    package: str, reference: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    for module in (package, f"{package}.artifacts", f"{package}.core"):
        monkeypatch.setitem(sys.modules, module, None)
    for scheme in fsspec.available_protocols():  # an earlier test may have had it
        monkeypatch.delitem(
            sys.modules["fsspec.registry"].__dict__["_registry"], scheme, raising=False
        )
    with (
        pytest.raises(ShortageError, match=rf"pip install 'llmkit\[{extra}\]'"),
        open_store(reference),
    ):
        pass


def test_verify_command_reports_problems(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["verify", str(copy), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified == {"ok": True, "signature": "not checked", "problems": [], "updated": []}
    flip(copy)
    assert main.run(["verify", str(copy)]) == 3
    assert "2 wrong, the first: model.safetensors: tensor" in capsys.readouterr().err
