"""The small Triton kernels against torch: by the interpreter, and compiled for two GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.elementwise_cases import (
    NORM_SHAPES,
    TOLERANCES,
    Placement,
    RopeCacheCase,
    add_norm_arguments,
    assert_same_outputs,
    rope_cache_arguments,
    rope_cache_cases,
    run_reference,
)
from support.triton_checks import Compiled, compiled_for, interpreted

from llmkit.kernels import elementwise
from llmkit.kernels.elementwise import act_and_mul, add_residual, add_rms_norm, rms_norm

PLACED = rope_cache_cases()


@pytest.fixture(scope="module")
def placements(tmp_path_factory: pytest.TempPathFactory) -> list[Placement]:
    calls: list[tuple[object, ...]] = [rope_cache_arguments(case) for case in PLACED]
    return interpreted(
        "support.elementwise_cases", "run_kernel", calls, tmp_path_factory.mktemp("interpreted")
    )


@pytest.mark.parametrize("case", PLACED, ids=lambda case: case.label)
def test_rope_and_cache_matches_torch(case: RopeCacheCase, placements: list[Placement]) -> None:
    arguments = rope_cache_arguments(case)
    assert_same_outputs(placements[PLACED.index(case)], run_reference(arguments), arguments, case)


def test_rope_and_cache_keeps_nan_in_a_quantized_cache(tmp_path: Path) -> None:
    """The engine finds such a sequence by its logits."""
    case = RopeCacheCase(2, 1, 64, 64, kv_cache_dtype="int8", dynamic_scales=True)
    calls = []
    for bad in (float("nan"), float("inf")):
        arguments = rope_cache_arguments(case)
        arguments[0][4, 2:, 5] = bad  # key and value
        calls.append(arguments)
    for (_, kv, scales), arguments in zip(
        interpreted("support.elementwise_cases", "run_kernel", calls, tmp_path), calls, strict=True
    ):
        assert scales is not None
        values = (kv.float() * scales).flatten(1, 2)[:, arguments[-1]]
        assert not values[:, 4].isfinite().all(-1).any()
        assert values[:, [0, 1, 2, 3, 5, 6]].isfinite().all()


def test_add_rms_norm_matches_torch(tmp_path: Path) -> None:
    calls = [add_norm_arguments(*one) for one in NORM_SHAPES]
    results = interpreted("llmkit.kernels.elementwise", "add_rms_norm_triton", calls, tmp_path)
    for call, got in zip(calls, results, strict=True):
        with torch.enable_grad():  # torch's own form
            expected = add_rms_norm(*call)
        limit = TOLERANCES[call[0].dtype]
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=limit, rtol=limit)


@pytest.mark.parametrize("grad", [False, True])
def test_add_rms_norm_without_update_or_weight(grad: bool) -> None:
    hidden, update, scale, weight, eps = add_norm_arguments(5, 100, torch.float32)
    with torch.set_grad_enabled(grad):
        total = add_residual(hidden, update, scale)
        torch.testing.assert_close(total, hidden + 0.4 * update)
        for given, wanted in (
            ((None, weight), (hidden, rms_norm(hidden, weight, eps))),
            ((update, None), (total, total)),
            ((update, weight), (total, rms_norm(total, weight, eps))),
        ):
            for ours, theirs in zip(
                add_rms_norm(hidden, given[0], scale, given[1], eps), wanted, strict=True
            ):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_act_and_mul_matches_torch(activation: str, tmp_path: Path) -> None:
    calls = [
        (
            torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(2)).to(dtype) * 4,
            activation != "silu",
        )
        for rows, size in ((1, 1536), (5, 100), (3, 2048))
        for dtype in (torch.float32, torch.float16)
    ]
    calls[0][0][0, :3] = torch.tensor([90.0, -90.0, 0.0])
    for (x, _), got in zip(
        calls,
        interpreted("llmkit.kernels.elementwise", "act_and_mul_triton", calls, tmp_path),
        strict=True,
    ):
        with torch.enable_grad():  # torch's own form
            expected = act_and_mul(x.float(), activation).to(x.dtype)  # type: ignore[arg-type]
        torch.testing.assert_close(
            got, expected, rtol=2e-3 if x.dtype == torch.float16 else 1e-5, atol=1e-5
        )


def swiglu_clamped_in_float64(x: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    gate, up = x.double().chunk(2, -1)
    gate = torch.where(gate > limit, limit, gate)
    up = torch.where(up.abs() > limit, up.sign() * limit, up)
    return gate / (1 + torch.exp(-alpha * gate)) * (up + 1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (3, 100), (130, 3072)])
def test_swiglu_clamped_on_a_cpu(shape: tuple[int, int], grad: bool) -> None:
    """Compiled, and in torch."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 6
    x[0, :8] = torch.tensor([0.0, -0.0, 100, -100, 1e-30, 7, -7, 20])
    x[0, -8:] = torch.tensor([0.0, -0.0, 100, -100, 1e-30, 7, -7, 20])
    with torch.set_grad_enabled(grad):
        for limit, alpha in ((7.0, 1.702), (2.5, 1.0)):
            out = elementwise.swiglu_clamped(x, limit, alpha)
            expected = swiglu_clamped_in_float64(x, limit, alpha)
            torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)
        x[0, 1] = torch.nan
        x[0, -2] = torch.nan
        out = elementwise.swiglu_clamped(x, 7.0)
        assert out[0, 1].isnan() and out[0, -2].isnan() and out[0, 0].isfinite()


def test_swiglu_clamped_kernel_matches_torch(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(4)
    calls = [
        (torch.randn(rows, 2 * size, generator=draw).mul(6).to(dtype), limit, 1.702)
        for rows, size, limit in ((1, 1536, 7.0), (5, 100, 3.0))
        for dtype in (torch.float32, torch.float16)
    ]
    calls[0][0][0, :3] = torch.tensor([90.0, -90.0, float("nan")])
    results = interpreted("llmkit.kernels.elementwise", "swiglu_clamped_triton", calls, tmp_path)
    for (x, limit, alpha), got in zip(calls, results, strict=True):
        expected = swiglu_clamped_in_float64(x, limit, alpha).to(x.dtype)
        limit = 2e-3 if x.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(got, expected, rtol=limit, atol=1e-5, equal_nan=True)


def placing(
    capability: int, folder: Path, cache_dtype: str | None, own: bool, normed: bool, dim: int
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
    constants |= {
        "HEADS": 32,
        "ALL_HEADS": 48,
        "HEAD_DIM": dim,
        "PADDED_DIM": 1 << (dim - 1).bit_length(),
        "ROTARY_DIM": dim,
    }
    constants |= {"TILE": 1024 // constants["PADDED_DIM"], "DYNAMIC_SCALES": int(own)}
    constants["MAX_VALUE"] = {None: 0.0, "int8": 127.0, "fp8": 448.0}[cache_dtype]
    return compiled_for(
        capability, elementwise._rope_and_cache_kernel, arguments, constants, folder
    )


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


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize(("tile", "warps"), [(1024, 2), (4096, 8), (elementwise.MAX_HIDDEN, 16)])
def test_add_rms_norm_kernel_compiles(
    capability: int, tile: int, warps: int, tmp_path: Path
) -> None:
    kinds = dict.fromkeys(("residual", "update", "weight", "total", "normed"), "*bf16")
    kinds |= {"scale": "fp32", "eps": "fp32", "size": "i32"}
    compiled = compiled_for(
        capability,
        elementwise._add_rms_norm_kernel,
        kinds,
        {"TILE": tile},
        tmp_path,
        num_warps=warps,
    )
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= 1024


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("gelu", [False, True])
def test_act_and_mul_kernel_compiles(capability: int, gelu: bool, tmp_path: Path) -> None:
    gate = {"gate_up": "*bf16", "y": "*bf16", "size": "i32"}
    assert (
        compiled_for(
            capability,
            elementwise._act_and_mul_kernel,
            gate,
            {"GELU": gelu, "TILE": 1024},
            tmp_path,
        ).stack_bytes
        == 0
    )


def test_swiglu_clamped_kernel_compiles(tmp_path: Path) -> None:
    types = {"gate_up": "*bf16", "y": "*bf16", "size": "i32", "limit": "fp32", "alpha": "fp32"}
    kernel = elementwise._swiglu_clamped_kernel
    assert compiled_for(90, kernel, types, {"TILE": 1024}, tmp_path).stack_bytes == 0
