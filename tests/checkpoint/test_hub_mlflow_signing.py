"""Stores and signatures without their servers and libraries: what is sent, compared and refused.

The real ones: checkpoint/test_registries_servers.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.hf_api import RepoFile, RepoFolder

from llmkit.checkpoint import hub
from llmkit.checkpoint.manifest import make_manifest, manifest_text
from llmkit.checkpoint.output_directory import output_lock
from llmkit.checkpoint.registry import local_copies, signing
from llmkit.checkpoint.registry.hub_upload import HubStore
from llmkit.checkpoint.registry.mlflow_store import MlflowStore, open_mlflow_store
from llmkit.checkpoint.registry.open_store import open_store, open_writable_store
from llmkit.checkpoint.registry.store_interface import Published
from llmkit.common.errors import InputError, OutputError, ShortageError, UsageError
from llmkit.common.progress import SilentProgress
from llmkit.common.version import version

CONTENTS = {"config.json": b'{"a": 1}', "model.safetensors": b"weights"}
LLMKIT_JSON = "llmkit.json"


def entries(contents: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }


MANIFEST = json.dumps({"files": entries(CONTENTS)}).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in CONTENTS.items():
        (folder / name).write_bytes(data)
    return folder


class Stages(SilentProgress):
    """Notes each stage, with its total and what was done."""

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []

    def start(self, stage: str, total: int, unit: str) -> None:
        self.seen.append([stage, total, unit, 0])

    def advance(self, n: int = 1, note: str = "") -> None:
        self.seen[-1][3] += n


class FakeHub:
    """The calls of huggingface_hub's HfApi that an upload makes, on one repository."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        self.files = files
        self.commits = 0
        self.damages = ""  # this file, when it is sent
        self._folder = folder

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        assert (repository, private, exist_ok) == ("organization/model", True, True)

    def list_repo_files(self, repository: str) -> list[str]:
        return list(self.files)

    def hf_hub_download(self, repository: str, name: str) -> str:
        path = self._folder / f"downloaded-{name}"
        path.write_bytes(self.files[name])
        return str(path)

    def get_paths_info(
        self, repository: str, names: list[str], revision: str | None
    ) -> list[RepoFile | RepoFolder]:
        assert revision in (None, f"commit {self.commits}")
        # A repository may have a folder of that name.
        found: list[RepoFile | RepoFolder] = [
            RepoFolder(path=name, oid="0") for name in names if name not in self.files
        ]
        for name in names:
            if name not in self.files:
                continue
            data = self.files[name]
            info = {"path": name, "size": len(data), "oid": "a pointer's"}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(data).hexdigest()
                info["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
            else:
                info["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            found.append(RepoFile(**info))
        return found

    def create_commit(
        self, repository: str, operations: list[Any], commit_message: str
    ) -> SimpleNamespace:
        for operation in operations:
            name = operation.path_in_repo
            if type(operation).__name__ == "CommitOperationDelete":
                del self.files[name]
                continue
            data = operation.path_or_fileobj
            data = data if isinstance(data, bytes) else Path(data).read_bytes()
            if name == self.damages:
                data = data[:-1] + b"?"
            elif name == self.damages.removesuffix("+"):
                data += b"?"
            self.files[name] = data
        self.commits += 1
        return SimpleNamespace(oid=f"commit {self.commits}")


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path, {"README.md": b"of the repository"})
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    return fake


def push_to_hub(folder: Path, force: bool = False) -> tuple[Published, list[list[Any]]]:
    stages = Stages()
    with open_writable_store("hf://organization/model") as store:
        assert isinstance(store, HubStore)
        result = store.publish(folder, entries(CONTENTS), MANIFEST, force, stages)
    return result, stages.seen


ON_HUB = CONTENTS | {LLMKIT_JSON: MANIFEST, "README.md": b"of the repository"}


def test_hub_push_is_one_commit_and_is_not_repeated(fake_hub: FakeHub, folder: Path) -> None:
    result, stages = push_to_hub(folder)
    assert result == Published("hf://organization/model")
    assert stages == [["send", 3, "files", 3]]
    assert fake_hub.files == ON_HUB
    assert push_to_hub(folder) == (Published("hf://organization/model", already_there=True), [])
    assert fake_hub.commits == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damaged", [b"", b"absent", b"WEIGHTS", b'{"a": 2}'])
def test_hub_push_repairs_the_same_checkpoint(
    name: str, damaged: bytes, fake_hub: FakeHub, folder: Path
) -> None:
    fake_hub.files.update(ON_HUB)
    fake_hub.files[name] = damaged
    if damaged == b"absent":
        del fake_hub.files[name]
    result, _ = push_to_hub(folder)
    assert (result.already_there, fake_hub.commits) == (False, 1)
    assert fake_hub.files == ON_HUB


def test_hub_push_over_another_checkpoint_needs_force(fake_hub: FakeHub, folder: Path) -> None:
    """Files of the old one alone are deleted."""
    old = {"files": {"old.json": {}, "config.json": {}, "gone.json": {}}}
    fake_hub.files |= {LLMKIT_JSON: json.dumps(old).encode(), "old.json": b"1", "config.json": b""}
    with pytest.raises(OutputError, match=r"^hf://organization/model holds another checkpoint"):
        push_to_hub(folder)
    assert fake_hub.commits == 0
    push_to_hub(folder, force=True)
    assert fake_hub.files == ON_HUB


@pytest.mark.parametrize("name", [*CONTENTS, LLMKIT_JSON])
@pytest.mark.parametrize("longer", ["", "+"])
def test_hub_push_finds_what_was_stored_wrong(
    name: str, longer: str, fake_hub: FakeHub, folder: Path
) -> None:
    fake_hub.damages = name + longer
    with pytest.raises(ShortageError, match=f"^hf://organization/model/{name} is not what was"):
        push_to_hub(folder)


class MlflowError(Exception):
    """As mlflow.exceptions.MlflowException."""

    error_code = "RESOURCE_ALREADY_EXISTS"


class FakeMlflow:
    """A tracking server, with the calls of MlflowClient and of mlflow.artifacts."""

    def __init__(self) -> None:
        self.artifacts: dict[str, bytes] = {}  # by URL
        self.experiments: dict[str, str] = {}
        self.models: dict[str, list[tuple[str, str]]] = {}  # the source and run of each version
        self.aliases: dict[tuple[str, str], int] = {}
        self.runs: dict[str, str] = {}  # the status
        self.damages = ""
        self.names: list[tuple[str, dict[str, str]]] = []
        self.create_error = "RESOURCE_ALREADY_EXISTS"

    def list_artifacts(self, url: str) -> list[SimpleNamespace]:
        files = [
            SimpleNamespace(path="checkpoint/" + name[len(url) + 1 :], file_size=size, is_dir=False)
            for name, size in ((n, len(d) or None) for n, d in self.artifacts.items())
            if name.startswith(url + "/")
        ]
        return [SimpleNamespace(path="checkpoint/sub", file_size=None, is_dir=True), *files]

    def download_artifacts(self, url: str, dst_path: str) -> str:
        path = Path(dst_path) / url.rpartition("/")[2]
        path.write_bytes(self.artifacts[url])
        return str(path)

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        known = self.experiments.get(name)
        return None if known is None else SimpleNamespace(experiment_id=known)

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = f"of {name}"
        return self.experiments[name]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> SimpleNamespace:
        self.names.append((run_name, tags))
        run = f"run{len(self.runs)} {experiment}"
        self.runs[run] = "RUNNING"
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def log_artifact(self, run: str, path: str, folder: str) -> None:
        data = Path(path).read_bytes()
        name = Path(path).name
        if name == self.damages:
            data = data[:-1] + b"?"
        self.artifacts[f"runs:/{run}/{folder}/{name}"] = data

    def set_terminated(self, run: str, status: str) -> None:
        sys.stdout.write("View the run")
        self.runs[run] = status

    def create_registered_model(self, name: str) -> None:
        if name in self.models:
            error = MlflowError("the model exists")
            error.error_code = self.create_error
            raise error
        self.models[name] = []

    def create_model_version(self, name: str, source: str, run: str) -> SimpleNamespace:
        self.models[name].append((source, run))
        return SimpleNamespace(version=len(self.models[name]))

    def set_registered_model_alias(self, name: str, alias: str, number: int) -> None:
        self.aliases[name, alias] = number


@pytest.fixture
def fake_mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    modules = {name: ModuleType(name) for name in ("mlflow", "mlflow.artifacts")}
    modules["mlflow.exceptions"] = ModuleType("mlflow.exceptions")
    vars(modules["mlflow.exceptions"])["MlflowException"] = MlflowError
    vars(modules["mlflow"]).update(MlflowClient=lambda: fake, artifacts=fake)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    return fake


def push_to_mlflow(folder: Path, url: str) -> tuple[Published, list[list[Any]]]:
    stages = Stages()
    with open_store(url) as store:
        result = store.publish(folder, entries(CONTENTS), MANIFEST, False, stages)
    return result, stages.seen


def test_mlflow_push_makes_a_version_of_a_run(
    fake_mlflow: FakeMlflow,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result, stages = push_to_mlflow(folder, "models:/tiny")
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert result == Published("models:/tiny/1")
    assert stages == [["send", 15, "bytes", 15], ["compare", 15, "bytes", 15]]
    source = "runs:/run0 of llmkit/checkpoint"
    stored = CONTENTS | {LLMKIT_JSON: MANIFEST}
    assert fake_mlflow.artifacts == {f"{source}/{name}": data for name, data in stored.items()}
    assert fake_mlflow.names == [("push tiny", {"llmkit.version": version()})]
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert push_to_mlflow(folder, "models:/tiny@best")[0] == Published("models:/tiny/2")
    push_to_mlflow(folder, "models:/tiny")
    assert fake_mlflow.experiments == {"llmkit": "of llmkit", "mine": "of mine"}
    assert fake_mlflow.models == {
        "tiny": [
            (source, "run0 of llmkit"),
            ("runs:/run1 of mine/checkpoint", "run1 of mine"),
            ("runs:/run2 of mine/checkpoint", "run2 of mine"),
        ]
    }
    assert fake_mlflow.aliases == {("tiny", "best"): 2}
    assert set(fake_mlflow.runs.values()) == {"FINISHED"}
    assert capsys.readouterr().out == ""  # the client's lines go to stderr


@pytest.mark.parametrize("name", [*CONTENTS, LLMKIT_JSON])
def test_mlflow_push_of_a_damaged_file_makes_no_version(
    name: str, fake_mlflow: FakeMlflow, folder: Path
) -> None:
    fake_mlflow.damages = name
    with pytest.raises(ShortageError, match=f"^models:/tiny/{name} is not what was sent"):
        push_to_mlflow(folder, "models:/tiny")
    assert (fake_mlflow.models, list(fake_mlflow.runs.values())) == ({}, ["FAILED"])


def test_mlflow_push_raises_other_errors_of_the_registry(
    fake_mlflow: FakeMlflow, folder: Path
) -> None:
    push_to_mlflow(folder, "models:/tiny")
    fake_mlflow.create_error = "PERMISSION_DENIED"
    with pytest.raises(MlflowError):
        push_to_mlflow(folder, "models:/tiny")
    assert len(fake_mlflow.models["tiny"]) == 1


@pytest.mark.parametrize("url", ["models:/tiny/3", "runs:/abc", "runs:/abc/checkpoint"])
def test_mlflow_push_needs_the_name_of_a_model(
    url: str, fake_mlflow: FakeMlflow, folder: Path
) -> None:
    with pytest.raises(UsageError, match=rf"^{url} cannot hold a checkpoint. models:/NAME or"):
        push_to_mlflow(folder, url)
    assert fake_mlflow.runs == {}


@pytest.mark.parametrize("length", [0, 3, 9, 10, 11])
def test_mlflow_download_replaces_an_incomplete_file(
    length: int, fake_mlflow: FakeMlflow, tmp_path: Path
) -> None:
    data = bytes(range(10))
    url = "models:/tiny/1"
    fake_mlflow.artifacts = {f"{url}/x": data, f"{url}/empty": b""}
    (tmp_path / "x").write_bytes(bytes(length) if length < 10 else (data + b"!")[:length])
    if length == 10:
        fake_mlflow.artifacts[f"{url}/x"] = b"not asked for"
    steps: list[int] = []
    with open_mlflow_store(url) as store:
        assert isinstance(store, MlflowStore)
        assert store.download("x", 10, tmp_path / "x", steps.append) == (
            hashlib.sha256(data).hexdigest()
        )
        assert store.sizes() == {"x": len(fake_mlflow.artifacts[f"{url}/x"]), "empty": 0}
        assert store.read_small_file("empty", 0) == b""
    assert (steps, (tmp_path / "x").read_bytes()) == ([10], data)


class FakeSigning:
    """The library model_signing: a signature lists the digests of the files it covers."""

    def __init__(self) -> None:
        self.passwords: list[bytes | None] = []
        self.ignored: list[str] = []

    def Config(self) -> FakeSigning:  # noqa: N802
        return self

    def use_elliptic_key_signer(self, private_key: Path, password: bytes | None) -> None:
        self.key = private_key.read_text()
        self.passwords.append(password)

    def use_elliptic_key_verifier(self, public_key: Path) -> None:
        self.key = public_key.read_text()

    def set_ignored_paths(self, paths: list[str]) -> FakeSigning:
        self.ignored = paths
        return self

    def set_hashing_config(self, config: FakeSigning) -> FakeSigning:
        return self

    def sign(self, folder: Path, path: Path) -> None:
        path.write_text(self._covered(folder))

    def verify(self, folder: Path, path: Path) -> None:
        if path.read_text() != self._covered(folder):
            raise ValueError("the digests\ndiffer")

    def _covered(self, folder: Path) -> str:
        files = sorted(path for path in folder.iterdir() if path.name not in self.ignored)
        return self.key + "".join(f"{file.name} {file.read_bytes()!r}" for file in files)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeSigning:
    fake = FakeSigning()
    module = ModuleType("model_signing")
    vars(module).update(signing=fake, verifying=fake, hashing=fake)
    monkeypatch.setitem(sys.modules, "model_signing", module)
    monkeypatch.delenv("LLMKIT_KEY_PASSWORD", raising=False)
    return fake


@pytest.fixture
def checkpoint_folder(tmp_path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / LLMKIT_JSON).write_bytes(manifest_text(make_manifest(folder)))
    return folder


def test_signature_covers_the_manifest_and_its_files_only(
    library: FakeSigning,
    checkpoint_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = tmp_path / "key"
    key.write_text("secret")
    with pytest.raises(InputError, match=r"has no model.sig. A signed checkpoint was expected"):
        signing.verify(checkpoint_folder, key)
    (checkpoint_folder / "notes.md").write_text("not signed")
    assert signing.sign(checkpoint_folder, key) == checkpoint_folder / "model.sig"
    for password in ("", "hidden"):
        monkeypatch.setenv("LLMKIT_KEY_PASSWORD", password)
        signing.sign(checkpoint_folder, key)  # again: the old signature is not signed
    assert library.passwords == [None, None, b"hidden"]
    (checkpoint_folder / "notes.md").write_text("changed")
    signing.verify(checkpoint_folder, key)
    for name in ("config.json", LLMKIT_JSON):
        before = (checkpoint_folder / name).read_bytes()
        (checkpoint_folder / name).write_bytes(before + b" ")
        with pytest.raises(InputError, match=r"signed \(the digests differ\)") as caught:
            signing.verify(checkpoint_folder, key)
        assert f"{checkpoint_folder} is not what the owner of {key}" in str(caught.value)
        (checkpoint_folder / name).write_bytes(before)


def test_signature_needs_a_key_and_an_unchanged_checkpoint(
    library: FakeSigning, checkpoint_folder: Path, tmp_path: Path
) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(InputError, match=rf"{absent} is not a readable private key.*PASSWORD"):
        signing.sign(checkpoint_folder, absent)
    with pytest.raises(InputError, match=rf"{absent} is not a readable public key") as caught:
        signing.verify(checkpoint_folder, absent)
    assert "PASSWORD" not in str(caught.value)
    (checkpoint_folder / "config.json").write_text("{ }")
    with pytest.raises(InputError, match="does not verify"):
        signing.sign(checkpoint_folder, absent)
    assert not (checkpoint_folder / "model.sig").exists()


def test_signature_without_the_library_names_the_extra(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ShortageError, match=r"pip install 'llmkit\[signing\]'"):
        signing.sign(checkpoint_folder, tmp_path)


def test_local_copy_of_a_url_is_made_once(
    fake_mlflow: FakeMlflow,
    checkpoint_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_copies, "_copies", {})
    url = "models:/tiny/1"
    files = {path.name: path.read_bytes() for path in checkpoint_folder.iterdir()}
    fake_mlflow.artifacts = {f"{url}/{name}": data for name, data in files.items()}
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    digest = hashlib.sha256(files[LLMKIT_JSON]).hexdigest()
    out = local_copies.local_copy(url)
    assert out == tmp_path / "home" / ".cache" / "llmkit" / "checkpoints" / digest
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    fake_mlflow.artifacts.clear()
    assert local_copies.local_copy(url) == out  # nothing is asked for in this process

    local_copies._copies.clear()
    fake_mlflow.artifacts = {f"{url}/{name}": bytes(len(data)) for name, data in files.items()}
    fake_mlflow.artifacts[f"{url}/{LLMKIT_JSON}"] = files[LLMKIT_JSON]
    assert local_copies.local_copy(url) == out  # in another, the manifest only
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert local_copies.copies_folder() == tmp_path / "cache" / "llmkit" / "checkpoints"

    monkeypatch.setattr(local_copies, "download_from_hub", lambda hub_id: tmp_path / hub_id)
    assert local_copies.local_copy("hf://a/b") == tmp_path / "a" / "b"


def test_local_copy_waits_for_another_process_that_makes_it(
    fake_mlflow: FakeMlflow,
    checkpoint_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_copies, "_copies", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = "models:/tiny/1"
    files = {path.name: path.read_bytes() for path in checkpoint_folder.iterdir()}
    fake_mlflow.artifacts = {f"{url}/{name}": data for name, data in files.items()}
    out = local_copies.copies_folder() / hashlib.sha256(files[LLMKIT_JSON]).hexdigest()
    made: list[Path] = []
    thread = threading.Thread(target=lambda: made.append(local_copies.local_copy(url)))
    with output_lock(out):
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        shutil.copytree(checkpoint_folder, out)
        (out / "mark").touch()
    thread.join(10)
    assert made == [out]
    assert (out / "mark").exists()  # it was not made again


@pytest.mark.parametrize(
    ("text", "is_id", "is_url", "is_hub_url"),
    [
        ("a/b", True, False, False),
        ("A1._-x/b.c-9_", True, False, False),
        ("a/b/c", False, False, False),
        ("/a", False, False, False),
        (".a/b", False, False, False),
        ("a/..", False, False, False),
        ("hf://a/b", False, True, True),
        ("hf://a", False, True, False),
        ("s3://a/b", False, True, False),
        ("models:/a", False, True, False),
        ("1:/a", False, False, False),
        ("C:a", False, False, False),
    ],
)
def test_hub_references_are_told_apart(
    text: str, is_id: bool, is_url: bool, is_hub_url: bool
) -> None:
    found = (hub.is_hub_id(text), hub.is_url(text), hub.is_hub_url(text))
    assert found == (is_id, is_url, is_hub_url)


@pytest.mark.parametrize(("text", "shown"), [("no\nroute", "no route"), ("", "OSError")])
def test_hub_download_error_shows_its_reason(
    text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(text)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=rf"could not be fetched from the hub \({shown}\)"):
        hub.download_from_hub("a/b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="not in the hub's cache, and HF_HUB_OFFLINE forbids"):
        hub.download_from_hub("a/b")
