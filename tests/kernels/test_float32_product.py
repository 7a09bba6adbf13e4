"""Products of float32 matrices by the compiled kernels, beside float64."""

from __future__ import annotations

import pytest
import torch

from llmkit.kernels.cpu import cpu_kernels, float32_product
from llmkit.kernels.cpu.float32_product import add_gram_matrix, add_inner_product, linear

# Tokens, columns of A and of B: whole panels or not, several blocks of a Gram matrix.
SIZES = [(70, 33, 17), (64, 16, 5), (100, 800, 96), (300, 385, 40)]


@pytest.fixture(params=["torch", "compiled"], autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Both implementations, on any processor. Returns the rows of each compiled product."""
    if request.param == "compiled" and cpu_kernels.library is None:
        pytest.skip("no compiled kernels")
    monkeypatch.setattr(float32_product, "outruns_torch", lambda: request.param == "compiled")
    rows: list[int] = []
    product = float32_product._product

    def counted(values: torch.Tensor, weight: cpu_kernels.PackedWeight) -> torch.Tensor:
        rows.append(len(values))
        return product(values, weight)

    monkeypatch.setattr(float32_product, "_product", counted)
    return rows


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    assert ((found - expected).norm() / expected.norm()).item() < 1e-6


@pytest.mark.parametrize(("tokens", "columns", "other"), SIZES)
@torch.no_grad()
def test_linear_is_that_of_float64(tokens: int, columns: int, other: int) -> None:
    x = random(2, tokens // 2, columns)
    weight = random(other, columns)
    bias = random(other)
    expected = x.double() @ weight.double().T + bias
    assert_near(linear(x, weight, bias), expected)
    assert_near(linear(x, weight), expected - bias)
    strided = random(tokens, 2 * columns)[:, ::2]
    assert_near(linear(strided, weight), strided.double() @ weight.double().T)


@pytest.mark.parametrize(("tokens", "columns", "other"), SIZES)
@torch.no_grad()
def test_inner_product_is_added_to_a_fraction_of_the_total(
    tokens: int, columns: int, other: int
) -> None:
    a = random(tokens, columns)
    b = random(tokens, other)
    total = random(columns, other)
    expected = 0.25 * total.double() + 0.5 * (a.double().T @ b.double())
    add_inner_product(total, a, b, 0.25, 0.5)
    assert_near(total, expected)


@pytest.mark.parametrize(("tokens", "columns", "other"), SIZES)
@torch.no_grad()
def test_gram_matrix_is_symmetric_and_that_of_float64(
    tokens: int, columns: int, other: int
) -> None:
    a = random(tokens, columns)
    total = random(columns, columns)
    total = total + total.T
    expected = 0.25 * total.double() + 0.5 * (a.double().T @ a.double())
    add_gram_matrix(total, a, 0.25, 0.5)
    assert_near(total, expected)
    assert torch.equal(total, total.T)


@torch.no_grad()
def test_compiled_products_need_many_rows_of_float32(
    products: list[int], request: pytest.FixtureRequest
) -> None:
    weight = random(32, 48)
    linear(random(64, 48), weight)
    expected = [64] if request.node.callspec.params["products"] == "compiled" else []
    assert products == expected
    linear(random(63, 48), weight)
    linear(random(64, 48).bfloat16(), weight.bfloat16())
    assert linear(random(0, 48), weight).shape == (0, 32)
    assert products == expected


def test_linear_with_gradients_is_torchs(products: list[int]) -> None:
    x = random(80, 48).requires_grad_()
    linear(x, random(32, 48)).sum().backward()
    assert x.grad is not None
    assert products == []
