"""Decode steps on a CPU as recorded calls of the compiled kernels: of a small step, Python is the larger part."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmkit.kernels import native
from llmkit.kernels.attention import AttentionBatch, KvCache
from llmkit.kernels.paging import Table
from llmkit.model.decoder import Decoder

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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # else torch imports its compiler with the first operator, for 1.3 s
        return False

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


class Inputs:
    """Where so many sequences with one new token each stand: a batch that is read from where it lay at first.

    host: int64, on the CPU: contexts [rows], positions [rows], and of each window slots [rows] and blocks
    [rows, width]. words: the same on the device; it is `host` itself where that is the CPU. spare: by window the block
    that rows without a sequence write to.
    """

    def __init__(
        self, rows: int, width: int, block_size: int, spare: Mapping[int | None, int],
        device: torch.device | str = "cpu", more: int = 0,
    ) -> None:  # fmt: skip
        """width: blocks of the longest request; more: words besides, `own` on the host and `extra` on the device."""
        self.rows, self.width, self.block_size, self.spare = rows, width, block_size, spare
        self.host = torch.zeros(rows * (2 + len(spare) * (1 + width)) + more, dtype=torch.int64)
        self.words = self.host if torch.device(device).type == "cpu" else self.host.to(device)
        ends = list(accumulate((rows, rows, *(rows, rows * width) * len(spare), more)))
        self._host = [self.host[start:end].numpy() for start, end in pairwise([0, *ends])]
        parts = [self.words[start:end] for start, end in pairwise([0, *ends])]
        self.contexts, self.positions, self.extra = *parts[:2], parts[-1]
        self.own = self.host[-more:] if more else self.host[:0]
        self.blocks = {window: parts[3 + 2 * i].view(rows, width) for i, window in enumerate(spare)}
        starts = np.arange(rows, dtype=np.int64) * width
        tables = {window: Table(self._host[3 + 2 * i], starts) for i, window in enumerate(spare)}
        ones = np.ones(rows, dtype=np.int64)
        self.batch = AttentionBatch(ones, self._host[0], tables, block_size, torch.device(device))
        for i, window in enumerate(spare):
            self.batch.of(window).slots = parts[2 + 2 * i]

    def set(self, positions: Sequence[int], contexts: Sequence[int], tables: Tables) -> None:
        """A step's; tables: of each window, -1 for blocks that were freed."""
        missing, size = self.rows - len(contexts), self.block_size
        self._host[0][:] = [*contexts, *[1] * missing]
        self._host[1][:] = [*positions, *[0] * missing]
        for i, (window, spare) in enumerate(self.spare.items()):
            slots, blocks = [], self._host[3 + 2 * i]
            for row, (table, context) in enumerate(zip(tables[window], contexts, strict=True)):
                blocks[row * self.width : row * self.width + len(table)] = table
                slots.append(table[(context - 1) // size] * size + (context - 1) % size)
            blocks[len(contexts) * self.width :: self.width] = spare
            self._host[2 + 2 * i][:] = [*slots, *[spare * size] * missing]
        if self.words is not self.host:
            self.words.copy_(self.host.pin_memory(), non_blocking=True)


class Recording(Inputs):
    """The layers of a model for so many sequences with one new token each."""

    def __init__(self, model: Decoder, rows: int, width: int, block_size: int) -> None:
        super().__init__(rows, width, block_size, dict.fromkeys(model.spec.windows, 0))
        self.hidden = torch.zeros(rows, model.spec.hidden)
        self.rotations = model.rotations(self.positions)
        self._program = b""
        self._kept: list[torch.Tensor] = []
        self.out = self.hidden  # [rows, H], after the last norm

    def begin(self, model: Decoder, tokens: torch.Tensor) -> None:
        """What goes into the first layer, after `set`."""
        self.hidden.copy_(model.embed_tokens(tokens))
        for name, (cos, sin) in model.rotations(self.positions).items():
            self.rotations[name][0].copy_(cos)
            self.rotations[name][1].copy_(sin)

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
        """Run them again, on what was `set` and begun with."""
        assert native.library is not None
        native.library.run(self._program)


class Recordings:
    """A model's recordings by number of sequences, made when a number comes twice in a row."""

    def __init__(self, model: Decoder, caches: Sequence[KvCache], width: int, block_size: int) -> None:
        self.model, self.caches, self.width, self.block_size = model, caches, width, block_size
        self._made: OrderedDict[int, Recording] = OrderedDict()
        self._last = 0  # sequences of the step before
        self.draws = False
        alone = model.spec.rank is None  # what ranks do together is not recorded
        self.possible = alone and native.library is not None and model.dtype == torch.float32

    def take(self, rows: int) -> bool:
        """Whether `run` is to be called for this step of so many tokens, one a sequence: it is small, and recorded or
        like the step before."""
        again, self._last = rows == self._last or rows in self._made, rows
        return again and self.possible and rows * self.model.spec.hidden <= MOST_ELEMENTS

    def run(
        self, tokens: torch.Tensor, positions: Sequence[int], contexts: Sequence[int], tables: Tables
    ) -> tuple[torch.Tensor, None]:
        """The logits after `tokens` [rows], the last of such contexts."""
        rows, recording = len(contexts), self._made.get(len(contexts))
        known = recording is not None
        if recording is None:
            recording = self._made[rows] = Recording(self.model, rows, self.width, self.block_size)
            if len(self._made) > KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(rows)
        recording.set(positions, contexts, tables)
        recording.begin(self.model, tokens)
        if known:
            recording.replay()
        elif not recording.record(self.model, self.caches):  # it has gone through the layers all the same
            self.possible = False
            self._made.clear()
        return self.model.logits(recording.out), None
