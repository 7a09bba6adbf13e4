"""Reads a GGUF file as a Hugging Face checkpoint.

Config, tensor names and row order are those of Hugging Face; tensors are dequantized to float32.
The experts of gpt-oss stay in MXFP4, in the tensors that Hugging Face has for it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llmkit.checkpoint.gguf_architectures import (
    BARE_MODULES,
    CONFIG_TENSORS,
    ONE_ROW_MODULES,
    gguf_architecture,
    gguf_config,
)
from llmkit.checkpoint.gguf_header import read_gguf_header
from llmkit.checkpoint.gguf_metadata import GgufMetadata
from llmkit.checkpoint.gguf_tokenizer import tokenizer_files
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.tensor_reader import read_into
from llmkit.common.errors import InputError

if TYPE_CHECKING:
    import torch

# Of one dimension in Hugging Face's files; GGUF's may have more.
_FLAT_MODULES = (".A_log", "mixer.D", "mamba.D", "linear_attn.norm", "mixer.norm", "mamba.norm")
# The tensors of a layer that gpt-oss stores in two, gate and up.
_STACKED_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_down_exps")
# What Hugging Face's gpt-oss has in config.json. The modules are not in MXFP4.
_MXFP4_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


@dataclass(frozen=True)
class _Source:
    """Where a Hugging Face tensor comes from.

    parts: tensors of the file. arrange: from the same rows of all parts to rows of the Hugging
    Face tensor; None: one part as it is. needs_all_rows: `arrange` moves rows, so it gets all of
    them, and parts may have different numbers of rows. is_stored: `arrange` gets the stored bytes,
    uint8 [experts, out, blocks, bytes of a block]. number: the value of a tensor without parts.
    """

    parts: tuple[TensorInfo, ...]
    arrange: Callable[..., torch.Tensor] | None = None
    needs_all_rows: bool = False
    is_stored: bool = False
    number: float = 0.0


class GgufModel:
    """An opened GGUF file. Tensors are dequantized when read (`RowReader`).

    dequantize: of gpt-oss' experts too, which otherwise stay in MXFP4.
    """

    def __init__(self, path: Path, dequantize: bool = False) -> None:
        self._path = path
        values, tensors = read_gguf_header(path)
        self.files: tuple[str, ...] = (path.name,)  # one, or the parts of a model in several
        if values.get("split.count", 1) != 1:
            self.files = _part_names(path, values)
            for name in self.files[1:]:
                _add_part(path, tensors, path.with_name(name))
            _check_tensor_count(path, values, tensors)
        self._metadata = GgufMetadata(path, values, tensors, self._read_vector)
        self._architecture = gguf_architecture(self._metadata)
        for tensor in tensors.values():
            self._check_type(tensor)
        self.config = gguf_config(self._metadata, self._architecture) | self._token_ids()
        stacks = [tensor for tensor in tensors.values() if tensor.name.endswith("_exps.weight")]
        self._keeps_mxfp4 = (
            self._architecture.model_type == "gpt_oss"
            and not dequantize
            and all(tensor.ggml_type == "MXFP4" for tensor in stacks)
        )
        if self._keeps_mxfp4:
            self.config["quantization_config"] = _MXFP4_CONFIG
        self._check_experts()
        self.tensors: dict[str, TensorInfo] = {}  # by Hugging Face name
        self._sources: dict[str, _Source] = {}  # by Hugging Face name
        for tensor in tensors.values():
            if tensor.name not in CONFIG_TENSORS:
                self._add_tensor(tensor)
        self._add_layer_numbers()
        self.generation_config = {
            name: value for name, value in self._token_ids().items() if value is not None
        }

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as float32; of blocks and scales of MXFP4, as uint8.

        Only these are read, except for vectors and for q and k of files that interleave them.
        """
        import torch  # keeps torch off the path that reads configs and tokenizers

        source = self._sources[info.name]
        if not source.parts:
            return torch.full(info.shape, source.number, dtype=torch.float32)
        num_rows = info.shape[0]
        reads_all = source.needs_all_rows or len(source.parts[0].shape) == 1
        first, last = (0, num_rows) if reads_all else (start, stop)
        read = self._read_stored if source.is_stored else self._dequantize
        parts = [
            torch.from_numpy(read(part, first, part.shape[0] if reads_all else last))
            for part in source.parts
        ]
        tensor = parts[0] if source.arrange is None else source.arrange(*parts)
        if (first, last) == (start, stop):
            return tensor.contiguous()
        return tensor[start:stop].clone()

    def blocks(self, name: str) -> torch.Tensor:
        """The stored blocks of the matrix `name`, uint8 [out, blocks of a row, bytes of a block].

        Rows are in the order of Hugging Face.
        """
        import torch  # keeps torch off the path that reads configs and tokenizers

        source = self._sources.get(name) or self._stacked_expert(name)
        parts = source.parts
        if source.arrange is None:
            return torch.from_numpy(self._read_stored(parts[0], 0, parts[0].shape[0]))
        kinds = {part.ggml_type for part in parts}
        if not source.needs_all_rows or len(kinds) > 1 or len(parts[0].shape) > 2:
            raise InputError(
                f"{self._path}: the stored values of {parts[0].name} are in another order",
                "A weight whose rows alone are moved was expected",
                "Quantize the file anew: llmkit quantize",
            )
        stored = [self._read_stored(part, 0, part.shape[0]) for part in parts]
        moved: torch.Tensor = source.arrange(*map(torch.from_numpy, stored))
        return moved

    def side_files(self) -> dict[str, bytes]:
        """Tokenizer, chat template and generation config as Hugging Face files.

        Raises InputError for an unknown tokenizer.
        """
        return dict(self._side_files)

    @cached_property
    def _side_files(self) -> dict[str, bytes]:
        files = tokenizer_files(
            self._path, self._metadata.values, self.config["max_position_embeddings"]
        )
        files["generation_config.json"] = (
            json.dumps(self.generation_config, indent=2) + "\n"
        ).encode()
        return files

    def _dequantize(self, tensor: TensorInfo, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows [start, stop). Raises InputError when scales of blocks are NaN or infinite."""
        shape = (stop - start, *tensor.shape[1:])
        num_rows = max(1, tensor.shape[0])
        if len(tensor.shape) == 1:  # always read whole, as one row: it may be stored in blocks
            num_rows = 1
            start = 0
            stop = 1
        row_bytes = (tensor.end - tensor.start) // num_rows
        stored = self._read_bytes(tensor, start * row_bytes, (stop - start) * row_bytes)
        qtype = GGMLQuantizationType[tensor.ggml_type]
        values = dequantize(stored.reshape(stop - start, row_bytes), qtype)
        values_per_block, _ = GGML_QUANT_SIZES[qtype]
        has_scales = values_per_block > 1
        if has_scales and values.size and not np.isfinite((values.min(), values.max())).all():
            raise InputError(
                f"{self._path}: scales of blocks of {tensor.name} are NaN or infinite",
                "Finite numbers were expected",
                "Download the checkpoint again or get it from its maker",
            )
        return values.reshape(shape)

    def _read_stored(self, tensor: TensorInfo, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The blocks of rows [start, stop), with their bytes as the last dimension."""
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.ggml_type]]
        row_bytes = (tensor.end - tensor.start) // max(1, tensor.shape[0])
        stored = self._read_bytes(tensor, start * row_bytes, (stop - start) * row_bytes)
        inner = tensor.shape[1:-1]
        return stored.reshape(stop - start, *inner, tensor.shape[-1] // block, block_bytes)

    def _read_bytes(self, tensor: TensorInfo, start: int, count: int) -> npt.NDArray[np.uint8]:
        stored = np.empty(count, np.uint8)
        read_into(self._path.with_name(tensor.file), tensor.start + start, stored.data)
        return stored

    def _read_vector(self, tensor: TensorInfo) -> npt.NDArray[np.float32]:
        return self._dequantize(tensor, 0, tensor.shape[0])

    def _add_tensor(self, tensor: TensorInfo) -> None:
        match = re.fullmatch(
            r"(?:blk\.(\d+)\.)?((?:nextn\.|shortconv\.)?\w+?)"
            r"(?:\.(weight|bias|scale))?",
            tensor.name,
        )
        if match is None:
            raise self._unknown(tensor.name)
        layer, part, kind = match.groups()
        if kind is None and part not in self._architecture.bare_tensors:
            raise self._unknown(tensor.name)
        if kind == "scale" and (layer is None or part not in self._architecture.scales):
            raise self._unknown(tensor.name)
        if layer is None:
            modules = self._architecture.all_top_modules
            if part not in modules:
                raise self._unknown(tensor.name)
            self._add_module(tensor, "", modules[part], kind)
            return
        prefix = f"{self._architecture.tensor_prefix}.layers.{int(layer)}"
        experts = self._architecture.experts or {}
        joined = {parts: module for module, parts in self._architecture.joined.items()}
        of_part = {part: (parts, module) for parts, module in joined.items() for part in parts}
        if kind == "scale":
            name = f"{prefix}.{self._architecture.scales[part]}"
            self._add(name, tensor.shape, _Source((tensor,)))
        elif part in self._architecture.modules:
            self._add_module(tensor, f"{prefix}.", self._architecture.modules[part], kind)
        elif part in of_part:
            parts, module = of_part[part]
            if part == parts[0]:
                self._add_joined(tensor, int(layer), module, kind)
            elif f"blk.{layer}.{parts[0]}.{kind}" not in self._metadata.tensors:
                raise InputError(
                    f"{self._path} has {tensor.name}, but no blk.{layer}.{parts[0]}.{kind}"
                )
        elif self._architecture.stacked_experts and part in _STACKED_EXPERTS:
            self._add_stacked_experts(tensor, int(layer), part, kind)
        elif part in experts and len(tensor.shape) == 3:
            self._add_experts(tensor, f"{prefix}.{experts[part]}.{kind}")
        else:
            raise self._unknown(tensor.name)

    def _add_module(self, tensor: TensorInfo, prefix: str, module: str, kind: str) -> None:
        """A tensor that is one of Hugging Face's. prefix: "model.layers.3." or ""."""
        move = self._architecture.move(module, kind, self.config)
        if module.endswith(_FLAT_MODULES):
            tensor = replace(tensor, shape=(math.prod(tensor.shape),))
        elif module.endswith(("conv.conv", ".conv1d")) and len(tensor.shape) == 2:
            tensor = replace(tensor, shape=(tensor.shape[0], 1, tensor.shape[1]))
        elif module.endswith(ONE_ROW_MODULES):
            tensor = replace(tensor, shape=(1, math.prod(tensor.shape)))
        source = _Source((tensor,))
        if move is not None:
            source = _Source((tensor,), move.load, needs_all_rows=move.kind == "rows")
        self._add(_hugging_face_name(prefix + module, kind), tensor.shape, source)

    def _add_joined(self, tensor: TensorInfo, layer: int, module: str, kind: str) -> None:
        """A tensor whose values are in several of the file, of which `tensor` is the first."""
        import torch  # keeps torch off the path that reads other families' configs

        names = [f"blk.{layer}.{part}.{kind}" for part in self._architecture.joined[module]]
        missing = [name for name in names if name not in self._metadata.tensors]
        if missing:
            raise InputError(f"{self._path} has {tensor.name}, but no {missing[0]}")
        parts = tuple(self._metadata.tensors[name] for name in names)
        move = self._architecture.move(module, kind, self.config)
        assert move is not None, f"{module} has parts and no move"
        try:
            shape = move.load(*(torch.empty(part.shape, device="meta") for part in parts)).shape
        except (RuntimeError, InputError) as error:
            shapes = ", ".join(f"{part.name} {list(part.shape)}" for part in parts)
            raise InputError(
                f"{self._path} has {shapes}", "Parts of one weight of the model were expected"
            ) from error
        name = _hugging_face_name(
            f"{self._architecture.tensor_prefix}.layers.{layer}.{module}", kind
        )
        self._add(name, tuple(shape), _Source(parts, move.load, needs_all_rows=True))

    def _add_experts(self, tensor: TensorInfo, name: str) -> None:
        """Each expert of a [experts, out, in] tensor as a tensor of its own."""
        for index in range(tensor.shape[0]):
            part = _expert_part(tensor, index)
            self._add(name.format(index), part.shape, _Source((part,)))

    def _stacked_expert(self, name: str) -> _Source:
        """One expert of a family whose experts `rows` returns together."""
        for part, pattern in (self._architecture.experts or {}).items():
            module = re.escape(pattern).replace(r"\{\}", r"(\d+)")
            match = re.fullmatch(rf"model\.layers\.(\d+)\.{module}\.weight", name)
            if match is not None:
                stored_as = f"blk.{match[1]}.{part}.weight"
                if stored_as not in self._metadata.tensors:
                    raise InputError(
                        f"{self._path} has gate and up of experts in one tensor",
                        f"The tensor {stored_as} was expected",
                        "Quantize the file anew: llmkit quantize",
                    )
                tensor = self._metadata.tensors[stored_as]
                return _Source((_expert_part(tensor, int(match[2])),))
        raise KeyError(name)

    def _add_stacked_experts(self, tensor: TensorInfo, layer: int, part: str, kind: str) -> None:
        """The experts of a layer in one tensor: weights of three dimensions, biases of two."""
        stack = self._architecture.stacked_experts
        assert stack is not None
        suffix = "" if kind == "weight" else "_bias"
        num_dimensions = 3 if kind == "weight" else 2
        if len(tensor.shape) != num_dimensions:
            raise InputError(
                f"{self._path}: tensor {tensor.name} has the shape {list(tensor.shape)}",
                f"{num_dimensions} dimensions were expected, the first of them experts",
            )
        prefix = f"model.layers.{layer}."
        is_transposed = stack.in_turn and kind == "weight"
        shape = [tensor.shape[0], *(tensor.shape[:0:-1] if is_transposed else tensor.shape[1:])]
        keeps_mxfp4 = kind == "weight" and self._keeps_mxfp4
        if part == "ffn_down_exps" and keeps_mxfp4:
            self._add_mxfp4(f"{prefix}{stack.down}", (tensor,))
            return
        if part == "ffn_down_exps":
            arrange = _transposed if is_transposed else None
            self._add(f"{prefix}{stack.down}{suffix}", tuple(shape), _Source((tensor,), arrange))
            return
        if part == "ffn_gate_up_exps":  # all rows of gate first
            if stack.in_turn:
                raise self._unknown(tensor.name)
            self._add(f"{prefix}{stack.gate_up}{suffix}", tuple(shape), _Source((tensor,)))
            return
        if part == "ffn_up_exps":  # added with the gate
            part_name = f"blk.{layer}.ffn_gate_exps.{kind}"
            if part_name not in self._metadata.tensors:
                raise InputError(f"{self._path} has {tensor.name}, but no {part_name}")
            return
        up = self._metadata.tensors.get(f"blk.{layer}.ffn_up_exps.{kind}")
        if up is None or up.shape != tensor.shape:
            raise InputError(
                f"{self._path}: tensor {tensor.name} has the shape {list(tensor.shape)}, and"
                f" blk.{layer}.ffn_up_exps.{kind} has {list(up.shape) if up else 'none'}",
                "Equal shapes were expected",
            )
        if keeps_mxfp4:
            self._add_mxfp4(f"{prefix}{stack.gate_up}", (tensor, up))
            return
        shape[-1 if stack.in_turn else 1] *= 2
        source = _Source((tensor, up), _gate_and_up_in_turn if stack.in_turn else _gate_then_up)
        self._add(f"{prefix}{stack.gate_up}{suffix}", tuple(shape), source)

    def _add_mxfp4(self, name: str, parts: tuple[TensorInfo, ...]) -> None:
        """Blocks [experts, out, in/32, 16] and scales [experts, out, in/32]."""
        num_experts, num_rows, in_features = parts[0].shape
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType.MXFP4]
        shape = (num_experts, num_rows * len(parts), in_features // block)
        blocks = _Source(parts, _mxfp4_blocks, is_stored=True)
        scales = _Source(parts, _mxfp4_scales, is_stored=True)
        self._add(f"{name}_blocks", (*shape, block_bytes - 1), blocks, "U8")
        self._add(f"{name}_scales", shape, scales, "U8")

    def _add_layer_numbers(self) -> None:
        """The tensors of one number whose values are in the metadata."""
        num_layers = self.config["num_hidden_layers"]
        for key, (module, shape) in self._architecture.layer_numbers.items():
            for layer, number in enumerate(self._metadata.layer_numbers(key, num_layers)):
                name = f"{self._architecture.tensor_prefix}.layers.{layer}.{module}"
                self.tensors[name] = TensorInfo(name, "F32", shape, self._path.name)
                self._sources[name] = _Source((), number=number)

    def _add(self, name: str, shape: tuple[int, ...], source: _Source, dtype: str = "F32") -> None:
        self.tensors[name] = replace(source.parts[0], name=name, shape=shape, dtype=dtype)
        self._sources[name] = source

    def _check_experts(self) -> None:
        """Raises InputError when the tensors have another number of experts than the metadata."""
        if not self._architecture.has_experts:
            return
        num_experts = self._metadata.integer("expert_count")
        for name, tensor in self._metadata.tensors.items():
            if re.search(r"_exps\.", name) and tensor.shape[0] != num_experts:
                raise self._metadata.error(
                    "expert_count", f"{tensor.shape[0]} was expected, as {name} has"
                )

    def _unknown(self, name: str) -> InputError:
        return InputError(
            f"{self._path} has the tensor {name},"
            f" which this {self._metadata.architecture} reader does not know",
            "The tensors of a decoder of this architecture were expected",
        )

    def _check_type(self, tensor: TensorInfo) -> None:
        qtype = GGMLQuantizationType[tensor.ggml_type]
        block = np.zeros((1, GGML_QUANT_SIZES[qtype][1]), np.uint8)
        try:
            dequantize(block, qtype)
        except NotImplementedError:
            raise InputError(
                f"{self._path}: tensor {tensor.name} is stored as {tensor.ggml_type}"
            ) from None

    def _token_ids(self) -> dict[str, Any]:
        values = self._metadata.values
        # The end of a text, of a turn, and of a message that a tool answers.
        found = [values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        ends = [token for token in dict.fromkeys(found) if token is not None]
        return {
            "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
            "pad_token_id": values.get("tokenizer.ggml.padding_token_id"),
        }


def _part_names(path: Path, values: dict[str, Any]) -> tuple[str, ...]:
    """The files of a model that is split, named NAME-00001-of-00003.gguf, given the first one."""
    count = values["split.count"]
    number = values.get("split.no")
    if type(count) is not int or type(number) is not int or not 0 <= number < count < 10**5:
        raise InputError(
            f"{path}: its metadata says part {number} of {count}",
            "A part below the number of parts was expected",
            "Download it again",
        )
    ending = f"-{number + 1:05}-of-{count:05}.gguf"
    if not path.name.endswith(ending):
        raise InputError(
            f"{path} is part {number + 1} of a model in {count} files",
            f"A name that ends with {ending} was expected",
            "Give the files the names that they had",
        )
    stem = path.name.removesuffix(ending)
    names = tuple(f"{stem}-{index + 1:05}-of-{count:05}.gguf" for index in range(count))
    if number != 0:
        raise InputError(
            f"{path} is part {number + 1} of a model in {count} files",
            "The first one was expected",
            f"Give {path.with_name(names[0])}",
        )
    return names


def _add_part(path: Path, tensors: dict[str, TensorInfo], part: Path) -> None:
    """Add the tensors of another file of the model."""
    if not part.exists():
        raise InputError(
            f"{path} needs {part.name}, which is not beside it",
            "All files of the model were expected in one directory",
            "Download the others",
        )
    _, others = read_gguf_header(part)
    twice = tensors.keys() & others.keys()
    if twice:
        raise InputError(
            f"{part} has the tensor {min(twice)}, which is in another file of the model too",
            "The files of one model were expected",
        )
    tensors |= others


def _check_tensor_count(path: Path, values: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
    expected = values.get("split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise InputError(
            f"{path} and its other files have {len(tensors)} tensors",
            f"{expected} were expected, as its metadata says",
        )


def _expert_part(tensor: TensorInfo, expert: int) -> TensorInfo:
    """One expert of a tensor [experts, out, in]."""
    expert_bytes = (tensor.end - tensor.start) // max(1, tensor.shape[0])
    start = tensor.start + expert * expert_bytes
    return replace(tensor, shape=tensor.shape[1:], start=start, end=start + expert_bytes)


def _hugging_face_name(module: str, kind: str) -> str:
    return module if module.endswith(BARE_MODULES) else f"{module}.{kind}"


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT


def _gate_and_up_in_turn(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[experts, in, 2 * out] from two [experts, out, in], or [experts, 2 * out] of biases."""
    import torch

    if gate.ndim == 2:
        return torch.stack((gate, up), dim=-1).flatten(1)
    return _in_turn((gate, up)).mT


def _gate_then_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[experts, 2 * out, in] from two [experts, out, in]."""
    import torch

    return torch.cat((gate, up), dim=1)


def _mxfp4_blocks(*parts: torch.Tensor) -> torch.Tensor:
    """The 4-bit values of blocks, gate and up rows in turn.

    A block is a byte of scale and 16 bytes of values. In GGUF byte i holds the values i and i + 16;
    in Hugging Face's files it holds 2i and 2i + 1.
    """
    import torch

    packed = _in_turn(parts)[..., 1:]
    values = torch.cat((packed & 15, packed >> 4), dim=-1)
    return values[..., 0::2] | values[..., 1::2] << 4


def _mxfp4_scales(*parts: torch.Tensor) -> torch.Tensor:
    return _in_turn(parts)[..., 0]


def _in_turn(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[experts, out * parts, ...] from parts [experts, out, ...]."""
    import torch

    return torch.stack(parts, dim=2).flatten(1, 2)


def open_gguf(path: Path, dequantize: bool = False) -> GgufModel:
    """Read and check the header of a GGUF file. dequantize: see `GgufModel`.

    Raises InputError when it is damaged, incomplete or of an unknown architecture.
    """
    return GgufModel(path, dequantize)
