"""The rows of the parameter table for multi-head latent attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llmkit.model.parameter import (
    Parameter,
    SourceTensor,
    fused_linear_rows,
    linear_rows,
    source_module,
)
from llmkit.model.spec import ModelSpec
from llmkit.model.split import REPLICATED, Split


def mla_rows(spec: ModelSpec, index: int) -> Iterator[Parameter]:
    """The rows of a layer's attention, without the norm before it.

    A rank has some of the heads. It computes the latents of all tokens, which all heads read.
    """
    mla = spec.mla
    assert mla is not None
    name = f"layers.{index}.attn"
    layers = (index,)
    heads = Split("heads", 0, spec.num_heads, mla.qk_head_dim)
    q_size = spec.num_heads * mla.qk_head_dim

    def source(module: str) -> str:
        return source_module(spec, index, f"attn.{module}")

    def norm(module: str, size: int) -> Parameter:
        tensor = SourceTensor(f"{source(module)}.weight", (size,))
        return Parameter(f"{name}.{module}.weight", (tensor,), layers)

    queries = (source("q"), q_size, heads)
    if mla.q_lora_rank is not None:
        queries = (source("q_a"), mla.q_lora_rank, REPLICATED)
    yield from fused_linear_rows(
        spec,
        f"{name}.qkv_a",
        None,
        [queries, (source("kv_a"), mla.latent_dim, REPLICATED)],
        spec.qkv_bias,
        layers,
        f"layers.{index}.attn_norm.weight",
    )
    if mla.q_lora_rank is not None:
        yield norm("q_a_norm", mla.q_lora_rank)
        yield from linear_rows(
            f"{name}.q_b",
            source("q_b"),
            (q_size, mla.q_lora_rank),
            heads,
            False,
            layers,
            f"{name}.q_a_norm.weight",
        )
    yield norm("kv_a_norm", mla.kv_lora_rank)
    kv_unit = mla.qk_nope_head_dim + mla.v_head_dim
    yield from linear_rows(
        f"{name}.kv_b",
        source("kv_b"),
        (spec.num_heads * kv_unit, mla.kv_lora_rank),
        replace(heads, unit=kv_unit),
        False,
        layers,
        f"{name}.kv_a_norm.weight",
    )
    yield from linear_rows(
        f"{name}.o",
        source("o"),
        (spec.hidden_size, spec.num_heads * mla.v_head_dim),
        Split("heads", 1, spec.num_heads, mla.v_head_dim),
        spec.o_proj_bias,
        layers,
        None,  # the rows of kv_b are those of keys and values of one head after the other
    )
