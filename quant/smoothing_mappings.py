"""Smoothing mappings: which layer can take the scales that move into a linear's weight.

A mapping leads from a smooth layer to a linear. The smooth layer is a norm, or the linear whose
rows compute the inputs (v for o, up for down). The linear's columns are multiplied by the scales
and the smooth layer's output is divided by them, so the decoder layer computes the same. The
parameter table says which layer feeds which (`input_from`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llmkit.model.decoder import DecoderLayer
from llmkit.model.parameter import Parameter


@dataclass(frozen=True)
class SmoothingMapping:
    """A pair of layers, by module name within the decoder layer."""

    smooth_layer: str  # a norm or a linear, whose output is divided by the scales
    linear: str  # its weight's columns are multiplied by them
    # The rows of the smooth layer that compute the inputs. None: the smooth layer is a norm.
    rows: slice | None
    # From v to o: the query heads per KV head and head_dim. None: every output is used once.
    kv_group: tuple[int, int] | None = None

    def max_over_kv_group(self, values: torch.Tensor) -> torch.Tensor:
        """Magnitudes [in] of the linear's inputs as magnitudes of the smooth layer's outputs.

        For query heads that share a KV head, it is their largest magnitude.
        """
        if self.kv_group is None:
            return values
        heads, head_dim = self.kv_group
        return values.view(-1, heads, head_dim).amax(dim=1).flatten()

    def repeat_kv(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales of the smooth layer's outputs as scales [in] of the linear's inputs."""
        if self.kv_group is None:
            return scales
        heads, head_dim = self.kv_group
        return scales.view(-1, 1, head_dim).expand(-1, heads, head_dim).flatten()


def find_mapping(layer: DecoderLayer, parameter: Parameter) -> SmoothingMapping | None:
    """The mapping to a linear of the layer.

    None when its inputs cannot be scaled: they do not come from a linear or norm of this layer, or
    others, such as a router, read them too.
    """
    if parameter.input_from is None:
        return None
    prefix = ".".join(parameter.name.split(".")[:2]) + "."
    source = parameter.input_from.rpartition(".")[0].removeprefix(prefix)
    linear = parameter.module.removeprefix(prefix)
    if source in layer.norms:
        return SmoothingMapping(source, linear, None)
    if source.endswith("attn.qkv"):
        spec = layer.spec  # the sizes of this layer
        first_v_row = (spec.num_heads + spec.num_kv_heads) * spec.head_dim
        v_rows = slice(first_v_row, first_v_row + spec.num_kv_heads * spec.head_dim)
        kv_group = (spec.num_heads // spec.num_kv_heads, spec.head_dim)
        return SmoothingMapping(source, linear, v_rows, kv_group)
    if source.endswith(".gate_up"):
        first_up_row = layer.linears[source].weight.shape[0] // 2
        return SmoothingMapping(source, linear, slice(first_up_row, None))
    return None


def apply_scales(
    layer: DecoderLayer,
    mapping: SmoothingMapping,
    scales: torch.Tensor,
    dtypes: Mapping[str, torch.dtype],
) -> torch.Tensor:
    """Divide the smooth layer by `scales`, one per output, and multiply the linear's columns.

    dtypes: the stored dtype of the smooth layer's vectors (a norm's weight, a linear's bias), by
    name within the decoder layer. The vectors are rounded to it. The linear compensates for a
    norm's rounding. Returns the scales that were used, one per input of the linear.
    """
    linear = layer.linears[mapping.linear]
    if mapping.rows is None:
        offset = layer.spec.norm_offset
        before = layer.norms[mapping.smooth_layer]
        stored = dtypes[f"{mapping.smooth_layer}.weight"]
        after = (before / scales - offset).to(stored).float() + offset
        usable = (before != 0) & (after != 0) & torch.isfinite(after)
        after = torch.where(usable, after, before)
        used = torch.where(usable, before / after, torch.ones_like(after))
        layer.norms[mapping.smooth_layer] = after
        bias = layer.norm_biases.get(mapping.smooth_layer)
        if bias is not None:
            stored = dtypes[f"{mapping.smooth_layer}.bias"]
            layer.norm_biases[mapping.smooth_layer] = (bias / used).to(stored).float()
    else:
        smooth = layer.linears[mapping.smooth_layer]
        used = mapping.repeat_kv(scales)
        smooth.weight[mapping.rows] /= scales[:, None]
        if smooth.bias is not None:
            stored = dtypes[f"{mapping.smooth_layer}.bias"]
            smooth.bias[mapping.rows] = (smooth.bias[mapping.rows] / scales).to(stored).float()
    linear.weight *= used
    return used
