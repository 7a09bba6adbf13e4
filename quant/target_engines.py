"""`--for ENGINE`: refuses, before any work, what an engine cannot load.

The rules were tested with transformers 5.23 and vLLM 0.32. SGLang's come from reading its source.
See docs/formats.md.
"""

from __future__ import annotations

from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.common.errors import UsageError

ENGINES = ("vllm", "sglang", "transformers")
MARLIN_GROUP_SIZES = (-1, 32, 64, 128)


def check_engine(engine: str | None, quantization: QuantizationConfig | None) -> None:
    """Raises UsageError, with an option that helps, when `engine` cannot load the output."""
    if engine is None or quantization is None:
        return
    if engine not in ENGINES:
        raise UsageError(
            f"--for {engine} is not known", f"One of {', '.join(ENGINES)} was expected"
        )
    for scheme in quantization.schemes:
        if engine == "transformers":
            _check_transformers_scheme(quantization, scheme)
        else:
            _check_marlin_group_size(engine, scheme)
    if engine == "transformers":
        _check_transformers_lm_head(quantization)
    if quantization.kv == "int8":
        raise UsageError(f"{engine} knows no INT8 KV cache", "FP8 was expected", "Use --kv fp8")
    if quantization.kv and engine == "transformers":
        raise UsageError("transformers keeps its KV cache in 16 bits", todo="Leave out --kv")


def _check_marlin_group_size(engine: str, scheme: Scheme) -> None:
    is_weight_only = scheme.kind == "int" and scheme.inputs == "none"
    if is_weight_only and scheme.group_size not in MARLIN_GROUP_SIZES:
        raise UsageError(
            f"{engine} has no kernel for groups of {scheme.group_size}",
            f"One of {', '.join(map(str, MARLIN_GROUP_SIZES))} was expected",
            "Choose another --group-size",
        )


def _check_transformers_scheme(quantization: QuantizationConfig, scheme: Scheme) -> None:
    if quantization.format == "compressed-tensors" and not scheme.symmetric:
        raise UsageError(
            "transformers runs asymmetric compressed-tensors only with "
            "CompressedTensorsConfig(dequantize=True)",
            "A symmetric grid was expected",
            "Use --symmetric, or --format awq",
        )


def _check_transformers_lm_head(quantization: QuantizationConfig) -> None:
    if quantization.format == "gptq" and quantization.scheme_of("lm_head"):
        raise UsageError(
            "transformers does not read a quantized lm_head of the gptq format "
            "and generates nonsense without an error",
            todo="Leave out --lm-head, or use --format compressed-tensors",
        )
