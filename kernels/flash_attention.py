"""FlashAttention-3 (https://github.com/Dao-AILab/flash-attention), used where it is installed.

Builds differ in what was compiled in: some have no soft-capping, some no paging. So each build is
probed once for each kind of layer, on a small problem, before a layer uses it.

Legend: T tokens of this step, N query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from typing import Any

import torch

from llmkit.kernels.attention_metadata import AttentionBatch, AttentionMetadata
from llmkit.kernels.attention_reference import paged_attention_reference
from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.triton_support import device_capability

# The modules of the builds: from source and `tokenspeed-fa3`, then `fa3-fwd`.
MODULES = ("flash_attn_interface", "fa3_fwd_interface")
MAX_HEAD_DIM = 256
_PROBE_ERROR = 0.05  # of values around 1 in 16 bits
_PROBE_BLOCK = 16


@dataclass(frozen=True)
class LayerKind:
    """What a layer asks of the library."""

    dtype: torch.dtype
    head_dim: int
    has_window: bool = False
    has_softcap: bool = False


@dataclass(frozen=True, eq=False)
class Build:
    """An installed build."""

    name: str  # of its distribution, with its version
    library: Any  # the module; None: its import failed
    error: str = ""  # of the import


def supports(
    q: torch.Tensor, cache: KVCache, window: int | None = None, softcap: float | None = None
) -> bool:
    """Whether `attention` takes these queries [T, N, D] and this cache: 16-bit, on Hopper GPUs.

    It depends on the builds that are installed. A build is probed on the first call for a kind of
    layer, which is before a CUDA graph is captured.
    """
    fits = (
        q.is_cuda
        and q.element_size() == 2
        and not cache.quantized
        and q.shape[2] <= MAX_HEAD_DIM
        and installed_builds()
        and device_capability(q.device)[0] == 9
    )
    if not fits:
        return False
    kind = LayerKind(q.dtype, q.shape[2], window is not None, bool(softcap))
    return _choose_library(kind, q.device) is not None


def attention(
    q: torch.Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    softcap: float | None,
    library: Any = None,
) -> torch.Tensor:
    """See `attention.paged_attention`. q: [T, N, D]. library: None: the one that passed its probe.

    The cache is not copied: the library takes [blocks, block_size, K, D] with any strides. It
    reads whole tiles of tokens, also those before a window, and masks them afterwards: it
    multiplies them by 0. So the block table has block 0 there, whose values must be finite.
    """
    if library is None:
        kind = LayerKind(q.dtype, q.shape[2], metadata.window is not None, bool(softcap))
        library = _choose_library(kind, q.device)
    tensors = metadata.device_tensors()
    k, v = cache.kv.permute(1, 2, 0, 3).chunk(2, dim=2)
    out: torch.Tensor = library.flash_attn_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=tensors.seq_lens,
        page_table=tensors.block_table,
        cu_seqlens_q=tensors.query_start_loc,
        max_seqlen_q=metadata.batch.max_query_len,
        softmax_scale=scale,
        causal=True,
        window_size=(-1 if metadata.window is None else metadata.window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out


def status(device: torch.device | None = None) -> tuple[bool, str]:
    """Whether FlashAttention-3 is used on this GPU, and for which layers and why, for `doctor`.

    device: None: the current one.
    """
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    device = device or torch.device("cuda", torch.cuda.current_device())
    builds = installed_builds()
    if not builds:
        return False, f"none of {', '.join(MODULES)} is installed; llmkit's own kernel is used"
    if device_capability(device)[0] != 9:
        return False, "it needs a Hopper GPU (sm_90); llmkit's own kernel is used"
    kinds = {
        "layers with full attention": LayerKind(torch.bfloat16, 128),
        "sliding windows": LayerKind(torch.bfloat16, 128, has_window=True),
        "soft-capped layers": LayerKind(torch.bfloat16, 128, has_softcap=True),
    }
    used: list[str] = []
    refused: list[str] = []
    for label, kind in kinds.items():
        reasons = [(build.name, _refusal(build, kind, device)) for build in builds]
        name = next((name for name, reason in reasons if reason is None), None)
        if name is None:
            refused.append(f"not for {label} ({'; '.join(f'{n}: {why}' for n, why in reasons)})")
        else:
            used.append(f"{name} for {label}")
    return bool(used), ", ".join([*used, *refused])


@cache
def installed_builds() -> tuple[Build, ...]:
    """The builds that are installed, those from source first."""
    builds = []
    for module in MODULES:
        if not torch.cuda.is_available() or find_spec(module) is None:
            continue
        names = packages_distributions().get(module) or [module]
        name = f"{names[0]} {version(names[0])}" if names[0] != module else module
        try:
            builds.append(Build(name, importlib.import_module(module)))
        except (ImportError, OSError, RuntimeError) as error:  # made for another torch or CUDA
            builds.append(Build(name, None, f"its import failed: {_first_line(error)}"))
    return tuple(builds)


@cache
def _choose_library(kind: LayerKind, device: torch.device) -> Any:
    """The library of the first build that computes such layers; None: no build does."""
    builds = installed_builds()
    return next((b.library for b in builds if _refusal(b, kind, device) is None), None)


@cache
@torch.inference_mode()
def _refusal(build: Build, kind: LayerKind, device: torch.device) -> str | None:
    """Why a build does not compute layers of this kind; None: its result on a small one is right.

    A build raises an error where a feature was not compiled in.
    """
    if build.library is None:
        return build.error
    window = 20 if kind.has_window else None
    softcap = 5.0 if kind.has_softcap else None
    tables = [[-1, 3, 1] if kind.has_window else [2, 3, 1], [0]]  # of 37 and 5 tokens
    batch = AttentionBatch.build([1, 2], [37, 5], {window: tables}, _PROBE_BLOCK, device)
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(4, 4, _PROBE_BLOCK, kind.head_dim, generator=generator)
    q = torch.randn(3, 4, kind.head_dim, generator=generator)
    kv, q = (values.to(device, kind.dtype) for values in (kv, q))
    arguments = q, KVCache(kv), batch.metadata(window), kind.head_dim**-0.5, softcap
    try:
        found = attention(*arguments, library=build.library).float()
    except (RuntimeError, TypeError, AttributeError, ValueError, NotImplementedError) as error:
        return _first_line(error)
    error_size = float((found - paged_attention_reference(*arguments).float()).abs().max())
    if error_size <= _PROBE_ERROR:
        return None
    return f"its result on a small problem is wrong by {error_size:.2g}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
