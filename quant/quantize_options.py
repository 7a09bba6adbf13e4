"""The options of `llmkit quantize`. No torch here: the command line imports them."""

import shlex
from dataclasses import dataclass
from typing import Annotated, Literal

from llmkit.common.option_values import THREADS, count_or_auto
from llmkit.common.options import DEVICE, REQUIRE_NATIVE, SEED, Option, option_fields

METHOD_PANEL = "Method"
CALIBRATION_PANEL = "Calibration"
OUTPUT_PANEL = "Output"

Effort = Literal["fast", "normal", "high", "max"]
# The names of NUMBER_FORMATS (quant/number_formats.py).
SCHEMES = (
    "w2a16",
    "w3a16",
    "w4a16",
    "w8a16",
    "w8a8",
    "w4afp8",
    "fp8",
    "fp8-static",
    "fp8-block",
    "mxfp8",
    "mxfp4",
    "mxfp4afp8",
    "mxfp4a16",
    "nvfp4",
    "nvfp4a16",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q4_k_m",
    "q5_k_m",
    "q6_k",
)


@dataclass(frozen=True)
class QuantizeOptions:
    """How a checkpoint is quantized, calibrated and evaluated."""

    method: Annotated[
        str,
        Option(
            "How values are chosen. auto, gptq, awq: calibrated; rtn, int8, fp8: rounded to "
            "nearest; bf16, fp16: a cast.",
            choices=("auto", "bf16", "fp16", "int8", "fp8", "gptq", "awq", "rtn"),
            metavar="METHOD",
        ),
    ]
    scheme: Annotated[
        str | None,
        Option(
            "What weights and inputs are quantized to, such as w4a16, fp8 or nvfp4. "
            "docs/quantize.md has them all.",
            choices=SCHEMES,
            metavar="NAME",
            unset="the method's own: w4a16, with int8 w8a16, with fp8 fp8",
        ),
    ] = None
    bits: Annotated[
        int | None,
        Option(
            "Bits of an integer weight, instead of --scheme.",
            metavar="N",
            unset="the scheme's",
            panel=METHOD_PANEL,
        ),
    ] = None
    group_size: Annotated[
        int | None,
        Option(
            "Integer weights that share a scale; -1: a row; auto: the largest of 128, 64, 32 that "
            "fits.",
            metavar="N|auto",
            format=count_or_auto(-1),
        ),
    ] = None
    format: Annotated[
        str | None,
        Option(
            "How weights are stored: gptq, awq, compressed-tensors, fp8 (DeepSeek's blocks), "
            "modelopt (Model-Optimizer, for TensorRT-LLM) or gguf (one file, for llama.cpp).",
            choices=("gptq", "awq", "compressed-tensors", "fp8", "modelopt", "gguf"),
            metavar="FORMAT",
            unset="the method's own if it stores the scheme, otherwise compressed-tensors",
            panel=METHOD_PANEL,
        ),
    ] = None
    symmetric: Annotated[
        bool | None,
        Option(
            "Quantized values around zero, or with zero points.",
            flags=("--symmetric/--asymmetric",),
            unset="asymmetric in the awq format and with --method awq",
            panel=METHOD_PANEL,
        ),
    ] = None
    activations: Annotated[
        bool,
        Option(
            "int8: quantize the inputs of linear layers too (W8A8, SmoothQuant).",
            panel=METHOD_PANEL,
        ),
    ] = False
    static_activations: Annotated[
        bool,
        Option(
            "fp8: one fixed scale for a layer's inputs instead of one for each token (the scheme "
            "fp8-static).",
            flags=("--static",),
            panel=METHOD_PANEL,
        ),
    ] = False
    kv: Annotated[
        Literal["", "fp8", "int8"],
        Option(
            "Calibrate an 8-bit KV cache too.",
            choices=("fp8", "int8"),
            metavar="fp8|int8",
            unset="16-bit KV cache",
            panel=METHOD_PANEL,
        ),
    ] = ""
    effort: Annotated[
        Effort,
        Option(
            "fast: no range search; normal; high: learned rounding and norms too; max: more of it.",
            metavar="LEVEL",
        ),
    ] = "normal"
    target_kl: Annotated[
        float | None,
        Option(
            "Choose a scheme for each layer, of those that --for runs fast: the smallest "
            "checkpoint of at most this mean KL.",
            metavar="X",
            unset="off",
            panel=METHOD_PANEL,
        ),
    ] = None
    target_bits: Annotated[
        float | None,
        Option(
            "Choose a scheme for each layer, of those that --for runs fast: the best checkpoint of "
            "at most B bits a weight, with the scales.",
            metavar="B",
            unset="off",
            panel=METHOD_PANEL,
        ),
    ] = None
    keep: Annotated[
        str | None,
        Option(
            "Linear layers to leave unquantized, by name.",
            metavar="REGEX",
            unset="none",
            panel=METHOD_PANEL,
        ),
    ] = None
    lm_head: Annotated[
        int | None,
        Option(
            "Quantize the output projection too, to N bits.",
            metavar="N",
            unset="not quantized",
            panel=METHOD_PANEL,
        ),
    ] = None
    prune_experts: Annotated[
        float | None,
        Option(
            "Drop this share of each layer's experts: those that add least on the calibration text "
            "(REAP).",
            metavar="SHARE",
            unset="none",
            panel=METHOD_PANEL,
        ),
    ] = None
    layers: Annotated[
        str | None,
        Option(
            "Decoder layers to quantize; others stay.",
            metavar="A-B",
            unset="all",
            panel=METHOD_PANEL,
        ),
    ] = None
    engine: Annotated[
        str | None,
        Option(
            "Refuse what this engine (vllm, sglang, transformers, llmkit) cannot load. With a GPU "
            "(vllm@h200) or cpu, --target-kl and --target-bits choose from what runs fast there.",
            flags=("--for",),
            metavar="ENGINE[@GPU]",
            unset="any engine",
            panel=METHOD_PANEL,
        ),
    ] = None
    calibration: Annotated[
        str,
        Option(
            "Calibration text: a .txt, .jsonl or .parquet file, a dataset of the hub, CPython's "
            "own reference, or text that the model writes itself.",
            metavar="FILE|ID|builtin|self",
            panel=CALIBRATION_PANEL,
        ),
    ] = "builtin"
    samples: Annotated[
        int | None,
        Option(
            "Windows of calibration text.",
            metavar="N",
            min=1,
            unset="128 on a GPU, by the model's width on a CPU",
            panel=CALIBRATION_PANEL,
        ),
    ] = None
    seq_len: Annotated[
        int | None,
        Option(
            "Tokens of a window, at most the model's positions.",
            metavar="N",
            min=1,
            unset="2048, on a CPU without --samples 256",
            panel=CALIBRATION_PANEL,
        ),
    ] = None
    damp: Annotated[
        float | None,
        Option(
            "GPTQ's damping, as a share of the Hessian's diagonal.",
            metavar="SHARE",
            unset="0.01, before learned rounding 0.1",
            panel=METHOD_PANEL,
        ),
    ] = None
    offload: Annotated[
        Literal["auto", "disk", "memory"],
        Option(
            "Where the hidden states of the calibration text are kept; auto: in memory if they "
            "fit.",
            metavar="auto|disk|memory",
            panel=CALIBRATION_PANEL,
        ),
    ] = "auto"
    evaluate: Annotated[
        bool,
        Option(
            "Measure the quality before and after on held-out text.", flags=("--eval/--no-eval",)
        ),
    ] = True
    # Windows of 1,024 tokens to evaluate on. Not on the command line.
    eval_windows: int = 8
    max_kl: Annotated[
        float | None,
        Option(
            "Exit with 1 if the mean KL is above X.",
            metavar="X",
            unset="off",
            in_recipes=False,
            panel=OUTPUT_PANEL,
        ),
    ] = None
    max_ppl_ratio: Annotated[
        float | None,
        Option(
            "Exit with 1 if the perplexity grows by more than this factor.",
            metavar="X",
            unset="off",
            in_recipes=False,
            panel=OUTPUT_PANEL,
        ),
    ] = None
    min_acceptance: Annotated[
        float | None,
        Option(
            "Exit with 1 if the MTP head's acceptance falls below this share of the source's.",
            metavar="X",
            unset="off",
            in_recipes=False,
            panel=OUTPUT_PANEL,
        ),
    ] = None
    # For the command line that an interrupted run prints. A run also resumes without it.
    resume: Annotated[
        bool,
        Option(
            "Resume an interrupted run; this also happens without the option.",
            in_recipes=False,
            panel=OUTPUT_PANEL,
        ),
    ] = False
    dry_run: Annotated[
        bool, Option("Show what would be done and write nothing.", in_recipes=False)
    ] = False
    require_native: Annotated[bool, REQUIRE_NATIVE] = False
    threads: Annotated[int | None, THREADS] = None
    device: Annotated[str, DEVICE] = "auto"
    seed: Annotated[int, SEED] = 0

    @property
    def mixed(self) -> bool:
        """Whether every linear layer gets its own number of bits."""
        return self.target_kl is not None or self.target_bits is not None

    def command_line(self, source: str, output: str) -> str:
        """The command that quantizes `source` with these options."""
        words = ["llmkit", "quantize", source, "--method", self.method, "--output", output]
        for field in option_fields(type(self)):
            value = getattr(self, field.path[-1])
            if field.name == "method" or value == field.default:
                continue
            if value is False:
                words += field.negated_spellings
            else:
                words.append(field.spellings[0])
                if value is not True:
                    words.append(str(value))
        return shlex.join(words)
