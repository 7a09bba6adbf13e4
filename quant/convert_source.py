"""The quantized weights of a checkpoint or GGUF file that `llmkit convert` reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.dtypes import FLOATS
from llmkit.checkpoint.gguf_integers import INTEGER_TYPES, unpack_blocks
from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.common.errors import InputError
from llmkit.model.checkpoint_tensors import carried_tensors, kv_scales, scheme_of
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.model.weight_loader import read_kv_scale, read_quantized

# The formats whose weights are converted. MXFP4 of gpt-oss has all experts of a layer in a tensor.
READABLE = ("gptq", "gptq_v2", "awq", "compressed-tensors", "fp8", "autofp8", "modelopt", "gguf")
_FLOAT_TYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # dtypes by ggml type


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight of the source."""

    parameter: Parameter
    name: str  # of the dense tensor that it stands for
    scheme: Scheme
    shape: tuple[int, int]

    @property
    def module(self) -> str:
        """The checkpoint module."""
        return self.name.removesuffix(".weight")


class ConvertSource:
    """A checked checkpoint whose quantized weights are read one at a time.

    Raises InputError for formats that are not READABLE, for a checkpoint that is not quantized, and
    for GGUF types whose integers no other format can hold.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        self.checkpoint = checkpoint
        self.spec = spec
        quantization = checkpoint.quantization
        self.format: str = "gguf" if checkpoint.file_format == "gguf" else "dense"
        if quantization is not None:
            self.format = quantization.format
        if self.format == "dense" or (self.format != "gguf" and not quantization):
            raise InputError(
                f"{checkpoint.reference} is not quantized",
                f"A checkpoint in one of {', '.join(READABLE)} was expected",
                "Quantize it: llmkit quantize",
            )
        if self.format not in READABLE:
            raise InputError(
                f"{checkpoint.reference} is in the format {self.format}",
                f"One of {', '.join(READABLE)} was expected",
            )
        self._check_carried()

    @property
    def kv(self) -> str:
        """The dtype of a quantized KV cache whose scales the source has; "" without."""
        return self.checkpoint.quantization.kv if self.checkpoint.quantization else ""

    @cached_property
    def weights(self) -> dict[str, StoredWeight]:
        """The quantized weights by the name of the dense tensor, in the order of the table."""
        found = self._gguf_weights() if self.format == "gguf" else self._stored_weights()
        if not found:
            raise InputError(
                f"{self.checkpoint.reference} has no quantized weights",
                "At least one quantized linear layer was expected",
                "Quantize it: llmkit quantize",
            )
        return found

    def read(self, weight: StoredWeight) -> QuantizedWeight:
        """A weight as it is stored. Raises InputError, with its name, for malformed tensors."""
        if self.format != "gguf":
            found = read_quantized(self.checkpoint, weight.parameter, weight.name, "cpu")
            assert found is not None
            return found
        from llmkit.checkpoint.gguf import GgufModel  # keeps the gguf package off the start path

        model = self.checkpoint.row_reader
        assert isinstance(model, GgufModel)
        ggml_type = self.checkpoint.tensors[weight.name].ggml_type
        try:
            return unpack_blocks(ggml_type, model.blocks(weight.name))
        except InputError as error:
            what = f"{self.checkpoint.reference}: {weight.name}: {error.what}"
            raise InputError(what, error.expected, error.todo) from error

    def read_kv_scales(self, parameter: Parameter) -> dict[str, torch.Tensor]:
        """The KV-cache scales that a parameter's output needs, float32 [1], by runtime name.

        Raises InputError, with the tensor's name, for scales that are not finite or not positive.
        """
        names = kv_scales(parameter, self.checkpoint.quantization)
        return {runtime: read_kv_scale(self.checkpoint, name) for runtime, name in names.items()}

    def dense_dtype(self, name: str) -> str:
        """The dtype in which an output stores a tensor that is not quantized, exactly.

        Blocks of a GGUF file, such as those of an embedding, are dequantized to float32.
        """
        info = self.checkpoint.tensors[name]
        return info.dtype if self.format != "gguf" else _FLOAT_TYPES.get(info.ggml_type, "F32")

    def _stored_weights(self) -> dict[str, StoredWeight]:
        found = {}
        for parameter in parameters(self.spec):
            for name in parameter.source_names:
                scheme = scheme_of(parameter, name, self.checkpoint.quantization)
                if scheme is not None:
                    found[name] = StoredWeight(parameter, name, scheme, _shape(parameter, name))
        return found

    def _gguf_weights(self) -> dict[str, StoredWeight]:
        found = {}
        refused: dict[str, str] = {}
        for parameter in parameters(self.spec):
            if not parameter.is_linear:  # the output projection is dequantized, as others expect it
                continue
            for name in parameter.source_names:
                ggml_type = self.checkpoint.tensors[name].ggml_type
                is_stacked = parameter.expert_slice(name) is not None
                if ggml_type in INTEGER_TYPES and not is_stacked:
                    scheme = INTEGER_TYPES[ggml_type]
                    found[name] = StoredWeight(parameter, name, scheme, _shape(parameter, name))
                elif ggml_type not in _FLOAT_TYPES:
                    experts = ", all experts of a layer" if is_stacked else ""
                    refused[name] = f"{name} in {ggml_type}{experts}"
        if refused:
            raise InputError(
                f"{self.checkpoint.reference} has {len(refused)} linear weights whose values no"
                f" other format holds ({', '.join(list(refused.values())[:5])})",
                f"Matrices in {', '.join(INTEGER_TYPES)} and floats were expected",
                "Quantize the original model, or this file: llmkit quantize",
            )
        return found

    def _check_carried(self) -> None:
        """Raises InputError for quantized tensors of parts that do not run."""
        for name, info in carried_tensors(self.checkpoint, self.spec).items():
            is_packed = name.endswith((".qweight", ".weight_packed"))
            if self.format != "gguf" and (is_packed or info.dtype.startswith("F8_")):
                raise InputError(
                    f"{self.checkpoint.reference} has the quantized tensor {name} in a part that"
                    " does not run here",
                    f"Such parts in {', '.join(FLOATS)} were expected: they are copied as they are",
                )


def _shape(parameter: Parameter, name: str) -> tuple[int, int]:
    """[out, in] of the checkpoint tensor `name`."""
    sources = parameter.sources_in(name)
    return sum(source.shape[0] for source in sources), parameter.shape[1]
