"""Paged attention in Triton: the kernels in the interpreter against the reference, and compiled for two GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paged_cases import BLOCK, CASES, DECODE, IDS, MIXED, REPLAYED, Case, assert_close
from triton_checks import SHARED_BYTES, compiled_for, interpreted

from llmkit.kernels import paged
from llmkit.kernels.attention import AttentionBatch

TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """Of every case, then of every replayed one."""
    calls = [(index, False) for index in range(len(CASES))] + [(index, True) for index in range(len(REPLAYED))]
    return interpreted("paged_cases", "interpreted_answer", calls, tmp_path_factory.mktemp("interpreted"))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_kernel_equals_the_reference(case: Case, answers: list[torch.Tensor]) -> None:
    assert_close(answers[CASES.index(case)], case.scene.expected(), case.dtype)


@pytest.mark.parametrize("case", REPLAYED, ids=lambda case: case.label)
def test_a_launch_can_be_replayed_with_other_contexts(case: Case, answers: list[torch.Tensor]) -> None:
    assert_close(answers[len(CASES) + REPLAYED.index(case)], case.scene.expected(), case.dtype)


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
    """Makes tensors of the CPU those of a GPU of 132 multiprocessors, whose launches of both kernels are noted."""
    pytest.importorskip("triton")

    def make(capability: tuple[int, int]) -> tuple[Launches, Launches]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        properties = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        both = Launches(paged._attend), Launches(paged._combine)
        monkeypatch.setattr(paged, "_attend", both[0])
        monkeypatch.setattr(paged, "_combine", both[1])
        return both

    return make


PROMPT = [200], [300]
COMPILED = [
    (90, Case("decode", *DECODE, dim=128, heads=(8, 2))),
    (90, Case("decode, window, cap, dim 256", [1], [9000], dim=256, heads=(2, 1), window=8000, softcap=50.0)),
    (90, Case("decode, fp8", *DECODE, dim=128, codes="fp8", own_scales=True)),
    (90, Case("prefill", *PROMPT, dim=128, heads=(8, 2))),
    (90, Case("prefill, window, cap, dim 256", *PROMPT, dim=256, window=100, softcap=50.0)),
    (90, Case("prefill, int8", *PROMPT, dim=128, codes="int8", own_scales=True)),
    (90, Case("prefill, fp8", *PROMPT, dim=80, codes="fp8")),
    (80, Case("decode", *DECODE, dim=128, heads=(8, 2))),
    (80, Case("prefill", *PROMPT, dim=128, heads=(8, 2))),
    (80, Case("prefill, window, cap, dim 256", *PROMPT, dim=256, window=100, softcap=50.0)),
    (80, Case("prefill, int8", *PROMPT, dim=128, codes="int8", own_scales=True)),
]


@pytest.mark.parametrize(
    ("capability", "case"), COMPILED, ids=lambda part: part.label if isinstance(part, Case) else f"sm_{part}"
)
def test_it_compiles_as_it_is_launched(
    capability: int, case: Case, gpu: Callable[[tuple[int, int]], tuple[Launches, Launches]], tmp_path: Path
) -> None:
    scene, launches = case.scene, gpu((capability // 10, 0))
    scene.q, scene.poisoned = scene.q.bfloat16(), scene.clean if case.codes else scene.bfloat16()
    scene.answer()
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


def test_what_is_launched_for_decoding_depends_on_shapes_alone(
    gpu: Callable[[tuple[int, int]], tuple[Launches, Launches]],
) -> None:
    """Contexts are nowhere in it, so that a graph can be replayed with others."""
    launches = gpu((9, 0))
    q, cache = CASES[0].scene.q, CASES[0].scene.clean
    tables = [[0] * 40] * 4
    for contexts in ([640] * 4, [1, 640, 17, 3]):
        batch = AttentionBatch.build([1] * 4, contexts, {None: tables}, BLOCK)
        paged.attention(q, cache, batch.of(None), 1.0, None)
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
    ("programs", "most", "expected"), [(8, 1000, 64), (8, 5, 4), (8, 0, 1), (264, 64, 2), (265, 64, 1), (9999, 64, 1)]
)
def test_splits_fill_the_gpu(
    programs: int, most: int, expected: int, gpu: Callable[[tuple[int, int]], tuple[Launches, Launches]]
) -> None:
    gpu((9, 0))
    assert paged._splits(torch.device("cuda"), programs, most) == expected


def test_what_the_device_gets() -> None:
    new, contexts = MIXED
    tables = [list(range(10 * i, 10 * i + -(-length // BLOCK))) for i, length in enumerate(contexts)]
    group = AttentionBatch.build(new, contexts, {None: tables}, BLOCK).of(None)
    table, context, starts, tiles = group.on_device(20)
    assert all(part.dtype == torch.int32 and part.data_ptr() % 16 == 0 for part in (table, context, starts, tiles))
    assert [[block for block in row if block >= 0] for row in table.tolist()] == tables
    assert table.shape[1] == 16
    assert context.tolist() == contexts
    assert starts.tolist() == [0, 1, 24, 25, 75, 77]
    assert tiles is not None
    assert tiles.tolist() == [[3, 40], [0, 0], [3, 20], [3, 0], [4, 0], [1, 20], [1, 0], [2, 0]]
    assert group.on_device(20)[0] is table


def test_a_freed_block_that_is_needed_is_noticed() -> None:
    batch = AttentionBatch.build([1, 1], [30, 40], {20: [[0, 1], [-1, -1, 2]]}, BLOCK)
    with pytest.raises(AssertionError, match="within the window"):
        batch.of(20).on_device(1)
    batch = AttentionBatch.build([1, 1], [30, 40], {20: [[0, 1], [-1, 3, 2]]}, BLOCK)
    assert batch.of(20).on_device(1)[0][:, :3].tolist() == [[0, 1, -1], [-1, 3, 2]]
