"""Checks that a checkpoint's weights are finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.tensor_reader import row_chunks
from llmkit.common.errors import InputError
from llmkit.common.progress import Progress


def check_finite(source: Checkpoint, names: Sequence[str], progress: Progress) -> None:
    """Read the named tensors once.

    Raises InputError with the tensor's name and the counts when one holds NaN or infinity.
    """
    progress.start("check", len(names), "tensors")
    for name in names:
        num_nan = 0
        num_infinite = 0
        for rows in row_chunks(source.tensors[name]):
            chunk = source.read_slice(name, [rows], 0)
            if chunk.is_floating_point() and not bool(torch.isfinite(chunk).all()):
                num_nan += int(chunk.isnan().sum())
                num_infinite += int(chunk.isinf().sum())
        if num_nan or num_infinite:
            count = math.prod(source.tensors[name].shape)
            raise InputError(
                f"tensor {name} holds {num_nan} NaN and {num_infinite} infinite values of {count}",
                "Finite weights were expected",
                "Download the checkpoint again or get it from its maker",
            )
        progress.advance(1, name)
    progress.finish()
