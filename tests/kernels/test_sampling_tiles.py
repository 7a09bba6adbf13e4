"""Draws of the Triton sampler over many tiles, of which most need no exact arrival times.

The sampler's other tests have one tile for each split. Here, tiles are short.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.triton_checks import interpreted

from llmkit.kernels import sampling_triton as sampling_gpu
from llmkit.kernels.logits_tables import IN_PROMPT, IS_END, LogitsTables, change_logits
from llmkit.kernels.sampling import sample
from llmkit.kernels.token_bitmask import apply_token_bitmask, num_bitmask_words
from llmkit.kernels.triton_support import jit, tl

TILE = 64
# Tokens that a counting loop handles in a turn must divide a split, as they do in the sampler.
SETTINGS = {"TILE": TILE, "NUM_WARPS": TILE // 32, "UNROLL": 1}
# How often each is called says which tiles were skipped: `_draw_kernel` calls the first two for
# each tile and the third for some, `_choose_kernel` calls the last two together.
COUNTED = ("_log2_before", "_random_bits", "_arrival")

Asked = tuple[float, int, float, float]  # temperature, top-k, top-p, min-p


@dataclass(frozen=True)
class Case:
    """Rows to sample. asked: of each row in turn."""

    asked: tuple[Asked, ...]
    dtype: torch.dtype = torch.bfloat16
    spread: float = 3.0  # of the logits
    rows: int = 12
    splits: int = 1
    tiles: int = 10  # of a split
    candidates: int = 64  # the most that are listed
    is_extreme: bool = False
    has_bitmask: bool = False
    has_tables: bool = False

    @property
    def size(self) -> int:
        """The vocabulary. The last tile is not full."""
        return self.splits * self.tiles * TILE - 13

    @property
    def is_filtered(self) -> bool:
        return any(top_k > 0 or top_p < 1 for _, top_k, top_p, _ in self.asked)


UNFILTERED = ((1.0, 0, 1.0, 0.0), (0.4, 0, 1.0, 0.0), (3.0, 0, 1.0, 0.0), (40.0, 0, 1.0, 0.0))
CASES = {
    "no filter": Case(UNFILTERED, rows=48, splits=2),
    "float32": Case(UNFILTERED, torch.float32, rows=16, tiles=20),
    "four splits": Case(UNFILTERED, torch.float32, rows=6, splits=4),
    "top-p": Case(((1.0, 0, 0.8, 0.0), (2.0, 0, 0.95, 0.0)), spread=1.0, rows=8, splits=2),
    "top-k": Case(((1.0, 300, 1.0, 0.0), (4.0, 500, 1.0, 0.0)), torch.float32, rows=8),
    "top-k and top-p": Case(((1.0, 400, 0.8, 0.0), (2.0, 300, 0.9, 0.01)), torch.float32, 1.0),
    "min-p": Case(((1.0, 0, 1.0, 0.05), (3.0, 0, 1.0, 0.3), (1.0, 0, 0.9, 0.02)), spread=1.0),
    "bitmask": Case((*UNFILTERED, (1.0, 0, 0.9, 0.0)), has_bitmask=True),
    "tables": Case((*UNFILTERED, (1.0, 0, 0.9, 0.0)), has_tables=True),
    "bitmask and tables": Case(UNFILTERED, torch.float32, has_bitmask=True, has_tables=True),
    "extreme": Case((*UNFILTERED, (1e-6, 0, 1.0, 0.0)), is_extreme=True, rows=18),
    "extreme float32": Case(
        ((1.0, 0, 1.0, 0.0), (5.0, 0, 0.9, 0.0)), torch.float32, is_extreme=True
    ),
}


@dataclass
class Inputs:
    logits: torch.Tensor
    parameters: list[torch.Tensor]
    bitmask: torch.Tensor | None = None
    bitmask_rows: torch.Tensor | None = None
    tables: LogitsTables | None = None
    slots: torch.Tensor | None = None


def inputs_of(case: Case) -> Inputs:
    draw = torch.Generator().manual_seed(17)
    shape = (case.rows, case.size)
    logits = torch.randn(shape, generator=draw) * case.spread
    if case.is_extreme:
        make_extreme(logits, draw)
    asked = [case.asked[row % len(case.asked)] for row in range(case.rows)]
    temperature, top_k, top_p, min_p = torch.tensor(asked, dtype=torch.float64).T
    seeds = torch.randint(-(1 << 62), 1 << 62, (case.rows,), generator=draw)
    counters = torch.randint(0, 5000, (case.rows,), generator=draw)
    inputs = Inputs(
        logits.to(case.dtype),
        [temperature.float(), top_k.long(), top_p.float(), min_p.float(), seeds, counters],
    )
    if case.has_bitmask:
        num_words = num_bitmask_words(case.size)
        bitmask = torch.randint(-(1 << 31), 1 << 31, (case.rows, num_words), generator=draw).int()
        # Of some rows, most tiles have no token; of others, only the last tile has.
        bitmask[1::4] *= torch.rand(num_words, generator=draw) < 0.1
        bitmask[2::4, :-1] = 0
        inputs.bitmask = bitmask
        rows = torch.arange(case.rows, dtype=torch.int32)
        inputs.bitmask_rows = rows.where(rows % 5 > 0, -1)
    if case.has_tables:
        counts = torch.randint(0, 3, (4, case.size), generator=draw, dtype=torch.int32)
        counts[:, ::4] |= IN_PROMPT
        counts[:, 1::5] |= IS_END
        bias = torch.randint(-3, 4, counts.shape, generator=draw).float() / 2
        factors = [
            (1 / 1.3, 1.3, 0.5, 0.0, 1),
            (1, 1, 0, 0, 1),
            (1, 1, 0, 0, 0),
            (1 / 1.1, 1.1, -0.2, 0.7, 0),
        ]
        min_tokens = torch.tensor([1 << 20, 0, 1 << 20, 0])
        inputs.tables = LogitsTables(counts, bias, torch.tensor(factors), min_tokens)
        inputs.slots = torch.arange(case.rows) % 5 - 1
    return inputs


def make_extreme(logits: torch.Tensor, draw: torch.Generator) -> None:
    """Rows of six kinds, in turn: some tokens far above the others, far below, or none."""
    places = torch.randint(0, logits.shape[1], (len(logits), 2), generator=draw)
    for row, (place, other) in enumerate(places.tolist()):
        match row % 6:
            case 0:
                logits[row, place] = 1e4
            case 1:
                logits[row, torch.rand(logits.shape[1], generator=draw) < 0.7] = -1e30
            case 2:
                logits[row, place] += 50
            case 3:
                logits[row] = 0.5
            case 4:
                logits[row, [place, other]] = 1e30
            case 5:
                logits[row] -= 200


def sample_in_tiles(name: str) -> tuple[torch.Tensor, Counter[str]]:
    """The sampled ids of a case, and how often each of COUNTED was called."""
    case = CASES[name]
    inputs = inputs_of(case)
    calls: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for setting, value in SETTINGS.items():
            patch.setattr(sampling_gpu, setting, value)
        patch.setattr(sampling_gpu, "MAX_SPLITS", case.splits)
        patch.setattr(sampling_gpu, "CANDIDATES", case.candidates)
        for function in COUNTED:
            counting = _counting(function, getattr(sampling_gpu, function), calls)
            patch.setattr(sampling_gpu, function, counting)
        ids = sampling_gpu.sample(
            inputs.logits,
            *inputs.parameters,
            inputs.bitmask,
            inputs.bitmask_rows,
            inputs.tables,
            inputs.slots,
        )
    return ids, calls


def _counting(
    name: str, function: Callable[..., Any], calls: Counter[str]
) -> Callable[..., tl.tensor]:
    def call(*arguments: Any) -> tl.tensor:
        calls[name] += 1
        return function(*arguments)

    return call


def expected_ids(case: Case) -> torch.Tensor:
    inputs = inputs_of(case)
    logits = inputs.logits.float()
    if inputs.tables is not None and inputs.slots is not None:
        logits = change_logits(logits, inputs.tables, inputs.slots, inputs.parameters[-1])
    if inputs.bitmask is not None and inputs.bitmask_rows is not None:
        apply_token_bitmask(logits, inputs.bitmask, inputs.bitmask_rows)
    return sample(logits, *inputs.parameters)


def bounds(bits: torch.Tensor, distances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's bounds of arrival times, and the times."""
    before = torch.empty_like(distances)
    arrivals = torch.empty_like(distances)
    _bounds_kernel[(1,)](bits, distances, before, arrivals, count=len(bits))
    return before, arrivals


@jit
def _bounds_kernel(
    bits: tl.tensor,
    distances: tl.tensor,
    before: tl.tensor,
    arrivals: tl.tensor,
    count: tl.constexpr,
) -> None:
    at = tl.arange(0, count)
    token_bits = tl.load(bits + at)
    distance = tl.load(distances + at)
    tl.store(before + at, sampling_gpu._log2_before(token_bits, distance))
    tl.store(arrivals + at, sampling_gpu._arrival(token_bits, distance))


def bits_and_distances() -> tuple[torch.Tensor, torch.Tensor]:
    """Random bits of every size, each of the least and most, and distances from 0 to 80."""
    draw = torch.Generator().manual_seed(3)
    count = 1 << 16
    bits = torch.randint(0, 1 << 31, (count,), generator=draw)
    bits[: count // 2] >>= torch.arange(count // 2) % 31
    distances = torch.rand(count, generator=draw) * 80
    distances[::7] = 0
    distances[1::7] = 80
    edges = [0, 1, 2, 3, (1 << 24) - 1, 1 << 24, (1 << 30) + 1, (1 << 31) - 2, (1 << 31) - 1]
    bits[: 64 * len(edges)] = torch.tensor(edges).repeat(64)
    return bits.int(), distances


def run(name: str, *arguments: Any) -> Any:
    """A function of this file, in the interpreter."""
    return globals()[name](*arguments)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of all cases, and of the bounds, from one process."""
    calls = [("sample_in_tiles", name) for name in CASES]
    results = interpreted(
        "kernels.test_sampling_tiles",
        "run",
        [*calls, ("bounds", *bits_and_distances())],
        tmp_path_factory.mktemp("tiles"),
    )
    return dict(zip((*CASES, "bounds"), results, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_draws_over_many_tiles_match_the_reference(name: str, found: dict[str, Any]) -> None:
    ids, _ = found[name]
    expected = expected_ids(CASES[name])
    assert len(set(expected.tolist())) > len(expected) // 3
    assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("name", CASES)
def test_draws_skip_tiles(name: str, found: dict[str, Any]) -> None:
    """Else the ids would say nothing about the bound."""
    case = CASES[name]
    _, calls = found[name]
    num_tiles = calls["_log2_before"]
    num_computed = calls["_arrival"] - (calls["_random_bits"] - num_tiles)
    num_all = case.rows * case.splits * case.tiles
    assert num_tiles == num_all if not case.is_filtered else num_tiles > num_all // 2
    assert 0 < num_computed < num_tiles * (0.7 if case.is_extreme else 0.5)


def test_bound_is_not_above_the_arrival_time(found: dict[str, Any]) -> None:
    """158 + log2(arrival) is what `_draw_kernel` compares, with a margin of 1e-3."""
    before, arrivals = (values.double() for values in found["bounds"])
    assert torch.isfinite(arrivals).all()
    assert (before >= 0).all(), "the kernel compares the bits of floats"
    slack = 158 + arrivals.log2() - before
    assert slack.min() > -1e-3
    # A bound that is far below would be computed for nothing.
    bits, _ = bits_and_distances()
    usual = (bits > 64) & (bits < 1 << 28)
    assert slack[usual].max() < 0.2
