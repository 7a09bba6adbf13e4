"""Sampling in Triton: interpreted against the reference, and compiled for two GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.sampling_cases import sampling_arguments
from support.triton_checks import compiled_for, interpreted

from llmkit.kernels import sampling_triton as sampling_gpu
from llmkit.kernels.sampling import sample

SIZES = (5000, 130)


def test_sample_kernel_matches_the_reference(tmp_path: Path) -> None:
    calls = [sampling_arguments(size) for size in SIZES]
    for call, got in zip(
        calls, interpreted("llmkit.kernels.sampling_triton", "sample", calls, tmp_path), strict=True
    ):
        expected = sample(*call)
        assert len(set(expected.tolist())) > 10
        assert got.tolist() == expected.tolist()


def test_sample_kernel_gives_no_token_for_nan_rows(tmp_path: Path) -> None:
    logits, *parameters = (part[:8] for part in sampling_arguments(5000))
    for row, value in ((1, float("nan")), (3, float("inf")), (5, float("-inf"))):
        logits[row, 4500] = value
    wide = torch.cat((logits, torch.full((8, 3), float("nan"))), 1)[:, :5000]  # a stride of its own
    (got,) = interpreted(
        "llmkit.kernels.sampling_triton", "sample", [(wide, *parameters)], tmp_path
    )
    expected = sample(logits, *parameters)
    assert got.tolist() == [-1 if row in (1, 3, 5) else int(expected[row]) for row in range(8)]


def test_sample_kernel_keeps_ties(tmp_path: Path) -> None:
    """And no others: each of them is drawn by some seed."""
    count = 40
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


@pytest.mark.parametrize("capability", [90, 80])
def test_sample_kernel_compiles(capability: int, tmp_path: Path) -> None:
    floats = dict.fromkeys(("logits", "temperature", "top_p", "min_p"), "*fp32")
    kinds = (
        floats
        | dict.fromkeys(("top_k", "seeds", "counters", "ids"), "*i64")
        | {"row_stride": "i32", "vocab_size": "i32"}
    )
    compiled = compiled_for(
        capability,
        sampling_gpu._sample_kernel,
        kinds,
        {"TILE": 2048, "WAYS": 4},
        tmp_path,
        num_warps=16,
    )
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= 99 * 1024
