"""A GGUF file seen as a Hugging Face checkpoint: HF config, HF tensor names, float32 tensors in HF row order."""

from __future__ import annotations

import json
import math
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.gguf_header import GgufTensor, read_gguf_header
from llmkit.checkpoint.gguf_tokenizer import tokenizer_files
from llmkit.checkpoint.reading import read_into
from llmkit.checkpoint.safetensors_header import TensorInfo

if TYPE_CHECKING:
    import torch

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
        self._metadata, stored = read_gguf_header(path)
        self._architecture = str(self._metadata.get("general.architecture"))
        if self._architecture not in ARCHITECTURES:
            raise InputError(
                f"{path} has the architecture {self._architecture}", f"One of {', '.join(ARCHITECTURES)} was expected"
            )
        self._rope_factors = stored.pop(_ROPE_FACTORS, None)
        self._stored = {self._hf_name(name): tensor for name, tensor in stored.items()}
        for tensor in self._stored.values():
            self._check_type(tensor)
        self.tensors = {
            name: TensorInfo(name, "F32", tensor.shape, path.name, tensor.start, tensor.end)
            for name, tensor in self._stored.items()
        }
        self.config = self._make_config()
        self.generation_config = {name: value for name, value in self._token_ids().items() if value is not None}

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as float32; only theirs are read, except of q and k in llama files."""
        import torch

        tensor = self._stored[info.name]
        heads = self._permuted_heads(info.name)
        if heads is None and len(tensor.shape) > 1:
            return torch.from_numpy(self._dequantize(tensor, start, stop))
        whole = torch.from_numpy(self._dequantize(tensor, 0, tensor.shape[0]))
        if heads is not None:
            # llama.cpp rotates neighbouring rows of a head, HF its two halves: undo the converter's interleaving.
            pairs = tensor.shape[0] // heads // 2
            whole = whole.reshape(heads, pairs, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        return whole[start:stop].clone() if (start, stop) != (0, tensor.shape[0]) else whole

    def side_files(self) -> dict[str, bytes]:
        """Tokenizer, chat template and generation config as HF files. InputError for an unknown tokenizer."""
        return dict(self._side_files)

    @cached_property
    def _side_files(self) -> dict[str, bytes]:
        files = tokenizer_files(self._path, self._metadata, self.config["max_position_embeddings"])
        files["generation_config.json"] = (json.dumps(self.generation_config, indent=2) + "\n").encode()
        return files

    def _dequantize(self, tensor: GgufTensor, start: int, stop: int) -> npt.NDArray[np.float32]:
        row_bytes = (tensor.end - tensor.start) // max(1, tensor.shape[0])
        stored = np.empty((stop - start) * row_bytes, np.uint8)
        read_into(self._path, tensor.start + start * row_bytes, stored.data)
        values = dequantize(stored.reshape(stop - start, -1), tensor.qtype)
        return values.reshape(stop - start, *tensor.shape[1:])

    def _permuted_heads(self, name: str) -> int | None:
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
            f"{self._path} has the tensor {name}, which this {self._architecture} reader does not know",
            "A dense decoder was expected",
        )

    def _check_type(self, tensor: GgufTensor) -> None:
        block = np.zeros((1, GGML_QUANT_SIZES[tensor.qtype][1]), np.uint8)
        try:
            dequantize(block, tensor.qtype)
        except NotImplementedError:
            raise InputError(f"{self._path}: tensor {tensor.name} is stored as {tensor.qtype.name}") from None

    def _get(self, key: str, default: Any = None) -> Any:
        value = self._metadata.get(f"{self._architecture}.{key}", default)
        if value is None:
            raise InputError(f"{self._path} lacks {self._architecture}.{key} in its metadata")
        return value

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if type(value) is not int or value < 1:
            raise InputError(f"{self._path}: {self._architecture}.{key} is {value}", "A positive number was expected")
        return value

    def _make_config(self) -> dict[str, Any]:
        name, kind = ARCHITECTURES[self._architecture]
        hidden, heads = self._integer("embedding_length"), self._integer("attention.head_count")
        head_dim = self._integer("attention.key_length", hidden // heads)
        if "model.embed_tokens.weight" not in self.tensors:
            raise InputError(f"{self._path} has no token_embd.weight")
        for key, expected in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
            if (found := self._get(key, expected)) != expected:
                raise InputError(f"{self._path}: {self._architecture}.{key} is {found}", f"{expected} was expected")
        for key in ("expert_count", "attention.sliding_window"):
            if found := self._get(key, 0):
                raise InputError(f"{self._path}: {self._architecture}.{key} is {found}", "A dense decoder was expected")
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
        if scaling := self._rope_scaling(config):
            config["rope_scaling"] = scaling
        return config

    def _token_ids(self) -> dict[str, Any]:
        metadata = self._metadata
        eos, turn = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
        ends = [token for token in dict.fromkeys((eos, turn)) if token is not None]
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
            raise InputError(f"{self._path} scales RoPE by {kind}", "none, linear, yarn or llama3 was expected")
        scaling = {"rope_type": kind, "factor": float(self._get("rope.scaling.factor"))}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self._integer("rope.scaling.original_context_length")
        return scaling

    def _llama3_scaling(self, tensor: GgufTensor, config: dict[str, Any]) -> dict[str, Any]:
        """The parameters that give the stored per-frequency divisors; llama.cpp keeps only the divisors."""
        found = self._dequantize(tensor, 0, tensor.shape[0]).astype(np.float64)
        factor, low, high, original = float(found.max()), 1.0, 4.0, 8192
        frequencies = config["rope_theta"] ** (-np.arange(0, config["head_dim"], 2) / config["head_dim"])
        smooth = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clip(0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
            raise InputError(f"{self._path}: {_ROPE_FACTORS} is not Llama 3's scaling", "Llama 3's was expected")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }


def open_gguf(path: Path) -> GgufModel:
    """Read and check a GGUF file's header. InputError when it is damaged, incomplete or of an unknown kind."""
    return GgufModel(path)
