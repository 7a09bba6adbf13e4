"""Paged attention against a plain dense one, sequence by sequence, and the 8-bit caches against rounded values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_checkpoint

from llmkit.checkpoint.source import open_checkpoint
from llmkit.kernels.attention import CODES, AttentionBatch, KvCache, paged_attention
from llmkit.kernels.elementwise import rotate_
from llmkit.kernels.rounding import round_tensor, round_tokens
from llmkit.model.decoder import Decoder
from llmkit.model.linear import Rounding
from llmkit.model.loader import load_model

BLOCK, DIM, SCALE = 4, 8, 0.3
KINDS = {"int8": "int", "fp8": "float"}
MIXED = ([1, 7, 1, 33, 5, 5, 1, 20], [30, 7, 1, 50, 9, 61, 64, 21])  # new tokens, contexts


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, softcap: float | None) -> torch.Tensor:
    """The last tokens q [n, N, D] of a sequence with keys and values [L, K, D]; everything in float64."""
    new, length = len(q), len(k)
    share = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(share, 1), v.double().repeat_interleave(share, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    for row in range(new):
        place = length - new + row
        scores[:, row, place + 1 :] = float("-inf")
        if window is not None:
            scores[:, row, : max(0, place - window + 1)] = float("-inf")
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).float()


class Scene:
    """Sequences with random keys and values in a paged cache whose other memory is garbage."""

    def __init__(
        self, new: list[int], contexts: list[int], heads: tuple[int, int] = (6, 2), window: int | None = None,
        seed: int = 0, shuffled: bool = True,
    ) -> None:  # fmt: skip
        self.new, self.contexts, self.window = new, contexts, window
        draw = torch.Generator().manual_seed(seed)
        q_heads, kv_heads = heads
        self.kv = [torch.randn(length, 2 * kv_heads, DIM, generator=draw) for length in contexts]
        self.q = [torch.randn(count, q_heads, DIM, generator=draw) for count in new]
        sizes = [-(-length // BLOCK) for length in contexts]
        count = sum(sizes) + 3
        ids = torch.randperm(count, generator=draw).tolist() if shuffled else list(range(count))
        self.tables = [[ids.pop() if shuffled else ids.pop(0) for _ in range(size)] for size in sizes]
        self.spare = ids
        self.cache = KvCache(torch.randn(2 * kv_heads, count, BLOCK, DIM, generator=draw) * 100)

    def batch(self, tables: list[list[int]] | None = None) -> AttentionBatch:
        return AttentionBatch.build(self.new, self.contexts, {self.window: tables or self.tables}, BLOCK)

    def fill(self) -> None:
        """Put what came before this step into the cache, and then the step's own."""
        before = [length - count for count, length in zip(self.new, self.contexts, strict=True)]
        old = [(kv[:n], n, table) for kv, n, table in zip(self.kv, before, self.tables, strict=True) if n]
        if old:
            earlier = AttentionBatch.build(
                [n for _, n, _ in old], [n for _, n, _ in old], {None: [t for *_, t in old]}, BLOCK
            )
            self.cache.store(torch.cat([kv for kv, *_ in old]), earlier.of(None).slots)
        own = [kv[n:] for kv, n in zip(self.kv, before, strict=True)]
        self.cache.store(torch.cat(own), self.batch().of(self.window).slots)

    def answer(self, batch: AttentionBatch | None = None, softcap: float | None = None) -> torch.Tensor:
        group = (batch or self.batch()).of(self.window)
        return paged_attention(torch.cat(self.q), self.cache, group, SCALE, softcap)

    def expected(self, softcap: float | None = None) -> torch.Tensor:
        parts = [dense(q, *kv.chunk(2, 1), self.window, softcap) for q, kv in zip(self.q, self.kv, strict=True)]
        return torch.cat(parts)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3, 12, 40])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_mixed_batches(window: int | None, softcap: float | None, heads: tuple[int, int]) -> None:
    scene = Scene(*MIXED, heads, window)
    scene.fill()
    close(scene.answer(softcap=softcap), scene.expected(softcap))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 32), st.integers(0, 60)), min_size=1, max_size=7),
    st.sampled_from([None, 1, 5, 17, 64]),
    st.booleans(),
)
def test_any_batch(lengths: list[tuple[int, int]], window: int | None, shuffled: bool) -> None:
    scene = Scene([n for n, _ in lengths], [n + before for n, before in lengths], window=window, shuffled=shuffled)
    scene.fill()
    close(scene.answer(), scene.expected())


@pytest.mark.parametrize("before", [0, 70])
@pytest.mark.parametrize("window", [None, 50, 1024])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_long_chunks(before: int, window: int | None, softcap: float | None) -> None:
    scene = Scene([600, 1], [600 + before, 40], window=window)
    scene.fill()
    close(scene.answer(softcap=softcap), scene.expected(softcap))


@pytest.mark.parametrize("shuffled", [True, False])
def test_blocks_that_left_the_window_are_never_read(shuffled: bool) -> None:
    scene = Scene(*MIXED, window=10, shuffled=shuffled)
    scene.fill()
    tables = [list(table) for table in scene.tables]
    for table, new, context in zip(tables, *MIXED, strict=True):
        for index in range(max(0, context - new - 10 + 1) // BLOCK):
            scene.cache.kv[:, table[index]] = float("nan")
            table[index] = -1
    assert sum(table.count(-1) for table in tables) > 20
    scene.cache.kv[:, scene.spare] = float("nan")
    close(scene.answer(scene.batch(tables)), scene.expected())


def test_a_freed_block_that_is_needed_is_noticed() -> None:
    scene = Scene([1], [30], window=10)
    (table,) = scene.tables
    with pytest.raises(AssertionError, match="within the window"):
        scene.answer(scene.batch([[*table[:-2], -1, table[-1]]]))
    with pytest.raises(AssertionError, match="a new token"):
        scene.batch([[*table[:-1], -1]]).of(10).slots.sum()


def test_every_window_has_its_own_tables() -> None:
    """One batch for the layers of both kinds, whose caches have different blocks."""
    whole, sliding = Scene(*MIXED), Scene(*MIXED, window=12, seed=1)
    tables = {None: whole.tables, 12: sliding.tables}
    batch = AttentionBatch.build(*MIXED, tables, BLOCK)
    for scene in (whole, sliding):
        scene.fill()
        assert torch.equal(batch.of(scene.window).slots, scene.batch().of(scene.window).slots)
        close(scene.answer(batch), scene.expected())
    assert not torch.equal(batch.of(None).slots, batch.of(12).slots)


def test_a_window_without_tables_has_those_of_whole_contexts() -> None:
    scene = Scene(*MIXED)
    scene.fill()
    batch = scene.batch()
    scene.window = 12
    close(scene.answer(batch), scene.expected())


def test_an_answer_does_not_depend_on_the_rest_of_the_batch() -> None:
    together = Scene(*MIXED)
    together.fill()
    answers = together.answer().split(MIXED[0])
    for index, answer in enumerate(answers):
        alone = Scene([MIXED[0][index]], [MIXED[1][index]])
        alone.q, alone.kv = [together.q[index]], [together.kv[index]]
        alone.fill()
        close(answer, alone.answer())


def test_complete_sequences() -> None:
    lengths = [5, 16, 1, 40]
    scene = Scene(lengths, lengths)
    batch = AttentionBatch.for_sequences(lengths, BLOCK)
    scene.cache = KvCache(torch.full((4, batch.blocks, BLOCK, DIM), float("nan")))
    scene.cache.clear(list(range(batch.blocks)))
    scene.cache.store(torch.cat(scene.kv), batch.of(None).slots)
    close(scene.answer(batch), scene.expected())


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("stored", [True, False])
def test_codes_are_what_rounding_gives(name: str, stored: bool) -> None:
    """Attention over codes is exactly attention over a cache of rounded values."""
    coded, plain = Scene(*MIXED), Scene(*MIXED)
    kv = torch.zeros(coded.cache.kv.shape, dtype=CODES[name])
    if stored:
        scale = torch.tensor([0.02, 0.05])
        coded.cache = KvCache(kv, stored=scale.repeat_interleave(2)[:, None, None])
        for values in plain.kv:
            for part, one in zip(values.chunk(2, 1), scale.split(1), strict=True):
                part.copy_(round_tensor(part, one, KINDS[name]))
    else:
        coded.cache = KvCache(kv, torch.zeros(*kv.shape[:3], 1))
        plain.kv = [round_tokens(values, KINDS[name]) for values in plain.kv]
    coded.fill()
    plain.fill()
    assert not torch.equal(plain.kv[0], coded.kv[0])
    assert torch.equal(coded.answer(), plain.answer())
    coded.cache.clear(coded.tables[3])
    assert not coded.cache.gather(torch.tensor(coded.tables[3]), torch.float32).any()
    assert coded.cache.gather(torch.tensor(coded.tables[5]), torch.float32).any()


@pytest.mark.parametrize("rotated", [8, 4])
def test_rotation_is_a_product_of_complex_numbers(rotated: int) -> None:
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(5.0)[:, None, None] * 0.3 / torch.arange(1, rotated // 2 + 1)
    half = rotated // 2
    turned = torch.complex(x[..., :half], x[..., half:rotated]) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag, x[..., rotated:]), dim=-1)
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        ours = x.to(dtype, copy=True)
        rotate_(ours, cos, sin)
        torch.testing.assert_close(ours.float(), expected, atol=error, rtol=error)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path: Path = tiny_checkpoint(tmp_path_factory.mktemp("attention"), "gemma2", dtype="float32")
    return load_model(open_checkpoint(path), torch.float32)


def run(model: Decoder, caches: list[KvCache], chunks: list[int]) -> torch.Tensor:
    """Logits of 50 tokens, computed in chunks."""
    tokens = torch.randint(3, 512, (50,), generator=torch.Generator().manual_seed(1))
    parts, done = [], 0
    with torch.inference_mode():
        for count in chunks:
            span = slice(done, done + count)
            done += count
            batch = AttentionBatch.build([count], [done], {None: [range(4)]}, 16)
            parts.append(model.logits(model(tokens[span], torch.arange(span.start, span.stop), batch, caches)))
    return torch.cat(parts)


@pytest.mark.parametrize("name", CODES)
def test_an_8_bit_cache_with_the_checkpoints_scales(model: Decoder, name: str) -> None:
    """Exactly what rounded values give, in whole prompts, chunks and decoding."""
    scales = {"attn.k": torch.tensor([0.03]), "attn.v": torch.tensor([0.02])}
    before = [layer.rounding for layer in model.layers]
    try:
        for layer in model.layers:
            layer.rounding = before[0] | {key: Rounding(KINDS[name], scale) for key, scale in scales.items()}
        caches = [model.new_cache(4, kv_dtype=name) for _ in model.layers]
        assert all(cache.kv.dtype == CODES[name] and cache.scales is None for cache in caches)
        for chunks in ([50], [20, 1, 17, *[1] * 12]):
            values = [model.new_cache(4) for _ in model.layers]
            torch.testing.assert_close(run(model, caches, chunks), run(model, values, chunks), atol=1e-5, rtol=1e-5)
        other = next(kind for kind in CODES if kind != name)
        assert model.new_cache(4, kv_dtype=other).scales is not None
    finally:
        for layer, rounding in zip(model.layers, before, strict=True):
            layer.rounding = rounding


@pytest.mark.parametrize("name", CODES)
def test_an_8_bit_cache_with_scales_of_its_own(model: Decoder, name: str) -> None:
    exact = run(model, [model.new_cache(4) for _ in model.layers], [50])
    caches = [model.new_cache(4, kv_dtype=name) for _ in model.layers]
    rounded = run(model, caches, [50])
    error = (rounded - exact).square().mean() / exact.square().mean()
    assert 0 < error < (1e-4 if name == "int8" else 2e-3)
    torch.testing.assert_close(run(model, caches, [20, 1, 17, *[1] * 12]), rounded, atol=1e-4, rtol=0)


def test_bytes_of_a_token(model: Decoder) -> None:
    spec = replace(model.spec, layers=model.spec.layers * 3)
    for kv_dtype, expected in (
        (None, spec.kv_bytes_per_token(4)),
        ("int8", spec.kv_bytes_per_token(1, own_scales=True)),
    ):
        cache = model.new_cache(5, 16, kv_dtype)
        held = sum(part.nbytes for part in (cache.kv, cache.scales) if part is not None)
        assert held * len(spec.layers) == 5 * 16 * expected
