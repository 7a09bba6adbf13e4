"""A view of a checkpoint whose mixtures have fewer experts, as if it had been written so.

`quantize --prune-experts` reads its source through this view. The experts that stay keep their
order, and the rows of the router follow them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.safetensors_header import TensorInfo, byte_count
from llmkit.common.errors import InputError
from llmkit.model.families import checkpoint_spec
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec

# What config.json calls the number of experts, by family.
_NUM_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)

KeptExperts = Mapping[int, Sequence[int]]  # the experts that stay, ascending, by layer


def with_pruned_experts(checkpoint: Checkpoint, spec: ModelSpec, kept: KeptExperts) -> Checkpoint:
    """The checkpoint with the experts `kept` of each layer that has experts.

    The checkpoint is not quantized and stores experts one by one. All layers keep the same number.
    Raises InputError where config.json does not say how many experts there are.
    """
    assert spec.moe is not None and spec.moe.expert_stack is None
    (num_experts,) = {len(experts) for experts in kept.values()}
    config = _with_num_experts(checkpoint.config, spec.moe.num_experts, num_experts)
    bias_shape = [
        num_experts if size == spec.moe.num_experts else size
        for size in spec.moe.correction_bias_shape
    ]
    moe = replace(spec.moe, num_experts=num_experts, correction_bias_shape=tuple(bias_shape))
    pruned_spec = replace(spec, moe=moe)
    originals = {row.name: row for row in parameters(spec)}
    sources: dict[str, _Source] = {}
    for row in parameters(pruned_spec):
        original = originals[_original_name(row, kept)]
        for own, source in zip(row.sources, original.sources, strict=True):
            if row.expert is not None:
                sources[own.name] = _Source(source.name)
            elif own.shape != source.shape:  # the router's rows are those of the experts
                sources[own.name] = _Source(source.name, list(kept[row.layers[0]]))
    gone = {name for row in parameters(spec) if row.expert is not None for name in row.source_names}
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in gone}
    for name, stored in sources.items():
        info = checkpoint.tensors[stored.name]
        shape = list(info.shape)
        if stored.experts is not None:
            shape[_experts_dim(shape, spec.moe.num_experts)] = num_experts
        nbytes = byte_count(info.dtype, tuple(shape))
        tensors[name] = TensorInfo(name, info.dtype, tuple(shape), end=nbytes)
    pruned = replace(
        checkpoint,
        config=config,
        tensors=tensors,
        manifest=None,  # `_PrunedRows` reads through the checkpoint, which verifies the bytes
        row_reader=_PrunedRows(checkpoint, sources, spec.moe.num_experts),
    )
    found = checkpoint_spec(pruned).moe
    if found is None or found.num_experts != num_experts:
        raise InputError(
            f"The config.json of {checkpoint.reference} does not say how many experts there are in"
            f" a field that llmkit can change ({', '.join(_NUM_EXPERTS)})",
            "One of these fields was expected",
            "Leave out --prune-experts",
        )
    return pruned


class _Source:
    """Where a tensor of the view comes from: a tensor, or its parts of some experts."""

    def __init__(self, name: str, experts: list[int] | None = None) -> None:
        self.name = name
        self.experts = experts


class _PrunedRows:
    """Reads rows of the tensors of `with_pruned_experts`."""

    def __init__(
        self, checkpoint: Checkpoint, sources: Mapping[str, _Source], num_experts: int
    ) -> None:
        self._checkpoint = checkpoint
        self._sources = sources
        self._num_experts = num_experts

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """See `RowReader.rows`. Raises as `Checkpoint.read_slice` does."""
        source = self._sources.get(info.name)
        if source is None:
            return self._checkpoint.read_slice(info.name, [(start, stop)], 0)
        if source.experts is None:
            return self._checkpoint.read_slice(source.name, [(start, stop)], 0)
        whole = self._checkpoint.read(source.name)
        dim = _experts_dim(list(whole.shape), self._num_experts)
        return whole.index_select(dim, torch.tensor(source.experts))[start:stop]


def _original_name(row: Parameter, kept: KeptExperts) -> str:
    """The name of the row of the whole model that a row of the pruned one stands for."""
    if row.expert is None:
        return row.name
    layer = row.layers[0]
    own = f".experts.{row.expert}."
    return row.name.replace(own, f".experts.{kept[layer][row.expert]}.", 1)


def _experts_dim(shape: Sequence[int], num_experts: int) -> int:
    """The dimension of a router's tensor along which the experts lie."""
    return list(shape).index(num_experts)


def _with_num_experts(config: dict[str, Any], old: int, new: int) -> dict[str, Any]:
    """config.json with another number of experts, also in the config of its text model."""
    changed: dict[str, Any] = {name: new for name in _NUM_EXPERTS if config.get(name) == old}
    text_config = config.get("text_config")
    if isinstance(text_config, dict):
        changed["text_config"] = _with_num_experts(text_config, old, new)
    return config | changed
