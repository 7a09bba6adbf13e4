"""The sampler against softmax itself, with an independent statement of each filter."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmkit.kernels import sampling
from llmkit.kernels.sampling import sample

DRAWS = 20_000
V = 40


def draw(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
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


def allowed(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """The probabilities [V] by the definitions, one token at a time in plain Python."""
    weights = [torch.tensor(x / temperature, dtype=torch.float64).exp().item() for x in logits]
    order = sorted(range(V), key=lambda i: -weights[i])
    if top_k:
        order = order[:top_k]
    total = sum(weights[i] for i in order)
    kept = []
    mass = 0.0
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
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.7, 7, 1.0, 0.0),
        (1.0, 0, 0.7, 0.0),
        (1.0, 0, 1.0, 0.2),
        (1.3, 20, 0.8, 0.1),
    ],
)
def test_sample_frequencies(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(V, generator=torch.Generator().manual_seed(5)) * 2
    want = allowed(logits.tolist(), temperature, top_k, top_p, min_p)
    got = draw(logits, temperature, top_k, top_p, min_p)
    assert (got[want == 0] == 0).all()
    deviation = (want * (1 - want) / DRAWS).sqrt()
    assert ((got - want).abs() <= 4.5 * deviation + 1e-9).all()


def test_sample_follows_the_probabilities_over_a_million_draws() -> None:
    """Chi-square of a vocabulary of 20 tokens with all filters."""
    num_tokens, num_draws, parts = 20, 1_000_000, 4
    logits = torch.randn(num_tokens, generator=torch.Generator().manual_seed(8)) * 2
    scaled = (logits.double() - logits.double().max()) / 1.3
    largest, order = scaled.sort(descending=True)
    shares = largest[:15].softmax(-1)
    kept = (shares.cumsum(-1) - shares < 0.97) & (largest[:15].exp() >= 0.02)
    assert 5 < int(kept.sum()) < 15
    expected = torch.zeros(num_tokens, dtype=torch.float64)
    expected[order[:15][kept]] = shares[kept] / shares[kept].sum()
    count = torch.zeros(num_tokens, dtype=torch.int64)
    rows = num_draws // parts
    for part in range(parts):
        ids = sample(
            logits.expand(rows, num_tokens),
            torch.full((rows,), 1.3),
            torch.full((rows,), 15),
            torch.full((rows,), 0.97),
            torch.full((rows,), 0.02),
            torch.arange(rows) + part * rows,
            torch.arange(rows) % 5,
        )
        count += torch.bincount(ids, minlength=num_tokens)
    possible = expected > 0
    assert int(count[~possible].sum()) == 0
    mean = expected[possible] * num_draws
    statistic = float(((count[possible] - mean) ** 2 / mean).sum())
    degrees = int(possible.sum()) - 1
    # The quantile for p = 0.001, by the approximation of Wilson and Hilferty.
    spread = 2 / (9 * degrees)
    assert statistic < degrees * (1 - spread + 3.09 * spread**0.5) ** 3


def test_sample_temperature_zero_takes_the_first_maximum() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [9.0, 3.0, 3.0, 1.0]])
    ids = sample(
        logits,
        torch.tensor([0.0, 0.0]),
        torch.tensor([0, 0]),
        torch.tensor([1.0, 1.0]),
        torch.tensor([0.0, 0.0]),
        torch.tensor([1, 2]),
        torch.tensor([0, 0]),
    )
    assert ids.tolist() == [1, 0]


def test_sample_row_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(8, V, generator=torch.Generator().manual_seed(1))
    columns = [
        torch.full((8,), 0.8),
        torch.full((8,), 9),
        torch.full((8,), 0.95),
        torch.full((8,), 0.01),
        torch.arange(8) * 2**40,
        torch.arange(8),
    ]
    together = sample(logits, *columns)
    alone = [sample(logits[i : i + 1], *(c[i : i + 1] for c in columns)).item() for i in range(8)]
    assert together.tolist() == alone


def columns(*rows: tuple[float, int, float, float, int, int]) -> list[torch.Tensor]:
    """(temperature, top_k, top_p, min_p, seed, counter) of each row, as `sample` takes them."""
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.int64)
    return [
        torch.tensor(values, dtype=dtype)
        for values, dtype in zip(zip(*rows, strict=True), dtypes, strict=True)
    ]


def test_sample_mixes_all_parameters_in_a_batch() -> None:
    """Also with a vocabulary in which some nuclei are wider than the first tokens."""
    vocab = 3 * sampling._NUCLEUS
    logits = (
        torch.randn(7, vocab, generator=torch.Generator().manual_seed(2))
        * torch.tensor([5.0] * 5 + [0.1] * 2)[:, None]
    )
    rows = [
        (0.0, 0, 1.0, 0.0, 1, 0),
        (0.7, 0, 1.0, 0.0, 2, 5),
        (1.0, 3, 1.0, 0.0, 3, 6),
        (1.0, 0, 0.5, 0.0, 4, 7),
        (1.2, 40, 0.9, 0.2, 5, 8),
        (1.0, 0, 0.95, 0.0, 6, 9),
        (1.0, vocab, 0.99, 0.0, -(2**63), 10),
    ]
    together = sample(logits, *columns(*rows))
    assert together.tolist() == [
        sample(logits[i : i + 1], *columns(row)).item() for i, row in enumerate(rows)
    ]
    assert together[0] == logits[0].argmax()


@pytest.mark.parametrize("p", [0.3, 0.9, 0.995])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_sample_filters_match_transformers(p: float, spread: float) -> None:
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(4)) * spread
    cold = TemperatureLogitsWarper(0.8)(None, logits)
    scaled = cold - cold.amax(-1, keepdim=True)
    for ours, theirs in (
        (
            sampling._top_k(scaled, torch.tensor([1, 2, 50, 4999]), sampling.FULL_VOCAB),
            [TopKLogitsWarper(k) for k in (1, 2, 50, 4999)],
        ),
        (
            sampling._top_p(scaled, torch.full((4,), p), sampling.FULL_VOCAB),
            [TopPLogitsWarper(p)] * 4,
        ),
        (
            sampling._min_p(scaled, torch.full((4,), p / 2), sampling.FULL_VOCAB),
            [MinPLogitsWarper(p / 2)] * 4,
        ),
    ):
        for row, warp in enumerate(theirs):
            kept = ours[row].isfinite()
            want = warp(None, cold[row : row + 1])[0].isfinite()
            assert (kept != want).sum() <= 1, "at most the token at the very edge, by rounding"


def test_sample_runs_no_filter_that_keeps_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs as much as a layer, and top-p of 1 would drop what rounding makes of a tail."""
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(1))
    off = [(1.0, 0, 1.0, 0.0, seed, 0) for seed in range(2)]
    expected = sample(logits, *columns(*off))
    for name in ("_top_k", "_top_p", "_min_p"):
        monkeypatch.setattr(sampling, name, lambda *_: pytest.fail("a filter ran"))
    assert sample(logits, *columns(*off)).tolist() == expected.tolist()
    for change in ({1: 3}, {2: 0.999}, {3: 0.001}):
        row = [change.get(index, value) for index, value in enumerate(off[1])]
        with pytest.raises(pytest.fail.Exception, match="a filter ran"):
            sample(logits, *columns(off[0], tuple(row)))


def exact_logit(probability: float) -> float:
    """The logit whose exponential in float32 is the probability exactly."""
    logit = torch.tensor(probability).log()
    for _ in range(8):
        if logit.exp() == probability:
            return logit.item()
        toward = float("inf") if logit.exp() < probability else float("-inf")
        logit = logit.nextafter(torch.tensor(toward))
    pytest.skip(f"no float32 has the exponential {probability} here")


@pytest.mark.parametrize(
    ("p", "kept"), [(0.25, 1), (0.5, 1), (0.5000001, 2), (0.75, 2), (0.7500001, 4), (1.0, 4)]
)
def test_sample_top_p_ends_with_the_token_that_reaches_p(p: float, kept: int) -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8, whose sums float32 holds exactly."""
    half, quarter = exact_logit(0.5), exact_logit(0.25)
    scaled = torch.tensor([[quarter, 0.0, half, quarter]])
    got = sampling._top_p(scaled, torch.tensor([p]), sampling.FULL_VOCAB)[0].isfinite()
    assert got.nonzero()[:, 0].tolist() == {1: [1], 2: [1, 2], 4: [0, 1, 2, 3]}[kept]


@pytest.mark.parametrize(
    ("p", "kept"), [(0.49, 2048), (0.5, 2048), (0.5000001, 6144), (0.9, 6144), (1.0, 6144)]
)
def test_sample_top_p_ends_a_wide_nucleus_with_the_token_that_reaches_p(
    p: float, kept: int
) -> None:
    """2048 tokens with 1/4096 each and 4096 with half of that: more than are sorted at first."""
    scaled = torch.full((1, 6144), exact_logit(0.5))
    scaled[0, 1::3] = 0.0
    assert sampling._NUCLEUS < 2048
    got = sampling._top_p(scaled, torch.tensor([p]), sampling.FULL_VOCAB)[0].isfinite()
    assert int(got.sum()) == kept
    assert bool(got[1::3].all())


def test_sample_noise_is_the_published_hashes() -> None:
    def splitmix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def lowbias(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    assert (
        splitmix(0) == 0xE220A8397B1DCDAF
    )  # the first output of the reference generator seeded with 0
    seeds = [0, 1, -1, 2**62, -(2**63)]
    counters = [0, 1, 2, 3, 100_000]
    got = sampling._hash(sampling._key(torch.tensor(seeds), torch.tensor(counters)), 300)
    for row, (seed, counter) in enumerate(zip(seeds, counters, strict=True)):
        key = splitmix((splitmix(seed % 2**64) + counter) % 2**64)
        want = [lowbias((token + key) % 2**32) ^ key >> 32 for token in range(300)]
        assert [x % 2**32 for x in got[row].tolist()] == want


def test_sample_draws_are_independent_and_uniform() -> None:
    """Chi-square of single tokens and of successive pairs, over the counters of one seed."""
    n = 64_000
    vocab = 8
    ids = sample(torch.zeros(n, vocab), *columns(*[(1.0, 0, 1.0, 0.0, 42, i) for i in range(n)]))
    for values, cells, quantile in (
        (ids, vocab, 24.3),
        (ids[:-1] * vocab + ids[1:], vocab**2, 103.4),
    ):
        count = torch.bincount(values, minlength=cells).double()
        mean = count.sum() / cells
        assert ((count - mean) ** 2 / mean).sum() < quantile  # p = 0.001


def test_sample_extreme_parameters_keep_the_most_probable_token() -> None:
    logits = torch.tensor([0.0, 80.0, -80.0, float("-inf")]).expand(5, 4)
    rows = [
        (1e-38, 0, 1.0, 0.0, 1, 0),
        (1.0, 1, 1.0, 0.0, 1, 0),
        (1.0, 0, 1e-9, 0.0, 1, 0),
        (1.0, 0, 1.0, 1.0, 1, 0),
        (100.0, 0, 0.0, 0.0, 1, 0),
    ]
    assert sample(logits, *columns(*rows)).tolist() == [1] * 5


def test_sample_nan_row_leaves_the_others() -> None:
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(1))
    rows = [(0.9, 5, 0.9, 0.05, seed, 0) for seed in range(4)]
    want = sample(logits, *columns(*rows))
    for bad in (float("nan"), float("inf")):
        broken = logits.clone()
        broken[1, 3] = broken[1, 7] = bad
        got = sample(broken, *columns(*rows))
        assert got[[0, 2, 3]].tolist() == want[[0, 2, 3]].tolist()
        assert 0 <= got[1] < V
