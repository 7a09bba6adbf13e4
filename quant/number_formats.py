"""What weights and inputs are quantized to, by name: the values of `llmkit quantize --scheme`.

The names are those of presets of compressed-tensors and llama.cpp, in lower case. How the values
are chosen is the subject of --method, how they are stored that of --format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmkit.checkpoint.quantized_weight import Format, Scheme


@dataclass(frozen=True)
class NumberFormat:
    """One value of --scheme. The first of `formats` is the default."""

    scheme: Scheme
    formats: tuple[Format, ...]
    # Whether --group-size chooses the size of groups; otherwise the scheme has it.
    has_group_option: bool = False
    # Whether weights may have zero points (--asymmetric).
    may_be_asymmetric: bool = False

    def scheme_in(self, format_name: str | None) -> Scheme:
        """The scheme as a format stores it: Model-Optimizer has one FP8 scale for a weight."""
        if format_name == "modelopt" and self.scheme.is_fp8 and self.scheme.inputs == "tensor":
            return replace(self.scheme, block_rows=-1)
        return self.scheme


NUMBER_FORMATS: dict[str, NumberFormat] = {
    "w2a16": NumberFormat(Scheme(2), ("gptq", "compressed-tensors"), True, True),
    "w3a16": NumberFormat(Scheme(3), ("gptq", "compressed-tensors"), True, True),
    "w4a16": NumberFormat(Scheme(4), ("compressed-tensors", "gptq", "awq", "modelopt"), True, True),
    "w8a16": NumberFormat(Scheme(8), ("compressed-tensors", "gptq"), True, True),
    "w8a8": NumberFormat(Scheme(8, inputs="token"), ("compressed-tensors",)),
    "w4afp8": NumberFormat(
        Scheme(4, inputs="token", input_type="fp8"), ("compressed-tensors",), True
    ),
    "fp8": NumberFormat(
        Scheme(8, kind="float", inputs="token"), ("compressed-tensors", "modelopt")
    ),
    "fp8-static": NumberFormat(
        Scheme(8, kind="float", inputs="tensor"), ("compressed-tensors", "modelopt")
    ),
    "fp8-block": NumberFormat(
        Scheme(8, 128, kind="float", inputs="group", block_rows=128),
        ("compressed-tensors", "fp8", "modelopt"),
    ),
    "mxfp8": NumberFormat(
        Scheme(8, 32, kind="float", inputs="group", scale_format="e8m0"),
        ("compressed-tensors", "modelopt"),
    ),
    "mxfp4": NumberFormat(
        Scheme(4, 32, kind="float", inputs="group", scale_format="e8m0"), ("compressed-tensors",)
    ),
    "mxfp4afp8": NumberFormat(
        Scheme(4, 32, kind="float", inputs="tensor", scale_format="e8m0", input_type="fp8"),
        ("modelopt",),
    ),
    "mxfp4a16": NumberFormat(
        Scheme(4, 32, kind="float", scale_format="e8m0"), ("compressed-tensors", "modelopt")
    ),
    "nvfp4": NumberFormat(
        Scheme(4, 16, kind="float", inputs="group", scale_format="e4m3"),
        ("compressed-tensors", "modelopt"),
    ),
    "nvfp4a16": NumberFormat(
        Scheme(4, 16, kind="float", scale_format="e4m3"), ("compressed-tensors", "modelopt")
    ),
    "q4_0": NumberFormat(Scheme(4, 32, preset="Q4_0"), ("gguf",)),
    "q4_1": NumberFormat(Scheme(4, 32, symmetric=False, preset="Q4_1"), ("gguf",)),
    "q5_0": NumberFormat(Scheme(5, 32, preset="Q5_0"), ("gguf",)),
    "q5_1": NumberFormat(Scheme(5, 32, symmetric=False, preset="Q5_1"), ("gguf",)),
    "q8_0": NumberFormat(Scheme(8, 32, preset="Q8_0"), ("gguf",)),
    "q4_k_m": NumberFormat(Scheme(4, 32, symmetric=False, preset="Q4_K_M"), ("gguf",)),
    "q5_k_m": NumberFormat(Scheme(5, 32, symmetric=False, preset="Q5_K_M"), ("gguf",)),
    "q6_k": NumberFormat(Scheme(6, 16, preset="Q6_K"), ("gguf",)),
}
