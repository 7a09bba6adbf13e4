"""The memory of CUDA graphs, estimated before they are captured. No GPU has confirmed it yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmkit.kernels import paged_attention
from llmkit.kernels.quantized_linear import MAX_FUSED_ROWS
from llmkit.model.linear import gpu_capability
from llmkit.model.spec import ModelSpec
from llmkit.runtime.engine.cuda_graphs import BatchDescriptor, logits_dtype
from llmkit.runtime.engine.slot_block_tables import ROW_MULTIPLE
from llmkit.runtime.memory_plan import activation_bytes

# What cuBLAS keeps for the stream on which all graphs are captured.
CUBLAS_BYTES = 32 << 20
# Memory of the driver for each kernel of a graph: a guess.
BYTES_PER_KERNEL = 8 << 10
KERNELS_PER_LAYER = 14
LORA_KERNELS_PER_LAYER = 12  # three more for each of four linear layers
# Lists of candidates and sums of the sampler, for each row.
SAMPLER_BYTES_PER_ROW = 64 << 10
# Partial sums of a product with packed weights: float32 tiles, four for each multiprocessor.
SPLIT_SUMS_BYTES = 32 << 20


def estimate_graph_bytes(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    descriptors: Sequence[BatchDescriptor],
    max_num_seqs: int,
    max_blocks: int,
    has_lora: bool = False,
    hidden_size: int = 0,
    has_packed_weights: bool = False,
) -> int:
    """Bytes on the device of all graphs of a model, without what models share (`CUBLAS_BYTES`).

    descriptors: without adapters. max_blocks: blocks of the longest request. has_lora: each graph
    is captured with adapters, too. hidden_size: see `CudaGraphRunner`. has_packed_weights: weights
    are unpacked in kernels or, in steps of many tokens, one after the other before them.

    Graphs share the memory of activations, logits and the hidden states for a draft head, which is
    that of the largest graph, and the block tables. Each graph has its inputs, and the driver's
    memory for its kernels.
    """
    if not descriptors:
        return 0
    num_tokens = max(descriptor.num_tokens for descriptor in descriptors)
    shared = activation_bytes(spec, dtype, num_tokens)
    shared += max(_attention_bytes(spec, dtype, device, one) for one in descriptors)
    shared += num_tokens * hidden_size * dtype.itemsize
    if has_packed_weights:
        layers = [spec.for_layer(index) for index in range(len(spec.layers))]
        widest = max(layer.intermediate_size for layer in layers)
        dense = 2 * widest * spec.hidden_size * dtype.itemsize
        shared += dense if num_tokens > MAX_FUSED_ROWS else SPLIT_SUMS_BYTES
    if spec.is_last_stage:
        num_logits = max(descriptor.num_logits for descriptor in descriptors)
        shared += num_logits * (_logits_bytes(spec, dtype) + SAMPLER_BYTES_PER_ROW)
    num_windows = len(spec.sliding_windows)
    width = -(-max_blocks // ROW_MULTIPLE) * ROW_MULTIPLE
    # int32: the tables of all slots, and those of the sequences of a step.
    tables = 2 * num_windows * (max_num_seqs + 1) * width * 4
    inputs = sum(_input_bytes(descriptor, num_windows) for descriptor in descriptors)
    num_kernels = KERNELS_PER_LAYER
    if has_lora:
        inputs += inputs + sum(descriptor.num_tokens for descriptor in descriptors) * 8
        num_kernels += KERNELS_PER_LAYER + LORA_KERNELS_PER_LAYER
    kernels = len(descriptors) * (len(spec.layers) + 1) * num_kernels * BYTES_PER_KERNEL
    return shared + tables + inputs + kernels


def _logits_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Of the logits of a token: what the LM head computes, and the buffer.

    Where logits are scaled, float32 is between. A rank gathers the parts of all ranks and joins
    them.
    """
    itemsize = logits_dtype(spec, dtype).itemsize
    computed = dtype.itemsize if itemsize == dtype.itemsize else dtype.itemsize + itemsize
    gathered = 0 if spec.full_model.vocab_size == spec.vocab_size else 2 * itemsize
    return spec.vocab_size * computed + spec.full_model.vocab_size * (gathered + itemsize)


def _input_bytes(descriptor: BatchDescriptor, num_windows: int) -> int:
    """Of the inputs that only one graph has: int64, and int32 for attention."""
    of_logits = 6 * descriptor.num_logits  # sampling parameters, and the token
    of_tokens = (5 + num_windows) * descriptor.num_tokens
    return 8 * (of_logits + of_tokens + 5 * descriptor.num_reqs)


def _attention_bytes(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, descriptor: BatchDescriptor
) -> int:
    """Of the parts of long contexts before they are combined, in the largest launch of a graph."""
    most = 0
    query_len = descriptor.max_query_len
    for index, layer in enumerate(spec.layers):
        if layer.mixer != "attention":
            continue
        layer_spec = spec.for_layer(index)
        num_kv_heads, head_dim = layer_spec.num_kv_heads, layer_spec.head_dim
        group = layer_spec.num_heads // num_kv_heads
        short_rows, long_rows = paged_attention.tile_rows(
            group, head_dim, dtype, False, query_len, gpu_capability(device)
        )
        long_queries = long_rows // group
        num_tiles = descriptor.num_reqs * -(-query_len // long_queries)
        if not descriptor.is_uniform:
            num_tiles = descriptor.num_tokens // long_queries + min(
                descriptor.num_reqs, descriptor.num_tokens // (short_rows // group + 1)
            )
        rows_used = paged_attention.queries_used(long_queries, query_len) * group
        sizes = (num_tiles, rows_used, num_kv_heads, head_dim)
        most = max(most, paged_attention.split_bytes(*sizes, device))
    return most
