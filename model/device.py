"""Where to compute."""

from __future__ import annotations

import torch

from llmkit.checkpoint.errors import ShortageError


def resolve_device(name: str) -> torch.device:
    """The device that "auto", "cuda" or "cpu" means here. Raises ShortageError for CUDA where there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ShortageError(
            "--device cuda, and PyTorch sees no CUDA device", "An NVIDIA GPU and its driver", "Use --device cpu"
        )
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")
