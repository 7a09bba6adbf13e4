"""Paged attention in Triton: interpreted against the reference, and compiled for two GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.paged_cases import BLOCK, CASES, DECODE, IDS, MIXED, REPLAYED, Case, assert_close
from support.triton_checks import SHARED_BYTES, compiled_for, interpreted

from llmkit.kernels import paged_attention as paged
from llmkit.kernels.attention_metadata import AttentionBatch

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """Of every case, then of every replayed one."""
    calls = [(index, False) for index in range(len(CASES))] + [
        (index, True) for index in range(len(REPLAYED))
    ]
    return interpreted(
        "support.paged_cases",
        "run_kernel_interpreted",
        calls,
        tmp_path_factory.mktemp("interpreted"),
    )


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_paged_attention_kernel_matches_the_reference(
    case: Case, answers: list[torch.Tensor]
) -> None:
    assert_close(answers[CASES.index(case)], case.inputs.expected(), case.dtype)


@pytest.mark.parametrize("case", REPLAYED, ids=lambda case: case.label)
def test_paged_attention_launch_replays_with_other_lengths(
    case: Case, answers: list[torch.Tensor]
) -> None:
    assert_close(answers[len(CASES) + REPLAYED.index(case)], case.inputs.expected(), case.dtype)


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
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], tuple[Launches, Launches]]:
    """Makes the CPU look like a GPU with 132 multiprocessors, and records the kernels' launches."""
    pytest.importorskip("triton")

    def make(capability: tuple[int, int]) -> tuple[Launches, Launches]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        properties = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        both = Launches(paged._paged_attention_kernel), Launches(paged._combine_splits_kernel)
        monkeypatch.setattr(paged, "_paged_attention_kernel", both[0])
        monkeypatch.setattr(paged, "_combine_splits_kernel", both[1])
        return both

    return make


PROMPT = [200], [300]
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
    (80, Case("decode", *DECODE, dim=128, heads=(8, 2))),
    (80, Case("prefill", *PROMPT, dim=128, heads=(8, 2))),
    (80, Case("prefill, window, cap, dim 256", *PROMPT, dim=256, window=100, softcap=50.0)),
    (80, Case("prefill, int8", *PROMPT, dim=128, kv_cache_dtype="int8", dynamic_scales=True)),
]


@pytest.mark.parametrize(
    ("capability", "case"),
    COMPILED,
    ids=lambda part: part.label if isinstance(part, Case) else f"sm_{part}",
)
def test_paged_attention_kernel_compiles_as_launched(
    capability: int,
    case: Case,
    gpu: Callable[[tuple[int, int]], tuple[Launches, Launches]],
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
        assert len(noted.grids) <= 1
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
            if capability == 90 and "prefill" in case.label and noted is launches[0]:
                assert "HGMMA" in compiled.code
    assert launches[1].grids or "decode" not in case.label, "short of programs, a context is split"


def test_paged_attention_decode_launch_depends_on_shapes_alone(
    gpu: Callable[[tuple[int, int]], tuple[Launches, Launches]],
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
    assert launches[0].grids[0] == (4, 2, 4), "a split is two tiles of 64 tokens at least"


@pytest.mark.parametrize(
    ("programs", "most", "expected"),
    [(8, 1000, 64), (8, 5, 4), (8, 0, 1), (264, 64, 2), (265, 64, 1), (9999, 64, 1)],
)
def test_paged_attention_splits_fill_the_gpu(
    programs: int,
    most: int,
    expected: int,
    gpu: Callable[[tuple[int, int]], tuple[Launches, Launches]],
) -> None:
    gpu((9, 0))
    assert paged._num_splits(torch.device("cuda"), programs, most) == expected


def test_attention_metadata_device_tensors() -> None:
    new, contexts = MIXED
    tables = [
        list(range(10 * i, 10 * i + -(-length // BLOCK))) for i, length in enumerate(contexts)
    ]
    group = AttentionBatch.build(new, contexts, {None: tables}, BLOCK).metadata(None)
    table, context, starts, tiles = group.device_tensors(20)
    assert all(
        part.dtype == torch.int32 and part.data_ptr() % 16 == 0
        for part in (table, context, starts, tiles)
    )
    assert [[block for block in row if block >= 0] for row in table.tolist()] == tables
    assert table.shape[1] == 16
    assert context.tolist() == contexts
    assert starts.tolist() == [0, 1, 24, 25, 75, 77]
    assert tiles is not None
    assert tiles.tolist() == [[3, 40], [0, 0], [3, 20], [3, 0], [4, 0], [1, 20], [1, 0], [2, 0]]
    assert group.device_tensors(20)[0] is table


def test_attention_batch_refuses_freed_blocks_in_use() -> None:
    batch = AttentionBatch.build([1, 1], [30, 40], {20: [[0, 1], [-1, -1, 2]]}, BLOCK)
    with pytest.raises(AssertionError, match="within the window"):
        batch.metadata(20).device_tensors(1)
    batch = AttentionBatch.build([1, 1], [30, 40], {20: [[0, 1], [-1, 3, 2]]}, BLOCK)
    assert batch.metadata(20).device_tensors(1)[0][:, :3].tolist() == [[0, 1, -1], [-1, 3, 2]]
