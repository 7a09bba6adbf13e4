"""`python -m llmkit`, from a wheel and from an editable install."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The compiler's part is left out: it takes long and changes nothing here.
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))
"""
# What `python -m llmkit` does, without the environment's own installation of llmkit: with -S its
# .pth files are not read. addsitedir reads the one of the editable install.
RUN = """
import runpy, site, sys
site.addsitedir(sys.argv[1])
sys.path.append(sys.argv[2])
import llmkit.cli.start
sys.stderr.write(f"{llmkit.__spec__.origin} {llmkit.cli.start.__file__}")
sys.argv = ["llmkit", "--version"]
runpy.run_module("llmkit", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages and pyproject.toml, without the C extension."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("project")
    text = (ROOT / "pyproject.toml").read_text()
    start = text.index("[[tool.setuptools.ext-modules]]")
    (folder / "pyproject.toml").write_text(text[:start] + text[text.index("[tool.ruff]") :])
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for init in ROOT.glob("*/__init__.py"):
        shutil.copytree(
            init.parent, folder / init.parent.name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_module_run_is_the_program(project: Path, tmp_path: Path, kind: str) -> None:
    built = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(tmp_path)],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    done = subprocess.run(
        [sys.executable, "-S", "-c", RUN, str(site), sysconfig.get_path("purelib")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == f"llmkit {importlib.metadata.version('llmkit')}\n", done.stderr
    start = (site / "llmkit" if kind == "wheel" else project) / "cli" / "start.py"
    # No origin: llmkit is a namespace package, which other distributions could extend.
    assert done.stderr == f"None {start}"
