"""The rows of the parameter table for the mixers that keep a recurrent state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from llmkit.model.parameter import (
    Parameter,
    SourceTensor,
    fused_linear_rows,
    linear_rows,
    source_module,
)
from llmkit.model.spec import GatedDeltaNetSpec, Mamba2Spec, Mixer, ModelSpec, ShortConvSpec
from llmkit.model.split import Split


def recurrent_rows(spec: ModelSpec, index: int) -> Iterator[Parameter]:
    """The rows of a layer's mixer, without the norm before it."""
    yield from _ROWS[spec.layers[index].mixer](spec, index)


def _gated_delta_net_rows(spec: ModelSpec, index: int) -> Iterator[Parameter]:
    """A rank has some key heads, with the value heads that read them."""
    gdn = spec.recurrent
    assert isinstance(gdn, GatedDeltaNetSpec)
    name = f"layers.{index}.gdn"
    layers = (index,)
    heads = gdn.num_k_heads
    values_per_key = gdn.num_v_heads // heads
    k_size = gdn.head_k_dim
    v_size = values_per_key * gdn.head_v_dim

    def source(module: str) -> str:
        return source_module(spec, index, f"gdn.{module}")

    def projections(
        tensor: str, sizes: tuple[int, ...], columns: tuple[int, ...]
    ) -> list[SourceTensor]:
        """Projections that follow one another. sizes: their rows for each key head."""
        sources = []
        first_row = 0
        for size in sizes:
            split = Split("key_heads", 0, heads, size)
            sources.append(SourceTensor(tensor, (heads * size, *columns), split, first_row))
            first_row += heads * size
        return sources

    def alternating(tensor: str, sizes: tuple[int, ...]) -> list[SourceTensor]:
        """Projections of a tensor that has the rows of one key head after the other."""
        sources = []
        first_row = 0
        for size in sizes:
            split = Split("key_heads", 0, heads, size)
            shape = (heads * size, spec.hidden_size)
            sources.append(SourceTensor(tensor, shape, split, first_row, size, sum(sizes)))
            first_row += size
        return sources

    columns = (spec.hidden_size,)
    qkv = (k_size, k_size, v_size)
    ba = (values_per_key, values_per_key)
    if gdn.fused_projections:
        qkvz_sources = alternating(f"{source('qkvz')}.weight", (*qkv, v_size))
        ba_sources = alternating(f"{source('ba')}.weight", ba)
    else:
        qkvz_sources = projections(f"{source('qkv')}.weight", qkv, columns)
        qkvz_sources += projections(f"{source('z')}.weight", (v_size,), columns)
        ba_sources = projections(f"{source('b')}.weight", ba[:1], columns)
        ba_sources += projections(f"{source('a')}.weight", ba[1:], columns)
    # No scales move from the norm before: beta and decay read it, too, and stay in 16 bits, where
    # rounding them once more costs as much as INT8 does.
    yield Parameter(f"{name}.qkvz.weight", tuple(qkvz_sources), layers, is_linear=True)
    gates = Parameter(f"{name}.ba.weight", tuple(ba_sources), layers)
    yield replace(gates, is_linear=gdn.quantized_gates)
    conv = projections(f"{source('conv')}.weight", qkv, (1, gdn.conv_kernel_size))
    yield Parameter(f"{name}.conv.weight", tuple(conv), layers)
    for vector in ("A_log", "dt_bias"):
        (tensor,) = projections(source(vector), (values_per_key,), ())
        yield Parameter(f"{name}.{vector}", (tensor,), layers, is_float32=True)
    norm = SourceTensor(f"{source('norm')}.weight", (gdn.head_v_dim,))
    yield Parameter(f"{name}.norm.weight", (norm,), layers)
    yield from linear_rows(
        f"{name}.out",
        source("out"),
        (spec.hidden_size, heads * v_size),
        Split("key_heads", 1, heads, v_size),
        False,
        layers,
        None,  # the norm's weight is that of all heads
    )


def _mamba2_rows(spec: ModelSpec, index: int) -> Iterator[Parameter]:
    """A rank has some heads, with the B and C of their groups. Several ranks may share a group."""
    mamba = spec.recurrent
    assert isinstance(mamba, Mamba2Spec)
    name = f"layers.{index}.mamba"
    layers = (index,)
    size = mamba.intermediate_size
    group_size = mamba.n_groups * mamba.state_size
    heads = Split("heads", 0, mamba.num_heads, mamba.head_dim)
    groups = Split("kv_heads", 0, mamba.n_groups, mamba.state_size)
    steps = Split("heads", 0, mamba.num_heads, 1)

    def source(module: str) -> str:
        return source_module(spec, index, f"mamba.{module}")

    xbc = [("", size, heads), ("", group_size, groups), ("", group_size, groups)]
    yield from fused_linear_rows(
        spec,
        f"{name}.in_proj",
        source("in_proj"),
        [("", size, heads), *xbc, ("", mamba.num_heads, steps)],  # z, x, B, C, dt
        mamba.proj_bias,
        layers,
        f"layers.{index}.attn_norm.weight",
    )
    for kind in ("weight", "bias") if mamba.conv_bias else ("weight",):
        columns = (1, mamba.conv_kernel_size) if kind == "weight" else ()
        sources = []
        first_row = 0
        for _, rows, split in xbc:
            name_of_all = f"{source('conv')}.{kind}"
            sources.append(SourceTensor(name_of_all, (rows, *columns), split, first_row))
            first_row += rows
        yield Parameter(f"{name}.conv.{kind}", tuple(sources), layers)
    for vector in ("A_log", "D", "dt_bias"):
        tensor = SourceTensor(source(vector), (mamba.num_heads,), steps)
        yield Parameter(f"{name}.{vector}", (tensor,), layers, is_float32=True)
    norm = SourceTensor(f"{source('norm')}.weight", (size,), heads)
    yield Parameter(f"{name}.norm.weight", (norm,), layers)
    yield from linear_rows(
        f"{name}.out",
        source("out"),
        (spec.hidden_size, size),
        replace(heads, dim=1),
        mamba.proj_bias,
        layers,
        f"{name}.norm.weight",
    )


def _short_conv_rows(spec: ModelSpec, index: int) -> Iterator[Parameter]:
    """A rank has some channels."""
    conv = spec.recurrent
    assert isinstance(conv, ShortConvSpec)
    name = f"layers.{index}.conv"
    layers = (index,)
    channels = Split("features", 0, conv.channels)

    def source(module: str) -> str:
        return source_module(spec, index, f"conv.{module}")

    yield from fused_linear_rows(
        spec,
        f"{name}.in_proj",
        source("in_proj"),
        [("", conv.channels, channels)] * 3,  # B, C, x
        conv.bias,
        layers,
        f"layers.{index}.attn_norm.weight",
    )
    for kind in ("weight", "bias") if conv.bias else ("weight",):
        shape = (conv.channels, 1, conv.conv_kernel_size) if kind == "weight" else (conv.channels,)
        tensor = SourceTensor(f"{source('conv')}.{kind}", shape, channels)
        yield Parameter(f"{name}.conv.{kind}", (tensor,), layers)
    yield from linear_rows(
        f"{name}.out",
        source("out"),
        (spec.hidden_size, conv.channels),
        replace(channels, dim=1),
        conv.bias,
        layers,
        None,
    )


_ROWS: dict[Mixer, Callable[[ModelSpec, int], Iterator[Parameter]]] = {
    "gated_delta_net": _gated_delta_net_rows,
    "mamba2": _mamba2_rows,
    "short_conv": _short_conv_rows,
}
