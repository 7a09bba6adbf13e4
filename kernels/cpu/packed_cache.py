"""The order of the elements in a KV cache of the compiled CPU kernels.

The compiled kernels multiply words of 32 bits, which hold one to four consecutive elements (see
kernels/cpu/kv_types.h). So a cache lies in memory as they take it, and no step rearranges it. Its
shape stays [2K, blocks, block_size, D].

Legend: K key-value heads, D head_dim, w elements of a word. Of each head, PANEL_WIDTH tokens lie
together: keys as [D / w, PANEL_WIDTH, w], and values as [PANEL_WIDTH / w, D, w], with w tokens in a
word.
"""

from __future__ import annotations

import torch

from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_kernels import PANEL_WIDTH

MAX_HEAD_DIM = 512
KV_CHUNK = 64  # tokens that attention reads at once; the block size must divide it


def can_pack(
    block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> bool:
    """Whether the compiled kernels can use a cache of this form."""
    return (
        cpu_kernels.library is not None
        and torch.device(device).type == "cpu"
        and dtype in cpu_kernels.KV_TYPES
        and head_dim % 8 == 0
        and head_dim <= MAX_HEAD_DIM
        and block_size % PANEL_WIDTH == 0
        and KV_CHUNK % block_size == 0
    )


def pack_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """Keys and values [2K, blocks, block_size, D] in the order of the compiled kernels."""
    num_heads, count, block_size, head_dim = blocks.shape
    width = _word_elements(blocks)
    keys, values = blocks.reshape(2, num_heads // 2, -1, PANEL_WIDTH, head_dim)
    keys = keys.unflatten(3, (-1, width)).transpose(2, 3)
    values = values.unflatten(2, (-1, width)).transpose(3, 4)
    return _joined(keys, values).view(num_heads, count, block_size, head_dim)


def unpack_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """What `pack_blocks` packed."""
    num_heads, count, block_size, head_dim = blocks.shape
    width = _word_elements(blocks)
    keys, values = blocks.reshape(2, num_heads // 2, -1)
    keys = keys.unflatten(1, (-1, head_dim // width, PANEL_WIDTH, width)).transpose(2, 3)
    values = values.unflatten(1, (-1, PANEL_WIDTH // width, head_dim, width)).transpose(3, 4)
    return _joined(keys, values).view(num_heads, count, block_size, head_dim)


def _word_elements(blocks: torch.Tensor) -> int:
    return 4 // blocks.dtype.itemsize


def _joined(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.cat((keys.flatten(1), values.flatten(1)))
