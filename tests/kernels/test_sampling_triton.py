"""Sampling in Triton: interpreted against the reference, and compiled for two GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.sampling_cases import sampling_arguments
from support.triton_checks import compiled_for, interpreted

from llmkit.bench.gpu.kernel_code import TARGETS, kernel_code, sampler_cases
from llmkit.kernels import sampling_triton as sampling_gpu
from llmkit.kernels.sampling import sample
from llmkit.kernels.token_bitmask import apply_token_bitmask
from llmkit.kernels.triton_support import jit, tl

# Tokens, and which rows: from one on in steps.
SIZES = ((1300, 18, 7), (700, 19, 5), (130, 2, 5))


Call = tuple[torch.Tensor, ...]


def plain_calls() -> list[Call]:
    return [
        tuple(part[at::step].contiguous() for part in sampling_arguments(size))
        for size, at, step in SIZES
    ]


def broken_call() -> Call:
    """Rows 1, 3 and 5 have a logit that is not finite."""
    logits, *parameters = (part[16:22] for part in sampling_arguments(1300))
    for row, value in ((1, float("nan")), (3, float("inf")), (5, float("-inf"))):
        logits[row, 1200] = value
    wide = torch.cat((logits, torch.full((6, 3), float("nan"))), 1)[:, :1300]  # a stride of its own
    return wide, *parameters


def calls_with_ties() -> list[Call]:
    count = 5
    logits = torch.full((count, 200), -30.0)
    logits[:, 3] = 1.0
    logits[:, 50:54] = 0.5
    ones = torch.ones(count)
    common = (torch.zeros(count), torch.arange(count), torch.zeros(count, dtype=torch.int64))
    return [
        (logits, ones, torch.full((count,), 3), ones, *common),
        (logits, ones, torch.zeros(count, dtype=torch.int64), ones * 0.6, *common),
    ]


def first_bracket_call() -> Call:
    """Top-k and top-p both end close to the largest logit, top-p first."""
    count = 6
    logits = -torch.linspace(3, 40, 100).repeat(count, 1)
    logits[:, 20] = 0.0
    logits[:, 70] = -1.0
    logits[:, 71:74] = -1.5
    ones = torch.ones(count)
    seeds = torch.arange(count)
    return logits, ones, torch.full((count,), 5), ones * 0.6, ones * 0, seeds, seeds


def extreme_calls() -> list[Call]:
    """Few tokens above a floor, ties, 16-bit logits, and parameters at the ends of their ranges."""
    draw = torch.Generator().manual_seed(7)
    only = torch.full((1, 300), -1e30)
    only[0, 211] = 1.5
    logits = torch.cat(
        (
            torch.randn(2, 300, generator=draw) * 3,
            torch.zeros(1, 300),
            only,
            torch.randn(1, 300, generator=draw).round() * 1e-4,
            torch.randn(1, 300, generator=draw) * 1e30,
        )
    )
    asked = [
        (1.0, 0, 1e-9, 0.0),
        (1.0, 0, 0.0, 0.0),
        (1.0, 0, 1.0, 1.0),
        (1e-38, 0, 0.9, 0.0),
        (1e3, 30, 0.5, 0.0),
        (1.0, 3, 0.5, 0.1),
        (5.0, 20, 0.99, 0.0),
        (1.0, 50, 0.9999, 0.0),
        (0.7, 299, 0.3, 0.0),
        (2.0, 1, 1.0, 0.0),
        (0.0, 5, 0.5, 0.0),
    ]
    calls: list[Call] = []
    for turn, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        # Each kind of logits meets other parameters in each dtype.
        order = [(turn * 4 + 5 * row) % len(asked) for row in range(len(logits))]
        rows = logits[torch.arange(len(order)) % len(logits)]
        temperature, top_k, top_p, min_p = torch.tensor(asked, dtype=torch.float64)[order].T
        seeds = torch.randint(-(1 << 62), 1 << 62, (len(rows),), generator=draw)
        calls.append(
            (
                (rows.clamp(-6e4, 6e4) if dtype == torch.float16 else rows).to(dtype),
                temperature.float(),
                top_k.long(),
                top_p.float(),
                min_p.float(),
                seeds,
                seeds % 1000,
            )
        )
    return calls


def negative_call() -> Call:
    """All logits are so far below 0 that the share of a logit of 0 would be infinite."""
    logits, *parameters = (part[18::9] for part in sampling_arguments(1300))
    return (logits - 200, *(part.contiguous() for part in parameters))


def masked_call(kind: str) -> Call:
    """Some rows have a bitmask: of many tokens, of few, or of one. The vocabulary is padded."""
    first, step = (18, 5) if kind == "drawn" else (2, 9)
    arguments = (part[first::step].contiguous() for part in sampling_arguments(700, seed=4))
    logits, *parameters = arguments
    draw = torch.Generator().manual_seed(6)
    count = len(logits)
    bitmask = torch.randint(-(1 << 31), 1 << 31, (count, 22), generator=draw).int()
    bitmask[::3, :] = 0
    bitmask[::3, 4] = 0b1001
    bitmask[::3, 21] = 1 << 20  # behind the vocabulary
    bitmask[1, :] = 0
    bitmask[1, 21] = 1 << 27  # the last token
    rows = torch.arange(count, dtype=torch.int32).flip(0)
    rows[2::4] = -1
    return (logits, *parameters, bitmask, rows)


def forbidden_calls() -> list[Call]:
    """Greedy and filtered rows: no token is allowed; the only one, and all, have the least logit.

    A third call has no bitmask.
    """
    count = 5
    logits = torch.full((count, 300), torch.finfo(torch.float32).min)
    logits[:, :40] = torch.arange(40.0)
    parameters = (
        torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]),
        torch.tensor([0, 0, 5, 0, 5]),
        torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5]),
        torch.zeros(count),
        torch.arange(count),
        torch.arange(count),
    )
    rows = torch.zeros(count, dtype=torch.int32)
    none = torch.zeros(1, 10, dtype=torch.int32)
    one = none.clone()
    one[0, 9] = 2  # token 289
    return [
        (logits, *parameters, none, rows),
        (logits, *parameters, one, rows),
        (logits[:, 40:].contiguous(), *parameters),
    ]


def crowded_call() -> Call:
    return tuple(part[20::7].contiguous() for part in sampling_arguments(1300, seed=3))


def sample_with(num_candidates: int, *arguments: torch.Tensor) -> torch.Tensor:
    """`sample` with lists of this length: with short ones, rows need every level."""
    sampling_gpu.CANDIDATES = num_candidates
    return sampling_gpu.sample(*arguments)  # type: ignore[call-arg]


def exponential(u: torch.Tensor) -> torch.Tensor:
    """The kernel's -log(1 - u)."""
    out = torch.empty_like(u)
    _exponential_kernel[(1,)](u, out, count=len(u))
    return out


@jit
def _exponential_kernel(u: tl.tensor, out: tl.tensor, count: tl.constexpr) -> None:
    at = tl.arange(0, count)
    tl.store(out + at, sampling_gpu._exponential(tl.load(u + at)))


def row_masses(masses: torch.Tensor) -> torch.Tensor:
    """The kernel's sums of masses [1, 1, S, WAYS] over the splits."""
    out = torch.empty(masses.shape[-1])
    _row_masses_kernel[(1,)](masses, out, splits=masses.shape[2], ways=masses.shape[3])
    return out


@jit
def _row_masses_kernel(
    masses: tl.tensor, out: tl.tensor, splits: tl.constexpr, ways: tl.constexpr
) -> None:
    row = tl.program_id(0)
    mass = sampling_gpu._sums(masses, row, 1, 0, splits, ways)
    tl.store(out + tl.arange(0, ways), mass)


def masses_of_splits() -> list[torch.Tensor]:
    """Masses of 64 splits, in two orders."""
    draw = torch.Generator().manual_seed(5)
    masses = torch.rand(1, 1, 64, 16, generator=draw) * torch.arange(1, 65).view(1, 1, -1, 1)
    return [masses, masses.flip(2).contiguous()]


def draws() -> torch.Tensor:
    """Uniform numbers of every size, as the sampler makes them."""
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 1 << 31, (1 << 16,), generator=draw, dtype=torch.int64)
    bits[: 1 << 14] >>= torch.arange(1 << 14) % 31
    u = ((bits.float() + 0.5) * 2.0**-31).clamp_max(1 - 2.0**-24)
    u[:2] = torch.tensor([2.0**-32, 1 - 2.0**-24])
    return u


def run(name: str, *arguments: Any) -> torch.Tensor:
    """A function of this file, in the interpreter."""
    function: Callable[..., torch.Tensor] = globals()[name]
    return function(*arguments)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[torch.Tensor]]:
    """The results of all calls, from one process: it takes seconds to start."""
    calls: list[tuple[str, tuple[Any, ...]]] = [("draws", ("exponential", draws()))]
    for name, sampled in (
        ("plain", plain_calls()),
        ("broken", [broken_call()]),
        ("ties", calls_with_ties()),
        ("extreme", extreme_calls()),
        ("first", [first_bracket_call()]),
        ("negative", [negative_call()]),
        ("masked", [masked_call("drawn"), masked_call("mixed")]),
        ("forbidden", forbidden_calls()),
    ):
        calls += [(name, ("sample_with", 4096, *call)) for call in sampled]
    calls += [("masses", ("row_masses", masses)) for masses in masses_of_splits()]
    calls += [("crowded", ("sample_with", length, *crowded_call())) for length in (64, 8)]
    results = interpreted(
        "kernels.test_sampling_triton",
        "run",
        [call for _, call in calls],
        tmp_path_factory.mktemp("ids"),
    )
    found: dict[str, list[torch.Tensor]] = {}
    for (name, _), result in zip(calls, results, strict=True):
        found.setdefault(name, []).append(result)
    return found


def test_sample_kernels_match_the_reference(ids: dict[str, list[torch.Tensor]]) -> None:
    for call, got in zip(plain_calls(), ids["plain"], strict=True):
        expected = sample(*call)  # type: ignore[call-arg]
        assert len(set(expected.tolist())) > 4
        assert got.tolist() == expected.tolist()


def test_sample_kernels_give_no_token_for_nan_rows(ids: dict[str, list[torch.Tensor]]) -> None:
    expected = sample(*broken_call()).tolist()  # type: ignore[call-arg]
    assert ids["broken"][0].tolist() == [
        -1 if row in (1, 3, 5) else expected[row] for row in range(6)
    ]


def test_sample_kernels_keep_ties(ids: dict[str, list[torch.Tensor]]) -> None:
    """Tokens that tie with the last kept one are kept, too."""
    for call, got in zip(calls_with_ties(), ids["ties"], strict=True):
        assert got.tolist() == sample(*call).tolist()  # type: ignore[call-arg]
        assert len(set(got.tolist())) > 3


def test_sample_kernels_match_the_reference_in_extreme_cases(
    ids: dict[str, list[torch.Tensor]],
) -> None:
    for (logits, *parameters), got in zip(extreme_calls(), ids["extreme"], strict=True):
        expected = sample(logits.float(), *parameters)  # type: ignore[call-arg]
        assert got.tolist() == expected.tolist()


def test_sample_kernels_find_bounds_next_to_the_largest_logit(
    ids: dict[str, list[torch.Tensor]],
) -> None:
    expected = sample(*first_bracket_call()).tolist()  # type: ignore[call-arg]
    assert set(expected) == {20, 70}
    assert ids["first"][0].tolist() == expected


def test_sample_kernels_filter_rows_of_negative_logits(ids: dict[str, list[torch.Tensor]]) -> None:
    expected = sample(*negative_call()).tolist()  # type: ignore[call-arg]
    assert ids["negative"][0].tolist() == expected


def test_sample_kernels_read_bitmasks(ids: dict[str, list[torch.Tensor]]) -> None:
    for kind, got in zip(("drawn", "mixed"), ids["masked"], strict=True):
        logits, *parameters, bitmask, bitmask_rows = masked_call(kind)
        apply_token_bitmask(logits, bitmask, bitmask_rows)
        allowed = logits.gather(1, got[:, None])
        assert (allowed > float("-inf")).all()
        assert got.tolist() == sample(logits, *parameters).tolist()  # type: ignore[call-arg]
        assert len(set(got.tolist())) > 3


def test_sample_kernels_give_no_token_where_none_is_allowed(
    ids: dict[str, list[torch.Tensor]],
) -> None:
    none, one, every = ids["forbidden"]
    assert none.tolist() == [-1] * 5
    assert one.tolist() == [289] * 5
    assert every.tolist() == sample(*forbidden_calls()[2]).tolist()  # type: ignore[call-arg]


def test_sample_kernels_match_the_reference_with_crowded_brackets(
    ids: dict[str, list[torch.Tensor]],
) -> None:
    """Some rows are counted twice, and some are searched as a whole."""
    expected = sample(*crowded_call()).tolist()  # type: ignore[call-arg]
    assert [got.tolist() for got in ids["crowded"]] == [expected] * 2


def test_sums_over_splits_are_the_same_in_every_order(ids: dict[str, list[torch.Tensor]]) -> None:
    """The kernels must agree on them, and each adds in the order of its own warps."""
    assert torch.equal(*ids["masses"])


def test_exponential_has_the_precision_of_float32(ids: dict[str, list[torch.Tensor]]) -> None:
    truth = -torch.log1p(-draws().double())
    assert ((ids["draws"][0] / truth - 1).abs() < 4e-7).all()


def test_sample_splits_fill_a_gpu() -> None:
    splits = {rows: sampling_gpu.num_splits(rows, 128_256) for rows in (1, 16, 64, 256, 5000)}
    assert splits == {1: 64, 16: 32, 64: 8, 256: 2, 5000: 1}
    assert sampling_gpu.num_splits(1, 5) == 1
    rare = {rows: sampling_gpu.num_splits(rows, 128_256, is_rare=True) for rows in (1, 16, 64, 256)}
    assert rare == {1: 64, 16: 64, 64: 16, 256: 4}, "few numbers, and none is smaller"


@pytest.mark.parametrize("vocab_size", [5, 5_000, 128_256])
@pytest.mark.parametrize("is_rare", [False, True])
def test_sample_rows_of_variants_have_all_numbers_of_splits(vocab_size: int, is_rare: bool) -> None:
    for max_rows in (1, 31, 256, 700):
        expected = {
            sampling_gpu.num_splits(rows, vocab_size, is_rare=is_rare)
            for rows in range(1, max_rows + 1)
        }
        found = {
            sampling_gpu.num_splits(rows, vocab_size, is_rare=is_rare)
            for rows in sampling_gpu.rows_of_variants(max_rows)
        }
        assert found == expected


def test_sample_kernels_are_the_same_for_all_numbers_of_rows_with_as_many_splits() -> None:
    gpu = sampling_gpu
    kernels = (
        gpu._find_extremes_kernel,
        gpu._count_kernel,
        gpu._draw_kernel,
        gpu._choose_kernel,
    )
    for kernel in kernels:
        assert [one.name for one in kernel.params if one.do_not_specialize] == ["rows"]


@pytest.mark.parametrize(
    ("capability", "dtype", "has_bitmask", "has_tables"),
    [
        (90, "*bf16", True, False),
        (80, "*fp32", True, False),
        (90, "*bf16", False, True),
        (90, "*bf16", True, True),
        pytest.param(90, "*fp32", True, True, marks=pytest.mark.slow),
        pytest.param(80, "*fp32", True, True, marks=pytest.mark.slow),
        pytest.param(80, "*fp16", False, True, marks=pytest.mark.slow),
        pytest.param(89, "*bf16", False, True, marks=pytest.mark.slow),
    ],
)
def test_sample_kernels_compile(
    capability: int, dtype: str, has_bitmask: bool, has_tables: bool, tmp_path: Path
) -> None:
    kinds = (
        {"logits": dtype}
        | dict.fromkeys(("temperature", "top_p", "min_p", "extremes", "masses"), "*fp32")
        | dict.fromkeys(("top_k", "seeds", "counters", "ids"), "*i64")
        | dict.fromkeys(("tokens", "counts", "candidates"), "*i32")
        | dict.fromkeys(("rows", "row_stride", "vocab_size", "slice_size"), "i32")
    )
    bitmask = dict.fromkeys(("bitmask", "bitmask_rows"), "*i32")
    tables = {"slots": "*i64", "token_counts": "*i32", "bias": "*fp32", "factors": "*fp32"}
    tables |= {"min_tokens": "*i64"}
    kinds |= (bitmask if has_bitmask else {}) | (tables if has_tables else {})
    gpu = sampling_gpu
    constants: dict[str, int | None] = {
        **dict.fromkeys(() if has_bitmask else bitmask),
        **dict.fromkeys(() if has_tables else tables),
        "SPLITS": 16,
        "WAYS": gpu.WAYS,
        "CANDIDATES": gpu.CANDIDATES,
        "TILE": gpu.TILE,
        "THREADS": 32 * gpu.NUM_WARPS,
        "UNROLL": gpu.UNROLL,
        "LEVEL": 1,
    }
    choice_warps = gpu.CHANGED_CHOICE_WARPS if has_tables else gpu.CHOICE_WARPS
    for kernel, warps, tile in (
        (gpu._find_extremes_kernel, gpu.NUM_WARPS, gpu.TILE),
        (gpu._count_kernel, gpu.NUM_WARPS, gpu.TILE),
        (gpu._draw_kernel, gpu.NUM_WARPS, gpu.TILE),
        (gpu._choose_kernel, choice_warps, gpu.CHOICE_TILE),
    ):
        names = kernel.arg_names
        compiled = compiled_for(
            capability,
            kernel,
            {name: kinds[name] for name in names if name in kinds},
            {name: (constants | {"TILE": tile})[name] for name in names if name in constants},
            tmp_path,
            num_warps=warps,
        )
        assert compiled.stack_bytes == 0
        assert compiled.shared_bytes <= (40 if has_tables else 16) * 1024


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=[] if target == "sm_89" else [pytest.mark.slow])
        for target in TARGETS
    ],
)
def test_sample_kernels_without_changes_compile(target: str) -> None:
    """What most steps launch: 16-bit logits, without a bitmask and tables."""
    pytest.importorskip("triton")
    cases = [case for case in sampler_cases() if not case.name.endswith(("-masked", "-changed"))]
    assert [case.constants.get("LEVEL") for case in cases] == [None, 0, 1, None, None]
    for case in cases:
        code = kernel_code(case, target)
        assert code.spill_bytes == 0, case.name
        assert code.shared_bytes <= 16 * 1024, case.name
