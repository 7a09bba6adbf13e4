"""On a CUDA device: kernels against their references, on fresh inputs, with memory that holds NaN (`make gpu`)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from elementwise_cases import (
    SUMS,
    TOLERANCES,
    Placed,
    assert_placed,
    by_kernel,
    by_reference,
    placed_arguments,
    placed_cases,
    sum_arguments,
)  # fmt: skip
from expert_cases import MIXTURES, Mixture, expected, mixed, mixture_arguments
from paged_cases import BLOCK, CASES, IDS, REPLAYED, SCALE, Case, Scene, assert_close, poisoned_memory
from sampling_cases import rows

from llmkit.kernels import paged, sampling, sampling_gpu
from llmkit.kernels.attention import AttentionBatch, KvCache, paged_attention
from llmkit.kernels.elementwise import add_norm
from llmkit.kernels.experts import Experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """Which the kernels do not give."""
    with torch.inference_mode():
        yield


def scene_of(case: Case, dtype: torch.dtype) -> Scene:
    pytest.importorskip("triton")
    if case.codes == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 is left to torch there")
    return Scene(replace(case, dtype=dtype), random.randrange(1 << 31))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_paged_attention(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_of(case, dtype)
    assert_close(scene.answer("cuda"), scene.expected(), dtype)
    monkeypatch.setattr(paged, "_splits", lambda *_: case.splits)
    assert_close(scene.answer("cuda"), scene.expected(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [
    Case("long", [1] * 3, [5000, 700, 3001], heads=(32, 8), dim=128),
    Case("long, fp8", [1] * 3, [5000, 700, 3001], heads=(32, 8), dim=128, codes="fp8", own_scales=True),
    Case("prompt", [1500, 1, 400], [1500, 2000, 900], heads=(8, 2), dim=128),
    Case("window", [1500, 1], [1500, 2000], heads=(8, 2), dim=256, window=512, softcap=30.0),
], ids=lambda case: case.label)  # fmt: skip
def test_long_contexts(case: Case, dtype: torch.dtype) -> None:
    scene = scene_of(case, dtype)
    assert_close(scene.answer("cuda"), scene.expected(), dtype)


@pytest.mark.parametrize("case", REPLAYED, ids=lambda case: case.label)
def test_a_graph_is_replayed_with_other_contexts(case: Case) -> None:
    scene = scene_of(case, torch.bfloat16)
    longest = max(map(len, scene.tables)) + 20
    lengths, others = [longest * BLOCK] * len(case.new), [[0] * longest] * len(case.new)
    group = AttentionBatch.build(case.new, lengths, {case.window: others}, BLOCK, "cuda").of(case.window)
    parts = (scene.poisoned.kv, scene.poisoned.scales, scene.poisoned.stored)
    cache, q = KvCache(*(part if part is None else part.cuda() for part in parts)), scene.q.cuda()  # type: ignore[arg-type]
    with poisoned_memory():
        paged_attention(q, cache, group, SCALE, case.softcap)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = paged_attention(q, cache, group, SCALE, case.softcap)
    blocks = torch.tensor([table + [-1] * (longest - len(table)) for table in scene.tables], device="cuda")
    group.refresh(blocks, torch.tensor(case.contexts, device="cuda"))
    graph.replay()
    assert_close(answer, scene.expected(), torch.bfloat16)


def moved(parts: tuple[object, ...]) -> list[Any]:
    """Arguments of a kernel on the device."""
    return [
        moved(part) if isinstance(part, tuple) else part.cuda() if isinstance(part, torch.Tensor) else part
        for part in parts
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", placed_cases()[::2], ids=lambda case: case.label)
def test_queries_keys_and_values_find_their_places(case: Placed, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    case = replace(case, dtype=dtype)
    if case.codes == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 is left to torch there")
    arguments = placed_arguments(case, random.randrange(1 << 31))
    with poisoned_memory():
        got = by_kernel(*moved(arguments))
    assert_placed(got, by_reference(arguments), arguments, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), sorted({one[:2] for one in SUMS} | {(700, 5120), (2, 20000)}))
def test_residual_sums_and_their_norms(rows: int, size: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    call = sum_arguments(rows, size, dtype, random.randrange(1 << 31))
    with poisoned_memory():
        got = add_norm(*moved(call))
    for ours, theirs in zip(got, add_norm(*call), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", [*MIXTURES, Mixture(2000, 8, 64, 256, 320)], ids=lambda case: case.label)
def test_mixtures_of_experts(case: Mixture, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    arguments = mixture_arguments(case, dtype, random.randrange(1 << 31))
    with poisoned_memory():
        got = mixed(*moved(arguments))
    assert_close(got, expected(*arguments).float(), dtype)


def test_a_graph_is_replayed_with_other_choices() -> None:
    pytest.importorskip("triton")
    case = Mixture(24, 4, 16, 128, 96)
    first, second = (mixture_arguments(case, torch.bfloat16, random.randrange(1 << 31)) for _ in range(2))
    arguments = moved(first)
    mixed(*arguments)
    stacks = arguments[3:5]
    run = Experts(*stacks, *first[5:])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = run(*arguments[:3])
    for there, new in zip(arguments[:5], second[:5], strict=True):
        there.copy_(new)
    graph.replay()
    assert_close(answer, expected(*second).float(), torch.bfloat16)


@pytest.mark.parametrize("size", [130, 5000, 151936])
def test_sampling_takes_the_tokens_of_the_reference(size: int) -> None:
    """But for draws that are as good as equal."""
    pytest.importorskip("triton")
    arguments = rows(size, random.randrange(1 << 31), copies=4)
    arguments[0][7, size // 2] = float("nan")
    got, wanted = sampling_gpu.sample(*moved(arguments)).cpu(), sampling.sample(*arguments)
    assert got[7] == -1
    assert (got != wanted).sum() <= 1 + len(got) // 100


def test_a_graph_samples_with_other_parameters() -> None:
    pytest.importorskip("triton")
    first, second = (rows(5000, random.randrange(1 << 31)) for _ in range(2))
    arguments = moved(first)
    sampling_gpu.sample(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = sampling_gpu.sample(*arguments)
    for there, new in zip(arguments, [second[0], *(part.flip(0) for part in second[1:])], strict=True):
        there.copy_(new)
    graph.replay()
    assert torch.equal(ids, sampling_gpu.sample(*arguments))
    assert (ids.cpu() != sampling.sample(*(part.cpu() for part in arguments))).sum() <= 2
