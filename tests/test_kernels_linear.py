"""Products with packed weights against float64, in sizes that the blocks of their kernels divide and do not divide."""

from __future__ import annotations

import platform

import pytest
import torch

from llmkit.kernels import linear
from llmkit.kernels.linear import HalfProduct, Int4Product, Int8Product, TokenProduct, half_rows, suits_int4
from llmkit.kernels.rounding import round_tokens

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="kernels of x86 processors")
SIZES = [(1, 1, 1), (1, 7, 5), (3, 33, 70), (17, 64, 512), (40, 100, 1537)]  # tokens, out, in


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(y: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """y is as far from the float64 product as `limit` times the largest value, at most."""
    assert (y.double() - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "out", "columns"), SIZES)
def test_a_half_product_is_the_product_where_weights_have_16_bits(
    tokens: int, out: int, columns: int, biased: bool
) -> None:
    weight, x = random(out, columns).mul(0.02).bfloat16().float(), random(tokens, columns, seed=1)
    bias = random(out, seed=2) if biased else None
    for scales in (torch.ones(out), random(out, seed=3).exp()):
        y = HalfProduct(weight, scales, bias)(x)
        expected = x.double() @ weight.double().T * scales.double() + (0 if bias is None else bias.double())
        assert y.shape == expected.shape
        close(y, expected, 2e-6)


def test_bfloat16_weights_of_any_magnitude_are_float16_times_powers_of_two() -> None:
    spread = torch.exp2(torch.randint(-14, 15, (64, 40), generator=torch.Generator().manual_seed(5)).float())
    for factor in (2.0**-60, 2.0**-20, 1.0, 2.0**30):
        weight = (random(64, 40) * spread * factor).bfloat16().float()
        weight[3] = 0
        weight[4, 1:] = 0
        numbers, powers, exact = half_rows(weight)
        assert exact
        lost = (numbers.half().double() * powers[:, None] - weight).norm(dim=1)
        assert (lost <= 2.0**-24 * weight.double().norm(dim=1)).all()
        x = random(5, 40, seed=1)
        close(HalfProduct(numbers, powers)(x), x.double() @ weight.double().T, 2e-6)


def test_weights_of_more_than_11_bits_are_told_and_rounded() -> None:
    weight, x = random(48, 64), random(4, 64, seed=1)
    numbers, powers, exact = half_rows(weight)
    assert not exact
    lost = (numbers.half().float() * powers[:, None] - weight).abs()
    assert (lost <= 2.0**-11 * weight.abs()).all()
    close(HalfProduct(numbers, powers)(x), x.double() @ weight.double().T, 1e-3)
    weight[5, 7] = torch.nan
    assert not half_rows(weight)[2]


def test_integers_are_summed_exactly() -> None:
    """Codes small enough not to overflow without VNNI, in sizes that no kernel's block divides."""
    generator = torch.Generator().manual_seed(0)
    for tokens, out, columns in SIZES:
        codes = torch.randint(128 - 60, 128 + 61, (out, columns), generator=generator, dtype=torch.uint8)
        x = torch.randint(-127, 128, (tokens, columns), generator=generator).float()
        scales = torch.exp2(torch.randint(-9, 0, (out, 1), generator=generator).float())
        expected = (x.double() @ (codes.double() - 128).T * scales.double().T).float()
        assert torch.equal(Int8Product(codes, scales)(x), expected)
        assert torch.equal(HalfProduct(codes.float() - 128, scales.flatten())(x), expected)


def test_products_that_overflow_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of products that are cut off at 16 bits, as processors without VNNI add them, and an exact sum."""

    class Pairs(Int8Product):
        limit = 2**15 - 1

        def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
            self.codes = codes.double() - 128

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            pairs = ((x[:, None] + 128) * self.codes).unflatten(-1, (-1, 2)).sum(-1)
            return (pairs.clamp(-self.limit - 1, self.limit).sum(-1) - 128 * self.codes.sum(-1)).float()

    monkeypatch.setattr(linear, "Int8Product", Pairs)
    assert not linear.has_int8_products.__wrapped__()
    monkeypatch.setattr(Pairs, "limit", 2**31)
    assert linear.has_int8_products.__wrapped__()


@pytest.mark.parametrize("biased", [False, True])
def test_token_products_are_products_of_rounded_tokens_whatever_the_batch(biased: bool) -> None:
    codes = torch.randint(0, 256, (33, 300), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scales, bias = random(33, seed=1).exp(), random(33, seed=2) if biased else None
    product = TokenProduct(HalfProduct(codes.float() - 128, scales), bias)
    x = random(70, 300, seed=3)
    x[5] = 0
    y = product(x)
    weight = (codes.double() - 128) * scales.double()[:, None]
    expected = round_tokens(x, "int").double() @ weight.T + (0 if bias is None else bias.double())
    close(y, expected, 1e-6)
    for rows in (slice(0, 1), slice(3, 8), slice(40, 70)):
        assert torch.equal(product(x[rows]), y[rows])


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_products(group: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for tokens, out in ((1, 16), (3, 48), (33, 96)):
        assert suits_int4((out, 512), group)
        codes = torch.randint(0, 16, (out, 512), generator=generator, dtype=torch.uint8)
        scales = (torch.rand(out, 512 // group, generator=generator) * 0.01).half()
        zeros = torch.randint(0, 16, scales.shape, generator=generator, dtype=torch.uint8)
        zeros = torch.full_like(zeros, 8) if symmetric else zeros
        weight = ((codes.double().unflatten(1, (-1, group)) - zeros[:, :, None]) * scales[:, :, None]).flatten(1)
        x, bias = random(tokens, 512, seed=1), random(out, seed=2)
        y = Int4Product(codes, scales, zeros, bias.bfloat16())(x.bfloat16())
        assert y.dtype == torch.bfloat16
        expected = x.double() @ weight.T + bias.double()
        assert (y.double() - expected).norm() <= 6e-3 * expected.norm()


def test_sizes_that_int4_products_do_not_have() -> None:
    assert not suits_int4((24, 128), 64)
    assert not suits_int4((32, 96), 64)
    assert not suits_int4((32, 96), 48)
    assert not suits_int4((32, 96), -1)


def test_16_bit_inputs_give_16_bit_outputs() -> None:
    weight, x = random(9, 40).bfloat16().float(), random(3, 40, seed=1)
    for dtype in (torch.bfloat16, torch.float16):
        y = HalfProduct(*half_rows(weight)[:2])(x.to(dtype))
        assert y.dtype == dtype
        close(y, x.to(dtype).double() @ weight.double().T, 2.0**-8)
