"""LoRA adapters: PEFT's files, read by the parameter table, and several of them over one model's shared weights.

An adapter adds (x A') B' alpha / r to what a linear makes of x (Hu et al. 2021, arXiv 2106.09685, section 4.1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.files import load_json
from llmkit.checkpoint.reading import SafetensorsRows
from llmkit.checkpoint.safetensors_header import TensorInfo, read_header
from llmkit.model.decoder import Decoder, DecoderLayer
from llmkit.model.layout import Parameter, parameters
from llmkit.model.linear import Linear
from llmkit.model.loader import FLOATS
from llmkit.model.spec import ModelSpec

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# What adapter_config.json may say. Of fields that are in neither table nothing is known: they must be empty.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (None, False, True),
    "init_lora_weights": (None, False, True, "gaussian", "eva", "orthogonal"),  # others change the model's own weights
}
HARMLESS = (  # read by `_Config`, or without influence on what a trained adapter computes
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "unsloth_fixed",
)  # fmt: skip

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
    config = _Config(directory / CONFIG)
    linears = [row for row in parameters(spec) if row.name.startswith("layers.") and len(row.shape) == 2]
    tensors = _tensors(directory / WEIGHTS, [tensor for row in linears for tensor in row.tensors])
    updates = {}
    for row in linears:
        pieces = []  # a [r, in] and b [out, r] of each checkpoint tensor that has them
        for tensor in row.tensors:
            names = [_name(tensor, side) for side in "AB"]
            if names[0] not in tensors:
                continue
            rank, scale = config.rank_and_scale(tensor.removesuffix(".weight"))
            size = sum(part.shape[0] for part in row.parts if part.tensor == tensor)
            a = _read(directory, tensors[names[0]], (rank, row.shape[1])).to(dtype)
            b = (_read(directory, tensors[names[1]], (size, rank)) * scale).to(dtype)
            for value, name in ((a, names[0]), (b, names[1])):
                if not value.isfinite().all():
                    raise InputError(
                        f"{directory / WEIGHTS}: tensor {name} has values that are not finite in {dtype}",
                        "Finite values were expected",
                        "Train or download the adapter again",
                    )
            pieces.append((a, _spread(row, tensor, b)))
        if pieces:
            a, b = torch.cat([a for a, _ in pieces]), torch.cat([b for _, b in pieces], dim=1)
            updates[row.module] = Update(a.to(device), b.to(device))
    return updates


def _name(tensor: str, side: str) -> str:
    """What PEFT calls the A or B of a checkpoint tensor."""
    return f"{PREFIX}{tensor.removesuffix('.weight')}.lora_{side}.weight"


def _tensors(path: Path, wanted: list[str]) -> dict[str, TensorInfo]:
    """The header of an adapter's file, in which every tensor is the A or B of a wanted one and none lacks the other."""
    if not path.is_file():
        raise InputError(
            f"{path} does not exist",
            f"An adapter in safetensors was expected; a pickled one ({path.stem}.bin) can run code and is never loaded",
            "Save it again with a newer peft: model.save_pretrained(DIRECTORY)",
        )
    tensors = read_header(path)
    pairs = [[_name(tensor, side) for side in "AB"] for tensor in wanted]
    unknown = sorted(tensors.keys() - {name for pair in pairs for name in pair})
    if unknown or not tensors:
        raise InputError(
            f"{path} has {len(unknown)} tensors of no linear layer of the model ({', '.join(unknown[:5])})"
            if unknown
            else f"{path} has no tensors",
            f"Names like {pairs[0][0]} were expected; adapters of embeddings and of lm_head are not supported",
            "Check that the adapter was made for this model",
        )
    for pair in pairs:
        absent = [name for name in pair if name not in tensors]
        if len(absent) == 1:
            raise InputError(f"{path} lacks {absent[0]}", "lora_A and lora_B of a linear layer were expected together")
    return tensors


def _read(directory: Path, info: TensorInfo, shape: tuple[int, int]) -> torch.Tensor:
    """A tensor in float32."""
    place = f"{directory / WEIGHTS}: tensor {info.name}"
    if info.shape != shape:
        raise InputError(
            f"{place} has shape {list(info.shape)}",
            f"Shape {list(shape)} was expected, by {CONFIG} and the model",
            "Check that the adapter was made for this model",
        )
    if info.dtype not in FLOATS:
        raise InputError(f"{place} has dtype {info.dtype}", f"Dtype {' or '.join(FLOATS)} was expected")
    return SafetensorsRows(directory).rows(info, 0, shape[0]).float()


def _spread(row: Parameter, tensor: str, b: torch.Tensor) -> torch.Tensor:
    """The rows of a checkpoint tensor's `b` at their places in the runtime tensor, zeros at the others."""
    spread, start = b.new_zeros(row.shape[0], b.shape[1]), 0
    for part in row.parts:
        if part.tensor == tensor:
            spread[start : start + part.shape[0]] = b[part.row : part.row + part.shape[0]]
        start += part.shape[0]
    return spread


class _Config:
    """An adapter_config.json. Raises InputError unless it describes plain LoRA."""

    def __init__(self, path: Path) -> None:
        self.path, self.values = path, load_json(path)
        for name, value in ({"peft_type": None} | self.values).items():
            allowed = ALLOWED.get(name)
            if (value not in allowed) if allowed else (value and name not in HARMLESS):
                expected = " or ".join(map(repr, allowed)) if allowed else "nothing"
                raise self._wrong(name, f"Plain LoRA was expected, with {expected} there", "Merge it into the model")
        self.rank, self.alpha = (self._positive(name, self.values.get(name)) for name in ("r", "lora_alpha"))
        self.ranks, self.alphas = (self._pattern(name) for name in ("rank_pattern", "alpha_pattern"))

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Of a checkpoint module ("model.layers.3.self_attn.q_proj")."""
        rank, alpha = (
            next((value for pattern, value in patterns if pattern.fullmatch(module)), default)
            for patterns, default in ((self.ranks, self.rank), (self.alphas, self.alpha))
        )
        return int(rank), alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def _pattern(self, name: str) -> list[tuple[re.Pattern[str], float]]:
        """What the first pattern that a module's name ends with has for it; a pattern begins after a dot."""
        given = self.values.get(name) or {}
        try:
            return [(re.compile(rf"(.*\.)?({key})"), self._positive(name, value)) for key, value in given.items()]
        except (AttributeError, re.error) as error:
            raise self._wrong(name, "An object of regular expressions and numbers was expected") from error

    def _positive(self, name: str, value: Any) -> float:
        whole = name in ("r", "rank_pattern")
        if type(value) not in ((int,) if whole else (int, float)) or not 0 < value < math.inf:
            raise self._wrong(name, f"A positive {'integer' if whole else 'number'} was expected")
        return value  # type: ignore[no-any-return]

    def _wrong(self, name: str, expected: str, todo: str = "") -> InputError:
        return InputError(f"{self.path} has {name} {str(self.values.get(name))[:80]}", expected, todo)


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
            yield
        finally:
            self.segments = []


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
