"""`--for ENGINE[@GPU]`: what an engine runs fast, and what it cannot load.

What an engine cannot load is refused before any work. What it runs fast are the candidates of
--target-kl and --target-bits. The rules were tested with transformers 5.23 and vLLM 0.32. SGLang's,
and what runs fast on GPUs, come from reading the source. See docs/formats.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.common.errors import UsageError
from llmkit.model.checkpoint_tensors import scheme_of
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.quant.number_formats import NUMBER_FORMATS

ENGINES = ("vllm", "sglang", "transformers", "llmkit")
# The generation of each GPU, and of the CPU.
GENERATIONS: dict[str, str] = {
    **dict.fromkeys(("a100", "a800", "a10", "a40", "a6000", "rtx3090"), "ampere"),
    **dict.fromkeys(("l4", "l40", "l40s", "rtx4090"), "ada"),
    **dict.fromkeys(("h100", "h200", "h20", "h800", "gh200"), "hopper"),
    **dict.fromkeys(("b200", "b300", "gb200", "gb300", "rtx5090", "rtx6000"), "blackwell"),
    "cpu": "cpu",
}
# What an engine runs fast, the candidates without --for: all that read the format have kernels.
ANYWHERE = ("w4a16", "w8a16")
_MARLIN = ("w4a16", "w8a16")  # weights alone, by Marlin or Machete
_FP4_WEIGHTS = ("nvfp4a16", "mxfp4a16")  # by Marlin, too
_FP8 = ("fp8", "fp8-block")
# GPUs of this generation multiply 4-bit floats: weights alone are no faster there.
_BLACKWELL = ("nvfp4", "mxfp4", "mxfp8", *_FP8)
# The schemes that an engine has fast kernels for, by generation; "" without a GPU.
# vLLM 0.32: get_scheme of compressed_tensors.py chooses the class, kernels/linear/ the kernel by
# capability. Marlin runs from 7.5 on, FP8 products from 8.9 on, CUTLASS' W4A8 on 9.0 only,
# FlashInfer's MXFP4 and MXFP8 from 10.0 on. On Hopper it runs NVFP4 and MXFP4 by Marlin, without
# rounding inputs, and on Ampere FP8. Its CPU kernels of weights alone are of 4 bits.
# SGLang: the classes of srt/layers/quantization/compressed_tensors/schemes/. W4A8 is of experts.
# llmkit: `gpu_kernel_type` and `pack_weight` of model/linear.py.
FAST_SCHEMES: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm": {
        "": ANYWHERE,
        "ampere": (*_MARLIN, "w8a8", *_FP4_WEIGHTS),
        "ada": (*_MARLIN, *_FP8, "w8a8", *_FP4_WEIGHTS),
        "hopper": (*_MARLIN, *_FP8, "w8a8", "w4afp8", *_FP4_WEIGHTS),
        "blackwell": _BLACKWELL,
        "cpu": ("w4a16", "w8a8"),
    },
    "sglang": {
        "": ANYWHERE,
        "ampere": (*_MARLIN, "w8a8"),
        "ada": (*_MARLIN, *_FP8, "w8a8"),
        "hopper": (*_MARLIN, *_FP8, "w8a8", *_FP4_WEIGHTS),
        "blackwell": ("nvfp4", "mxfp8", *_FP8),
        "cpu": ("w8a8",),
    },
    "transformers": {"": ANYWHERE},
    "llmkit": {
        "": ANYWHERE,
        "ampere": (*_MARLIN, "w8a8", *_FP4_WEIGHTS),
        "ada": (*_MARLIN, *_FP8, "w8a8", *_FP4_WEIGHTS),
        "hopper": (*_MARLIN, *_FP8, "w8a8", *_FP4_WEIGHTS),
        "blackwell": ("nvfp4", "mxfp4", *_FP8),
        "cpu": (*_MARLIN, "w8a8", *_FP4_WEIGHTS),
    },
}
# Integer products with 8-bit inputs need smoothing to be good: only on request (--activations).
ON_REQUEST = ("w8a8",)
MARLIN_GROUP_SIZES = (-1, 32, 64, 128)
# vLLM looks for gate_proj and up_proj among the quantized modules of these families, whose
# checkpoints have gate_up_proj.
VLLM_SPLITS_GATE_UP = ("GlmForCausalLM", "Glm4ForCausalLM")


@dataclass(frozen=True)
class Target:
    """A value of --for."""

    engine: str
    generation: str  # of the GPU, or "cpu"; "" when none was named


def parse_target(text: str | None) -> Target | None:
    """The target of "vllm" or "vllm@h200"; None for None.

    Raises UsageError for engines and GPUs that are not known.
    """
    if text is None:
        return None
    engine, at, gpu = text.lower().partition("@")
    if engine not in ENGINES:
        raise UsageError(f"--for {text} is not known", f"One of {', '.join(ENGINES)} was expected")
    if not at:
        return Target(engine, "")
    generation = GENERATIONS.get(gpu)
    known = [name for name, found in GENERATIONS.items() if found in FAST_SCHEMES[engine]]
    if generation not in FAST_SCHEMES[engine]:
        expected = f"{engine}@ and one of {', '.join(known)}" if known else f"{engine} alone"
        raise UsageError(f"--for {text} is not known", f"{expected} was expected")
    return Target(engine, generation)


def fast_schemes(target: Target | None, rounds_inputs: bool) -> tuple[str, ...]:
    """The names of the schemes that mixed precision chooses from.

    rounds_inputs: only those whose inputs are rounded too, which makes prompts faster.
    Raises UsageError when there are none.
    """
    names = ANYWHERE if target is None else FAST_SCHEMES[target.engine][target.generation]
    if not rounds_inputs:
        return tuple(name for name in names if name not in ON_REQUEST) or names
    rounding = tuple(name for name in names if NUMBER_FORMATS[name].scheme.inputs != "none")
    if not rounding:
        raise UsageError(
            "--activations: no candidate of --target-kl and --target-bits rounds its inputs",
            "An engine and a GPU that multiply rounded inputs were expected",
            "Add --for vllm@h100, for example",
        )
    return rounding


def check_engine(
    target: Target | None,
    quantization: QuantizationConfig | None,
    spec: ModelSpec,
    unstacks_experts: bool = False,
) -> None:
    """Raises UsageError, with an option that helps, when `engine` cannot load the output.

    unstacks_experts: the output stores experts one by one, unlike other models of the family.
    """
    if target is None or quantization is None or target.engine == "llmkit":
        return
    engine = target.engine
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
    if quantization.format == "modelopt":
        _check_modelopt(engine, quantization)
    if engine == "vllm" and quantization.format == "gptq":
        _check_vllm_gptq_modules(spec)
    if engine == "vllm":
        _check_vllm_blocks(quantization, spec)
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


def _check_modelopt(engine: str, quantization: QuantizationConfig) -> None:
    """transformers does not know the format, and vLLM not its INT4 and MXFP4."""
    unknown = []
    for scheme in quantization.schemes:
        if scheme.kind == "int":
            unknown.append("INT4")
        elif scheme.is_fp4 and scheme.scale_format == "e8m0":
            unknown.append("MXFP4")
    if engine == "transformers" or unknown:
        what = f"{unknown[0]} of the modelopt format" if engine == "vllm" else "the modelopt format"
        raise UsageError(
            f"{engine} does not read {what}",
            todo="Use --format compressed-tensors, or leave out --for",
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


def _check_vllm_blocks(quantization: QuantizationConfig, spec: ModelSpec) -> None:
    """vLLM concatenates linears only where the next one begins with a block of rows.

    Its function is `validate_fp8_block_shape`.
    """
    for parameter in parameters(spec):
        for source in parameter.sources[:-1]:
            scheme = scheme_of(parameter, source.name, quantization)
            if scheme is None or scheme.block_rows < 2 or source.shape[0] % scheme.block_rows == 0:
                continue
            raise UsageError(
                f"vLLM does not load blocks of {scheme.block_rows} rows of"
                f" {source.name.removesuffix('.weight')}, which has {source.shape[0]} rows and is"
                " concatenated with others",
                "Multiples of the block were expected",
                "Use --scheme fp8, or leave out --for",
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
