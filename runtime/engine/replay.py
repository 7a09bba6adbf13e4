"""Decode steps on a CPU as recorded calls of the compiled kernels: of a small step, Python is the larger part."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmkit.kernels import native
from llmkit.kernels.attention import AttentionBatch, KvCache
from llmkit.model.decoder import Decoder
from llmkit.model.rope import Rotation

MOST_ELEMENTS = 1 << 15  # rows times hidden size of a step that is recorded; larger ones have better things to wait for
KEPT = 4  # recordings; each keeps all that a step allocates

Tables = Mapping[int | None, Sequence[Sequence[int]]]


class _Recorder:
    """Stands in for the library and notes the calls."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.calls: list[tuple[str, tuple[float, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        kernel = getattr(self.library, name)

        def call(*arguments: float) -> None:
            self.calls.append((name, arguments))
            kernel(*arguments)

        return call


class _Watch(TorchDispatchMode):
    """Keeps what is allocated, and notes whether torch computes anything: that would be missing from a replay."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[torch.Tensor] = []
        self.computed = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator."""
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default):
            self.kept.append(result)
        elif not func.is_view:
            self.computed = True
        return result


class Recording:
    """The layers of a model for so many sequences with one new token each. Its inputs lie where they lay at first."""

    def __init__(self, model: Decoder, rows: int, width: int, windows: Sequence[int | None], block_size: int) -> None:
        """width: blocks of the longest request."""
        self.rows, self.width, self.block_size = rows, width, block_size
        self.hidden = torch.zeros(rows, model.spec.hidden)
        self.rotations = model.rotations(torch.zeros(rows, dtype=torch.int64))
        self.batch = AttentionBatch.build(
            [1] * rows, [1] * rows, {window: [[0] * width] * rows for window in windows}, block_size
        )
        self.windows = windows
        self._program = b""
        self._kept: list[torch.Tensor] = []
        self.out = self.hidden  # [rows, H], after the last norm

    def set(
        self, hidden: torch.Tensor, rotations: Mapping[str, Rotation], contexts: Sequence[int], tables: Tables
    ) -> None:
        """The step's inputs; tables: of each window, -1 for blocks that were freed."""
        self.hidden.copy_(hidden)
        for name, (cos, sin) in rotations.items():
            self.rotations[name][0].copy_(cos)
            self.rotations[name][1].copy_(sin)
        self.batch.context_lens[:] = contexts
        for window in self.windows:
            group, slots = self.batch.of(window), []
            for row, (table, context) in enumerate(zip(tables[window], contexts, strict=True)):
                at = row * self.width
                group.table.blocks[at : at + len(table)] = table
                slots.append(
                    table[(context - 1) // self.block_size] * self.block_size + (context - 1) % self.block_size
                )
            group.slots.numpy()[:] = slots

    def record(self, model: Decoder, caches: Sequence[KvCache]) -> bool:
        """Run the layers once; whether `replay` does the same from now on."""
        recorder, watch, library = _Recorder(native.library), _Watch(), native.library
        native.library = recorder  # type: ignore[assignment]
        try:
            with watch:
                self.out = model.run_layers(self.hidden, self.rotations, self.batch, caches)
        finally:
            native.library = library
        if watch.computed or library is None:
            return False
        self._program, self._kept = library.program(recorder.calls), watch.kept
        return True

    def replay(self) -> None:
        """Run them again, on what was `set`."""
        assert native.library is not None
        native.library.run(self._program)


class Recordings:
    """A model's recordings by number of sequences, made when a number comes twice in a row."""

    def __init__(self, model: Decoder, caches: Sequence[KvCache], width: int, block_size: int) -> None:
        self.model, self.caches, self.width, self.block_size = model, caches, width, block_size
        self._made: OrderedDict[int, Recording] = OrderedDict()
        self._last = 0  # sequences of the step before
        self.possible = native.library is not None and model.dtype == torch.float32 and model.device.type == "cpu"

    def take(self, rows: int) -> bool:
        """Whether `run` is to be called for this step of so many tokens, one a sequence: it is small, and recorded or
        like the step before."""
        again, self._last = rows == self._last or rows in self._made, rows
        return again and self.possible and rows * self.model.spec.hidden <= MOST_ELEMENTS

    def clear(self) -> None:
        """Let go of what was recorded: of kernels that are replaced."""
        self._made.clear()

    def run(
        self, tokens: torch.Tensor, positions: torch.Tensor, contexts: Sequence[int], tables: Tables
    ) -> torch.Tensor:
        """What the model gives for `tokens` [rows], the last of such contexts; it stays until the next run."""
        rows, made = len(contexts), True
        recording = self._made.get(rows)
        if recording is None:
            made = False
            windows = list(self.model.spec.windows)
            recording = self._made[rows] = Recording(self.model, rows, self.width, windows, self.block_size)
            if len(self._made) > KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(rows)
        recording.set(self.model.embed_tokens(tokens), self.model.rotations(positions), contexts, tables)
        if made:
            recording.replay()
        elif not recording.record(self.model, self.caches):  # it has gone through the layers all the same
            self.possible = False
            self.clear()
        return recording.out
