"""`--for`: what the engines that people serve with cannot load, told before any work is done.

Tried with transformers 5.23 and vLLM 0.32, read from the source of SGLang (see docs/formats.md).
"""

from __future__ import annotations

from llmkit.checkpoint.errors import UsageError
from llmkit.checkpoint.quantized import QuantizationConfig

ENGINES = ("vllm", "sglang", "transformers")
MARLIN_GROUPS = (-1, 32, 64, 128)


def check_engine(engine: str | None, quantization: QuantizationConfig | None) -> None:
    """Raises UsageError when `engine` cannot load what `quantization` describes, with the option that helps."""
    if engine is None or quantization is None:
        return
    if engine not in ENGINES:
        raise UsageError(f"--for {engine} is not known", f"One of {', '.join(ENGINES)} was expected")
    for scheme in quantization.schemes:
        packed = scheme.kind == "int" and scheme.inputs == "none"
        if engine != "transformers" and packed and scheme.group_size not in MARLIN_GROUPS:
            raise UsageError(
                f"{engine} has no kernel for groups of {scheme.group_size}",
                f"One of {', '.join(map(str, MARLIN_GROUPS))} was expected",
                "Choose another --group-size",
            )
        if engine == "transformers" and quantization.format == "compressed-tensors" and not scheme.symmetric:
            raise UsageError(
                "transformers runs asymmetric compressed-tensors only with CompressedTensorsConfig(dequantize=True)",
                "A symmetric grid was expected",
                "Use --symmetric, or --format awq",
            )
    if engine == "transformers" and quantization.format == "gptq" and quantization.scheme_of("lm_head"):
        raise UsageError(
            "transformers leaves a quantized lm_head of the gptq format unread, and answers nonsense without a word",
            todo="Leave out --lm-head, or use --format compressed-tensors",
        )
    if quantization.kv == "int8":
        raise UsageError(f"{engine} knows no INT8 KV cache", "FP8 was expected", "Use --kv fp8")
    if quantization.kv and engine == "transformers":
        raise UsageError("transformers keeps its KV cache in 16 bits", todo="Leave out --kv")
