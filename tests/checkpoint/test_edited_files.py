"""Edited text files of a checkpoint: a warning, `llmkit verify` and `llmkit verify --update`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from support.synthetic_checkpoint import synthetic_checkpoint
from support.tiny_models import write_tokenizer

from llmkit.checkpoint.manifest import make_manifest, manifest_text
from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.cli import main
from llmkit.shard.shard_checkpoint import shard

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a checkpoint with a manifest, and of its two ranks."""
    folder = tmp_path_factory.mktemp("written")
    model = synthetic_checkpoint(folder / "model", QuantizationConfig("gptq", Scheme(4, 16)))
    write_tokenizer(model, vocab=300)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (model / "generation_config.json").write_text("{}")
    (model / "LICENSE").write_text("free")
    (model / "llmkit.json").write_bytes(manifest_text(make_manifest(model)))
    shard(model, folder / "ranks", 2)
    return folder


@pytest.fixture(params=["model", "ranks"])
def folder(request: pytest.FixtureRequest, written: Path, tmp_path: Path) -> Path:
    """A copy of one of them."""
    return Path(shutil.copytree(written / request.param, tmp_path / request.param))


class Ran:
    """What a command printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], code: int, *words: object) -> None:
        capsys.readouterr()
        assert main.run([str(word) for word in words]) == code
        self.stdout, self.stderr = capsys.readouterr()

    @property
    def document(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.stdout)
        return parsed


def edit(folder: Path) -> None:
    """Change one text file, remove one and add one."""
    (folder / "chat_template.jinja").write_text(TEMPLATE + "!")
    (folder / "LICENSE").unlink()
    (folder / "chat_template.json").write_text("{}")


def test_verify_names_edited_files_and_update_accepts_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verified = Ran(capsys, 0, "verify", folder, "--json").document
    assert (verified["ok"], verified["problems"]) == (True, [])
    edit(folder)
    names = ["LICENSE", "chat_template.jinja", "chat_template.json"]
    refused = Ran(capsys, 3, "verify", folder, "--json")
    document = refused.document
    assert (document["ok"], document["edited"]) == (False, names)
    digest = sha256((folder / "chat_template.jinja").read_bytes()).hexdigest()
    assert any(f"chat_template.jinja has SHA-256 {digest}" in line for line in document["problems"])
    assert f"{folder} does not verify (3 wrong, the first: " in refused.stderr
    assert f"`llmkit verify {folder} --update` accepts such edits." in refused.stderr

    updated = Ran(capsys, 0, "verify", folder, "--update", "--json").document
    assert (updated["ok"], updated["updated"]) == (True, names)
    entries = json.loads((folder / "llmkit.json").read_text())["files"]
    assert entries["chat_template.jinja"] == {"bytes": len(TEMPLATE) + 1, "sha256": digest}
    assert "LICENSE" not in entries
    assert Ran(capsys, 0, "verify", folder, "--json").document["ok"]
    if folder.name == "ranks":
        assert Ran(capsys, 0, "shard", "verify", folder, "--json").document["ok"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_verify_update_refuses_a_template_that_does_not_compile(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = folder / "chat_template.jinja"
    template.write_text("{% for message in messages %}\n{{ message.content }\n{% endfor %}")
    manifest = (folder / "llmkit.json").read_bytes()
    refused = Ran(capsys, 3, "verify", folder, "--update")
    reason = "does not compile (line 2: unexpected '}')"
    assert f"the chat template of {folder} {reason}" in refused.stderr
    assert (folder / "llmkit.json").read_bytes() == manifest
    template.write_text(TEMPLATE + "?")
    assert "updated: chat_template.jinja" in Ran(capsys, 0, "verify", folder, "--update").stdout


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "weights"])
def test_verify_update_refuses_other_files(
    folder: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder)
    path = folder / file
    if file == "weights":
        path = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    manifest = (folder / "llmkit.json").read_bytes()
    refused = Ran(capsys, 3, "verify", folder, "--update")
    assert path.name in refused.stderr
    assert "Write or copy the checkpoint again." in refused.stderr
    assert (folder / "llmkit.json").read_bytes() == manifest


@pytest.mark.parametrize("folder", ["model"], indirect=True)
def test_edited_text_files_only_warn_when_a_model_is_opened(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder)
    program = [sys.executable, "-m", "llmkit.cli.main", "inspect", str(folder)]
    opened = subprocess.run(program, capture_output=True, text=True, timeout=240, check=True)
    (line,) = opened.stderr.splitlines()
    assert line.startswith(f"llmkit: warning: {folder} was edited after llmkit wrote it (LICENSE, ")
    assert line.endswith(f"`llmkit verify {folder} --update` accepts the edit.")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert "config.json has SHA-256" in Ran(capsys, 3, "inspect", folder).stderr


def test_push_refuses_an_edit_until_it_is_accepted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder)
    refused = Ran(capsys, 3, "push", folder, tmp_path / "pushed")
    assert f"`llmkit verify {folder} --update` accepts such edits." in refused.stderr
    assert not (tmp_path / "pushed").exists()
