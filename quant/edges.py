"""Edges: where scales can move from a linear's inputs into what makes them, without changing what the layer computes.

An edge leads from a norm, or from the rows of a linear that make the inputs (v for o, up for down), to a linear. Its
scales multiply the columns of the linear and divide what feeds it. The parameter table says what feeds what (`fed_by`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llmkit.model.decoder import DecoderLayer
from llmkit.model.layout import Parameter
from llmkit.model.spec import ModelSpec


@dataclass(frozen=True)
class Edge:
    """From `source` (a norm or a linear, by module name within the layer) to `linear`."""

    source: str
    linear: str
    rows: slice | None  # the rows of the source linear that make the inputs; None: the source is a norm
    repeat: tuple[int, int] | None = None  # (heads that share each key-value head, head_dim), between v and o

    def per_source(self, values: torch.Tensor) -> torch.Tensor:
        """Magnitudes [in] of the linear's inputs as magnitudes of what the source makes: heads that share one, by
        their largest."""
        if self.repeat is None:
            return values
        shared, dim = self.repeat
        return values.view(-1, shared, dim).amax(dim=1).flatten()

    def per_input(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales of the source's outputs as scales [in] of the linear's inputs."""
        if self.repeat is None:
            return scales
        shared, dim = self.repeat
        return scales.view(-1, 1, dim).expand(-1, shared, dim).flatten()


def edge_to(spec: ModelSpec, layer: DecoderLayer, row: Parameter) -> Edge | None:
    """The edge that ends in a linear row of the layer; None when its inputs cannot be scaled: nothing within the
    layer makes them, or a router reads them too."""
    if row.fed_by is None:
        return None
    prefix = ".".join(row.name.split(".")[:2]) + "."
    source = row.fed_by.rpartition(".")[0].removeprefix(prefix)
    linear = row.module.removeprefix(prefix)
    if source in layer.norms:
        return None if ".experts." in linear else Edge(source, linear, None)
    if source.endswith("attn.qkv"):
        first = (spec.heads + spec.kv_heads) * spec.head_dim
        return Edge(source, linear, slice(first, None), (spec.heads // spec.kv_heads, spec.head_dim))
    if source.endswith(".gate_up"):
        return Edge(source, linear, slice(layer.linears[source].weight.shape[0] // 2, None))
    return None


def move(layer: DecoderLayer, edge: Edge, scales: torch.Tensor, dtypes: Mapping[str, torch.dtype]) -> torch.Tensor:
    """Divide the edge's source by `scales` (one per output of the source) and multiply its linear's columns.

    dtypes: what the source's vectors (a norm, the bias of a linear) are stored in, by name within the layer. They are
    rounded to it here, and of a norm the linear makes up for that too. Returns the scales used, per input of the
    linear.
    """
    linear = layer.linears[edge.linear]
    if edge.rows is None:
        offset = layer.spec.norm_offset
        before = layer.norms[edge.source]
        after = (before / scales - offset).to(dtypes[f"{edge.source}.weight"]).float() + offset
        usable = (before != 0) & (after != 0) & torch.isfinite(after)
        after = torch.where(usable, after, before)
        used = torch.where(usable, before / after, torch.ones_like(after))
        layer.norms[edge.source] = after
    else:
        source, used = layer.linears[edge.source], edge.per_input(scales)
        source.weight[edge.rows] /= scales[:, None]
        if source.bias is not None:
            stored = dtypes[f"{edge.source}.bias"]
            source.bias[edge.rows] = (source.bias[edge.rows] / scales).to(stored).float()
    linear.weight *= used
    return used
