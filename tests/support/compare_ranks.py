"""Splits a quantized checkpoint and compares its ranks with those of the dense one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model.checkpoint_tensors import check_checkpoint
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import read_parameter
from llmkit.shard.merge import merge
from llmkit.shard.rank_part import rank_parts
from llmkit.shard.shard_checkpoint import shard
from llmkit.shard.verify import verify
from support.synthetic_checkpoint import stored_bytes


def compare_ranks(
    packed: Path, folder: Path, layout: tuple[int, int, int], min_linears: int
) -> Iterator[tuple[Checkpoint, Parameter]]:
    """Split `packed` into `folder`/ranks by TP, PP and EP, and merge the ranks again.

    The values of stored ranks, and of slices of `packed`, must be those of `folder`/dense. Yields
    each of these parts with each of its parameters. min_linears: how many linears there are.
    """
    tp, pp, ep = layout
    shard(packed, folder / "ranks", tp, pp, ep)
    assert not verify(folder / "ranks").problems
    dense_parts = rank_parts(open_checkpoint(folder / "dense"), tp, pp, ep)
    stored_parts = rank_parts(open_checkpoint(folder / "ranks"))
    sliced_parts = rank_parts(open_checkpoint(packed), tp, pp, ep)
    num_compared = 0
    for dense, stored, sliced in zip(dense_parts, stored_parts, sliced_parts, strict=True):
        for row in parameters(dense.spec):
            expected = read_parameter(dense.checkpoint, row, torch.float32)
            for part in (stored, sliced):
                check_checkpoint(part.checkpoint, part.spec)
                found = read_parameter(part.checkpoint, row, torch.float32)
                assert torch.equal(found, expected), row.name
                yield part.checkpoint, row
            num_compared += row.is_linear
    assert num_compared >= min_linears
    merge(folder / "ranks", folder / "merged")
    assert stored_bytes(folder / "merged") == stored_bytes(packed)
