"""Reads LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkit.checkpoint.dtypes import FLOATS
from llmkit.checkpoint.model_files import load_json
from llmkit.checkpoint.safetensors_header import TensorInfo, read_header
from llmkit.checkpoint.tensor_reader import SafetensorsRows
from llmkit.common.errors import InputError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_PAIR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
# The allowed values of some fields of adapter_config.json. Other init_lora_weights change the
# weights of the base model. A field that is neither here nor in ALLOWED_FIELDS must be empty.
ALLOWED_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (None, False, True),
    "init_lora_weights": (None, False, True, "gaussian", "eva", "orthogonal"),
}
# These fields are read by `AdapterFiles`, or do not change what a trained adapter computes.
ALLOWED_FIELDS = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "unsloth_fixed",
)


Shape = tuple[int, int]


class AdapterFiles:
    """An adapter's directory.

    linears: the shapes [out, in] of the model's linear layers by checkpoint tensor.
    checkpoint_name: the checkpoint's name of a module that PEFT may name differently.
    unused: what the names of modules begin with that do not run; the adapter may have pairs of
    them, which are not read.
    Raises InputError unless the adapter is plain LoRA of these layers.
    """

    def __init__(
        self,
        directory: Path,
        linears: Mapping[str, Shape],
        checkpoint_name: Callable[[str], str] = str,
        unused: tuple[str, ...] = (),
    ) -> None:
        self.directory = directory
        self.linears = linears
        self._config = _Config(directory / CONFIG)
        self._pairs = _read_pairs(directory / WEIGHTS, linears, checkpoint_name, unused)

    def read(self, tensor: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A [r, in] and B [out, r] of a linear layer, or None when the adapter does not change it.

        B includes the scale: the adapter adds B A to the weight.
        """
        pair = self._pairs.get(tensor)
        if pair is None:
            return None
        out_features, in_features = self.linears[tensor]
        rank, scale = self._config.rank_and_scale(pair.module)
        a_info = pair.sides["A"]
        b_info = pair.sides["B"]
        a = _read(self.directory, a_info, (rank, in_features)).to(dtype)
        b = _read(self.directory, b_info, (out_features, rank))
        b = (b * scale).to(dtype)
        for value, info in ((a, a_info), (b, b_info)):
            if not value.isfinite().all():
                raise InputError(
                    f"{self.directory / WEIGHTS}: tensor {info.name} has values"
                    f" that are not finite in {dtype}",
                    "Finite values were expected",
                    "Train or download the adapter again",
                )
        return a, b


@dataclass(frozen=True)
class _Pair:
    """The A and B of a linear layer."""

    module: str  # PEFT's name
    sides: dict[str, TensorInfo]  # by "A" and "B"


def _peft_name(module: str, side: str) -> str:
    """PEFT's name of the A or B of a module."""
    return f"{PREFIX}{module}.lora_{side}.weight"


def _read_pairs(
    path: Path,
    linears: Mapping[str, Shape],
    checkpoint_name: Callable[[str], str],
    unused: tuple[str, ...],
) -> dict[str, _Pair]:
    """The pairs of an adapter's file by checkpoint tensor.

    Raises InputError unless every tensor is the A or B of one of `linears`, and each A has its B.
    """
    if not path.is_file():
        raise InputError(
            f"{path} does not exist",
            f"An adapter in safetensors was expected; a pickled one ({path.stem}.bin)"
            " can run code and is never loaded",
            "Save it again with a newer peft: model.save_pretrained(DIRECTORY)",
        )
    pairs: dict[str, _Pair] = {}
    unknown = []
    for name, info in read_header(path).items():
        if unused and name.startswith(tuple(PREFIX + prefix for prefix in unused)):
            continue
        match = _PAIR.fullmatch(name)
        module = match[1] if match else ""
        tensor = f"{checkpoint_name(module)}.weight"
        # Both names of a module in one adapter would be two updates of one weight.
        if match and tensor in linears and pairs.get(tensor, _Pair(module, {})).module == module:
            pairs.setdefault(tensor, _Pair(module, {})).sides[match[2]] = info
        else:
            unknown.append(name)
    if unknown or not pairs:
        problem = "has no tensors"
        if unknown:
            names = ", ".join(sorted(unknown)[:5])
            problem = f"has {len(unknown)} tensors of no linear layer of the model ({names})"
        elif unused:
            problem = "has no tensors of the text model"
        first_module = next(iter(linears)).removesuffix(".weight")
        raise InputError(
            f"{path} {problem}",
            f"Names like {_peft_name(first_module, 'A')} were expected;"
            " adapters of embeddings and of lm_head are not supported",
            "Check that the adapter was made for this model",
        )
    for pair in pairs.values():
        for side in "AB":
            if side not in pair.sides:
                raise InputError(
                    f"{path} lacks {_peft_name(pair.module, side)}",
                    "lora_A and lora_B of a linear layer were expected together",
                )
    return pairs


def _read(directory: Path, info: TensorInfo, shape: Shape) -> torch.Tensor:
    """A tensor in float32. Raises InputError for another shape or dtype."""
    where = f"{directory / WEIGHTS}: tensor {info.name}"
    if info.shape != shape:
        raise InputError(
            f"{where} has shape {list(info.shape)}",
            f"Shape {list(shape)} was expected, by {CONFIG} and the model",
            "Check that the adapter was made for this model",
        )
    if info.dtype not in FLOATS:
        raise InputError(
            f"{where} has dtype {info.dtype}", f"Dtype {' or '.join(FLOATS)} was expected"
        )
    return SafetensorsRows(directory).rows(info, 0, shape[0]).float()


class _Config:
    """An adapter_config.json. Raises InputError unless it describes plain LoRA."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = load_json(path)
        for name, value in ({"peft_type": None} | self.values).items():
            allowed = ALLOWED_VALUES.get(name)
            is_harmless = not value or name in ALLOWED_FIELDS
            is_supported = value in allowed if allowed else is_harmless
            if not is_supported:
                expected = " or ".join(map(repr, allowed)) if allowed else "nothing"
                raise self._error(
                    name,
                    f"Plain LoRA was expected, with {expected} there",
                    "Merge it into the model",
                )
        self.rank = self._require_positive("r", self.values.get("r"))
        self.alpha = self._require_positive("lora_alpha", self.values.get("lora_alpha"))
        self.rank_patterns = self._patterns("rank_pattern")
        self.alpha_patterns = self._patterns("alpha_pattern")

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """The rank and the scale of a module by PEFT's name ("model.layers.3.self_attn.q_proj")."""
        rank = _first_match(self.rank_patterns, module, self.rank)
        alpha = _first_match(self.alpha_patterns, module, self.alpha)
        return int(rank), alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def _patterns(self, name: str) -> list[tuple[re.Pattern[str], float]]:
        """The values of a field that maps patterns to numbers.

        A pattern matches the end of a module's name, from a dot on.
        """
        patterns = self.values.get(name) or {}
        try:
            return [
                (re.compile(rf"(.*\.)?({key})"), self._require_positive(name, value))
                for key, value in patterns.items()
            ]
        except (AttributeError, re.error) as error:
            raise self._error(
                name, "An object of regular expressions and numbers was expected"
            ) from error

    def _require_positive(self, name: str, value: Any) -> float:
        is_rank = name in ("r", "rank_pattern")
        types = (int,) if is_rank else (int, float)
        if type(value) not in types or not 0 < value < math.inf:
            raise self._error(name, f"A positive {'integer' if is_rank else 'number'} was expected")
        return value  # type: ignore[no-any-return]

    def _error(self, name: str, expected: str, todo: str = "") -> InputError:
        return InputError(
            f"{self.path} has {name} {str(self.values.get(name))[:80]}", expected, todo
        )


def _first_match(
    patterns: list[tuple[re.Pattern[str], float]], module: str, default: float
) -> float:
    """The value of the first pattern that matches the module."""
    for pattern, value in patterns:
        if pattern.fullmatch(module):
            return value
    return default
