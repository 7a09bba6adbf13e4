"""Measured configurations of Triton kernels, by GPU, Triton version, kernel and shape.

`llmkit doctor --tune` measures them and writes the user's file, which takes precedence over the
package's `tuned.json`. Nothing is measured when a model starts.
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

from llmkit.kernels import triton_support

Shape = tuple[object, ...]
Config = tuple[int, ...]
FORMAT = 1
# By kernel name: a function that replaces `Tunable.config` while the tuner measures that kernel.
trials: dict[str, Callable[[Shape, Config], Config]] = {}
# By kernel name: a function that gets each launch's compiled kernel while the tuner measures.
launch_observers: dict[str, Callable[[object], None]] = {}


@dataclass(frozen=True)
class Tunable:
    """A kernel, and the allowed values of each number in its configuration."""

    kernel: str
    choices: tuple[Config, ...]

    def config(self, shape: Shape, default: Config, device: torch.device) -> Config:
        """The configuration for a class of shapes: the measured one, else `default`."""
        trial = trials.get(self.kernel)
        if trial is not None:
            return trial(shape, default)
        if device.type != "cuda":
            return default
        return measured_config(self, shape, device) or default

    def measured(self, device: torch.device) -> dict[str, Config]:
        """The entries of this kernel in the files for a GPU, by name."""
        entries = read_configs(package_file()) | read_configs(user_file())
        prefix = self.name((), device)
        return {name: config for name, config in entries.items() if name.startswith(prefix)}

    def notify_observer(self, compiled: object) -> None:
        """Pass the compiled kernel of a launch to the tuner while it measures this kernel."""
        observer = launch_observers.get(self.kernel)
        if observer is not None:
            observer(compiled)

    def name(self, shape: Shape, device: torch.device) -> str:
        """The key of an entry in the files."""
        gpu = torch.cuda.get_device_properties(device)
        version = triton_support.triton.__version__
        sizes = " ".join(str(size).removeprefix("torch.") for size in shape)
        return f"{gpu.name} sm_{gpu.major}{gpu.minor}; triton {version}; {self.kernel}; {sizes}"


@cache
def measured_config(kernel: Tunable, shape: Shape, device: torch.device) -> Config | None:
    """The configuration in the files; None when there is none or its numbers are not allowed."""
    for path in (user_file(), package_file()):
        config = read_configs(path).get(kernel.name(shape, device), ())
        if len(config) == len(kernel.choices) and all(
            number in choices for number, choices in zip(config, kernel.choices, strict=True)
        ):
            return config
    return None


def package_file() -> Path:
    """The file with the configurations that come with the package."""
    return Path(__file__).with_name("tuned.json")


def user_file() -> Path:
    """The file with the configurations that this user has measured."""
    cache_folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_folder) / "llmkit" / "tuned.json"


@cache
def read_configs(path: Path) -> dict[str, Config]:
    """The entries of a file, which may be missing. A broken file gets a warning on stderr."""
    try:
        content = json.loads(path.read_text(encoding="utf-8") if path.exists() else "{}")
        tuned = content.get("tuned", {}) if content.get("format", FORMAT) == FORMAT else {}
        return {str(name): tuple(map(int, config)) for name, config in tuned.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        sys.stderr.write(f"llmkit: warning: {path} is ignored ({type(error).__name__}: {error})\n")
        return {}
