"""Reads a GGUF file as a Hugging Face checkpoint.

Config, tensor names and row order are those of Hugging Face; tensors are dequantized to float32.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llmkit.checkpoint.gguf_header import read_gguf_header
from llmkit.checkpoint.gguf_tokenizer import tokenizer_files
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.tensor_reader import read_into
from llmkit.common.errors import InputError

if TYPE_CHECKING:
    import torch

# By GGUF architecture: the Hugging Face architecture and model_type.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GgufModel:
    """An opened GGUF file. Tensors are dequantized when read (`RowReader`)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._metadata, tensors = read_gguf_header(path)
        self._architecture = str(self._metadata.get("general.architecture"))
        if self._architecture not in ARCHITECTURES:
            raise InputError(
                f"{path} has the architecture {self._architecture}",
                f"One of {', '.join(ARCHITECTURES)} was expected",
            )
        self._rope_factors = tensors.pop(_ROPE_FACTORS, None)
        self.tensors: dict[str, TensorInfo] = {}  # by Hugging Face name
        for tensor in tensors.values():
            name = self._hf_name(tensor.name)
            self.tensors[name] = replace(tensor, name=name)
        for tensor in tensors.values():
            self._check_type(tensor)
        self.config = self._make_config()
        self.generation_config = {
            name: value for name, value in self._token_ids().items() if value is not None
        }

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as float32. Only these are read, except for q and k of llama files."""
        import torch  # keeps torch off the path that reads configs and tokenizers

        num_heads = self._permuted_heads(info.name)
        if num_heads is None and len(info.shape) > 1:
            return torch.from_numpy(self._dequantize(info, start, stop))
        num_rows = info.shape[0]
        tensor = torch.from_numpy(self._dequantize(info, 0, num_rows))
        if num_heads is not None:
            # RoPE rotates pairs of rows. In llama.cpp a pair is two neighbouring rows of a head; in
            # Hugging Face it is one row of each half. This undoes the permutation of llama.cpp's
            # converter.
            num_pairs = num_rows // num_heads // 2
            interleaved = tensor.reshape(num_heads, num_pairs, 2, *info.shape[1:])
            tensor = interleaved.transpose(1, 2).reshape(info.shape)
        return tensor if (start, stop) == (0, num_rows) else tensor[start:stop].clone()

    def side_files(self) -> dict[str, bytes]:
        """Tokenizer, chat template and generation config as Hugging Face files.

        Raises InputError for an unknown tokenizer.
        """
        return dict(self._side_files)

    @cached_property
    def _side_files(self) -> dict[str, bytes]:
        files = tokenizer_files(self._path, self._metadata, self.config["max_position_embeddings"])
        files["generation_config.json"] = (
            json.dumps(self.generation_config, indent=2) + "\n"
        ).encode()
        return files

    def _dequantize(self, tensor: TensorInfo, start: int, stop: int) -> npt.NDArray[np.float32]:
        shape = (stop - start, *tensor.shape[1:])
        num_rows = max(1, tensor.shape[0])
        if len(tensor.shape) == 1:  # always read whole, as one row: it may be stored in blocks
            num_rows = 1
            start = 0
            stop = 1
        row_bytes = (tensor.end - tensor.start) // num_rows
        stored = np.empty((stop - start) * row_bytes, np.uint8)
        read_into(self._path, tensor.start + start * row_bytes, stored.data)
        qtype = GGMLQuantizationType[tensor.ggml_type]
        values = dequantize(stored.reshape(stop - start, row_bytes), qtype)
        return values.reshape(shape)

    def _permuted_heads(self, name: str) -> int | None:
        """The number of heads of q and k in llama files; None for tensors in Hugging Face order."""
        if self._architecture != "llama":
            return None
        if ".q_proj." in name:
            return int(self.config["num_attention_heads"])
        return int(self.config["num_key_value_heads"]) if ".k_proj." in name else None

    def _hf_name(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match:
            layer, part, kind = match.groups()
            if layer is None and part in _TOP:
                return f"{_TOP[part]}.{kind}"
            if layer is not None and part in _LAYER:
                return f"model.layers.{int(layer)}.{_LAYER[part]}.{kind}"
        raise InputError(
            f"{self._path} has the tensor {name},"
            f" which this {self._architecture} reader does not know",
            "A dense decoder was expected",
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

    def _get(self, key: str, default: Any = None) -> Any:
        value = self._metadata.get(f"{self._architecture}.{key}", default)
        if value is None:
            raise InputError(f"{self._path} lacks {self._architecture}.{key} in its metadata")
        return value

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if type(value) is not int or value < 1:
            raise InputError(
                f"{self._path}: {self._architecture}.{key} is {value}",
                "A positive number was expected",
            )
        return value

    def _make_config(self) -> dict[str, Any]:
        name, kind = ARCHITECTURES[self._architecture]
        hidden = self._integer("embedding_length")
        heads = self._integer("attention.head_count")
        head_dim = self._integer("attention.key_length", hidden // heads)
        if "model.embed_tokens.weight" not in self.tensors:
            raise InputError(f"{self._path} has no token_embd.weight")
        for key, expected in (
            ("attention.value_length", head_dim),
            ("rope.dimension_count", head_dim),
        ):
            found = self._get(key, expected)
            if found != expected:
                raise InputError(
                    f"{self._path}: {self._architecture}.{key} is {found}",
                    f"{expected} was expected",
                )
        for key in ("expert_count", "attention.sliding_window"):
            found = self._get(key, 0)
            if found:
                raise InputError(
                    f"{self._path}: {self._architecture}.{key} is {found}",
                    "A dense decoder was expected",
                )
        config: dict[str, Any] = {
            "architectures": [name],
            "model_type": kind,
            "vocab_size": self.tensors["model.embed_tokens.weight"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._integer("feed_forward_length"),
            "num_hidden_layers": self._integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._integer("context_length"),
            "rms_norm_eps": self._get("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._get("rope.freq_base", 10000.0),
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "dtype": "bfloat16",
            "use_cache": True,
            **self._token_ids(),
        }
        if kind != "qwen2":
            config["attention_bias"] = any(part.endswith("q_proj.bias") for part in self.tensors)
        if kind == "llama":
            config["mlp_bias"] = any(part.endswith("up_proj.bias") for part in self.tensors)
        scaling = self._rope_scaling(config)
        if scaling:
            config["rope_scaling"] = scaling
        return config

    def _token_ids(self) -> dict[str, Any]:
        metadata = self._metadata
        eos = metadata.get("tokenizer.ggml.eos_token_id")
        end_of_turn = metadata.get("tokenizer.ggml.eot_token_id")
        ends = [token for token in dict.fromkeys((eos, end_of_turn)) if token is not None]
        return {
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
            "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        }

    def _rope_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
        kind = self._get("rope.scaling.type", "none")
        if self._rope_factors is not None:
            return self._llama3_scaling(self._rope_factors, config)
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise InputError(
                f"{self._path} scales RoPE by {kind}", "none, linear, yarn or llama3 was expected"
            )
        scaling = {"rope_type": kind, "factor": float(self._get("rope.scaling.factor"))}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self._integer(
                "rope.scaling.original_context_length"
            )
        return scaling

    def _llama3_scaling(self, tensor: TensorInfo, config: dict[str, Any]) -> dict[str, Any]:
        """The parameters of Llama 3's RoPE scaling.

        The file has no parameters, only the divisor of each frequency. `factor` is the largest
        divisor; the other parameters are assumed to be Llama 3's, and the divisors that follow from
        them are compared with those of the file.
        """
        found = self._dequantize(tensor, 0, tensor.shape[0]).astype(np.float64)
        factor = float(found.max())
        low = 1.0
        high = 4.0
        original = 8192
        frequencies = config["rope_theta"] ** (
            -np.arange(0, config["head_dim"], 2) / config["head_dim"]
        )
        smooth = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clip(0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
            raise InputError(
                f"{self._path}: {_ROPE_FACTORS} is not Llama 3's scaling", "Llama 3's was expected"
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }


def open_gguf(path: Path) -> GgufModel:
    """Read and check the header of a GGUF file.

    Raises InputError when it is damaged, incomplete or of an unknown architecture.
    """
    return GgufModel(path)
