"""`--for ENGINE`: refuses, before any work, what an engine cannot load.

The rules were tested with transformers 5.23 and vLLM 0.32. SGLang's come from reading its source.
See docs/formats.md.
"""

from __future__ import annotations

from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.common.errors import UsageError
from llmkit.model.checkpoint_tensors import scheme_of
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec

ENGINES = ("vllm", "sglang", "transformers")
MARLIN_GROUP_SIZES = (-1, 32, 64, 128)
# vLLM looks for gate_proj and up_proj among the quantized modules of these families, whose
# checkpoints have gate_up_proj.
VLLM_SPLITS_GATE_UP = ("GlmForCausalLM", "Glm4ForCausalLM")


def check_engine(
    engine: str | None,
    quantization: QuantizationConfig | None,
    spec: ModelSpec,
    unstacks_experts: bool = False,
) -> None:
    """Raises UsageError, with an option that helps, when `engine` cannot load the output.

    unstacks_experts: the output stores experts one by one, unlike other models of the family.
    """
    if engine is None or quantization is None:
        return
    if engine not in ENGINES:
        raise UsageError(
            f"--for {engine} is not known", f"One of {', '.join(ENGINES)} was expected"
        )
    if unstacks_experts:
        _check_unstacked_experts(engine, spec)
    for scheme in quantization.schemes:
        if engine == "transformers":
            _check_transformers_scheme(quantization, scheme)
        else:
            _check_marlin_group_size(engine, scheme)
    if engine == "transformers":
        _check_transformers_lm_head(quantization)
        _check_transformers_experts(quantization, spec)
    if engine == "vllm" and quantization.format == "gptq":
        _check_vllm_gptq_modules(spec)
    if quantization.kv == "int8":
        raise UsageError(f"{engine} knows no INT8 KV cache", "FP8 was expected", "Use --kv fp8")
    if quantization.kv and engine == "transformers":
        raise UsageError("transformers keeps its KV cache in 16 bits", todo="Leave out --kv")


def _check_unstacked_experts(engine: str, spec: ModelSpec) -> None:
    """An engine that ignores the tensors runs with random experts, and only warns."""
    if engine == "transformers" or (engine == "vllm" and spec.architecture == "GptOssForCausalLM"):
        raise UsageError(
            f"{engine} reads the experts of a {spec.architecture} from one tensor for all of a"
            " layer, and ignores those that are stored one by one, as quantized experts are",
            todo="Leave out --for and serve it with llmkit",
        )


def _check_marlin_group_size(engine: str, scheme: Scheme) -> None:
    is_weight_only = scheme.kind == "int" and scheme.inputs == "none"
    if is_weight_only and scheme.group_size not in MARLIN_GROUP_SIZES:
        raise UsageError(
            f"{engine} has no kernel for groups of {scheme.group_size}",
            f"One of {', '.join(map(str, MARLIN_GROUP_SIZES))} was expected",
            "Choose another --group-size",
        )


def _check_vllm_gptq_modules(spec: ModelSpec) -> None:
    """vLLM finds the quantized modules of the gptq format by the names that it expects."""
    problem = None
    if spec.architecture in VLLM_SPLITS_GATE_UP:
        problem = "takes gate_up_proj as not quantized"
    elif any(layer.k_eq_v for layer in spec.layers):
        problem = "does not load layers without v_proj"
    if problem is not None:
        raise UsageError(
            f"vLLM {problem} in the gptq format of a {spec.architecture}",
            todo="Use --format awq or compressed-tensors",
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


def _check_transformers_experts(quantization: QuantizationConfig, spec: ModelSpec) -> None:
    for parameter in parameters(spec):
        if parameter.expert is None:
            continue
        for tensor in parameter.source_names:
            scheme = scheme_of(parameter, tensor, quantization)
            if scheme is not None and scheme.kind == "int" and scheme.inputs != "none":
                raise UsageError(
                    "transformers does not load INT8 experts whose inputs are quantized too",
                    "FP8, or weights alone, were expected",
                    "Use --method fp8, or leave out --activations",
                )
