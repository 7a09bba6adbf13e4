"""Reads the metadata of a GGUF file by key, and checks the values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.common.errors import InputError


@dataclass(frozen=True)
class GgufMetadata:
    """What the header of a GGUF file says about the model.

    Keys are without their first part, the architecture. Every method raises InputError when a key
    without a default is missing, and for values that make no sense.
    """

    path: Path
    values: Mapping[str, Any]  # the metadata
    tensors: Mapping[str, TensorInfo]  # by GGUF name
    read_vector: Callable[[TensorInfo], npt.NDArray[np.float32]]

    @property
    def architecture(self) -> str:
        """The GGUF name of the architecture."""
        return str(self.values.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of any type."""
        value = self.values.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise InputError(f"{self.path} lacks {self.architecture}.{key} in its metadata")
        return value

    def optional(self, key: str) -> Any:
        """The value of a key; None when there is no such key."""
        return self.values.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A number from 1."""
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise self.error(key, "A positive number was expected")
        return value

    def integers(self, key: str, count: int) -> list[int]:
        """Numbers from 1, one for each of `count` layers. One number stands for all of them."""
        value = self.get(key)
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count or not all(type(each) is int and each > 0 for each in values):
            raise self.error(key, f"A positive number, or {count} of them, was expected")
        return values

    def layer_numbers(self, key: str, num_layers: int) -> list[float]:
        """Numbers of layers, of a key that has no architecture. One stands for all layers."""
        value = self.values.get(key)
        if value is None:
            raise InputError(f"{self.path} lacks {key} in its metadata")
        values = value if isinstance(value, list) else [value] * num_layers
        are_numbers = all(type(each) in (int, float) and math.isfinite(each) for each in values)
        if len(values) != num_layers or not are_numbers:
            raise InputError(
                f"{self.path}: {key} is {value}", f"{num_layers} finite numbers were expected"
            )
        return [float(each) for each in values]

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(key, "A positive number was expected")
        return float(value)

    def expect(self, key: str, *expected: Any) -> None:
        """Raises InputError when the key has another value. A missing key has the first one."""
        if self.get(key, expected[0]) not in expected:
            raise self.error(key, f"{' or '.join(map(str, expected))} was expected")

    def error(self, key: str, expected: str) -> InputError:
        """The error for a key's value."""
        return InputError(
            f"{self.path}: {self.architecture}.{key} is {self.optional(key)}", expected
        )

    def has_tensor(self, name: str) -> bool:
        """Whether the file has the tensor, in layer 0 when its name has no layer."""
        return name in self.tensors or f"blk.0.{name}" in self.tensors

    def vector(self, name: str) -> list[float]:
        """The values of a tensor of one dimension."""
        info = self.tensors.get(name)
        if info is None:
            raise InputError(f"{self.path} has no {name}")
        values = self.read_vector(info).reshape(-1)
        # The shortest decimals for these float32 values.
        return [float(str(value)) for value in values]
