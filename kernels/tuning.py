"""Configurations of kernels that were measured to be fast, by GPU, Triton version, kernel and shape.

`llmkit doctor --tune` measures them and writes the user's file, which goes before the package's. No start measures.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from llmkit.kernels import jit

Shape = tuple[object, ...]
Config = tuple[int, ...]
FORMAT = 1
trials: dict[str, Callable[[Shape, Config], Config]] = {}  # while kernels are measured: in the place of `config`


@dataclass(frozen=True)
class Tunable:
    """A kernel, and what each number of its configuration may be."""

    kernel: str
    choices: tuple[Config, ...]

    def config(self, shape: Shape, safe: Config, device: torch.device) -> Config:
        """The configuration for a class of shapes: the measured one, else `safe`."""
        if trial := trials.get(self.kernel):
            return trial(shape, safe)
        return (_measured(self, shape, device) if device.type == "cuda" else None) or safe

    def name(self, shape: Shape, device: torch.device) -> str:
        """Of an entry."""
        gpu, version = torch.cuda.get_device_properties(device), jit.triton.__version__
        sizes = " ".join(str(size).removeprefix("torch.") for size in shape)
        return f"{gpu.name} sm_{gpu.major}{gpu.minor}; triton {version}; {self.kernel}; {sizes}"


@cache
def _measured(kernel: Tunable, shape: Shape, device: torch.device) -> Config | None:
    for path in (user_file(), Path(__file__).with_name("tuned.json")):
        config = entries(path).get(kernel.name(shape, device), ())
        if len(config) == len(kernel.choices) and all(map(tuple.__contains__, kernel.choices, config)):
            return config
    return None


def user_file() -> Path:
    """What this user has measured."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmkit" / "tuned.json"


@cache
def entries(path: Path) -> dict[str, Config]:
    """Those of a file, which may be missing. None, and a warning on stderr, when it is not what it should be."""
    try:
        content = json.loads(path.read_text(encoding="utf-8") if path.exists() else "{}")
        tuned = content.get("tuned", {}) if content.get("format", FORMAT) == FORMAT else {}
        return {str(name): tuple(map(int, config)) for name, config in tuned.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        sys.stderr.write(f"llmkit: warning: {path} is ignored ({type(error).__name__}: {error})\n")
        return {}
