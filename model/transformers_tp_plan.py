"""The splits of a model that runs by transformers' own modeling code, from its `tp_plan`.

A tp_plan names a style for modules and parameters of transformers' model. The styles are those of
transformers' distributed/tensor_parallel.py. Checkpoint tensors get the splits of the parameters
that transformers makes of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from llmkit.model.spec import TransformersTensor
from llmkit.model.split import Split, SplitKind

# Every rank has the whole parameter. Some of these styles say how a module's output is summed.
REPLICATED_STYLES = {
    "replicate",
    "replicated_with_grad_allreduce",
    "mla_kv_a_proj",
    "local_params",
    "moe_tp_experts",
    "all_reduce",
}
# The dimension along which a style splits a weight of two or more dimensions, and the number of
# equal parts that the dimension consists of. Output features are the last dimension but one.
SPLIT_STYLES = {
    "colwise": (-2, 1),
    "colwise_gather_output": (-2, 1),
    "colwise_rep": (-2, 1),
    "packed_colwise": (-2, 2),
    "rowwise": (-1, 1),
    "rowwise_split_input": (-1, 1),
    "rowwise_rep": (-1, 1),
    "packed_rowwise": (-1, 2),
    "embedding_rowwise": (-2, 1),
    "embedding_colwise": (-1, 1),
}
# Styles that split vectors, such as the biases of output features.
VECTOR_STYLES = {"colwise", "colwise_gather_output", "colwise_rep"}
# Styles after which the ranks hold different features. In attention, these belong to heads.
LOCAL_STYLES = {"colwise", "rowwise"}


class NoSplitError(Exception):
    """The model cannot be split by its tp_plan. The message is the reason, in a few words."""


@dataclass(frozen=True)
class AttentionHeads:
    """The heads of attention, which are whole on a rank."""

    modules: tuple[str, ...]  # the prefixes of the names of attention's parameters
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def of_features(self, size: int) -> tuple[SplitKind, int]:
        """Which heads `size` features belong to, and their number."""
        if size == self.num_kv_heads * self.head_dim and self.num_kv_heads < self.num_heads:
            return "kv_heads", self.num_kv_heads
        if size in (self.num_heads * self.head_dim, self.num_heads):
            return "heads", self.num_heads
        # Several projections in one, or heads of another size: groups of heads that share keys.
        return "heads", self.num_kv_heads


@dataclass(frozen=True)
class SplitAxis:
    """Where a parameter is split: a dimension, and the number of equal parts it consists of."""

    dim: int
    parts: int


def tensor_splits(
    model: Any, tensors: Sequence[TransformersTensor], heads: AttentionHeads
) -> dict[str, Split]:
    """The splits of checkpoint tensors by name; tensors that are not split are left out.

    model: transformers' model on the meta device. tensors: of its checkpoints.
    Raises NoSplitError with the reason.
    """
    plan: dict[str, str] = model.tp_plan
    if not plan:
        raise NoSplitError("its class has no tp_plan, which would say how tensors are split")
    state = model.state_dict(keep_vars=True)
    axes = {name: axis_of(plan, name, tensor) for name, tensor in state.items()}
    for tied, name in model.all_tied_weights_keys.items():
        if axes[tied] != axes[name]:
            raise NoSplitError(
                f"its tp_plan splits {tied} and {name} differently, and they are tied"
            )
    converted: dict[str, SplitAxis] = {}
    if any(tensor.parameter is None for tensor in tensors):
        converted = _converted_axes(model, state, axes)
    splits = {}
    for tensor in tensors:
        if tensor.parameter is None:
            name = tensor.source
            axis = converted.get(_without_numbers(name))
        else:
            name = tensor.parameter
            axis = axes[name]
        if axis is None:
            continue
        size = tensor.shape[axis.dim] // axis.parts
        kind: SplitKind = "features"
        count = size
        if tensor.name.startswith(("embed.", "lm_head.")) and axis.dim == 0:
            kind = "vocab"
        elif name.startswith(heads.modules) and axis.parts > 1:
            raise NoSplitError(
                f"its tp_plan has the style {parameter_style(plan, name)} for {name}"
            )
        elif name.startswith(heads.modules) and parameter_style(plan, name) in LOCAL_STYLES:
            kind, count = heads.of_features(size)
            if size % count:
                raise NoSplitError(f"its tp_plan splits the {size} features of {name} by heads")
        splits[tensor.source] = Split(kind, axis.dim, count, size // count, axis.parts)
    return splits


def module_style(plan: Mapping[str, str], name: str) -> str | None:
    """The style of a module."""
    return plan.get(_without_numbers(name))


def parameter_style(plan: Mapping[str, str], name: str) -> str | None:
    """The style of a parameter: its own, or that of the module that holds it."""
    return module_style(plan, name) or module_style(plan, name.rpartition(".")[0])


def axis_of(plan: Mapping[str, str], name: str, tensor: torch.Tensor) -> SplitAxis | None:
    """Where a parameter is split; None when every rank has all of it."""
    style = parameter_style(plan, name)
    if style is None or style in REPLICATED_STYLES:
        return None
    if style not in SPLIT_STYLES:
        raise NoSplitError(f"its tp_plan has the style {style} for {name}")
    dim, parts = SPLIT_STYLES[style]
    if dim == -1 and name.endswith(".bias"):  # it is added once, to the sum over the ranks
        return None
    if tensor.ndim > 1:
        dim += tensor.ndim
    elif style in VECTOR_STYLES:
        dim = 0
    else:
        raise NoSplitError(f"its tp_plan has the style {style} for the vector {name}")
    if tensor.shape[dim] % parts:
        raise NoSplitError(f"its tp_plan has the style {style} for {name}, whose size is odd")
    return SplitAxis(dim, parts)


def _converted_axes(
    model: Any, state: dict[str, torch.Tensor], axes: Mapping[str, SplitAxis | None]
) -> dict[str, SplitAxis]:
    """Where the checkpoint tensors are split that transformers converts to parameters.

    By the tensors' names without numbers: layers and experts are alike.
    """
    found: dict[str, SplitAxis] = {}
    seen = set()
    for name, tensor in state.items():
        axis = axes[name]
        if axis is None or _without_numbers(name) in seen:
            continue
        seen.add(_without_numbers(name))
        for source, source_axis in _axes_of_sources(model, name, tensor, axis).items():
            found[_without_numbers(source)] = source_axis
    return found


def _axes_of_sources(
    model: Any, name: str, tensor: torch.Tensor, axis: SplitAxis
) -> dict[str, SplitAxis]:
    """Where the checkpoint tensors of one parameter are split.

    The parameter is converted back, and so is one that is twice as large along its axis. The
    checkpoint tensors are split where they become twice as large.
    """
    shape = list(tensor.shape)
    shape[axis.dim] *= 2
    sources = revert_weight_conversion(model, {name: tensor})
    larger = revert_weight_conversion(model, {name: tensor.new_empty(shape)})
    found = {}
    for source, part in sources.items():
        other = larger.get(source)
        sizes = [] if other is None else list(zip(part.shape, other.shape, strict=True))
        dims = [dim for dim, (size, new_size) in enumerate(sizes) if size != new_size]
        if len(dims) != 1 or len(part.shape) > tensor.ndim:
            raise NoSplitError(
                f"its checkpoints store {name} in a form that its tp_plan does not split"
            )
        # Gate and up projections are two parts of one parameter, and may be two tensors.
        parts, rest = divmod(axis.parts * part.shape[dims[0]], tensor.shape[axis.dim])
        if rest or not parts:
            raise NoSplitError(
                f"its tp_plan splits {name} in {axis.parts} parts, and {source} is a part of it"
            )
        found[source] = SplitAxis(dims[0], parts)
    return found


def _without_numbers(name: str) -> str:
    """A tensor's name as in a tp_plan, "model.layers.*.mlp.experts.*.w1.weight"."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
