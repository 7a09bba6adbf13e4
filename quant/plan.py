"""Everything about a run that is known before any weight is read."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llmkit.checkpoint.errors import InputError, UsageError
from llmkit.checkpoint.output import check_output
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.quantized import QuantizationConfig
from llmkit.checkpoint.source import Checkpoint, open_checkpoint
from llmkit.checkpoint.writer import PlannedTensor, plan_files, planned_bytes
from llmkit.model.device import resolve_device
from llmkit.model.families import model_spec
from llmkit.model.layout import parameters
from llmkit.model.loader import check_checkpoint, scheme_of
from llmkit.model.spec import ModelSpec
from llmkit.quant import estimate, memory
from llmkit.quant.algorithm import Algorithm
from llmkit.quant.engines import check_engine
from llmkit.quant.methods import Choice, Effort, Method, kept_modules, mixed, quantization_of
from llmkit.quant.storage import planned_tensors, stored_dtype
from llmkit.quant.text import BUILTIN
from llmkit.quant.tokens import EVALUATION_TOKENS

MIN_SEQ_LEN = 16  # tokens; shorter windows say nothing of a model


@dataclass(frozen=True)
class QuantizeOptions:
    """What to do. Defaults are those of the command line."""

    method: str  # a key of methods.METHODS
    bits: int | None = None  # None: the method's first
    group_size: int | None = None  # columns that share a scale; None: the largest usual one that divides every layer
    format: str | None = None  # "gptq", "awq" or "compressed-tensors"; None: the method's own
    symmetric: bool | None = None  # None: as the format or the method has it
    activations: bool = False  # int8: round the inputs of the linear layers too
    static_activations: bool = False  # fp8: with one fixed scale per layer instead of one per token
    kv: Literal["", "fp8", "int8"] = ""  # also calibrate the scales of an 8-bit KV cache
    keep: str | None = None  # a regular expression: linear layers to leave unquantized
    lm_head: int | None = None  # bits of the output projection; None: it stays as it is
    layers: str | None = None  # "A-B": decoder layers to quantize; the others stay as they are
    engine: str | None = None  # refuse what this engine cannot load
    effort: Effort = "normal"
    target_kl: float | None = None  # mixed precision: the smallest checkpoint of at most this mean KL
    target_bits: float | None = None  # mixed precision: the best checkpoint of at most this many bits per weight
    calibration: str = BUILTIN
    samples: int = 128  # calibration windows, at most
    seq_len: int = 2048  # tokens of a calibration window; at most the model's positions
    damp: float = 0.01  # share of the Hessian's mean diagonal that is added to it
    offload: Literal["auto", "disk", "memory"] = "auto"  # where the hidden states of the calibration text lie
    evaluate: bool = True  # compare the output with the source on held-out text
    eval_windows: int = 8  # windows of 1,024 tokens to compare on
    max_kl: float | None = None  # gates: a result that is worse is reported as a failure
    max_ppl_ratio: float | None = None
    resume: bool = False  # what the message of an interrupted run says; it is continued without, too
    dry_run: bool = False  # plan only
    seed: int = 0  # chooses the calibration windows
    device: str = "auto"  # "auto", "cuda" or "cpu"

    @property
    def choice(self) -> Choice:
        """What they say of how weights are stored."""
        return Choice(
            self.method, self.bits, self.group_size, self.format, self.symmetric, self.activations,
            self.static_activations, self.kv, self.mixed, self.effort, self.lm_head,
        )  # fmt: skip

    @property
    def mixed(self) -> bool:
        """Whether every linear layer gets its own number of bits."""
        return self.target_kl is not None or self.target_bits is not None

    def command_line(self, source: str, output: str) -> str:
        """The command that does the same."""
        words = ["llmkit", "quantize", source, "--method", self.method, "--output", output]
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if option.name in ("method", "eval_windows") or value == option.default:
                continue
            name = {"engine": "for", "static_activations": "static"}.get(option.name, option.name).replace("_", "-")
            if value is True:
                words.append(f"--{name}")
            elif value is False:
                words.append({"symmetric": "--asymmetric", "evaluate": "--no-eval"}[option.name])
            else:
                words += [f"--{name}", str(value)]
        return shlex.join(words)

    def check(self) -> None:
        """Raises UsageError for values out of range and for options that do not go together."""
        self.choice.check()
        for name, value, least in (
            ("samples", self.samples, 1),
            ("seq-len", self.seq_len, MIN_SEQ_LEN),
            ("eval-windows", self.eval_windows, 1),
        ):
            if value < least:
                raise UsageError(f"--{name} is {value}", f"At least {least} was expected")
        if not 0 < self.damp <= 1:
            raise UsageError(f"--damp is {self.damp}", "A share above 0 and up to 1 was expected")
        if self.target_kl is not None and self.target_bits is not None:
            raise UsageError("--target-kl and --target-bits were both given", "One of them was expected")
        for name, bound in (
            ("target-kl", self.target_kl),
            ("max-kl", self.max_kl),
            ("max-ppl-ratio", self.max_ppl_ratio),
        ):
            if bound is None:
                continue
            if not bound > 0:
                raise UsageError(f"--{name} is {bound}", "A number above 0 was expected")
            if not self.evaluate:
                raise UsageError(f"--{name} needs the evaluation that --no-eval leaves out", todo="Leave out --no-eval")
        if self.target_bits is not None and not 4 <= self.target_bits <= 16:
            raise UsageError(f"--target-bits is {self.target_bits}", "4 to 16 bits per weight were expected")


@dataclass(frozen=True)
class Plan:
    """Everything that is known before any weight is read."""

    source: Checkpoint
    spec: ModelSpec
    out: Path
    options: QuantizeOptions
    quantization: QuantizationConfig | None
    tensors: list[PlannedTensor]
    files: dict[str, list[PlannedTensor]]
    device: torch.device
    seq_len: int

    @property
    def method(self) -> Method:
        """The row of the methods' table."""
        return self.options.choice.entry

    @property
    def bits(self) -> int:
        """Of a weight, where nothing else is said of it."""
        return self.options.bits or self.method.bits[0]

    @property
    def calibrated(self) -> bool:
        """Whether the model is run on calibration text."""
        return self.options.choice.calibrated or self.options.mixed

    @property
    def algorithm(self) -> Algorithm:
        """How the layers of a calibrated run are quantized."""
        return self.options.choice.algorithm(self.options.damp)

    def with_bits(self, bits: Mapping[str, int]) -> Plan:
        """The plan with other bits for some linears, by runtime module."""
        assert self.quantization is not None
        return _with(self, mixed(self.quantization, self.spec, bits))

    @property
    def dtype(self) -> str:
        """The dtype of what is not quantized, as in a safetensors header."""
        return stored_dtype(self.source, self.method.dtype)

    def memory_bytes(self, offload: bool = False) -> int:
        """The peak of the whole run, with the hidden states on disk or not."""
        rows = parameters(self.spec)
        need = memory.tensor_bytes(row for row in rows if scheme_of(row, row.tensors[0], self.quantization))
        if self.options.evaluate:
            need = max(need, memory.running_bytes(self.spec, min(EVALUATION_TOKENS, self.spec.max_positions)))
        if self.calibrated:
            algorithm = self.algorithm
            layer = memory.calibrating_bytes(
                self.spec,
                self.seq_len,
                hessians="hessian" in algorithm.needs,
                learn=algorithm.learn is not None,
                ahead=self.device.type == "cuda",
            )
            hidden = memory.hidden_bytes(self.spec, self.options.samples, self.seq_len)
            need = max(need, layer + (memory.hidden_bytes(self.spec, 1, self.seq_len) if offload else hidden))
        return need

    def offloads(self) -> bool:
        """Whether the hidden states go to disk."""
        if self.options.offload != "auto":
            return self.options.offload == "disk"
        return self.calibrated and self.memory_bytes() > memory.available_bytes(self.device)


def make_plan(source: str, out: Path, options: QuantizeOptions, progress: Progress) -> Plan:
    """Open the source, check it and the options, and plan the output; nothing is written.

    Raises UsageError, InputError, ShortageError (disk, device) and OutputError as `quantize` does.
    """
    options.check()
    device = resolve_device(options.device)
    checkpoint = open_checkpoint(source)
    if checkpoint.quantization is not None:
        found = checkpoint.quantization
        labels = ", ".join(scheme.label for scheme in found.schemes)
        raise InputError(
            f"{source} is already quantized ({found.method or found.format}, {labels})",
            "A checkpoint of 16 or 32 bits was expected",
            "Quantize the original model",
        )
    checkpoint.require_whole()
    spec = model_spec(checkpoint.config)
    check_checkpoint(checkpoint, spec)
    if options.lm_head is not None and spec.tied:  # the embedding stays as it is
        checkpoint = checkpoint.untied()
        spec = model_spec(checkpoint.config)
    kept = kept_modules(spec, options.keep, _layers(options.layers, len(spec.layers)))
    quantization = quantization_of(spec, options.choice, kept)
    if quantization is not None and options.method == "gptq":
        quantization = dataclasses.replace(quantization, damp=options.damp)
    check_engine(options.engine, quantization)
    seq_len = min(options.seq_len, spec.max_positions)
    plan = Plan(checkpoint, spec, out.expanduser().absolute(), options, None, [], {}, device, seq_len)
    plan = _with(plan, quantization)
    check_output(plan.out, checkpoint, planned_bytes(plan.files))
    if options.device == "auto" and device.type == "cpu":
        progress.message("no CUDA device: running on the CPU")
    if plan.calibrated and seq_len < options.seq_len:
        progress.message(f"calibration windows have {seq_len} tokens: the model has no more positions")
    return plan


def _with(plan: Plan, quantization: QuantizationConfig | None) -> Plan:
    tensors = planned_tensors(plan.source, plan.spec, quantization, plan.method.dtype)
    return dataclasses.replace(plan, quantization=quantization, tensors=tensors, files=plan_files(tensors))


def _layers(text: str | None, count: int) -> range | None:
    """The decoder layers that "A-B" or "A" names. Raises UsageError for any other text and for layers that are not
    there."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < count:
        raise UsageError(f"--layers is {text}", f"A-B was expected, with A and B from 0 to {count - 1}")
    return range(first, last + 1)


def plan_figures(plan: Plan) -> dict[str, Any]:
    """What a dry run reports."""
    files = {file: sum(tensor.nbytes for tensor in tensors) for file, tensors in plan.files.items()}
    return {
        "files": files,
        "tensors": len(plan.tensors),
        "checkpoint_bytes": sum(files.values()),
        "memory_bytes": plan.memory_bytes(plan.offloads()),
        "offload": plan.offloads(),
        "memory_available_bytes": memory.available_bytes(plan.device),
        "disk_bytes": planned_bytes(plan.files),
        "seconds": estimate.seconds(
            plan.spec,
            plan.source.weight_bytes,
            plan.options.samples * plan.seq_len if plan.calibrated else 0,
            plan.algorithm if plan.calibrated else None,
            plan.options.eval_windows if plan.options.evaluate else 0,
            plan.device,
        ),
    }
