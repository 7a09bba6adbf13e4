"""QK norm, RoPE and the write to the KV cache: torch, C and Triton against formulas in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.elementwise_cases import (
    Arguments,
    Placement,
    RopeCacheCase,
    assert_same_outputs,
    rope_cache_arguments,
    rope_cache_cases,
    run_reference,
)
from support.triton_checks import Compiled, compiled_for, interpreted
from torch.utils._python_dispatch import TorchDispatchMode

from llmkit.kernels.attention import rope_and_cache
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.packed_cache import pack_blocks
from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.rope_and_cache_triton import _rope_and_cache_kernel

PLACED = rope_cache_cases()
NOT_FINITE = [float("inf"), float("nan")]
UNQUANTIZED = [
    case for case in PLACED if case.dtype == torch.float32 and case.kv_cache_dtype is None
]
needs_library = pytest.mark.skipif(
    cpu_kernels.library is None, reason=f"compiled kernels: {cpu_kernels.status()}"
)


def nan_arguments(bad: float) -> Arguments:
    """A key and a value of a quantized cache are not finite."""
    case = RopeCacheCase(2, 1, 64, 64, kv_cache_dtype="int8", dynamic_scales=True)
    arguments = rope_cache_arguments(case)
    arguments[0][4, 2:, 5] = bad
    return arguments


@pytest.fixture(scope="module")
def placements(tmp_path_factory: pytest.TempPathFactory) -> list[Placement]:
    """Of every case, then with NaN and with infinity; from one interpreter, which starts slowly."""
    calls: list[tuple[object, ...]] = [rope_cache_arguments(case) for case in PLACED]
    calls += [nan_arguments(bad) for bad in NOT_FINITE]
    return interpreted(
        "support.elementwise_cases", "run_kernel", calls, tmp_path_factory.mktemp("interpreted")
    )


@pytest.mark.parametrize("case", PLACED, ids=lambda case: case.label)
def test_rope_and_cache_matches_torch(case: RopeCacheCase, placements: list[Placement]) -> None:
    arguments = rope_cache_arguments(case)
    assert_same_outputs(placements[PLACED.index(case)], run_reference(arguments), arguments, case)


@pytest.mark.parametrize("index", [0, 1], ids=["inf", "nan"])
def test_rope_and_cache_keeps_nan_in_a_quantized_cache(
    index: int, placements: list[Placement]
) -> None:
    """The engine finds such a sequence by its logits."""
    _, kv, scales = placements[len(PLACED) + index]
    assert scales is not None
    values = (kv.float() * scales).flatten(1, 2)[:, nan_arguments(NOT_FINITE[index])[-1]]
    assert not values[:, 4].isfinite().all(-1).any()
    assert values[:, [0, 1, 2, 3, 5, 6]].isfinite().all()


def in_float64(case: RopeCacheCase, arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and what is stored [T, 2K, D], by the formulas."""
    qkv, heads, norms, rotation, *_, query_scale, _, _ = arguments
    first_value = heads + case.kv_heads
    qkv = qkv.double()
    x = qkv[:, :first_value]

    def normalize(x: torch.Tensor) -> torch.Tensor:
        assert norms is not None
        if case.norm_subtracts_mean:
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        q_norm, k_norm = (norm.double() for norm in norms)
        return torch.cat((x[:, :heads] * q_norm, x[:, heads:] * k_norm), 1)

    if norms is not None and not case.norm_after_rope:
        x = normalize(x)
    if rotation is not None:
        half = case.rotary_dim // 2
        # Pair i is one complex number, which is turned by an angle.
        turn = torch.complex(rotation[0][..., :half], rotation[1][..., half:]).to(torch.complex128)
        rotated, rest = x[..., : case.rotary_dim], x[..., case.rotary_dim :]
        if case.interleaved:
            pairs = torch.complex(rotated[..., 0::2], rotated[..., 1::2]) * turn
            rotated = torch.view_as_real(pairs).flatten(-2)
        else:
            pairs = torch.complex(rotated[..., :half], rotated[..., half:]) * turn
            rotated = torch.cat((pairs.real, pairs.imag), -1)
        x = torch.cat((rotated, rest), -1)
    if norms is not None and case.norm_after_rope:
        x = normalize(x)
    q = x[:, :heads]
    if query_scale is not None:
        q = q * query_scale.double()[:, None, None]
    return q, torch.cat((x[:, heads:], qkv[:, first_value:]), 1)


@pytest.mark.parametrize("grad", [False, True], ids=["compiled", "torch"])
@pytest.mark.parametrize("case", UNQUANTIZED, ids=lambda case: case.label)
def test_rope_and_cache_on_a_cpu(case: RopeCacheCase, grad: bool) -> None:
    arguments = rope_cache_arguments(case)
    q, kv, _ = run_reference(arguments, grad)
    expected_q, expected_kv = in_float64(case, arguments)
    torch.testing.assert_close(q.double(), expected_q, atol=5e-6, rtol=5e-6)
    stored = kv.flatten(1, 2)[:, arguments[-1]].transpose(0, 1)
    torch.testing.assert_close(stored.double(), expected_kv, atol=5e-6, rtol=5e-6)


def test_rope_and_cache_quantizes_after_norm_and_rope() -> None:
    """Fake quantization sees the keys that are stored; queries are not quantized."""
    case = replace(UNQUANTIZED[0], interleaved=True, normed=True, norm_after_rope=True)
    qkv, heads, norms, rotation, kv, *_, slots = rope_cache_arguments(case)
    q, expected = in_float64(case, rope_cache_arguments(case))
    seen = []

    def double(values: torch.Tensor) -> torch.Tensor:
        seen.append(values.clone())
        return values * 2

    with torch.inference_mode():
        ours = rope_and_cache(
            qkv,
            heads,
            norms,
            1e-5,
            rotation,
            KVCache(kv),
            slots,
            (double, double),
            interleaved=True,
            norm_after_rope=True,
        )
    torch.testing.assert_close(torch.cat(seen, 1).double(), expected, atol=5e-6, rtol=5e-6)
    torch.testing.assert_close(ours.double(), q, atol=5e-6, rtol=5e-6)
    stored = kv.flatten(1, 2)[:, slots].transpose(0, 1)
    torch.testing.assert_close(stored.double(), expected * 2, atol=1e-5, rtol=1e-5)


class _Computed(TorchDispatchMode):
    """Counts the operators that compute something, as the recorder of CPU graphs does."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not func.is_view and "empty" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_library
@pytest.mark.parametrize("case", UNQUANTIZED, ids=lambda case: case.label)
def test_rope_and_cache_is_recorded_and_replayed(case: RopeCacheCase) -> None:
    """A replay on other values is what a call with them gives, and torch computes nothing."""
    first = rope_cache_arguments(case)
    second = rope_cache_arguments(case, seed=1)
    qkv, heads, norms, rotation, kv, _, _, query_scale, flags, slots = first
    with torch.inference_mode():
        expected_q, expected_kv, _ = run_reference((second[0], heads, norms, *second[3:]), False)
        inputs = qkv.clone()
        with cpu_kernels.recording() as recorder, _Computed() as computed:
            q = rope_and_cache(
                inputs,
                heads,
                norms,
                1e-5,
                rotation,
                KVCache(kv, is_packed=True),
                slots,
                **flags,
                query_scale=query_scale,
            )
        assert computed.names == []
        kv.fill_(torch.nan)
        inputs.copy_(second[0])
        slots.copy_(second[-1])
        for old, new in zip(rotation or (), second[3] or (), strict=True):
            old.copy_(new)
        if query_scale is not None:
            query_scale.copy_(second[-3])
        library = cpu_kernels.library
        assert library is not None
        library.run(recorder.program())
    assert torch.equal(q, expected_q)
    assert torch.equal(kv.nan_to_num(7), pack_blocks(expected_kv).nan_to_num(7))


def placing(
    capability: int,
    folder: Path,
    cache_dtype: str | None,
    own: bool,
    normed: bool,
    dim: int,
    flags: Sequence[str] = (),
) -> Compiled:
    """As a model with 32 and 8 heads launches it."""
    kind = {None: "*bf16", "int8": "*i8", "fp8": "*fp8e4nv"}[cache_dtype]
    arguments = {
        "qkv": "*bf16",
        "q": "*bf16",
        "kv": kind,
        "slot_mapping": "*i64",
        "cos": "*fp32",
        "sin": "*fp32",
    }
    arguments |= {"qkv_stride": "i32", "head_stride": "i32", "eps": "fp32"}
    constants: dict[str, object] = {} if normed else {"q_norm": None, "k_norm": None}
    arguments |= {"q_norm": "*bf16", "k_norm": "*bf16"} if normed else {}
    if cache_dtype:
        arguments["scales"] = "*fp32"
    else:
        constants["scales"] = None
    if "query_scale" in flags:
        arguments["query_scale"] = "*fp32"
    else:
        constants["query_scale"] = None
    for flag in ("INTERLEAVED", "NORM_AFTER_ROPE", "SUBTRACT_MEAN", "PER_HEAD_NORM"):
        constants[flag] = flag in flags
    constants |= {
        "HEADS": 32,
        "ALL_HEADS": 48,
        "HEAD_DIM": dim,
        "PADDED_DIM": 1 << (dim - 1).bit_length(),
        "ROTARY_DIM": dim,
    }
    constants |= {"TILE": 1024 // constants["PADDED_DIM"], "DYNAMIC_SCALES": int(own)}
    constants["MAX_VALUE"] = {None: 0.0, "int8": 127.0, "fp8": 448.0}[cache_dtype]
    return compiled_for(capability, _rope_and_cache_kernel, arguments, constants, folder)


@pytest.mark.parametrize(
    ("capability", "cache_dtype", "own", "normed", "dim"),
    [
        (90, None, False, True, 128),
        (90, None, False, False, 80),
        (90, "int8", True, True, 128),
        (90, "fp8", True, False, 128),
        (90, "fp8", False, True, 256),
        (80, None, False, True, 128),
        (80, "int8", True, True, 128),
        (80, "int8", False, False, 64),
    ],
)
def test_rope_and_cache_kernel_compiles(
    capability: int, cache_dtype: str | None, own: bool, normed: bool, dim: int, tmp_path: Path
) -> None:
    compiled = placing(capability, tmp_path, cache_dtype, own, normed, dim)
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= 8192


@pytest.mark.parametrize(
    ("normed", "dim", "flags"),
    [
        (False, 128, ("INTERLEAVED", "query_scale")),
        (True, 128, ("NORM_AFTER_ROPE",)),
        (True, 512, ()),
        (True, 128, ("INTERLEAVED", "SUBTRACT_MEAN", "PER_HEAD_NORM")),
    ],
)
def test_rope_and_cache_kernel_compiles_with_flags(
    normed: bool, dim: int, flags: tuple[str, ...], tmp_path: Path
) -> None:
    compiled = placing(90, tmp_path, None, False, normed, dim, flags)
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= 8192
