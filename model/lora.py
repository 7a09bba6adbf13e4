"""LoRA adapters: loading PEFT's files, and applying several adapters over one model's weights.

An adapter adds (x A') B' alpha / r to the output of a linear (Hu et al. 2021, arXiv 2106.09685,
section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from llmkit.checkpoint.lora_files import AdapterFiles
from llmkit.common.errors import InputError
from llmkit.kernels.input_quant import InputQuant, LinearInput
from llmkit.model.decoder import Decoder, DecoderLayer
from llmkit.model.language_model import LanguageModel
from llmkit.model.linear import Linear
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec, RankSpec
from llmkit.model.wrappers import checkpoint_name

Rows = slice | torch.Tensor  # rows of a step: consecutive ones, or int64 [n]
SLOT_RANK_STEP = 8  # tensor cores take multiples of 8


class LoraWeights(NamedTuple):
    """What an adapter adds to a runtime linear: (x lora_a') lora_b'.

    A fused linear (QKV, gate_up) has an A and a B for each part; R is the sum of their ranks.
    """

    lora_a: torch.Tensor  # [R, in]
    # [out, R], scaled by alpha / r. It is 0 where row and column belong to different parts.
    lora_b: torch.Tensor

    @property
    def padded_rank(self) -> int:
        """The rows of `lora_a` that a slot needs."""
        return -(-len(self.lora_a) // SLOT_RANK_STEP) * SLOT_RANK_STEP


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
        if lora_a and row.module.endswith("attn.kv_b"):
            raise InputError(
                f"{directory}: the adapter changes {row.source_names[0]}",
                "An adapter of other linear layers: this one is computed together with attention",
                "Merge the adapter into the model",
            )
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
        if part.split.kind == "replicated":
            start, stop = 0, part.shape[0]
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
            placed[start : start + part.shape[0]] = part.rows_of(b)
        start += part.shape[0]
    return placed


def _ranks_may_disagree(model: LanguageModel) -> bool:
    """Whether an adapter may change experts of one rank and none of another.

    Such adapters have no slots, and all ranks must run the same graphs.
    """
    group = model.parallel_group
    return model.spec.moe is not None and group.tp_size * group.pp_size > 1


class LoraManager:
    """The adapters of a model, which share its weights.

    Ids are never reused, so that results cached for one adapter are never used for another.

    For CUDA graphs each adapter has a slot. Every linear has the adapters of all slots side by
    side, and the rows of a step say which slot is theirs: a graph holds no ids.
    """

    def __init__(self, model: LanguageModel, uses_slots: bool = False) -> None:
        """uses_slots: whether steps with adapters are captured as CUDA graphs."""
        self.adapter_ids: dict[str, int] = {}  # by name; ids begin at 1
        # The adapter ids of the current step and their rows; `activate` sets it.
        self.active_rows: list[tuple[int, Rows]] = []
        self._model = model
        # The fallback has no layers that take adapters.
        self._layers = model.layers if isinstance(model, Decoder) else []
        self._last_id = 0
        self._uses_slots = uses_slots and not _ranks_may_disagree(model)
        self._slots: dict[int, int] = {}  # by adapter id, from 0
        self.num_slots = 0
        # Increases when other memory or other linears hold the adapters: graphs are void then.
        self.version = 0
        # bool [T, slots, 1]: whether a row of the step has the adapter of a slot; `activate_slots`
        # sets it.
        self.rows_of_slots: torch.Tensor | None = None
        self._slot_numbers = torch.empty(0, dtype=torch.int64)  # 1, 2, ... on the model's device

    def add(self, name: str, weights: dict[str, LoraWeights]) -> None:
        """Add an adapter under a free name. weights: as `load_adapter` returns them."""
        assert name not in self.adapter_ids, name
        self._last_id += 1
        self.adapter_ids[name] = self._last_id
        slot = self._take_slot(weights)
        for runtime_module, lora in weights.items():
            _, index, module = runtime_module.split(".", 2)
            layer = self._layers[int(index)]
            linear = layer.linears[module]
            if not isinstance(linear, LinearWithLora):
                expert_layer = layer if ".experts." in module else None
                linear = LinearWithLora(linear, self, expert_layer)
                layer.linears[module] = linear
                self.version += slot is not None
            linear.lora_weights[self._last_id] = lora
            if slot is not None:
                slots = linear.slots
                if slots.rank < lora.padded_rank or slots.num_slots <= slot:
                    slots.grow(self.num_slots, max(slots.rank, lora.padded_rank), lora)
                    self.version += 1
                slots.store(slot, lora)
                self._use_slots(linear)

    def remove(self, name: str) -> None:
        """Remove an adapter. Linears that no other adapter changes become plain again."""
        adapter_id = self.adapter_ids.pop(name)
        slot = self._slots.pop(adapter_id, None)
        for layer in self._layers:
            for module, linear in layer.linears.items():
                if isinstance(linear, LinearWithLora):
                    removed = linear.lora_weights.pop(adapter_id, None)
                    # A linear for whose slots there was not enough memory has fewer.
                    if removed is not None and slot is not None and slot < linear.slots.num_slots:
                        linear.slots.clear(slot)
                    if not linear.lora_weights:
                        layer.linears[module] = linear.base
                        self.version += slot is not None

    @property
    def has_slots(self) -> bool:
        """Whether an adapter has a slot."""
        return bool(self._slots)

    def slot(self, adapter_id: int) -> int | None:
        """What a row with this adapter has in `activate_slots`; None: no graph applies it."""
        if not adapter_id:
            return 0
        slot = self._slots.get(adapter_id)
        return None if slot is None else slot + 1

    def _take_slot(self, weights: dict[str, LoraWeights]) -> int | None:
        """The slot for a new adapter; None: it has none.

        Those of experts have none, because the host sees which rows an expert computes.
        """
        if not self._uses_slots or any(".experts." in module for module in weights):
            return None
        taken = set(self._slots.values())
        slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        self._slots[self._last_id] = slot
        if slot >= self.num_slots:
            self.num_slots = max(1, 2 * self.num_slots)
            self.version += 1
            # The adapter may change none of this rank's linears, so its weights tell no device.
            self._slot_numbers = torch.arange(1, self.num_slots + 1, device=self._model.device)
        return slot

    def _use_slots(self, linear: LinearWithLora) -> None:
        """Have all steps read the adapters from their slots, so that there is no second copy."""
        for adapter_id, lora in linear.lora_weights.items():
            slot = self._slots.get(adapter_id)
            if slot is not None:
                linear.lora_weights[adapter_id] = linear.slots.views(slot, len(lora.lora_a))

    @contextmanager
    def activate_slots(self, slots: torch.Tensor) -> Iterator[None]:
        """Apply adapters to the rows of a step that the model computes inside the block.

        slots: int64 [T] on the model's device: `slot` of each row's adapter, 0 for none. A CUDA
        graph of the block may be replayed after `slots` was overwritten, until `version` changes.
        """
        self.rows_of_slots = (slots[:, None] == self._slot_numbers)[..., None]
        try:
            yield
        finally:
            self.rows_of_slots = None

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


class LoraSlots:
    """The adapters of a linear, one beside the other in one A and one B.

    lora_a: [slots * rank, in]. lora_b: [out, slots * rank]. Unused rows and columns are 0.
    """

    def __init__(self) -> None:
        self.num_slots = 0
        self.rank = 0  # rows of `lora_a` that each slot has
        self.lora_a = torch.empty(0)
        self.lora_b = torch.empty(0)

    def views(self, slot: int, rank: int) -> LoraWeights:
        """The adapter of a slot."""
        rows = slice(slot * self.rank, slot * self.rank + rank)
        return LoraWeights(self.lora_a[rows], self.lora_b[:, rows])

    def store(self, slot: int, lora: LoraWeights) -> None:
        """Copy an adapter to its slot."""
        views = self.views(slot, len(lora.lora_a))
        views.lora_a.copy_(lora.lora_a)
        views.lora_b.copy_(lora.lora_b)

    def grow(self, num_slots: int, rank: int, like: LoraWeights) -> None:
        """Move all adapters to memory for `num_slots` of them with up to `rank` rows each."""
        a = like.lora_a.new_zeros(num_slots, rank, like.lora_a.shape[1])
        b = like.lora_b.new_zeros(len(like.lora_b), num_slots, rank)
        if self.num_slots:
            a_before = self.lora_a.view(self.num_slots, self.rank, -1)
            b_before = self.lora_b.view(-1, self.num_slots, self.rank)
            a[: self.num_slots, : self.rank] = a_before
            b[:, : self.num_slots, : self.rank] = b_before
        self.lora_a = a.flatten(0, 1)
        self.lora_b = b.flatten(1)
        self.num_slots = num_slots
        self.rank = rank

    def clear(self, slot: int) -> None:
        """Set an adapter to 0."""
        rows = slice(slot * self.rank, (slot + 1) * self.rank)
        self.lora_a[rows] = 0
        self.lora_b[:, rows] = 0

    def add_to(self, y: torch.Tensor, x: torch.Tensor, rows_of_slots: torch.Tensor) -> None:
        """Add to y [T, out] what the adapter of each row adds for x [T, in].

        rows_of_slots: bool [T, slots or more, 1]. No adapter of this linear has a later slot.
        """
        of_slots = (x @ self.lora_a.T).view(len(x), self.num_slots, self.rank)
        is_own = rows_of_slots[:, : self.num_slots]
        y.addmm_(of_slots.where(is_own, 0).flatten(1), self.lora_b.T)


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
        self.slots = LoraSlots()

    @property
    def input_quant(self) -> InputQuant | None:
        """That of `base`; None in a step with adapters, which read the inputs as they are."""
        is_active = self.manager.active_rows or self.manager.rows_of_slots is not None
        return None if is_active else self.base.input_quant

    def forward(self, x: LinearInput) -> torch.Tensor:
        """x: [T, in], or as `input_quant` says. Returns [T, out]."""
        y = self.base(x)
        rows_of_slots = self.manager.rows_of_slots
        if rows_of_slots is not None and self.slots.num_slots:
            assert isinstance(x, torch.Tensor)
            self.slots.add_to(y, x, rows_of_slots)
            return y
        for adapter_id, rows in self.manager.active_rows:
            lora = self.lora_weights.get(adapter_id)
            if lora is None:
                continue
            assert isinstance(x, torch.Tensor)
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
