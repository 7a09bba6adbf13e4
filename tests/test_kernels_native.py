"""The compiled CPU kernels against torch's, in sizes that their blocks divide and do not divide."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Literal

import pytest
import torch
from torch.nn import functional

from llmkit.checkpoint.quantized import QuantizedWeight, Scheme
from llmkit.kernels import native
from llmkit.kernels.attention import CODES, AttentionBatch, KvCache, paged_attention
from llmkit.kernels.elementwise import gated, rms_norm, rotate_
from llmkit.kernels.linear import Int8Product, NativeProduct
from llmkit.kernels.rounding import round_tokens
from llmkit.model.linear import panels_of, suits_integers
from llmkit.quant.grid import round_to_nearest

needs_library = pytest.mark.skipif(native.library is None, reason=f"compiled kernels: {native.status()}")
SIZES = [(1, 1, 1), (2, 7, 5), (3, 33, 70), (4, 64, 96), (5, 40, 64), (7, 100, 1538), (17, 64, 512), (97, 48, 130)]
TOKENS = [1, 2, 3, 4, 6, 7, 13, 96, 97]  # in the order of the tiles that they are cut into


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Call `.setattr(native, "library", None)` on it to have torch's kernels."""
    return monkeypatch


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def native_product(
    parts: Sequence[torch.Tensor | QuantizedWeight], bias: torch.Tensor | None = None, *, integers: bool = False
) -> NativeProduct:
    return NativeProduct([panels_of(part) for part in parts], bias, integers=integers)


def close(y: torch.Tensor, expected: torch.Tensor, limit: float = 2e-6) -> None:
    """y is as far from the float64 values as `limit` times the largest, at most."""
    assert y.shape == expected.shape
    assert (y.double() - expected).abs().max() <= limit * expected.abs().max()


def test_the_library_is_there_where_it_can_be() -> None:
    """CI has a compiler: a library that did not build or load would leave every other test here skipped."""
    flags = torch.backends.cpu.get_cpu_capability()
    if sys.platform == "linux" and flags.startswith("AVX"):
        assert native.status() == "on"


def test_what_they_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.runs(torch.zeros(1)) == (native.library is not None)
    assert not native.runs(torch.zeros(1, dtype=torch.bfloat16))
    assert not native.runs(torch.zeros(1, device="meta"))
    with torch.inference_mode(False), torch.enable_grad():
        assert not native.runs(torch.zeros(1))
    monkeypatch.setattr(native, "library", None)
    assert not native.runs(torch.zeros(1))
    assert native.status().startswith("off")


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "out", "columns"), SIZES)
def test_dense_products(tokens: int, out: int, columns: int, dtype: torch.dtype) -> None:
    weight, x, bias = random(out, columns).to(dtype), random(tokens, columns, seed=1), random(out, seed=2)
    for added in (None, bias):
        expected = functional.linear(x.double(), weight.double(), None if added is None else added.double())
        close(native_product([weight], added)(x), expected)


@needs_library
@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(8, 32), Scheme(4, 32), Scheme(4, 64, symmetric=False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_quantized_products(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = round_to_nearest(random(70, 192) * 0.1, scheme, dtype)
    bias, product = random(70, seed=2), native_product([weight])
    assert product.nbytes <= 0.26 * 4 * 80 * 192 * scheme.bits / 8 + 2 * 4 * 80 * 6
    for tokens in TOKENS:
        x = random(tokens, 192, seed=tokens)
        dense = weight.dequantize().double()
        close(product(x), x.double() @ dense.T, 4e-6)
        close(native_product([weight], bias)(x), x.double() @ dense.T + bias.double(), 4e-6)


@needs_library
def test_eight_bit_floats_and_groups_that_do_not_divide() -> None:
    x = random(9, 64, seed=1)
    fp8 = round_to_nearest(random(33, 64), Scheme(8, kind="float", inputs="token"), torch.float32)
    close(native_product([fp8])(x), x.double() @ fp8.dequantize().double().T)
    codes = torch.arange(32 * 64).view(32, 64).remainder(16).byte()
    short = QuantizedWeight(codes, random(32, 2), torch.full((32, 2), 8).byte(), Scheme(4, 48))
    close(native_product([short])(x), x.double() @ short.dequantize().double().T)


@needs_library
def test_parts_of_several_kinds_lie_one_below_the_other() -> None:
    four, eight = (
        round_to_nearest(random(rows, 64), Scheme(bits, 32), torch.float16) for rows, bits in ((5, 4), (21, 8))
    )
    parts = [random(7, 64, seed=3), four, random(1, 64, seed=4).half(), eight]
    dense = torch.cat([part.dequantize() if isinstance(part, QuantizedWeight) else part.float() for part in parts])
    x, bias = random(3, 2, 64, seed=1), random(34, seed=2)
    close(native_product(parts, bias)(x), x.double() @ dense.double().T + bias.double())


@needs_library
def test_a_row_is_the_same_whatever_is_beside_it() -> None:
    int8 = round_to_nearest(random(100, 576), Scheme(8), torch.float32)
    products = [
        *(native_product([random(100, 576).to(dtype)]) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        native_product([int8]),
        native_product([round_to_nearest(random(100, 576), Scheme(4, 64, symmetric=False), torch.float16)]),
        native_product([int8], integers=True),
    ]
    x = random(210, 576, seed=1)
    for product in products:
        whole = product(x)
        for rows in (slice(0, 1), slice(5, 7), slice(9, 12), slice(20, 25), slice(90, 100), slice(100, 210)):
            assert torch.equal(product(x[rows]), whole[rows])


@needs_library
def test_products_of_rounded_tokens() -> None:
    for rows, columns in ((33, 70), (64, 576), (16, 8192)):
        codes = torch.randint(1, 256, (rows, columns), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        weight = QuantizedWeight(
            codes, random(rows, 1, seed=1).exp(), torch.full((rows, 1), 128).byte(), Scheme(8, inputs="token")
        )
        assert suits_integers(weight)
        bias, dense = random(rows, seed=2), weight.dequantize().double()
        for tokens in TOKENS:
            x = random(tokens, columns, seed=tokens)
            x[0] *= tokens % 2  # a token of zeros stays zeros
            expected = round_tokens(x, "int").double() @ dense.T + bias.double()
            close(native_product([weight], bias, integers=True)(x), expected)
    x[2, 3] = torch.nan
    y = native_product([weight], integers=True)(x)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


def test_what_is_not_multiplied_as_integers() -> None:
    def weight(columns: int, groups: int = 1, scheme: Scheme | None = None) -> QuantizedWeight:
        shape = (4, groups)
        return QuantizedWeight(
            torch.zeros(4, columns).byte(), torch.ones(shape), torch.zeros(shape).byte(), scheme or Scheme(8)
        )

    assert suits_integers(weight(6))
    assert not suits_integers(weight(7))
    assert not suits_integers(weight(64, 2, Scheme(8, 32)))
    assert not suits_integers(weight(6, scheme=Scheme(8, symmetric=False)))
    assert not suits_integers(weight(6, scheme=Scheme(4, 6)))


def test_integers_are_summed_exactly_by_onednn() -> None:
    """Codes small enough not to overflow without VNNI, in sizes that no kernel's block divides."""
    generator = torch.Generator().manual_seed(0)
    for tokens, out, columns in SIZES[:5]:
        codes = torch.randint(128 - 60, 128 + 61, (out, columns), generator=generator, dtype=torch.uint8)
        x = torch.randint(-127, 128, (tokens, columns), generator=generator).float()
        scales = torch.exp2(torch.randint(-9, 0, (out, 1), generator=generator).float())
        expected = (x.double() @ (codes.double() - 128).T * scales.double().T).float()
        assert torch.equal(Int8Product(codes, scales).multiply(x), expected)


def test_products_that_overflow_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of products that are cut off at 16 bits, as processors without VNNI add them, and an exact sum."""
    from llmkit.kernels import linear

    class Pairs(Int8Product):
        limit = 2**15 - 1

        def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
            self.codes = codes.double() - 128

        def multiply(self, codes: torch.Tensor) -> torch.Tensor:
            pairs = ((codes[:, None] + 128) * self.codes).unflatten(-1, (-1, 2)).sum(-1)
            return (pairs.clamp(-self.limit - 1, self.limit).sum(-1) - 128 * self.codes.sum(-1)).float()

    monkeypatch.setattr(linear, "Int8Product", Pairs)
    assert not linear.has_int8_products.__wrapped__()
    monkeypatch.setattr(Pairs, "limit", 2**31)
    assert linear.has_int8_products.__wrapped__()


@needs_library
def test_16_bit_inputs_give_16_bit_outputs() -> None:
    weight, x = random(9, 40).bfloat16(), random(3, 40, seed=1)
    for dtype in (torch.bfloat16, torch.float16):
        y = native_product([weight])(x.to(dtype))
        assert y.dtype == dtype
        close(y, x.to(dtype).double() @ weight.double().T, 2.0**-8)


@needs_library
@pytest.mark.parametrize("shape", [(1, 8), (3, 5), (2, 3, 64), (70, 576), (40, 1001)])
def test_norms(shape: tuple[int, ...]) -> None:
    x, weight = random(*shape), random(shape[-1], seed=1)
    y = rms_norm(x, weight, 1e-5)
    close(y, functional.rms_norm(x.double(), weight.shape, weight.double(), 1e-5), 1e-6)


@needs_library
@pytest.mark.parametrize(("dim", "turned"), [(64, 64), (16, 8), (80, 32), (128, 128)])
def test_rotations_are_in_place_and_leave_the_rest(dim: int, turned: int, without: pytest.MonkeyPatch) -> None:
    whole = random(23, 7, dim)
    angles = random(23, 1, turned // 2, seed=1)
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    ours, theirs = whole.clone(), whole.clone()
    rotate_(ours[:, :5], cos, sin)
    without.setattr(native, "library", None)
    rotate_(theirs[:, :5], cos, sin)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert torch.equal(ours[:, 5:], whole[:, 5:])
    assert torch.equal(ours[..., turned:], whole[..., turned:])


@needs_library
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (130, 3072)])
def test_gates(activation: Literal["silu", "gelu_tanh"], shape: tuple[int, int]) -> None:
    x = random(*shape) * 8
    x[0, :8] = torch.tensor([0.0, -0.0, 100, -100, 1e-30, 88, -88, 20])
    gate, up = x.double().chunk(2, -1)
    expected = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    torch.testing.assert_close(gated(x, activation).double(), expected * up, atol=1e-6, rtol=1e-6)
    x[0, 3] = torch.nan
    assert gated(x, activation)[0, 3].isnan()


HEADS = [(9, 3, 64), (4, 4, 16), (8, 1, 80), (2, 2, 40), (14, 2, 128), (6, 2, 256)]  # queries, keys, dimensions
MIXED = ([1, 1, 5, 40, 1, 130, 3], [1, 65, 5, 40, 300, 200, 67])  # new tokens, context


def tables(contexts: list[int], size: int = 16) -> tuple[list[list[int]], int]:
    """Blocks in no order, some of them nobody's."""
    counts = [-(-context // size) for context in contexts]
    free = torch.randperm(sum(counts) + 5, generator=torch.Generator().manual_seed(7)).tolist()
    return [[free.pop() for _ in range(count)] for count in counts], sum(counts) + 5


@needs_library
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize("window", [None, 1, 20, 100])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("kind", [None, "int8"])
def test_attention(
    heads: int, kv_heads: int, dim: int, window: int | None, softcap: float | None, kind: str | None,
    without: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    new, contexts = MIXED
    rows, blocks = tables(contexts)
    shape = (2 * kv_heads, blocks, 16, dim)
    kv = random(*shape) * 2
    cache = KvCache(kv)
    if kind:
        codes = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(1)).to(CODES[kind])
        cache = KvCache(codes, scales=random(2 * kv_heads, blocks, 16, 1).abs() * 0.03)
        if window:
            cache = KvCache(codes, stored=random(2 * kv_heads, 1, 1).abs() * 0.03)
    nobody = sorted(set(range(blocks)) - {block for row in rows for block in row})
    if not kind:
        kv[:, nobody] = torch.nan
    queries = random(sum(new), heads + 2, dim, seed=2)[:, :heads]  # rows that do not lie side by side
    group = AttentionBatch.build(new, contexts, {None: rows}, 16).of(window)
    assert native.attends(queries, cache)
    ours = paged_attention(queries, cache, group, dim**-0.5, softcap)
    without.setattr(native, "library", None)
    theirs = paged_attention(queries, cache, group, dim**-0.5, softcap)
    torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=3e-5)


@needs_library
def test_attention_is_the_same_whatever_is_beside_it_and_however_a_prompt_is_cut() -> None:
    rows, blocks = tables([230, 90])
    cache = KvCache(random(6, blocks, 16, 64))
    queries = random(320, 9, 64, seed=1)
    for window in (None, 50):
        whole = paged_attention(
            queries, cache, AttentionBatch.build([230, 90], [230, 90], {None: rows}, 16).of(window), 0.125
        )
        for start, stop in ((0, 1), (0, 100), (100, 230), (229, 230), (17, 18)):
            group = AttentionBatch.build([stop - start], [stop], {None: rows[:1]}, 16).of(window)
            assert torch.equal(paged_attention(queries[start:stop], cache, group, 0.125), whole[start:stop])


@needs_library
def test_blocks_that_left_the_window_are_not_read() -> None:
    cache = KvCache(random(6, 10, 16, 64))
    queries = random(2, 9, 64, seed=1)
    kept, freed = [[3, 4, 5, 6, 7, 8]], [[-1, -1, 5, 6, 7, 8]]
    answers = [
        paged_attention(queries, cache, AttentionBatch.build([2], [90], {40: table}, 16).of(40), 0.125)
        for table in (kept, freed)
    ]
    assert torch.equal(*answers)


@needs_library
def test_keys_and_values_are_stored_where_they_belong(without: pytest.MonkeyPatch) -> None:
    qkv, slots = random(70, 15, 64), torch.randperm(160, generator=torch.Generator().manual_seed(1))[:70]
    ours, theirs = KvCache(torch.zeros(6, 10, 16, 64)), KvCache(torch.zeros(6, 10, 16, 64))
    ours.store(qkv[:, 9:], slots)
    without.setattr(native, "library", None)
    theirs.store(qkv[:, 9:], slots)
    assert torch.equal(ours.kv, theirs.kv)


def test_what_attention_leaves_to_torch() -> None:
    def fits(
        heads: int = 9, kv_heads: int = 3, size: int = 16, dim: int = 64, dtype: torch.dtype = torch.float32
    ) -> bool:
        return native.attends(torch.zeros(1, heads, dim), KvCache(torch.zeros(2 * kv_heads, 2, size, dim).to(dtype)))

    assert fits() == (native.library is not None)
    assert not fits(dim=60)
    assert not fits(dim=264)
    assert not fits(size=24)
    assert not fits(heads=49, kv_heads=1)
    assert not fits(dtype=torch.bfloat16)
    assert not fits(dtype=CODES["fp8"])


@needs_library
def test_wrong_calls_are_refused() -> None:
    with pytest.raises(TypeError, match="13 numbers were expected, 1 were given"):
        native.library.product(1)
    with pytest.raises(TypeError):
        native.library.rms_norm(0, 0, 0, 0, "0", 1.0)
