"""LoRA adapters as PEFT saves them: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmkit.checkpoint.dtypes import FLOATS
from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.files import load_json
from llmkit.checkpoint.reading import SafetensorsRows
from llmkit.checkpoint.safetensors_header import TensorInfo, read_header

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# What adapter_config.json may say. Of fields that are in neither table nothing is known: they must be empty.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (None, False, True),
    "init_lora_weights": (None, False, True, "gaussian", "eva", "orthogonal"),  # others change the model's own weights
}
HARMLESS = (  # read by `AdapterFiles`, or without influence on what a trained adapter computes
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "unsloth_fixed",
)  # fmt: skip


Shape = tuple[int, int]


class AdapterFiles:
    """An adapter's directory. Raises InputError for anything but plain LoRA of tensors that the model has.

    linears: the shapes [out, in] of the model's linear layers by checkpoint tensor.
    """

    def __init__(self, directory: Path, linears: Mapping[str, Shape]) -> None:
        self.directory, self.linears = directory, linears
        self._config = _Config(directory / CONFIG)
        self._tensors = _tensors(directory / WEIGHTS, list(linears))

    def read(self, tensor: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What is added to a linear's weight, b a: a [r, in] and b [out, r], times the scale; None for nothing."""
        names, (rows, columns) = [_name(tensor, side) for side in "AB"], self.linears[tensor]
        if names[0] not in self._tensors:
            return None
        rank, scale = self._config.rank_and_scale(tensor.removesuffix(".weight"))
        a = _read(self.directory, self._tensors[names[0]], (rank, columns)).to(dtype)
        b = (_read(self.directory, self._tensors[names[1]], (rows, rank)) * scale).to(dtype)
        for value, name in ((a, names[0]), (b, names[1])):
            if not value.isfinite().all():
                raise InputError(
                    f"{self.directory / WEIGHTS}: tensor {name} has values that are not finite in {dtype}",
                    "Finite values were expected",
                    "Train or download the adapter again",
                )
        return a, b


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


def _read(directory: Path, info: TensorInfo, shape: Shape) -> torch.Tensor:
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
