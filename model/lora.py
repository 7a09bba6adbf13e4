"""LoRA adapters: loading PEFT's files, and applying several adapters over one model's weights.

An adapter adds (x A') B' alpha / r to the output of a linear (Hu et al. 2021, arXiv 2106.09685,
section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from llmkit.checkpoint.lora_files import AdapterFiles
from llmkit.model.decoder import Decoder, DecoderLayer
from llmkit.model.language_model import LanguageModel
from llmkit.model.linear import Linear
from llmkit.model.parameter_table import Parameter, parameters
from llmkit.model.spec import ModelSpec, RankSpec
from llmkit.model.wrappers import checkpoint_name

Rows = slice | torch.Tensor  # rows of a step: consecutive ones, or int64 [n]


@dataclass(frozen=True)
class LoraWeights:
    """What an adapter adds to a runtime linear: (x lora_a') lora_b'.

    A fused linear (QKV, gate_up) has an A and a B for each part; R is the sum of their ranks.
    """

    lora_a: torch.Tensor  # [R, in]
    # [out, R], scaled by alpha / r. It is 0 where row and column belong to different parts.
    lora_b: torch.Tensor


def load_adapter(
    directory: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, LoraWeights]:
    """Load an adapter that PEFT saved. Returns its weights by runtime module ("layers.3.attn.qkv").

    For the spec of a rank, the result is the rank's part of the adapter. What an adapter adds to
    carried parts, such as a vision tower, is not loaded: they do not run.
    Raises InputError unless the adapter is plain LoRA of linear layers that the model has.
    """
    linears = [
        row
        for row in parameters(spec.full_model)
        if row.name.startswith("layers.")
        and row.name.endswith(".weight")
        and len(row.shape) == 2
        and row.sources[0].expert is None  # experts in one tensor are no linear modules
    ]
    shapes = {
        tensor: (sum(part.shape[0] for part in row.sources if part.name == tensor), row.shape[1])
        for row in linears
        for tensor in row.source_names
    }
    # The runtime modules of this rank, by their checkpoint tensors. A pipeline stage numbers its
    # layers from 0, so the checkpoint tensors identify a module.
    modules = {row.source_names: row.module for row in parameters(spec)}
    files = AdapterFiles(directory, shapes, partial(checkpoint_name, spec), spec.carried)
    weights = {}
    for row in linears:
        if row.source_names not in modules:
            continue
        lora_a = []
        lora_b = []
        for tensor in row.source_names:
            pair = files.read(tensor, dtype)
            if pair is not None:
                a, b = pair
                lora_a.append(a)
                lora_b.append(_place_rows(row, tensor, b))
        if lora_a:
            a = torch.cat(lora_a)
            b = torch.cat(lora_b, dim=1)
            if spec.rank is not None:
                a, b = _shard(row, spec.rank, a, b)
            weights[modules[row.source_names]] = LoraWeights(a.to(device), b.to(device))
    return weights


def _shard(
    row: Parameter, rank: RankSpec, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's part: columns of `a` for a row-parallel parameter, rows of `b` for others."""
    tp = rank.tp_size if row.expert is None else rank.tp_size // rank.ep_size
    split = row.sources[0].split
    if split.kind == "replicated":
        return a, b
    if split.dim == 1:
        start, stop = split.interval(rank.tp_rank % tp, tp)
        return a[:, start:stop], b
    rows = []
    first_row = 0
    for part in row.sources:
        start, stop = part.split.interval(rank.tp_rank % tp, tp)
        rows.append(b[first_row + start : first_row + stop])
        first_row += part.shape[0]
    return a, torch.cat(rows)


def _place_rows(row: Parameter, tensor: str, b: torch.Tensor) -> torch.Tensor:
    """Move the rows of a checkpoint tensor's `b` to their places in the runtime tensor.

    All other rows are 0.
    """
    placed = b.new_zeros(row.shape[0], b.shape[1])
    start = 0
    for part in row.sources:
        if part.name == tensor:
            rows = b[part.first_row : part.first_row + part.shape[0]]
            placed[start : start + part.shape[0]] = rows
        start += part.shape[0]
    return placed


class LoraManager:
    """The adapters of a model, which share its weights.

    Ids are never reused, so that results cached for one adapter are never used for another.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.adapter_ids: dict[str, int] = {}  # by name; ids begin at 1
        # The adapter ids of the current step and their rows; `activate` sets it.
        self.active_rows: list[tuple[int, Rows]] = []
        # The fallback has no layers that take adapters.
        self._layers = model.layers if isinstance(model, Decoder) else []
        self._last_id = 0

    def add(self, name: str, weights: dict[str, LoraWeights]) -> None:
        """Add an adapter under a free name. weights: as `load_adapter` returns them."""
        assert name not in self.adapter_ids, name
        self._last_id += 1
        self.adapter_ids[name] = self._last_id
        for runtime_module, lora in weights.items():
            _, index, module = runtime_module.split(".", 2)
            layer = self._layers[int(index)]
            linear = layer.linears[module]
            if not isinstance(linear, LinearWithLora):
                expert_layer = layer if ".experts." in module else None
                linear = LinearWithLora(linear, self, expert_layer)
                layer.linears[module] = linear
            linear.lora_weights[self._last_id] = lora

    def remove(self, name: str) -> None:
        """Remove an adapter. Linears that no other adapter changes become plain again."""
        adapter_id = self.adapter_ids.pop(name)
        for layer in self._layers:
            for module, linear in layer.linears.items():
                if isinstance(linear, LinearWithLora):
                    linear.lora_weights.pop(adapter_id, None)
                    if not linear.lora_weights:
                        layer.linears[module] = linear.base

    @contextmanager
    def activate(
        self,
        row_counts: Iterable[tuple[int, int]],
        to_device: Callable[[list[int]], torch.Tensor],
    ) -> Iterator[None]:
        """Apply adapters to the rows of a step that the model computes inside the block.

        row_counts: (adapter id, number of rows), in the order of the rows. Id 0 means no adapter.
        to_device: makes an int64 tensor on the model's device.
        """
        rows_by_adapter: dict[int, list[int]] = {}
        num_rows = 0
        for adapter_id, count in row_counts:
            if adapter_id:
                rows = rows_by_adapter.setdefault(adapter_id, [])
                rows.extend(range(num_rows, num_rows + count))
            num_rows += count
        self.active_rows = []
        for adapter_id, rows in rows_by_adapter.items():
            is_run = rows[-1] - rows[0] < len(rows)
            selected = slice(rows[0], rows[-1] + 1) if is_run else to_device(rows)
            self.active_rows.append((adapter_id, selected))
        try:
            for layer in self._layers:
                layer.has_lora_rows = bool(self.active_rows)
            yield
        finally:
            self.active_rows = []
            for layer in self._layers:
                layer.has_lora_rows = False


class LinearWithLora(Linear):
    """A linear layer with adapters. Each adapter is applied to its rows of the step.

    expert_layer: the decoder layer, if this linear belongs to an expert. An expert computes only
    the rows of the step that chose it (`DecoderLayer.expert_rows`).
    """

    def __init__(
        self, base: Linear, manager: LoraManager, expert_layer: DecoderLayer | None
    ) -> None:
        super().__init__(base.weight, base.bias, base.activation_quant)
        self.base = base
        self.manager = manager
        self.expert_layer = expert_layer
        self.lora_weights: dict[int, LoraWeights] = {}  # by adapter id

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, in]. Returns [T, out]."""
        y = self.base(x)
        for adapter_id, rows in self.manager.active_rows:
            lora = self.lora_weights.get(adapter_id)
            if lora is None:
                continue
            if self.expert_layer is not None:
                rows = _positions_in(self.expert_layer.expert_rows, rows)
            if isinstance(rows, slice):
                y[rows].addmm_(x[rows] @ lora.lora_a.T, lora.lora_b.T)
            else:
                y.index_add_(0, rows, x[rows] @ lora.lora_a.T @ lora.lora_b.T)
        return y


def _positions_in(expert_rows: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The positions in `expert_rows` of those rows of the step that are in `rows`, int64 [n]."""
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=expert_rows.device)
    return torch.isin(expert_rows, rows).nonzero().flatten()
