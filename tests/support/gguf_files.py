"""GGUF files for tests, written by the gguf package."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from llmkit.checkpoint.checkpoint import Checkpoint

TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The converter's name of an HF tensor."""
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{TO_GGUF[part]}.{kind}"
    return f"{TO_GGUF[module]}.{kind}"


def add_vocabulary(writer: gguf.GGUFWriter, size: int, pre: str) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [
        "<|end|>",
        "<|user|>",
        "<tool>",
        *sorted(ByteLevel.alphabet()),
        "he",
        "ll",
        "hell",
        "hello",
    ]
    tokens += [f"[unused{i}]" for i in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 4] + [1] * (size - 3))
    writer.add_token_merges(["h e", "l l", "he ll", "hell o"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def converters_permutation(weights: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's convert_hf_to_gguf.py does to the rows of q and k of a llama."""
    rows = weights.shape[0]
    return (
        weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def random_q4_k(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Blocks of Q4_K of the size of `values` with random contents: gguf only reads this type."""
    generator = np.random.default_rng(values.size)
    blocks = generator.integers(0, 256, (values.size // 256, 144), dtype=np.uint8)
    # The two float16 numbers at the start: the scale of the scales, and that of the minima.
    scales = generator.uniform(0.0001, 0.0004, (len(blocks), 2)).astype(np.float16)
    blocks[:, :4] = scales.view(np.uint8)
    return blocks.reshape(len(values), -1)


def convert(
    source: Checkpoint,
    path: Path,
    architecture: str,
    pre: str = "gpt-2",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0,
    **metadata: Any,
) -> Path:
    """Write an HF checkpoint as GGUF with the gguf package: float32 vectors, matrices of `kind`."""
    config = source.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(50000.0)
    add_vocabulary(writer, config["vocab_size"], pre)
    for key, value in metadata.items():
        getattr(writer, key)(value)
    for name in source.tensors:
        values = source.read(name).float().numpy()
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if architecture == "llama" and f".{part}." in name:
                values = converters_permutation(values, config[heads])
        if values.ndim == 2:
            is_q4_k = kind == gguf.GGMLQuantizationType.Q4_K
            quantized = random_q4_k(values) if is_q4_k else gguf.quants.quantize(values, kind)
            writer.add_tensor(gguf_name(name), quantized, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def raw_value(value: Any) -> tuple[int, bytes]:
    """GGUF's type number and bytes of a metadata value.

    A tuple (type, bytes) is taken as it is, so that a test can write any type.
    """
    if isinstance(value, tuple):
        return value
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, raw_string(value)
    kind = raw_value(value[0])[0] if value else 8
    items = b"".join(raw_value(item)[1] for item in value)
    return 9, struct.pack("<IQ", kind, len(value)) + items


def raw_string(text: str) -> bytes:
    """A string of a GGUF file: its length and its bytes."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def raw_tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's entry in the header. `shape` is torch's; kind 0 is F32."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return raw_string(name) + sizes + struct.pack("<IQ", kind, offset)


def raw_gguf(
    metadata: dict[str, Any], tensors: Sequence[bytes] = (), data: bytes = b"", alignment: int = 32
) -> bytes:
    """A GGUF file, byte by byte: what the gguf package would refuse to write too.

    Without `data` it ends with the header.
    """
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, content = raw_value(value)
        header += raw_string(key) + struct.pack("<I", kind) + content
    header += b"".join(tensors)
    if data:
        header += bytes(-len(header) % alignment)
    return header + data
