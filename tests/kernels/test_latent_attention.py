"""Multi-head latent attention: its forms against each other, compiled for a CPU and in Triton."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.latent_cases import CASES, REPLAYED, Case
from support.paged_cases import assert_close
from support.triton_checks import SHARED_BYTES, compiled_for, interpreted

from llmkit.kernels import latent_attention as latent_attention_module
from llmkit.kernels import latent_attention_triton as triton_attention
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.latent_attention import (
    expanded_attention,
    latent_attention,
    latent_attention_reference,
    latent_projection,
    mla_attention,
)
from llmkit.kernels.latent_cache import LatentCache

HEADS, NOPE, ROPE, RANK, VALUE = 6, 16, 8, 24, 14
QUERY_LENS = [1, 23, 70, 5]
SEQ_LENS = [300, 23, 90, 64]
SCALE = 0.2
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
needs_kernels = pytest.mark.skipif(cpu_kernels.library is None, reason="no compiled kernels")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """Of every case, then of every replayed one."""
    calls = [(index, False) for index in range(len(CASES))]
    calls += [(index, True) for index in range(len(REPLAYED))]
    folder = tmp_path_factory.mktemp("interpreted")
    return interpreted("support.latent_cases", "run_kernel_interpreted", calls, folder)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_latent_attention_kernel_matches_the_reference(
    case: Case, answers: list[torch.Tensor]
) -> None:
    assert_close(answers[CASES.index(case)], case.inputs.expected(), case.dtype)


@pytest.mark.parametrize("case", REPLAYED, ids=lambda case: case.label)
def test_latent_attention_launch_replays_with_other_lengths(
    case: Case, answers: list[torch.Tensor]
) -> None:
    assert_close(answers[len(CASES) + REPLAYED.index(case)], case.inputs.expected(), case.dtype)


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize(
    ("rank", "rows", "dtype"),
    [
        (512, 32, torch.bfloat16),
        (512, 16, torch.bfloat16),
        (256, 64, torch.bfloat16),
        (512, 16, torch.float32),
    ],
)
def test_latent_attention_kernel_compiles_without_spills(
    capability: int, rank: int, rows: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    assert rows <= triton_attention.max_rows(rank, dtype)
    tokens, warps, stages = triton_attention.launch_sizes(rows, rank, dtype)
    pointers = dict.fromkeys(("q", "latents", "out"), TYPES[dtype])
    pointers |= dict.fromkeys(("block_table", "seq_lens", "query_start_loc", "units"), "*i32")
    pointers |= dict.fromkeys(("unit_out", "unit_lse"), "*fp32")
    constants = {
        "GROUP": rows,
        "BLOCK_SIZE": 16,
        "LATENT_DIM": rank + 64,
        "RANK": rank,
        "PADDED_RANK": rank,
        "PADDED_ROPE": 64,
        "ROWS": rows,
        "ROWS_USED": rows,
        "TOKENS": tokens,
    }
    compiled = compiled_for(
        capability,
        triton_attention._latent_attention_kernel,
        pointers | {"table_stride": "i32", "scale": "fp32"},
        constants,
        tmp_path,
        num_warps=warps,
        num_stages=stages,
    )
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= SHARED_BYTES[capability]
    if dtype == torch.bfloat16:
        assert "MMA" in compiled.code


class Step:
    """A step of several sequences, whose latents are cached."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, is_packed: bool = False) -> None:
        draw = torch.Generator().manual_seed(0)
        sizes = [-(-length // 16) for length in SEQ_LENS]
        order = torch.randperm(sum(sizes), generator=draw)
        self.tables = [part.tolist() for part in order.split(sizes)]
        self.cache = LatentCache(
            torch.zeros(1, sum(sizes), 16, RANK + ROPE, dtype=dtype), is_packed
        )
        whole = AttentionBatch.build(SEQ_LENS, SEQ_LENS, {None: self.tables}, 16).metadata(None)
        self.latents = torch.randn(sum(SEQ_LENS), RANK + ROPE, generator=draw).to(dtype).float()
        with torch.inference_mode():
            self.cache.store(self.latents, whole.slot_mapping)
        self.q = torch.randn(sum(QUERY_LENS), HEADS, NOPE + ROPE, generator=draw)
        self.weight = torch.randn(HEADS * (NOPE + VALUE), RANK, generator=draw) / RANK**0.5

    def new_latents(self) -> torch.Tensor:
        """Those of this step's tokens."""
        parts = self.latents.split(SEQ_LENS)
        return torch.cat([part[-new:] for part, new in zip(parts, QUERY_LENS, strict=True)])

    def batch(self, query_lens: list[int], seq_lens: list[int]) -> AttentionBatch:
        return AttentionBatch.build(query_lens, seq_lens, {None: self.tables}, 16)

    def absorbed(self, query_lens: list[int], seq_lens: list[int], q: torch.Tensor) -> torch.Tensor:
        projection = latent_projection(self.weight, HEADS, VALUE, torch.float32)
        metadata = self.batch(query_lens, seq_lens).metadata(None)
        sums = latent_attention(projection.absorb(q), self.cache, metadata, SCALE, RANK)
        return projection.project(sums)

    def expanded(self) -> torch.Tensor:
        metadata = self.batch(QUERY_LENS, SEQ_LENS).metadata(None)
        return expanded_attention(
            self.q,
            lambda latents: latents @ self.weight.T,
            self.new_latents(),
            self.cache,
            metadata,
            SCALE,
            RANK,
            VALUE,
        )


@torch.inference_mode()
def test_latent_attention_forms_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "library", None)
    step = Step()
    absorbed = step.absorbed(QUERY_LENS, SEQ_LENS, step.q)
    torch.testing.assert_close(absorbed, step.expanded(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("min_queries", [2, 30, 1000])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_kernels)])
@torch.inference_mode()
def test_latent_attention_expands_long_prompts(
    min_queries: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sequence by its own number of new tokens; some heads at a time."""
    if not compiled:
        monkeypatch.setattr(cpu_kernels, "library", None)
    monkeypatch.setattr(latent_attention_module, "MIN_EXPANDED_QUERIES", min_queries)
    monkeypatch.setattr(latent_attention_module, "EXPANDED_BYTES", 4 * 2 * 96 * 24 * 4)
    step = Step(is_packed=compiled)
    projection = latent_projection(step.weight, HEADS, VALUE, torch.float32)
    batch = step.batch(QUERY_LENS, SEQ_LENS)
    answer = mla_attention(step.q, projection, step.cache, batch, SCALE, RANK)
    torch.testing.assert_close(answer, step.expanded(), atol=1e-5, rtol=1e-5)
    split = batch.split_prompts(min_queries)
    found = 0 if split is None else len(split.prompts)
    assert found == sum(new >= min_queries for new in QUERY_LENS)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_compiled_latent_attention_matches_the_reference(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(dtype, is_packed=True)
    answer = step.absorbed(QUERY_LENS, SEQ_LENS, step.q)
    monkeypatch.setattr(cpu_kernels, "library", None)
    rows = step.cache.gather(torch.tensor(step.tables[1]), torch.float32)[: SEQ_LENS[1]]
    assert torch.equal(rows, step.latents.split(SEQ_LENS)[1]), "torch reads the same cache"
    projection = latent_projection(step.weight, HEADS, VALUE, torch.float32)
    metadata = step.batch(QUERY_LENS, SEQ_LENS).metadata(None)
    sums = latent_attention_reference(projection.absorb(step.q), step.cache, metadata, SCALE, RANK)
    torch.testing.assert_close(answer, projection.project(sums), atol=1e-5, rtol=1e-5)


@needs_kernels
@torch.inference_mode()
def test_compiled_latent_attention_does_not_depend_on_the_batch() -> None:
    """A token's result has the same bits, however prompts are cut and whatever is beside it."""
    step = Step(is_packed=True)
    together = step.absorbed(QUERY_LENS, SEQ_LENS, step.q).split(QUERY_LENS)
    for index, (new, length) in enumerate(zip(QUERY_LENS, SEQ_LENS, strict=True)):
        alone = Step(is_packed=True)
        alone.tables = [step.tables[index]]
        rows = step.q.split(QUERY_LENS)[index]
        parts = []
        for start in range(0, new, 7):
            part = rows[start : start + 7].contiguous()
            done = length - new + start + len(part)
            parts.append(alone.absorbed([len(part)], [done], part))
        assert torch.equal(torch.cat(parts), together[index])


@torch.inference_mode()
def test_latent_cache_clears_blocks() -> None:
    step = Step()
    step.cache.clear([0, 3])
    assert not step.cache.kv[:, [0, 3]].any()
    assert step.cache.kv[:, 1].any()
