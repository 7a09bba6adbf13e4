"""Reading an output of `llmkit shard` as an unsharded checkpoint, without writing files."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.shard.chunking import ByteShape, Chunk
from llmkit.shard.shard_source import ShardSource


def unsharded(checkpoint: Checkpoint) -> Checkpoint:
    """A view of a sharded checkpoint whose tensors are merged as they are read.

    A checkpoint that is not sharded is returned as it is. Raises InputError when the ranks are
    incomplete or differ from the manifest.
    """
    if checkpoint.layout is None:
        return checkpoint
    source = ShardSource(checkpoint)
    return replace(
        checkpoint,
        tensors=source.tensors,
        manifest=None,
        row_reader=_UnshardedRows(source),
        stamps={},
    )


class _UnshardedRows:
    """Reads rows of unsharded tensors from the slices of the ranks."""

    def __init__(self, source: ShardSource) -> None:
        self._source = source

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor, as a new tensor.

        Raises InputError when a file is cut short.
        """
        layout = self._source.layout
        assert layout is not None
        dim = layout.slices_by_source[info.name][0].dim
        byte_shape = ByteShape.of(info.dtype, info.shape, dim)
        if dim:
            outer_per_row = math.prod(info.shape[1:dim])
            chunk = Chunk(start * outer_per_row, stop * outer_per_row, 0, byte_shape.length)
        else:
            chunk = Chunk(0, 1, start, stop)
        data = self._source.read(info.name, byte_shape, chunk).data.reshape(-1)
        rows = torch.from_numpy(data.copy()).view(info.torch_dtype)
        return rows.reshape(stop - start, *info.shape[1:])
