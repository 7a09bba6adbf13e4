"""Paged attention in Triton: interpreted against the reference, and compiled for two GPUs."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.paged_cases import BLOCK, CASES, DECODE, MIXED, REPLAYED, Case, assert_close
from support.triton_checks import SHARED_BYTES, compiled_for, interpreted

from llmkit.kernels import paged_attention as paged
from llmkit.kernels import triton_support
from llmkit.kernels.attention_metadata import AttentionBatch

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
}


# Each has neighbours with the same features in other combinations.
SLOW_CASES = {
    "3 heads a head",
    "dim 128",
    "soft cap",
    "sinks, mixed",
    "sinks, window, splits",
    "sinks, int8, splits",
    "2 programs",
    "4 programs",
    "splits, float32",
    "ragged, 5 heads a head",
    "ragged, window",
    "ragged, mixed",
    "ragged, int8, bfloat16",
    "int8, own scales",
    "int8, stored scales, splits",
    "fp8, stored scales",
    "fp8, own scales, splits",
}
Group = tuple[bool, bool]  # is replayed, is slow


def group(case: Case, is_replayed: bool) -> Group:
    return is_replayed, case in REPLAYED[1::2] if is_replayed else case.label in SLOW_CASES


def parameters(cases: list[Case], is_replayed: bool) -> list[Any]:
    return [
        pytest.param(
            case, id=case.label, marks=[pytest.mark.slow] if group(case, is_replayed)[1] else []
        )
        for case in cases
    ]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case, bool], torch.Tensor]:
    """The kernel's output for a case, run together with the others of its group."""

    @cache
    def answers(wanted: Group) -> dict[str, torch.Tensor]:
        cases = REPLAYED if wanted[0] else CASES
        calls = [
            (index, wanted[0])
            for index, case in enumerate(cases)
            if group(case, wanted[0]) == wanted
        ]
        folder = tmp_path_factory.mktemp("interpreted")
        outputs = interpreted("support.paged_cases", "run_kernel_interpreted", calls, folder)
        return {
            cases[index].label: output for (index, _), output in zip(calls, outputs, strict=True)
        }

    return lambda case, is_replayed: answers(group(case, is_replayed))[case.label]


@pytest.mark.parametrize("case", parameters(CASES, False))
def test_paged_attention_kernel_matches_the_reference(
    case: Case, answer: Callable[[Case, bool], torch.Tensor]
) -> None:
    assert_close(answer(case, False), case.inputs.expected(), case.dtype)


@pytest.mark.parametrize("case", parameters(REPLAYED, True))
def test_paged_attention_launch_replays_with_other_lengths(
    case: Case, answer: Callable[[Case, bool], torch.Tensor]
) -> None:
    assert_close(answer(case, True), case.inputs.expected(), case.dtype)


class Launches:
    """Takes a kernel's place and notes its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.grids: list[tuple[int, ...]] = []
        self.arguments: list[dict[str, Any]] = []
        self.options: list[dict[str, int]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: int) -> None:
            self.grids.append(grid)
            self.arguments.append(dict(zip(self.kernel.arg_names, arguments, strict=True)))
            self.options.append(options)

        return launch


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], tuple[Launches, ...]]:
    """Makes the CPU look like a GPU with 132 multiprocessors, and records the kernels' launches."""
    pytest.importorskip("triton")

    def make(capability: tuple[int, int]) -> tuple[Launches, ...]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        properties = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        names = ("_paged_attention_kernel", "combine_units_kernel", "_schedule_kernel")
        launches = tuple(Launches(getattr(paged, name)) for name in names)
        for name, noted in zip(names, launches, strict=True):
            monkeypatch.setattr(paged, name, noted)
        return launches

    return make


PROMPT = [200], [300]
# "decodes beside a prompt" compiles both kinds of the same model. The other slow ones have a
# neighbour with another combination of the same features.
SLOW = {
    (90, "decode"),
    (90, "prefill"),
    (90, "prefill, sinks"),
    (90, "decode, window, cap, dim 256"),
    (89, "decode, fp8"),
    (89, "prefill, window, cap, dim 256"),
    (80, "prefill"),
}
COMPILED = [
    (90, Case("decode", *DECODE, dim=128, heads=(8, 2))),
    (
        90,
        Case(
            "decode, window, cap, dim 256",
            [1],
            [9000],
            dim=256,
            heads=(2, 1),
            window=8000,
            softcap=50.0,
        ),
    ),
    (90, Case("decode, fp8", *DECODE, dim=128, kv_cache_dtype="fp8", dynamic_scales=True)),
    (90, Case("decode, sinks, window", [1], [9000], heads=(8, 1), window=8000, sinks=True)),
    (90, Case("prefill, sinks", *PROMPT, heads=(8, 1), sinks=True)),
    (90, Case("prefill", *PROMPT, dim=128, heads=(8, 2))),
    (90, Case("prefill, window, cap, dim 256", *PROMPT, dim=256, window=100, softcap=50.0)),
    (90, Case("prefill, int8", *PROMPT, dim=128, kv_cache_dtype="int8", dynamic_scales=True)),
    (90, Case("prefill, fp8", *PROMPT, dim=80, kv_cache_dtype="fp8")),
    (90, Case("decode, dim 512", [1], [9000], dim=512, heads=(2, 1))),
    (90, Case("32 rows, dim 512", *PROMPT, dim=512, heads=(8, 2))),  # HGMMA needs 64 rows
    (
        90,
        Case(
            "prefill, own fp8",
            *PROMPT,
            dim=128,
            heads=(8, 2),
            kv_cache_dtype="fp8",
            dynamic_scales=True,
        ),
    ),
    (90, Case("decodes beside a prompt", [1, 200, 1], [9000, 300, 40], dim=128, heads=(8, 2))),
    (89, Case("decode, fp8", *DECODE, dim=128, kv_cache_dtype="fp8", dynamic_scales=True)),
    (89, Case("prefill, fp8", *PROMPT, dim=128, kv_cache_dtype="fp8", dynamic_scales=True)),
    (89, Case("prefill, window, cap, dim 256", *PROMPT, dim=256, window=100, softcap=50.0)),
    (80, Case("decode", *DECODE, dim=128, heads=(8, 2))),
    (80, Case("prefill", *PROMPT, dim=128, heads=(8, 2))),
    (80, Case("prefill, window, cap, dim 256", *PROMPT, dim=256, window=100, softcap=50.0)),
    (80, Case("prefill, int8", *PROMPT, dim=128, kv_cache_dtype="int8", dynamic_scales=True)),
]


@pytest.mark.parametrize(
    ("capability", "case"),
    [
        pytest.param(
            *pair,
            marks=[pytest.mark.slow] if (pair[0], pair[1].label) in SLOW else [],
            id=f"sm_{pair[0]}-{pair[1].label}",
        )
        for pair in COMPILED
    ],
)
def test_paged_attention_kernel_compiles_as_launched(
    capability: int,
    case: Case,
    gpu: Callable[[tuple[int, int]], tuple[Launches, ...]],
    tmp_path: Path,
) -> None:
    inputs = case.inputs
    launches = gpu((capability // 10, 0))
    inputs.q, inputs.with_nan = (
        inputs.q.bfloat16(),
        inputs.clean if case.kv_cache_dtype else inputs.bfloat16(),
    )
    inputs.run_kernel()
    for noted in launches:
        assert len(noted.grids) <= (2 if "beside" in case.label else 1)
        for arguments, options in zip(noted.arguments, noted.options, strict=True):
            constants = {
                parameter.name: arguments[parameter.name]
                for parameter in noted.kernel.params
                if parameter.is_constexpr or arguments[parameter.name] is None
            }
            types = {
                name: TYPES[value.dtype]
                if isinstance(value, torch.Tensor)
                else {int: "i32", float: "fp32"}[type(value)]
                for name, value in arguments.items()
                if name not in constants
            }
            compiled = compiled_for(capability, noted.kernel, types, constants, tmp_path, **options)
            assert compiled.stack_bytes == 0
            assert compiled.shared_bytes <= SHARED_BYTES[capability]
            is_prefill = "prefill" in case.label or arguments.get("ROWS") == 128
            if capability == 90 and is_prefill and noted is launches[0]:
                assert "HGMMA" in compiled.code
            if noted is launches[0]:
                # Keys and values of a tile are in (stages - 1) buffers each: the lookup of blocks
                # takes no stage.
                tile_bytes = arguments["TOKENS"] * arguments["PADDED_DIM"]
                tile_bytes *= arguments["kv"].element_size()
                assert compiled.shared_bytes >= 2 * (options["num_stages"] - 1) * tile_bytes
                if case.kv_cache_dtype:  # two values an instruction, and nothing on slow pipes
                    slow = re.findall(r"F2F\.\S+|I2F\.F16\S*", compiled.code)
                    assert slow == []
    assert launches[1].grids or "decode" not in case.label, "short of programs, a context is split"


def test_paged_attention_decode_launch_depends_on_shapes_alone(
    gpu: Callable[[tuple[int, int]], tuple[Launches, ...]],
) -> None:
    """Contexts are nowhere in it, so that a graph can be replayed with others."""
    launches = gpu((9, 0))
    q = CASES[0].inputs.q
    cache = CASES[0].inputs.clean
    tables = [[0] * 40] * 4
    for contexts in ([640] * 4, [1, 640, 17, 3]):
        batch = AttentionBatch.build([1] * 4, contexts, {None: tables}, BLOCK)
        paged.attention(q, cache, batch.metadata(None), 1.0, None)
    for noted in launches:
        assert len(set(noted.grids)) == 1 and noted.options[0] == noted.options[1]
        first, second = noted.arguments
        for name, value in first.items():
            other = second[name]
            if isinstance(value, torch.Tensor):
                assert (value.shape, value.stride()) == (other.shape, other.stride())
            else:
                assert value == other
    assert launches[0].grids[0] == (4 + 132, 2), "two programs for each multiprocessor"
    assert launches[1].grids[0] == (4, 2 * 2), "a program for each sequence and query head"


def test_paged_attention_gives_decodes_beside_prompts_small_tiles(
    gpu: Callable[[tuple[int, int]], tuple[Launches, ...]],
) -> None:
    attention_kernel, combine, schedule = gpu((9, 0))
    case = Case("", [1, 200, 1, 1], [5000, 300, 40, 17], dim=128, heads=(8, 2))
    case.inputs.run_kernel()
    assert [launch["ROWS"] for launch in attention_kernel.arguments] == [128, 16]
    assert [launch["TILE_QUERIES"] for launch in schedule.arguments] == [32, 4]
    assert [options["num_warps"] for options in attention_kernel.options] == [8, 4]
    tiles = [launch["tiles"].tolist() for launch in schedule.arguments]
    assert tiles[0] == [[1, 192], *([1, 32 * i] for i in range(5, -1, -1))]
    assert tiles[1] == [[0, 0], [2, 0], [3, 0]], "the longest context first"
    assert len(combine.grids) == 2


def test_paged_attention_on_amd_gpus_has_the_tiles_of_sm_80(
    gpu: Callable[[tuple[int, int]], tuple[Launches, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of an AMD GPU's architecture says something else."""
    attention_kernel, *_ = gpu((9, 0))
    for capability, is_amd in (((9, 0), False), ((8, 0), False), ((9, 4), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        monkeypatch.setattr(triton_support, "is_amd", lambda found=is_amd: found)
        Case("", *PROMPT, dim=256).inputs.run_kernel()
    assert [launch["TOKENS"] for launch in attention_kernel.arguments] == [32, 16, 16]


@pytest.mark.parametrize("dim", [128, 256])
def test_paged_attention_fits_into_the_shared_memory_of_amd_gpus(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 KiB: queries of a prompt, and keys and values in one buffer each."""
    monkeypatch.setattr(torch.version, "hip", "7.2")
    dtype = torch.bfloat16
    tokens, _, stages, _ = paged.default_config(64, dim, dtype, dtype, False, (8, 0))
    num_elements = 64 + 2 * (stages - 1) * tokens
    assert num_elements * dim * dtype.itemsize <= 64 << 10


def test_paged_attention_schedules_once_a_step(
    gpu: Callable[[tuple[int, int]], tuple[Launches, ...]],
) -> None:
    """Layers share the schedule; it is made again when a graph's lengths have changed."""
    attention_kernel, _, schedule = gpu((9, 0))
    inputs = CASES[0].inputs
    metadata = inputs.batch().metadata(None)
    for _ in range(3):
        paged.attention(inputs.q, inputs.clean, metadata, 1.0, None)
    assert (len(attention_kernel.grids), len(schedule.grids)) == (3, 1)
    blocks = torch.tensor([[0], [1], [2], [-1]])
    metadata.update_block_tables(blocks, torch.tensor([1, 2, 3, 4]))
    paged.attention(inputs.q, inputs.clean, metadata, 1.0, None)
    assert len(schedule.grids) == 2


NUM_RANDOM_BATCHES = 12


def schedules() -> list[tuple[Any, ...]]:
    """Arguments of `run_schedule`: random batches, the last ones with few or no tokens."""
    draw = random.Random(0)
    calls: list[tuple[Any, ...]] = []
    for _ in range(NUM_RANDOM_BATCHES):
        count = draw.choice([1, 2, 7, 17])
        lens = [draw.choice([1, 1, 1, 2, 3, 9, 70]) for _ in range(count)]
        contexts = [n + draw.choice([0, 1, 15, 16, 300, 5000]) for n in lens]
        window = draw.choice([None, None, 1, 40, 1000])
        queries = draw.choice([(4, 32), (1, 8), (16, 16)])
        calls.append((lens, contexts, window, queries, draw.choice([16, 64]), draw.choice([1, 9])))
    calls.append(([1] * 18, [8000, *[200] * 17], None, (4, 32), 64, 20))
    # Rows of a CUDA graph for 3 tokens each, of which one has none.
    calls.append(([3, 0, 1], [50, 0, 7], None, (4, 4), 16, 5, 3))
    calls.append(([6, 0, 1], [50, 0, 7], None, (2, 4), 16, 5, 6))
    return calls


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return interpreted(
        "support.paged_cases",
        "run_schedule",
        schedules(),
        tmp_path_factory.mktemp("scheduled"),
    )


@pytest.mark.parametrize("index", range(len(schedules())))
def test_attention_schedule_covers_each_token_once(index: int, scheduled: list[Any]) -> None:
    lens, contexts, window, _, tokens, programs, *_ = schedules()[index]
    queries_seen = [0] * len(lens)
    for tile_queries, units, parts, tiles in scheduled[index]:
        if tiles is None:
            tiles = [[sequence, 0] for sequence in range(len(lens))]
        assert len(units) == len(tiles) + programs
        used = [unit for unit in units if unit[3] > unit[2]]
        assert units == used + [[0, 0, 0, 0]] * (len(units) - len(used))
        lengths = {}  # in tiles of tokens
        next_unit = 0
        for (sequence, first_query), (first_unit, count) in zip(tiles, parts, strict=True):
            cached = contexts[sequence] - lens[sequence]
            end = min(lens[sequence], first_query + tile_queries)
            assert first_unit == next_unit
            next_unit += count
            if first_query >= end:
                assert count == 0
                continue
            queries_seen[sequence] += end - first_query
            low = max(0, cached + first_query + 1 - (window or contexts[sequence]))
            place = low // tokens * tokens
            for unit in units[first_unit:next_unit]:
                assert unit[:3] == [sequence, first_query, place]
                place = unit[3]
            assert place == cached + end
            sizes = [-(-(unit[3] - unit[2]) // tokens) for unit in units[first_unit:next_unit]]
            assert len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]
            lengths[sequence, first_query] = sizes
        assert next_unit == len(used)
        total = sum(map(sum, lengths.values()))
        bound = max(paged.MIN_UNIT_TILES, -(-total // programs))
        assert max(map(max, lengths.values())) <= bound
    assert queries_seen == lens


def test_attention_schedule_splits_one_long_context(scheduled: list[Any]) -> None:
    """One of 8,000 tokens among 17 of 200: its 125 tiles of tokens are no longer serial."""
    ((_, units, parts, _),) = scheduled[NUM_RANDOM_BATCHES]
    assert parts[0] == [0, 13] and all(count == 1 for _, count in parts[1:])
    assert max(stop - start for _, _, start, stop in units) == 10 * 64


def test_attention_metadata_device_tensors() -> None:
    new, contexts = MIXED
    tables = [
        list(range(10 * i, 10 * i + -(-length // BLOCK))) for i, length in enumerate(contexts)
    ]
    group = AttentionBatch.build(new, contexts, {None: tables}, BLOCK).metadata(None)
    table, context, starts = group.device_tensors()
    long, short = group.query_tiles(4, 20)
    assert long.tiles is not None and short.tiles is not None
    assert all(
        part.dtype == torch.int32 and part.data_ptr() % 16 == 0
        for part in (table, context, starts, long.tiles, short.tiles)
    )
    for row, blocks in zip(table.tolist(), tables, strict=True):
        assert row == blocks + [0] * (16 - len(blocks))
    assert context.tolist() == contexts
    assert starts.tolist() == [0, 1, 24, 25, 75, 77]
    assert long.tiles.tolist() == [[3, 40], [3, 20], [3, 0], [1, 20], [1, 0]]
    assert short.tiles.tolist() == [[0, 0], [4, 0], [2, 0]]
    assert (long.max_tokens, long.total_tokens) == (90, 90 + 80 + 60 + 23 + 20)
    assert group.device_tensors()[0] is table and group.query_tiles(4, 20)[0] is long
    (whole,) = group.query_tiles(50, 50)
    assert whole.tiles is None and whole.num_tiles == 5


def test_attention_batch_refuses_freed_blocks_in_use() -> None:
    batch = AttentionBatch.build([1, 1], [30, 40], {20: [[0, 1], [-1, -1, 2]]}, BLOCK)
    with pytest.raises(AssertionError, match="within the window"):
        batch.metadata(20).device_tensors()


def test_attention_block_table_on_the_device_has_no_freed_blocks() -> None:
    """Kernels of libraries read whole tiles before they mask them."""
    batch = AttentionBatch.build([1, 1], [30, 40], {20: [[0, 1], [-1, 3, 2]]}, BLOCK)
    metadata = batch.metadata(20)
    assert metadata.device_tensors()[0][:, :3].tolist() == [[0, 1, 0], [0, 3, 2]]
    metadata.update_block_tables(torch.tensor([[-1, 1], [-1, -1]]), torch.tensor([30, 40]))
    assert metadata.device_tensors()[0][:, :3].tolist() == [[0, 1, 0], [0, 0, 2]]
