"""A view of a checkpoint that stores all experts of a layer in one tensor, as if one by one.

Quantized formats are of linear layers, and so `quantize` writes experts one by one. Through this
view it reads them in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.model.checkpoint_tensors import checkpoint_tensors
from llmkit.model.families import unstack_experts
from llmkit.model.parameter import Parameter, SourceTensor
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.model.weight_loader import read_source


def with_unstacked_experts(checkpoint: Checkpoint, spec: ModelSpec) -> Checkpoint:
    """The checkpoint, with tensors for each expert in place of those of all experts.

    The checkpoint is not quantized. It is returned itself when it stores experts one by one.
    """
    if spec.moe is None or spec.moe.expert_stack is None:
        return checkpoint
    tensors = dict(checkpoint.tensors)
    dtypes: dict[str, str] = {}  # of the dense experts, by the name that stands for all of them
    for name, (_, packed) in checkpoint_tensors(spec, None).items():
        if packed.num_experts:
            info = tensors.pop(name)
            dtypes[packed.source_name] = info.dtype
    experts: dict[str, tuple[Parameter, SourceTensor]] = {}
    rows = zip(parameters(spec), parameters(unstack_experts(spec)), strict=True)
    for row, unstacked in rows:
        if row.expert is None:
            continue
        for source, own in zip(row.sources, unstacked.sources, strict=True):
            tensors[own.name] = TensorInfo(own.name, dtypes[source.name], own.shape)
            experts[own.name] = row, source
    return replace(
        checkpoint,
        tensors=tensors,
        manifest=None,  # `_UnstackedRows` reads through the checkpoint, which verifies the bytes
        row_reader=_UnstackedRows(checkpoint, experts),
    )


class _UnstackedRows:
    """Reads rows of the tensors of `with_unstacked_experts`."""

    def __init__(
        self, checkpoint: Checkpoint, experts: Mapping[str, tuple[Parameter, SourceTensor]]
    ) -> None:
        self._checkpoint = checkpoint
        self._experts = experts

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """See `RowReader.rows`. Raises as `Checkpoint.read_slice` does."""
        if info.name not in self._experts:
            return self._checkpoint.read_slice(info.name, [(start, stop)], 0)
        row, source = self._experts[info.name]
        return read_source(self._checkpoint, row, source)[start:stop].clone()
