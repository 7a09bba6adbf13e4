"""A source of `quantize` that is quantized already: what it is called, and what users are told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmkit.checkpoint.checkpoint import Checkpoint

# Weights of fewer bits have lost so much that quantizing them again shows.
MIN_HARMLESS_BITS = 5


@dataclass(frozen=True)
class QuantizedSource:
    """How the weights of a source are quantized."""

    # "INT4 in groups of 128 and INT8 (gptq)", "Q4_K and Q6_K (gguf)"; "" when only the KV cache is.
    label: str
    min_bits: int  # of the smallest weights
    kv: str = ""  # "fp8" or "int8" when the source has scales of an 8-bit KV cache
    # Whether there is no better original: gpt-oss was trained with experts in MXFP4.
    is_original: bool = False

    def messages(self, is_cast: bool, kv: str) -> Iterator[str]:
        """What a run says before it starts.

        is_cast: the output's weights are not quantized. kv: how its KV cache is quantized.
        """
        if self.kv and not kv:
            yield (
                f"the scales of the source's {self.kv.upper()} KV cache are left out: --kv"
                f" {self.kv} calibrates new ones"
            )
        if not self.label:
            return
        yield (
            f"the source is {self.label}: its weights are dequantized layer by layer, and the"
            " output is compared with them, without rounding inputs"
        )
        if self.min_bits < MIN_HARMLESS_BITS and not is_cast and not self.is_original:
            yield (
                f"warning: quality is lost twice: the source lost some when it was quantized to"
                f" {self.min_bits} bits, which the comparison does not show. Quantize the original"
                " model where there is one"
            )


def quantized_source_of(checkpoint: Checkpoint) -> QuantizedSource | None:
    """How the weights of a checkpoint are quantized; None when they are not."""
    if checkpoint.file_format == "gguf":
        return _gguf_source(checkpoint)
    quantization = checkpoint.quantization
    if quantization is None:
        return None
    if not quantization.schemes:
        return QuantizedSource("", 16, quantization.kv)
    # How inputs were rounded does not matter any more.
    labels = dict.fromkeys(scheme.label.partition(",")[0] for scheme in quantization.schemes)
    return QuantizedSource(
        f"{_listed(list(labels))} ({quantization.format})",
        min(scheme.bits for scheme in quantization.schemes),
        quantization.kv,
        is_original=quantization.format == "mxfp4",
    )


def _gguf_source(checkpoint: Checkpoint) -> QuantizedSource | None:
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        if re.fullmatch(r"B?F\d+", info.ggml_type) is None:
            sizes[info.ggml_type] = sizes.get(info.ggml_type, 0) + info.nbytes
    if not sizes:
        return None
    types = sorted(sizes, key=lambda name: -sizes[name])
    bits = [int(match[0]) for name in types if (match := re.search(r"\d+", name))]
    return QuantizedSource(f"{_listed(types)} (gguf)", min(bits), is_original=types == ["MXFP4"])


def _listed(words: list[str]) -> str:
    """ "A", "A and B" or "A, B and C"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
