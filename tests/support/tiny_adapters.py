"""Random LoRA adapters in PEFT's format, and models with an adapter merged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def write_adapter(
    base: Path,
    path: Path,
    wanted: str = "",
    *,
    seed: int = 1,
    rank: Callable[[str], int] = lambda _: 4,
    prefix: str = "model.layers.",
    **config: Any,
) -> Path:
    """Write a random adapter for the linears with `wanted` in their names; returns `path`.

    "" stands for all linears.

    `rank` says for a module's name how large its A and B are; `prefix` is what the names of layers
    begin with in the base; `config` overrides r 4 and lora_alpha
    8.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        is_wanted = re.search(wanted or r"\.weight$", name)
        if name.startswith(prefix) and weight.dim() == 2 and is_wanted:
            module, (rows, columns) = name.removesuffix(".weight"), weight.shape
            for side, shape in (("A", (rank(module), columns)), ("B", (rows, rank(module)))):
                tensors[f"{PREFIX}{module}.lora_{side}.weight"] = (
                    torch.randn(shape, generator=generator) * 0.2
                )
    path.mkdir(parents=True)
    save_file(tensors, path / WEIGHTS)
    values = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "target_modules": ["q_proj"],
    } | config
    (path / "adapter_config.json").write_text(json.dumps(values))
    return path


def merged(
    base: Path, adapter: Path, path: Path, scale: Callable[[str], float] = lambda _: 2.0
) -> Path:
    """Write a copy of a checkpoint with W + scale(module) B A for each weight W; returns `path`."""
    shutil.copytree(base, path)
    weights = load_file(base / "model.safetensors")
    updates = load_file(adapter / WEIGHTS)
    for name in [name for name in updates if ".lora_A." in name]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        product = updates[name.replace("lora_A", "lora_B")].double() @ updates[name].double()
        weights[f"{module}.weight"] = (
            weights[f"{module}.weight"] + scale(module) * product
        ).float()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path
