"""Sampling in Triton: interpreted against the reference, and compiled for two GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.sampling_cases import sampling_arguments
from support.triton_checks import compiled_for, interpreted

from llmkit.kernels import sampling_triton as sampling_gpu
from llmkit.kernels.sampling import sample
from llmkit.kernels.triton_support import jit, tl

SIZES = ((1300, 18, 2), (130, 0, 1))  # tokens, and the rows from one on in steps


def test_sample_kernel_matches_the_reference(tmp_path: Path) -> None:
    calls = [
        tuple(part[at::step].contiguous() for part in sampling_arguments(size))
        for size, at, step in SIZES
    ]
    for call, got in zip(
        calls, interpreted("llmkit.kernels.sampling_triton", "sample", calls, tmp_path), strict=True
    ):
        expected = sample(*call)
        assert len(set(expected.tolist())) > 8
        assert got.tolist() == expected.tolist()


def test_sample_kernel_gives_no_token_for_nan_rows(tmp_path: Path) -> None:
    logits, *parameters = (part[:8] for part in sampling_arguments(1300))
    for row, value in ((1, float("nan")), (3, float("inf")), (5, float("-inf"))):
        logits[row, 1200] = value
    wide = torch.cat((logits, torch.full((8, 3), float("nan"))), 1)[:, :1300]  # a stride of its own
    (got,) = interpreted(
        "llmkit.kernels.sampling_triton", "sample", [(wide, *parameters)], tmp_path
    )
    expected = sample(logits, *parameters)
    assert got.tolist() == [-1 if row in (1, 3, 5) else int(expected[row]) for row in range(8)]


def test_sample_kernel_keeps_ties(tmp_path: Path) -> None:
    """And no others: each of them is drawn by some seed."""
    count = 14
    logits = torch.full((count, 200), -30.0)
    logits[:, 3] = 1.0
    logits[:, 50:54] = 0.5
    ones = torch.ones(count)
    common = (torch.zeros(count), torch.arange(count), torch.zeros(count, dtype=torch.int64))
    calls = [
        (logits, ones, torch.full((count,), 3), ones, *common),
        (logits, ones, torch.zeros(count, dtype=torch.int64), ones * 0.6, *common),
    ]
    for got in interpreted("llmkit.kernels.sampling_triton", "sample", calls, tmp_path):
        assert set(got.tolist()) == {3, 50, 51, 52, 53}


def test_sample_kernels_match_the_reference_in_extreme_cases(tmp_path: Path) -> None:
    """Few tokens above a floor, ties, 16-bit logits, and parameters at the ends of their ranges."""
    draw = torch.Generator().manual_seed(7)
    only = torch.full((1, 300), -1e30)
    only[0, 211] = 1.5
    logits = torch.cat(
        (
            torch.randn(5, 300, generator=draw) * 3,
            torch.zeros(1, 300),
            only,
            torch.randn(1, 300, generator=draw).round() * 1e-4,
            torch.randn(1, 300, generator=draw) * 1e30,
        )
    )
    asked = [
        (1.0, 0, 1e-9, 0.0),
        (1.0, 0, 0.0, 0.0),
        (1.0, 0, 1.0, 1.0),
        (1e-38, 0, 0.9, 0.0),
        (1e3, 30, 0.5, 0.0),
        (1.0, 3, 0.5, 0.1),
        (5.0, 20, 0.99, 0.0),
        (1.0, 50, 0.9999, 0.0),
        (0.7, 299, 0.3, 0.0),
        (2.0, 1, 1.0, 0.0),
        (0.0, 5, 0.5, 0.0),
    ]
    calls = []
    for turn, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        # Each kind of logits meets other parameters in each dtype.
        order = [(turn * 4 + 5 * row) % len(asked) for row in range(len(logits))]
        rows = logits[torch.arange(len(order)) % len(logits)]
        temperature, top_k, top_p, min_p = torch.tensor(asked, dtype=torch.float64)[order].T
        seeds = torch.randint(-(1 << 62), 1 << 62, (len(rows),), generator=draw)
        calls.append(
            (
                (rows.clamp(-6e4, 6e4) if dtype == torch.float16 else rows).to(dtype),
                temperature.float(),
                top_k.long(),
                top_p.float(),
                min_p.float(),
                seeds,
                seeds % 1000,
            )
        )
    for call, got in zip(
        calls, interpreted("llmkit.kernels.sampling_triton", "sample", calls, tmp_path), strict=True
    ):
        logits, *parameters = call
        assert got.tolist() == sample(logits.float(), *parameters).tolist()


def sample_with_few_candidates(*arguments: torch.Tensor) -> torch.Tensor:
    """`sample` with a short list of candidates, so that rows need every level."""
    assert sampling_gpu.CANDIDATES == 4096
    sampling_gpu.CANDIDATES = int(arguments[-1])
    try:
        return sampling_gpu.sample(*arguments[:-1])
    finally:
        sampling_gpu.CANDIDATES = 4096


@pytest.mark.parametrize("candidates", [64, 8])
def test_sample_kernels_match_the_reference_with_crowded_brackets(
    candidates: int, tmp_path: Path
) -> None:
    """Some rows are counted twice, and some are searched as a whole."""
    call = [part[20::5].contiguous() for part in sampling_arguments(1300, seed=3)]
    (got,) = interpreted(
        "kernels.test_sampling_triton",
        "sample_with_few_candidates",
        [(*call, torch.tensor(candidates))],
        tmp_path,
    )
    assert got.tolist() == sample(*call).tolist()


def exponential(u: torch.Tensor) -> torch.Tensor:
    """The kernel's -log(1 - u), run by the interpreter."""
    out = torch.empty_like(u)
    _exponential_kernel[(1,)](u, out, count=len(u))
    return out


@jit
def _exponential_kernel(u: tl.tensor, out: tl.tensor, count: tl.constexpr) -> None:
    at = tl.arange(0, count)
    tl.store(out + at, sampling_gpu._exponential(tl.load(u + at)))


def test_exponential_has_the_precision_of_float32(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 1 << 31, (1 << 16,), generator=draw, dtype=torch.int64)
    bits[: 1 << 14] >>= torch.arange(1 << 14) % 31
    u = ((bits.float() + 0.5) * 2.0**-31).clamp_max(1 - 2.0**-24)
    u[:2] = torch.tensor([2.0**-32, 1 - 2.0**-24])
    (got,) = interpreted("kernels.test_sampling_triton", "exponential", [(u,)], tmp_path)
    truth = -torch.log1p(-u.double())
    assert ((got / truth - 1).abs() < 4e-7).all()


def test_sample_splits_fill_a_gpu() -> None:
    splits = {rows: sampling_gpu.num_splits(rows, 128_256) for rows in (1, 16, 64, 256, 5000)}
    assert splits == {1: 64, 16: 64, 64: 16, 256: 4, 5000: 1}
    assert sampling_gpu.num_splits(1, 5) == 1


@pytest.mark.parametrize(("capability", "dtype"), [(90, "*bf16"), (80, "*fp32")])
def test_sample_kernels_compile(capability: int, dtype: str, tmp_path: Path) -> None:
    kinds = (
        {"logits": dtype}
        | dict.fromkeys(("temperature", "top_p", "min_p", "extremes", "masses"), "*fp32")
        | dict.fromkeys(("top_k", "seeds", "counters", "ids"), "*i64")
        | dict.fromkeys(("tokens", "counts", "candidates"), "*i32")
        | dict.fromkeys(("rows", "row_stride", "vocab_size", "slice_size"), "i32")
    )
    gpu = sampling_gpu
    constants = {
        "SPLITS": 16,
        "WAYS": gpu.WAYS,
        "CANDIDATES": gpu.CANDIDATES,
        "TILE": gpu.TILE,
        "THREADS": 32 * gpu.NUM_WARPS,
        "UNROLL": gpu.UNROLL,
        "LEVEL": 1,
    }
    for kernel, warps, tile in (
        (gpu._find_extremes_kernel, gpu.NUM_WARPS, gpu.TILE),
        (gpu._count_kernel, gpu.NUM_WARPS, gpu.TILE),
        (gpu._draw_kernel, gpu.NUM_WARPS, gpu.TILE),
        (gpu._choose_kernel, 16, gpu.CANDIDATES),
    ):
        names = kernel.arg_names
        compiled = compiled_for(
            capability,
            kernel,
            {name: kinds[name] for name in names if name in kinds},
            {name: (constants | {"TILE": tile})[name] for name in names if name in constants},
            tmp_path,
            num_warps=warps,
        )
        assert compiled.stack_bytes == 0
        assert compiled.shared_bytes <= 16 * 1024
