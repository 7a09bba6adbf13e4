"""Paged attention against dense attention, and 8-bit caches against fake-quantized values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed_caches import packed
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.kernels.activation_quant import fake_quantize_per_token, fake_quantize_static
from llmkit.kernels.attention import paged_attention
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.elementwise import apply_rotary_emb_
from llmkit.kernels.kv_cache import QUANTIZED_KV_CACHE_DTYPES, KVCache
from llmkit.model.decoder import Decoder
from llmkit.model.linear import ActivationQuant
from llmkit.model.weight_loader import load_model

BLOCK = 16
DIM = 8
SCALE = 0.3
MIXED = ([1, 7, 1, 33, 5, 5, 1, 20], [30, 7, 1, 50, 9, 61, 64, 21])  # new tokens, contexts


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the last tokens, q [n, N, D], of a sequence [L, K, D]; all in float64."""
    new = len(q)
    length = len(k)
    share = q.shape[1] // k.shape[1]
    q = q.double()
    k = k.double().repeat_interleave(share, 1)
    v = v.double().repeat_interleave(share, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    for row in range(new):
        place = length - new + row
        scores[:, row, place + 1 :] = float("-inf")
        if window is not None:
            scores[:, row, : max(0, place - window + 1)] = float("-inf")
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None, None]
    return torch.einsum("hqk,khd->qhd", weights / total, v).float()


class AttentionInputs:
    """Sequences with random keys and values in a paged cache whose other memory is garbage."""

    def __init__(
        self,
        query_lens: list[int],
        seq_lens: list[int],
        heads: tuple[int, int] = (6, 2),
        window: int | None = None,
        seed: int = 0,
        shuffled: bool = True,
    ) -> None:
        self.query_lens = query_lens
        self.seq_lens = seq_lens
        self.window = window
        draw = torch.Generator().manual_seed(seed)
        q_heads, kv_heads = heads
        self.kv = [torch.randn(length, 2 * kv_heads, DIM, generator=draw) for length in seq_lens]
        self.q = [torch.randn(count, q_heads, DIM, generator=draw) for count in query_lens]
        sizes = [-(-length // BLOCK) for length in seq_lens]
        count = sum(sizes) + 3
        ids = torch.randperm(count, generator=draw).tolist() if shuffled else list(range(count))
        self.tables = [
            [ids.pop() if shuffled else ids.pop(0) for _ in range(size)] for size in sizes
        ]
        self.spare = ids
        memory = torch.randn(2 * kv_heads, count, BLOCK, DIM, generator=draw) * 100
        self.cache = packed(KVCache(memory))

    def batch(self, tables: list[list[int]] | None = None) -> AttentionBatch:
        return AttentionBatch.build(
            self.query_lens, self.seq_lens, {self.window: tables or self.tables}, BLOCK
        )

    def fill(self) -> None:
        """Put what came before this step into the cache, and then the step's own."""
        before = [
            length - count for count, length in zip(self.query_lens, self.seq_lens, strict=True)
        ]
        old = [
            (kv[:n], n, table)
            for kv, n, table in zip(self.kv, before, self.tables, strict=True)
            if n
        ]
        if old:
            earlier = AttentionBatch.build(
                [n for _, n, _ in old], [n for _, n, _ in old], {None: [t for *_, t in old]}, BLOCK
            )
            self.cache.store(torch.cat([kv for kv, *_ in old]), earlier.metadata(None).slot_mapping)
        own = [kv[n:] for kv, n in zip(self.kv, before, strict=True)]
        self.cache.store(torch.cat(own), self.batch().metadata(self.window).slot_mapping)

    def run(
        self,
        batch: AttentionBatch | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        group = (batch or self.batch()).metadata(self.window)
        return paged_attention(torch.cat(self.q), self.cache, group, SCALE, softcap, sinks)

    def expected(
        self, softcap: float | None = None, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        parts = [
            dense(q, *kv.chunk(2, 1), self.window, softcap, sinks)
            for q, kv in zip(self.q, self.kv, strict=True)
        ]
        return torch.cat(parts)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3, 12, 40])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_paged_attention_with_mixed_batches(
    window: int | None, softcap: float | None, heads: tuple[int, int]
) -> None:
    inputs = AttentionInputs(*MIXED, heads, window)
    inputs.fill()
    close(inputs.run(softcap=softcap), inputs.expected(softcap))


@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_paged_attention_with_sinks(
    window: int | None, softcap: float | None, heads: tuple[int, int]
) -> None:
    inputs = AttentionInputs(*MIXED, heads, window)
    inputs.fill()
    sinks = torch.linspace(-3.0, 6.0, heads[0])
    close(inputs.run(softcap=softcap, sinks=sinks), inputs.expected(softcap, sinks))


def test_paged_attention_with_extreme_sinks() -> None:
    """A sink of -inf changes nothing; one far above all scores leaves no weight for the values."""
    inputs = AttentionInputs(*MIXED, window=12)
    inputs.fill()
    sinks = torch.tensor([float("-inf"), 1000.0, -1000.0, -1e30, 80.0, 0.0])
    out = inputs.run(sinks=sinks)
    plain = inputs.run()
    close(out[:, [0, 2, 3]], plain[:, [0, 2, 3]])
    assert not out[:, [1, 4]].any() or out[:, [1, 4]].abs().max() < 1e-20
    close(out[:, 5], inputs.expected(sinks=sinks)[:, 5])


def test_paged_attention_of_a_slice_of_heads_takes_their_sinks() -> None:
    """What a tensor-parallel rank computes: one key-value head, its query heads, their sinks."""
    inputs = AttentionInputs(*MIXED, (6, 2), window=20)
    inputs.fill()
    sinks = torch.linspace(-2.0, 4.0, 6)
    whole = inputs.run(sinks=sinks)
    for rank in range(2):
        kv = inputs.cache.kv[[rank, 2 + rank]].contiguous()
        q = torch.cat(inputs.q)[:, 3 * rank : 3 * rank + 3]
        part = paged_attention(
            q,
            replace(inputs.cache, kv=kv),
            inputs.batch().metadata(20),
            SCALE,
            sinks=sinks[3 * rank : 3 * rank + 3],
        )
        close(part, whole[:, 3 * rank : 3 * rank + 3])


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 32), st.integers(0, 60)), min_size=1, max_size=7),
    st.sampled_from([None, 1, 5, 17, 64]),
    st.booleans(),
)
def test_paged_attention_with_any_batch(
    lengths: list[tuple[int, int]], window: int | None, shuffled: bool
) -> None:
    inputs = AttentionInputs(
        [n for n, _ in lengths],
        [n + before for n, before in lengths],
        window=window,
        shuffled=shuffled,
    )
    inputs.fill()
    close(inputs.run(), inputs.expected())


@pytest.mark.parametrize("before", [0, 70])
@pytest.mark.parametrize("window", [None, 50, 1024])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_paged_attention_with_long_chunks(
    before: int, window: int | None, softcap: float | None
) -> None:
    inputs = AttentionInputs([600, 1], [600 + before, 40], window=window)
    inputs.fill()
    close(inputs.run(softcap=softcap), inputs.expected(softcap))


@pytest.mark.parametrize("shuffled", [True, False])
def test_paged_attention_does_not_read_freed_blocks(shuffled: bool) -> None:
    inputs = AttentionInputs(*MIXED, window=10, shuffled=shuffled)
    inputs.fill()
    tables = [list(table) for table in inputs.tables]
    for table, new, context in zip(tables, *MIXED, strict=True):
        for index in range(max(0, context - new - 10 + 1) // BLOCK):
            inputs.cache.kv[:, table[index]] = float("nan")
            table[index] = -1
    assert sum(table.count(-1) for table in tables) > 5
    inputs.cache.kv[:, inputs.spare] = float("nan")
    close(inputs.run(inputs.batch(tables)), inputs.expected())


def test_attention_batch_refuses_freed_blocks_in_use() -> None:
    inputs = AttentionInputs([1], [40], window=10)
    (table,) = inputs.tables
    with pytest.raises(AssertionError, match="within the window"):
        inputs.run(inputs.batch([[*table[:-2], -1, table[-1]]]))
    with pytest.raises(AssertionError, match="a new token"):
        inputs.batch([[*table[:-1], -1]]).metadata(10).slot_mapping.sum()


def test_attention_batch_has_block_tables_by_window() -> None:
    """One batch for the layers of both kinds, whose caches have different blocks."""
    whole = AttentionInputs(*MIXED)
    sliding = AttentionInputs(*MIXED, window=12, seed=1)
    tables = {None: whole.tables, 12: sliding.tables}
    batch = AttentionBatch.build(*MIXED, tables, BLOCK)
    for inputs in (whole, sliding):
        inputs.fill()
        assert torch.equal(
            batch.metadata(inputs.window).slot_mapping,
            inputs.batch().metadata(inputs.window).slot_mapping,
        )
        close(inputs.run(batch), inputs.expected())
    assert not torch.equal(batch.metadata(None).slot_mapping, batch.metadata(12).slot_mapping)


def test_attention_batch_window_without_tables_uses_full_ones() -> None:
    inputs = AttentionInputs(*MIXED)
    inputs.fill()
    batch = inputs.batch()
    inputs.window = 12
    close(inputs.run(batch), inputs.expected())


def test_paged_attention_does_not_depend_on_the_batch() -> None:
    together = AttentionInputs(*MIXED)
    together.fill()
    answers = together.run().split(MIXED[0])
    for index, answer in enumerate(answers):
        alone = AttentionInputs([MIXED[0][index]], [MIXED[1][index]])
        alone.q = [together.q[index]]
        alone.kv = [together.kv[index]]
        alone.fill()
        close(answer, alone.run())


def test_attention_batch_for_complete_sequences() -> None:
    lengths = [5, 16, 1, 40]
    inputs = AttentionInputs(lengths, lengths)
    batch = AttentionBatch.for_sequences(lengths, BLOCK)
    memory = torch.full((4, batch.num_blocks, BLOCK, DIM), float("nan"))
    inputs.cache = packed(KVCache(memory))
    inputs.cache.clear(list(range(batch.num_blocks)))
    inputs.cache.store(torch.cat(inputs.kv), batch.metadata(None).slot_mapping)
    close(inputs.run(batch), inputs.expected())


@pytest.mark.parametrize("name", QUANTIZED_KV_CACHE_DTYPES)
@pytest.mark.parametrize("stored", [True, False])
def test_kv_cache_quantizes_as_fake_quantize(name: str, stored: bool) -> None:
    """Attention over a quantized cache is exactly attention over a cache of rounded values."""
    coded = AttentionInputs(*MIXED)
    plain = AttentionInputs(*MIXED)
    kv = torch.zeros(coded.cache.kv.shape, dtype=QUANTIZED_KV_CACHE_DTYPES[name])
    if stored:
        scale = torch.tensor([0.02, 0.05])
        static_scales = scale.repeat_interleave(2)[:, None, None]
        coded.cache = packed(KVCache(kv, static_scales=static_scales))
        for values in plain.kv:
            for part, one in zip(values.chunk(2, 1), scale.split(1), strict=True):
                part.copy_(fake_quantize_static(part, one, name))
    else:
        coded.cache = packed(KVCache(kv, torch.zeros(*kv.shape[:3], 1)))
        plain.kv = [fake_quantize_per_token(values, name) for values in plain.kv]
    coded.fill()
    plain.fill()
    assert not torch.equal(plain.kv[0], coded.kv[0])
    assert torch.equal(coded.run(), plain.run())
    coded.cache.clear(coded.tables[3])
    assert not coded.cache.gather(torch.tensor(coded.tables[3]), torch.float32).any()
    assert coded.cache.gather(torch.tensor(coded.tables[5]), torch.float32).any()


@pytest.mark.parametrize("rotated", [8, 4])
def test_rotary_emb_is_a_complex_product(rotated: int) -> None:
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(5.0)[:, None, None] * 0.3 / torch.arange(1, rotated // 2 + 1)
    half = rotated // 2
    turned = torch.complex(x[..., :half], x[..., half:rotated]) * torch.polar(
        torch.ones_like(angles), angles
    )
    expected = torch.cat((turned.real, turned.imag, x[..., rotated:]), dim=-1)
    cos = torch.cat((angles.cos(), angles.cos()), -1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1)
    for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        ours = x.to(dtype, copy=True)
        apply_rotary_emb_(ours, cos, sin)
        torch.testing.assert_close(ours.float(), expected, atol=error, rtol=error)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path: Path = tiny_checkpoint(tmp_path_factory.mktemp("attention"), "gemma2", dtype="float32")
    return load_model(open_checkpoint(path), torch.float32)


def run(decoder: Decoder, caches: list[KVCache], chunks: list[int]) -> torch.Tensor:
    """Logits of 50 tokens, computed in chunks."""
    tokens = torch.randint(3, 512, (50,), generator=torch.Generator().manual_seed(1))
    parts = []
    done = 0
    with torch.inference_mode():
        for count in chunks:
            span = slice(done, done + count)
            done += count
            batch = AttentionBatch.build([count], [done], {None: [range(4)]}, 16)
            parts.append(
                decoder.logits(
                    decoder(tokens[span], torch.arange(span.start, span.stop), batch, caches)
                )
            )
    return torch.cat(parts)


@pytest.mark.parametrize("name", QUANTIZED_KV_CACHE_DTYPES)
def test_kv_cache_with_static_scales(decoder: Decoder, name: str) -> None:
    """Exactly what rounded values give, in whole prompts, chunks and decoding."""
    scales = {"attn.k": torch.tensor([0.03]), "attn.v": torch.tensor([0.02])}
    before = [layer.activation_quant for layer in decoder.layers]
    try:
        for layer in decoder.layers:
            layer.activation_quant = before[0] | {
                key: ActivationQuant(name, scale) for key, scale in scales.items()
            }
        caches = [decoder.new_kv_cache(4, kv_cache_dtype=name) for _ in decoder.layers]
        assert all(
            cache.kv.dtype == QUANTIZED_KV_CACHE_DTYPES[name] and cache.scales is None
            for cache in caches
        )
        for chunks in ([50], [20, 1, 17, *[1] * 12]):
            values = [decoder.new_kv_cache(4) for _ in decoder.layers]
            torch.testing.assert_close(
                run(decoder, caches, chunks), run(decoder, values, chunks), atol=1e-5, rtol=1e-5
            )
        other = next(kind for kind in QUANTIZED_KV_CACHE_DTYPES if kind != name)
        assert decoder.new_kv_cache(4, kv_cache_dtype=other).scales is not None
    finally:
        for layer, rounding in zip(decoder.layers, before, strict=True):
            layer.activation_quant = rounding


@pytest.mark.parametrize("name", QUANTIZED_KV_CACHE_DTYPES)
def test_kv_cache_with_dynamic_scales(decoder: Decoder, name: str) -> None:
    exact = run(decoder, [decoder.new_kv_cache(4) for _ in decoder.layers], [50])
    caches = [decoder.new_kv_cache(4, kv_cache_dtype=name) for _ in decoder.layers]
    rounded = run(decoder, caches, [50])
    error = (rounded - exact).square().mean() / exact.square().mean()
    assert 0 < error < (1e-4 if name == "int8" else 2e-3)
    torch.testing.assert_close(
        run(decoder, caches, [20, 1, 17, *[1] * 12]), rounded, atol=1e-4, rtol=0
    )


def test_kv_cache_bytes_per_token(decoder: Decoder) -> None:
    spec = replace(decoder.spec, layers=decoder.spec.layers * 3)
    for kv_cache_dtype, expected in (
        (None, spec.kv_bytes_per_token(4)),
        ("int8", spec.kv_bytes_per_token(1, per_token_head_scales=True)),
    ):
        cache = decoder.new_kv_cache(5, 16, kv_cache_dtype)
        held = sum(part.nbytes for part in (cache.kv, cache.scales) if part is not None)
        assert held * len(spec.layers) == 5 * 16 * expected
