"""The sampler against softmax itself, with an independent statement of each filter."""

from __future__ import annotations

import pytest
import torch

from llmkit.kernels.sampling import sample

DRAWS = 20_000
V = 40


def draw(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """The observed frequencies [V] over many seeds."""
    n = DRAWS
    ids = sample(
        logits.expand(n, V),
        torch.full((n,), temperature),
        torch.full((n,), top_k),
        torch.full((n,), top_p),
        torch.full((n,), min_p),
        torch.arange(n),
        torch.arange(n) % 7,
    )
    return torch.bincount(ids, minlength=V) / n


def allowed(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """The probabilities [V] by the definitions, one token at a time in plain Python."""
    weights = [torch.tensor(x / temperature, dtype=torch.float64).exp().item() for x in logits]
    order = sorted(range(V), key=lambda i: -weights[i])
    if top_k:
        order = order[:top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p and kept:
            break
        kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return torch.tensor([weights[i] / total if i in kept else 0.0 for i in range(V)])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0), (0.6, 0, 1.0, 0.0), (1.7, 7, 1.0, 0.0), (1.0, 0, 0.7, 0.0), (1.0, 0, 1.0, 0.2),
        (1.3, 20, 0.8, 0.1),
    ],
)  # fmt: skip
def test_frequencies(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(V, generator=torch.Generator().manual_seed(5)) * 2
    want = allowed(logits.tolist(), temperature, top_k, top_p, min_p)
    got = draw(logits, temperature, top_k, top_p, min_p)
    assert (got[want == 0] == 0).all()
    deviation = (want * (1 - want) / DRAWS).sqrt()
    assert ((got - want).abs() <= 4.5 * deviation + 1e-9).all()


def test_temperature_zero_is_the_first_of_the_most_probable() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [9.0, 3.0, 3.0, 1.0]])
    ids = sample(
        logits, torch.tensor([0.0, 0.0]), torch.tensor([0, 0]), torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0]),
        torch.tensor([1, 2]), torch.tensor([0, 0]),
    )  # fmt: skip
    assert ids.tolist() == [1, 0]


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = torch.randn(8, V, generator=torch.Generator().manual_seed(1))
    columns = [
        torch.full((8,), 0.8), torch.full((8,), 9), torch.full((8,), 0.95), torch.full((8,), 0.01),
        torch.arange(8) * 2**40, torch.arange(8),
    ]  # fmt: skip
    together = sample(logits, *columns)
    alone = [sample(logits[i : i + 1], *(c[i : i + 1] for c in columns)).item() for i in range(8)]
    assert together.tolist() == alone
