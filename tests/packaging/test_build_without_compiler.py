"""A wheel that is built on a machine without a C compiler: it lacks the CPU kernels, and serves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from support.server_process import serving
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
STATUS = """
import json
from llmkit.kernels.cpu import cpu_kernels
print(json.dumps([cpu_kernels.__file__, cpu_kernels.status(), cpu_kernels.levels()]))
"""
PROMPT = list(range(3, 40))
NUM_TOKENS = 12


def run(command: list[str | Path], environment: dict[str, str], folder: Path) -> str:
    result = subprocess.run(
        command,
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def copy_sources(folder: Path) -> None:
    """The files that a wheel is built from, without what an earlier build has compiled."""
    tops = {path.split("/")[0] for path in PROJECT["tool"]["setuptools"]["package-dir"].values()}
    for top in tops:
        shutil.copytree(
            ROOT / top, folder / top, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked wheel, built with a PATH that has no programs."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    programs = folder / "programs"
    sources.mkdir()
    programs.mkdir()
    copy_sources(sources)
    named = ("CC", "CXX", "LDSHARED", "PATH")
    environment = {name: value for name, value in os.environ.items() if name not in named}
    # Without a PATH, Python would look in the system's folders.
    environment["PATH"] = str(programs)
    output = run([sys.executable, "-c", BUILD, folder], environment, sources)
    assert 'building extension "llmkit.kernels.cpu._cpu_kernels" failed' in output
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_wheel_without_a_compiler_has_all_but_the_kernels(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.relative_to(installed).as_posix() for path in installed.rglob("*")}
    assert not [name for name in files if name.endswith((".so", ".pyd", ".o"))]
    monkeypatch.setenv("PYTHONPATH", str(installed))
    file, status, levels = json.loads(
        run([sys.executable, "-c", STATUS], dict(os.environ), tmp_path)
    )
    assert file == f"{installed}/llmkit/kernels/cpu/cpu_kernels.py"
    assert status == "off, llmkit was installed without a C compiler"
    assert levels == []


@pytest.mark.slow
def test_wheel_without_a_compiler_serves_with_torch(
    installed: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(installed))
    with (
        serving(tmp_path / "log", model, dtype="float32") as server,
        server.client() as client,
    ):
        body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        answer = client.post("/v1/completions", json={**body, "return_token_ids": True}).json()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = reference.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        do_sample=False,
    )
    assert answer["choices"][0]["token_ids"] == expected[0, len(PROMPT) :].tolist()
