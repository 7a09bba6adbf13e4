"""An output of `llmkit shard` seen as the whole checkpoint that its ranks' files make up; nothing is written."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.source import Checkpoint
from llmkit.shard.blocks import Chunk, Grid
from llmkit.shard.source import Source


def whole(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself, or of a sharded one the whole, whose tensors are put together as they are read.

    Raises InputError when the ranks do not make up the whole or are not what the manifest says.
    """
    if checkpoint.layout is None:
        return checkpoint
    source = Source(checkpoint)
    return replace(checkpoint, tensors=source.tensors, manifest=None, _rows=_JoinedRows(source), _stamps={})


class _JoinedRows:
    """Rows of whole tensors, out of the slices that the ranks have of them."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor, in memory of their own. Raises InputError when a file is cut short."""
        layout = self._source.layout
        assert layout is not None
        dim = layout.by_source[info.name][0].slice.dim
        grid = Grid.of(info.dtype, info.shape, dim)
        outer = math.prod(info.shape[1:dim])  # of one row
        chunk = Chunk(start * outer, stop * outer, 0, grid.length) if dim else Chunk(0, 1, start, stop)
        data = self._source.read(info.name, grid, chunk).view.reshape(-1)
        return torch.from_numpy(data.copy()).view(info.torch_dtype).reshape(stop - start, *info.shape[1:])
