"""What other projects' packers made of FP4 and MX weights: tests/data/fp4.safetensors.

`python tests/peers/fp4_pack.py --out FILE` wrote it with compressed-tensors 0.20.0, Model-Optimizer
0.47.0 and torchao 0.18.0 (tests/peers/fp4.txt).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from llmkit.checkpoint.quantized_weight import Scheme

_FILE = Path(__file__).parents[1] / "data" / "fp4.safetensors"


class PeerCase(NamedTuple):
    """A weight as one packer got it and wrote it."""

    source: torch.Tensor  # what the packer was given [out, in]
    dense: torch.Tensor  # the same project's dequantized weight [out, in]
    stored: dict[str, torch.Tensor]  # what it wrote, by suffix
    scheme: Scheme
    details: dict[str, Any]  # "format" and others


def peer_cases() -> list[str]:
    """The names of all cases."""
    with safe_open(_FILE, "pt") as file:
        return sorted(file.metadata())


def read_peer_case(case: str) -> PeerCase:
    """One case by its name."""
    with safe_open(_FILE, "pt") as file:
        details = json.loads(file.metadata()[case])
        stored = {
            name.rpartition(".")[2]: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
            if name.rpartition(".")[0] == case
        }
    source = stored.pop("source")
    dense = stored.pop("dense")
    scheme = Scheme(kind="float", **details["scheme"])
    return PeerCase(source, dense, stored, scheme, details)
