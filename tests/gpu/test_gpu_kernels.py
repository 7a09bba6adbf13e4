"""On a CUDA device: kernels against their references, on random inputs, in memory full of NaN."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from support.elementwise_cases import (
    NORM_SHAPES,
    TOLERANCES,
    RopeCacheCase,
    add_norm_arguments,
    assert_same_outputs,
    rope_cache_arguments,
    rope_cache_cases,
    run_kernel,
    run_reference,
)
from support.expert_cases import MOE_CASES, MoeCase, expected, moe_arguments, run_fused_experts
from support.paged_cases import (
    BLOCK,
    CASES,
    IDS,
    REPLAYED,
    SCALE,
    AttentionInputs,
    Case,
    assert_close,
    poisoned_memory,
)
from support.sampling_cases import sampling_arguments

from llmkit.kernels import paged_attention as paged
from llmkit.kernels import sampling
from llmkit.kernels import sampling_triton as sampling_gpu
from llmkit.kernels.attention import paged_attention
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.elementwise import (
    Activation,
    act,
    act_and_mul,
    add_layer_norm,
    add_rms_norm,
    xielu,
)
from llmkit.kernels.fused_experts import FusedExperts
from llmkit.kernels.kv_cache import KVCache

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


def inputs_of(case: Case, dtype: torch.dtype) -> AttentionInputs:
    pytest.importorskip("triton")
    if case.kv_cache_dtype == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 is left to torch there")
    return AttentionInputs(replace(case, dtype=dtype), random.randrange(1 << 31))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_paged_attention_on_gpu(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(case, dtype)
    assert_close(inputs.run_kernel("cuda"), inputs.expected(), dtype)
    monkeypatch.setattr(paged, "num_programs", lambda *_: case.programs)
    assert_close(inputs.run_kernel("cuda"), inputs.expected(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("long", [1] * 3, [5000, 700, 3001], heads=(32, 8), dim=128),
        Case(
            "long, fp8",
            [1] * 3,
            [5000, 700, 3001],
            heads=(32, 8),
            dim=128,
            kv_cache_dtype="fp8",
            dynamic_scales=True,
        ),
        Case("prompt", [1500, 1, 400], [1500, 2000, 900], heads=(8, 2), dim=128),
        Case("window", [1500, 1], [1500, 2000], heads=(8, 2), dim=256, window=512, softcap=30.0),
    ],
    ids=lambda case: case.label,
)
def test_paged_attention_with_long_contexts(case: Case, dtype: torch.dtype) -> None:
    inputs = inputs_of(case, dtype)
    assert_close(inputs.run_kernel("cuda"), inputs.expected(), dtype)


@pytest.mark.parametrize("case", REPLAYED, ids=lambda case: case.label)
def test_paged_attention_graph_replays_with_other_lengths(case: Case) -> None:
    inputs = inputs_of(case, torch.bfloat16)
    longest = max(map(len, inputs.tables)) + 20
    lengths = [longest * BLOCK] * len(case.query_lens)
    others = [[0] * longest] * len(case.query_lens)
    batch = AttentionBatch.build(case.query_lens, lengths, {case.window: others}, BLOCK, "cuda")
    metadata = batch.metadata(case.window)
    parts = (inputs.with_nan.kv, inputs.with_nan.scales, inputs.with_nan.static_scales)
    cache = KVCache(*(part if part is None else part.cuda() for part in parts))
    q = inputs.q.cuda()
    with poisoned_memory():
        paged_attention(q, cache, metadata, SCALE, case.softcap)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = paged_attention(q, cache, metadata, SCALE, case.softcap)
    blocks = torch.tensor(
        [table + [-1] * (longest - len(table)) for table in inputs.tables], device="cuda"
    )
    metadata.update_block_tables(blocks, torch.tensor(case.seq_lens, device="cuda"))
    graph.replay()
    assert_close(answer, inputs.expected(), torch.bfloat16)


def moved(parts: tuple[object, ...]) -> list[Any]:
    """Arguments of a kernel on the device."""
    return [
        moved(part)
        if isinstance(part, tuple)
        else part.cuda()
        if isinstance(part, torch.Tensor)
        else part
        for part in parts
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", rope_cache_cases()[::2], ids=lambda case: case.label)
def test_rope_and_cache_matches_torch(case: RopeCacheCase, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    case = replace(case, dtype=dtype)
    if case.kv_cache_dtype == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 is left to torch there")
    arguments = rope_cache_arguments(case, random.randrange(1 << 31))
    with poisoned_memory():
        got = run_kernel(*moved(arguments))
    assert_same_outputs(got, run_reference(arguments), arguments, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "size"), sorted({one[:2] for one in NORM_SHAPES} | {(700, 5120), (2, 20000)})
)
def test_add_rms_norm_matches_torch(rows: int, size: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    call = add_norm_arguments(rows, size, dtype, random.randrange(1 << 31))
    with poisoned_memory():
        got = add_rms_norm(*moved(call))
    for ours, theirs in zip(got, add_rms_norm(*call), strict=True):
        torch.testing.assert_close(
            ours.cpu(), theirs, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_add_layer_norm_matches_torch(biased: bool, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    seed = random.randrange(1 << 31)
    hidden, update, scale, weight, eps = add_norm_arguments(70, 5120, dtype, seed)
    call = (hidden, update, scale, weight, weight.flip(0) if biased else None, eps)
    with poisoned_memory():
        got = add_layer_norm(*moved(call))
    for ours, theirs in zip(got, add_layer_norm(*call), strict=True):
        torch.testing.assert_close(
            ours.cpu(), theirs, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_match_torch(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    x = (torch.randn(33, 2 * 1100) * 4).to(dtype)
    parameters = torch.tensor([[0.3], [-0.7], [0.5], [-1e-6]])
    limit = 4 * TOLERANCES[dtype]
    with poisoned_memory():
        pairs = [(xielu(x.cuda(), *parameters.cuda()), xielu(x.float(), *parameters))]
        for activation in get_args(Activation):
            pairs.append((act(x.cuda(), activation), act(x.float(), activation)))
            both = act_and_mul(x.cuda(), activation), act_and_mul(x.float(), activation)
            pairs.append(both)
    for ours, theirs in pairs:
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.cpu().float(), theirs, atol=limit, rtol=limit)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "case", [*MOE_CASES, MoeCase(2000, 8, 64, 256, 320)], ids=lambda case: case.label
)
def test_fused_experts_on_gpu(case: MoeCase, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    arguments = moe_arguments(case, dtype, random.randrange(1 << 31))
    with poisoned_memory():
        got = run_fused_experts(*moved(arguments))
    assert_close(got, expected(*arguments).float(), dtype)


def test_fused_experts_graph_replays_with_other_choices() -> None:
    pytest.importorskip("triton")
    case = MoeCase(24, 4, 16, 128, 96)
    first, second = (
        moe_arguments(case, torch.bfloat16, random.randrange(1 << 31)) for _ in range(2)
    )
    arguments = moved(first)
    run_fused_experts(*arguments)
    stacks = arguments[3:5]
    run = FusedExperts(*stacks, *first[5:])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = run(*arguments[:3])
    for there, new in zip(arguments[:5], second[:5], strict=True):
        there.copy_(new)
    graph.replay()
    assert_close(answer, expected(*second).float(), torch.bfloat16)


@pytest.mark.parametrize("size", [130, 5000, 151936])
def test_sample_on_gpu_matches_the_reference(size: int) -> None:
    """But for draws that are as good as equal."""
    pytest.importorskip("triton")
    arguments = sampling_arguments(size, random.randrange(1 << 31), copies=4)
    arguments[0][7, size // 2] = float("nan")
    got = sampling_gpu.sample(*moved(arguments)).cpu()
    wanted = sampling.sample(*arguments)
    assert got[7] == -1
    assert (got != wanted).sum() <= 1 + len(got) // 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sample_on_gpu_is_the_same_in_every_run(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    logits, *parameters = moved(sampling_arguments(128_256, random.randrange(1 << 31)))
    first = sampling_gpu.sample(logits.to(dtype), *parameters)
    for _ in range(5):
        assert torch.equal(sampling_gpu.sample(logits.to(dtype), *parameters), first)


def test_sample_graph_replays_with_other_parameters() -> None:
    pytest.importorskip("triton")
    first, second = (sampling_arguments(5000, random.randrange(1 << 31)) for _ in range(2))
    arguments = moved(first)
    sampling_gpu.sample(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = sampling_gpu.sample(*arguments)
    for there, new in zip(
        arguments, [second[0], *(part.flip(0) for part in second[1:])], strict=True
    ):
        there.copy_(new)
    graph.replay()
    assert torch.equal(ids, sampling_gpu.sample(*arguments))
    assert (ids.cpu() != sampling.sample(*(part.cpu() for part in arguments))).sum() <= 2
