"""A model one decoder layer at a time, so that no more than a layer and the hidden states are in memory.

Legend: T tokens of a micro-batch, H hidden, L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmkit.checkpoint.output import writing
from llmkit.checkpoint.reading import read_range, tensor_bytes
from llmkit.checkpoint.source import Checkpoint
from llmkit.kernels.attention import AttentionBatch, KvCache
from llmkit.kernels.elementwise import rms_norm
from llmkit.model.decoder import Decoder, DecoderLayer
from llmkit.model.layout import Parameter, parameters
from llmkit.model.linear import Rounding
from llmkit.model.loader import read_parameter, read_rounding
from llmkit.model.rope import Rotation
from llmkit.model.sequence import packed
from llmkit.model.spec import ModelSpec

BATCH_TOKENS = 4096  # of a micro-batch, when a window is not longer than that
BATCH_ELEMENTS = 1 << 26  # of the widest activation of a micro-batch (256 MiB), when a window has no more
Read = Callable[[Parameter], torch.Tensor]


@dataclass(frozen=True)
class Step:
    """What micro-batches of one size share: where their tokens stand, and a scratch cache for every layer."""

    rotations: Mapping[str, Rotation]
    batch: AttentionBatch
    cache: KvCache

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return self.cache.kv.device


class MicroBatch:
    """Some windows on their way through the layers. `hidden` float32 [T, H], on the CPU, is what the last layer that
    ran put out; it lies in `file` when there is one, and in memory otherwise."""

    def __init__(self, hidden: torch.Tensor, step: Step, file: Path | None = None) -> None:
        self.step, self.shape, self._file = step, hidden.shape, file
        self._hidden: torch.Tensor | None = None
        self.hidden = hidden

    def before(self) -> MicroBatch:
        """The same hidden states, for keeping while these go on through a layer."""
        file = self._file.with_suffix(".before") if self._file is not None else None
        return MicroBatch(self.hidden, self.step, file)

    @property
    def tokens(self) -> int:
        """T"""
        return self.shape[0]

    @property
    def hidden(self) -> torch.Tensor:
        """Read from the file on every use."""
        if self._hidden is not None:
            return self._hidden
        assert self._file is not None
        return read_range(self._file, 0, self._file.stat().st_size).view(torch.float32).reshape(self.shape)

    @hidden.setter
    def hidden(self, value: torch.Tensor) -> None:
        if self._file is None:
            self._hidden = value
            return
        with writing(self._file):
            self._file.write_bytes(tensor_bytes(value.contiguous()))


class LayerStream:
    """A model of which `read` gives the runtime tensors, in float32, on `device`, and `rounding` what is rounded."""

    def __init__(
        self,
        spec: ModelSpec,
        read: Read,
        device: torch.device | str = "cpu",
        rounding: Callable[[Parameter], dict[str, Rounding]] = lambda row: {},
    ) -> None:
        self.spec, self.device = spec, torch.device(device)
        self.read, self.rounding = read, rounding
        self._rows = parameters(spec)

    @classmethod
    def of(cls, checkpoint: Checkpoint, spec: ModelSpec, device: torch.device | str = "cpu") -> LayerStream:
        """The stream of a checkpoint, dequantized where it is quantized."""
        return cls(
            spec,
            lambda row: read_parameter(checkpoint, row, torch.float32, device),
            device,
            lambda row: read_rounding(checkpoint, row, device),
        )

    def rows(self, index: int) -> list[Parameter]:
        """The rows of the parameter table that make up a layer."""
        return [row for row in self._rows if row.name.startswith(f"layers.{index}.")]

    def layer(self, index: int) -> DecoderLayer:
        """A layer, read now."""
        prefix = f"layers.{index}."
        rows = self.rows(index)
        tensors = {row.name.removeprefix(prefix): self.read(row) for row in rows}
        rounding = {name.removeprefix(prefix): how for row in rows for name, how in self.rounding(row).items()}
        return DecoderLayer(self.spec, index, tensors, rounding)

    @torch.no_grad()
    def embed(
        self, windows: torch.Tensor, batch_tokens: int | None = None, folder: Path | None = None
    ) -> list[MicroBatch]:
        """Token windows [n, L] as micro-batches before the first layer; their hidden states in files of `folder`."""
        if batch_tokens is None:
            widest = max((row.shape[0] for row in self._rows if row.linear), default=1)
            batch_tokens = min(BATCH_TOKENS, BATCH_ELEMENTS // widest)
        frame = self.frame(head=False)
        length = windows.shape[1]
        steps: dict[int, Step] = {}
        made: list[MicroBatch] = []
        for chosen in windows.split(max(1, batch_tokens // length)):
            count = len(chosen)
            if count not in steps:
                steps[count] = _step(frame, count, length)
            file = folder / f"hidden-{len(made)}.bin" if folder is not None else None
            made.append(MicroBatch(frame.embed_tokens(chosen.flatten().to(self.device)).cpu(), steps[count], file))
        return made

    def step(self, count: int, length: int) -> Step:
        """What `count` windows of `length` tokens side by side need."""
        return _step(self.frame(head=False), count, length)

    @torch.no_grad()
    def advance(self, layer: DecoderLayer, batches: list[MicroBatch]) -> None:
        """Run micro-batches through a layer."""
        for one in batches:
            hidden = layer(one.hidden.to(one.step.device), one.step.rotations, one.step.batch, one.step.cache)
            one.hidden = hidden.cpu()

    @torch.no_grad()
    def logits(self, windows: torch.Tensor, advance: Callable[[], None] = lambda: None) -> Iterator[torch.Tensor]:
        """Logits float32 [L, vocab] of each token window of [n, L]; `advance` is called after every layer."""
        batches = self.embed(windows)
        for index in range(len(self.spec.layers)):
            self.advance(self.layer(index), batches)
            advance()
        frame = self.frame(head=True)
        for one in batches:
            for hidden in one.hidden.split(windows.shape[1]):
                yield frame.logits(rms_norm(hidden.to(self.device), frame.final_norm, self.spec.norm_eps))

    def frame(self, head: bool) -> Decoder:
        """The decoder without its layers, and without the output projection unless `head`."""
        spec = replace(self.spec, layers=(), tied=self.spec.tied or not head)
        names = {"embed.weight", "norm.weight"} | (set() if spec.tied else {"lm_head.weight"})
        rows = [row for row in self._rows if row.name in names]
        rounding = {name: how for row in rows for name, how in self.rounding(row).items()}
        return Decoder(spec, {row.name: self.read(row) for row in rows}, rounding)


def read_ahead(read: Callable[[int], DecoderLayer], indices: Sequence[int], *, ahead: bool) -> Iterator[DecoderLayer]:
    """read(index) of every index; when `ahead`, each is read in a thread while the one before it is in use."""
    if not ahead or not indices:
        yield from map(read, indices)
        return
    with ThreadPoolExecutor(1) as pool:
        following = [pool.submit(read, index) for index in indices[:1]]
        for index in [*indices[1:], None]:
            layer = following.pop().result()
            if index is not None:
                following.append(pool.submit(read, index))
            yield layer


def _step(frame: Decoder, count: int, length: int) -> Step:
    positions, batch = packed(frame, [length] * count)
    return Step(frame.rotations(positions), batch, frame.new_cache(batch.blocks, batch.block_size))
