"""LoRA adapters: PEFT's files by the parameter table, and several of them over one model's shared weights.

An adapter adds (x A') B' alpha / r to what a linear makes of x (Hu et al. 2021, arXiv 2106.09685, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from llmkit.checkpoint.adapter import AdapterFiles
from llmkit.model.decoder import Decoder, DecoderLayer
from llmkit.model.layout import Parameter, parameters
from llmkit.model.linear import Linear
from llmkit.model.spec import ModelSpec, RankSpec

Rows = slice | torch.Tensor  # of a step's: consecutive ones, or int64 [n]


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a runtime linear: (x a') b'. R is the sum of the ranks of its parts."""

    a: torch.Tensor  # [R, in]
    b: torch.Tensor  # [out, R], times the scale; 0 where row and column are of different parts


def load_adapter(
    directory: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Update]:
    """The updates of an adapter that PEFT saved, by runtime module ("layers.3.attn.qkv"), where it has one.

    Raises InputError for anything but plain LoRA of linear layers that the model has, of the shapes that it has.
    """
    linears = [row for row in parameters(spec.whole) if row.name.startswith("layers.") and len(row.shape) == 2]
    shapes = {
        tensor: (sum(part.shape[0] for part in row.parts if part.tensor == tensor), row.shape[1])
        for row in linears
        for tensor in row.tensors
    }
    modules = {row.tensors: row.module for row in parameters(spec)}  # of a rank those that it has
    files, updates = AdapterFiles(directory, shapes), {}
    for row in linears:
        if row.tensors not in modules:
            continue
        read = {tensor: files.read(tensor, dtype) for tensor in row.tensors}
        pieces = [(one[0], _spread(row, tensor, one[1])) for tensor, one in read.items() if one is not None]
        if pieces:
            a, b = torch.cat([a for a, _ in pieces]), torch.cat([b for _, b in pieces], dim=1)
            a, b = (a, b) if spec.rank is None else _of_rank(row, spec.rank, a, b)
            updates[modules[row.tensors]] = Update(a.to(device), b.to(device))
    return updates


def _of_rank(row: Parameter, part: RankSpec, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of `a` or the rows of `b` that belong to what a rank has of a parameter."""
    tp = part.tp if row.expert is None else part.tp // part.ep
    split = row.parts[0].split
    if split.kind == "replicated":
        return a, b
    if split.dim == 1:
        start, stop = split.interval(part.rank % tp, tp)
        return a[:, start:stop], b
    rows, at = [], 0
    for piece in row.parts:
        start, stop = piece.split.interval(part.rank % tp, tp)
        rows.append(b[at + start : at + stop])
        at += piece.shape[0]
    return a, torch.cat(rows)


def _spread(row: Parameter, tensor: str, b: torch.Tensor) -> torch.Tensor:
    """The rows of a checkpoint tensor's `b` at their places in the runtime tensor, zeros at the others."""
    spread, start = b.new_zeros(row.shape[0], b.shape[1]), 0
    for part in row.parts:
        if part.tensor == tensor:
            spread[start : start + part.shape[0]] = b[part.row : part.row + part.shape[0]]
        start += part.shape[0]
    return spread


class Adapters:
    """The adapters of a model. Its weights are shared: a linear's update is added to what the linear itself gives.

    Inside, an adapter is a number that is never given twice, so that nothing computed with one is taken for another's.
    """

    def __init__(self, model: Decoder) -> None:
        self.keys: dict[str, int] = {}  # by name, from 1
        self.segments: list[tuple[int, Rows]] = []  # of the step under way: adapters and their rows
        self._layers, self._added = model.layers, 0

    def add(self, name: str, updates: dict[str, Update]) -> None:
        """Take an adapter in, under a name that is free."""
        assert name not in self.keys, name
        self._added += 1
        self.keys[name] = self._added
        for module, update in updates.items():
            _, index, place = module.split(".", 2)
            layer = self._layers[int(index)]
            linear = layer.linears[place]
            if not isinstance(linear, AdaptedLinear):
                linear = layer.linears[place] = AdaptedLinear(linear, self, layer if ".experts." in place else None)
            linear.updates[self._added] = update

    def remove(self, name: str) -> None:
        """Let go of an adapter; linears that no other one changes are again what they were."""
        key = self.keys.pop(name)
        for layer in self._layers:
            for place, linear in layer.linears.items():
                if isinstance(linear, AdaptedLinear):
                    linear.updates.pop(key, None)
                    if not linear.updates:
                        layer.linears[place] = linear.base

    @contextmanager
    def applied(
        self, owners: Iterable[tuple[int, int]], to_device: Callable[[list[int]], torch.Tensor]
    ) -> Iterator[None]:
        """While the model computes a step: `owners` says of its rows, in order, whose they are and how many.

        0 owns rows without an adapter. `to_device` makes an int64 tensor on the model's device.
        """
        rows: dict[int, list[int]] = {}
        total = 0
        for key, count in owners:
            if key:
                rows.setdefault(key, []).extend(range(total, total + count))
            total += count
        self.segments = [
            (key, slice(own[0], own[-1] + 1) if own[-1] - own[0] < len(own) else to_device(own))
            for key, own in rows.items()
        ]
        try:
            for layer in self._layers:
                layer.adapted = bool(self.segments)
            yield
        finally:
            self.segments = []
            for layer in self._layers:
                layer.adapted = False


class AdaptedLinear(Linear):
    """A linear of a model with adapters: what it gives, and on it the updates of those whose rows are in the step.

    An expert's linear computes rows of the step that its `layer` has chosen for it.
    """

    def __init__(self, base: Linear, adapters: Adapters, layer: DecoderLayer | None) -> None:
        super().__init__(base.weight, base.bias, base.rounding)
        self.base, self.adapters, self.layer = base, adapters, layer
        self.updates: dict[int, Update] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, in]. Returns [T, out]."""
        y = self.base(x)
        for key, rows in self.adapters.segments:
            update = self.updates.get(key)
            if update is None:
                continue
            if self.layer is not None:
                rows = _places(self.layer.chosen, rows)
            if isinstance(rows, slice):
                y[rows].addmm_(x[rows] @ update.a.T, update.b.T)
            else:
                y.index_add_(0, rows, x[rows] @ update.a.T @ update.b.T)
        return y


def _places(chosen: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Where in `chosen`, int64 [n], some of the step's rows are."""
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=chosen.device)
    return torch.isin(chosen, rows).nonzero().flatten()
