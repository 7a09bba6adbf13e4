"""On a CUDA device: kernels against their references, on fresh inputs, with memory that holds NaN (`make gpu`)."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from paged_cases import BLOCK, CASES, IDS, REPLAYED, SCALE, Case, Scene, assert_close, poisoned_memory

from llmkit.kernels import paged
from llmkit.kernels.attention import AttentionBatch, KvCache, paged_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


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
