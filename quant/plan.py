"""Everything about a run that is known before any weight is read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkit.checkpoint.errors import InputError, UsageError
from llmkit.checkpoint.output import check_output
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.quantized import QuantizationConfig
from llmkit.checkpoint.source import Checkpoint, open_checkpoint
from llmkit.checkpoint.writer import PlannedTensor, plan_files, planned_bytes
from llmkit.model.device import resolve_device
from llmkit.model.families import model_spec
from llmkit.model.loader import check_checkpoint
from llmkit.model.spec import ModelSpec
from llmkit.quant import memory
from llmkit.quant.methods import Method, method_of, quantization_of
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
    calibration: str = BUILTIN
    samples: int = 128  # calibration windows, at most
    seq_len: int = 2048  # tokens of a calibration window; at most the model's positions
    damp: float = 0.01  # share of the Hessian's mean diagonal that is added to it
    evaluate: bool = True  # compare the output with the source on held-out text
    eval_windows: int = 8  # windows of 1,024 tokens to compare on
    resume: bool = False  # insist on continuing an interrupted run (it is continued without, too)
    dry_run: bool = False  # plan only
    seed: int = 0  # chooses the calibration windows
    device: str = "auto"  # "auto", "cuda" or "cpu"


@dataclass(frozen=True)
class Plan:
    """Everything that is known before any weight is read."""

    source: Checkpoint
    spec: ModelSpec
    out: Path
    options: QuantizeOptions
    method: Method
    bits: int
    quantization: QuantizationConfig | None
    tensors: list[PlannedTensor]
    files: dict[str, list[PlannedTensor]]
    device: torch.device
    seq_len: int

    @property
    def dtype(self) -> str:
        """The dtype of what is not quantized, as in a safetensors header."""
        return stored_dtype(self.source, self.method.dtype)

    def memory_bytes(self) -> int:
        """The peak of the whole run."""
        need = memory.tensor_bytes(self.spec)
        if self.options.evaluate:
            need = max(need, memory.layer_bytes(self.spec, min(EVALUATION_TOKENS, self.spec.max_positions)))
        if self.method.calibrated:
            layer = memory.layer_bytes(self.spec, self.seq_len) + memory.gptq_bytes(self.spec)
            need = max(need, layer + memory.hidden_bytes(self.spec, self.options.samples, self.seq_len))
        return need


def make_plan(source: str, out: Path, options: QuantizeOptions, progress: Progress) -> Plan:
    """Open the source, check it and the options, and plan the output; nothing is written.

    Raises UsageError, InputError, ShortageError (disk, device) and OutputError as `quantize` does.
    """
    method, bits = method_of(options.method, options.bits, options.group_size)
    for name, value, least in (
        ("samples", options.samples, 1),
        ("seq-len", options.seq_len, MIN_SEQ_LEN),
        ("eval-windows", options.eval_windows, 1),
    ):
        if value < least:
            raise UsageError(f"--{name} is {value}", f"At least {least} was expected")
    if not 0 < options.damp <= 1:
        raise UsageError(f"--damp is {options.damp}", "A share above 0 and up to 1 was expected")
    device = resolve_device(options.device)
    if options.device == "auto" and device.type == "cpu":
        progress.message("no CUDA device: running on the CPU")
    checkpoint = open_checkpoint(source)
    if checkpoint.quantization is not None:
        found = checkpoint.quantization
        raise InputError(
            f"{source} is already quantized ({found.method or found.format}, {found.bits} bits)",
            "A checkpoint of 16 or 32 bits was expected",
            "Quantize the original model",
        )
    checkpoint.require_whole()
    spec = model_spec(checkpoint.config)
    check_checkpoint(checkpoint, spec)
    quantization = quantization_of(spec, options.method, bits, options.group_size)
    if quantization is not None and method.calibrated:
        quantization = dataclasses.replace(quantization, damp=options.damp)
    tensors = planned_tensors(checkpoint, spec, quantization, method.dtype)
    files = plan_files(tensors)
    check_output(out.expanduser().absolute(), checkpoint, planned_bytes(files))
    seq_len = min(options.seq_len, spec.max_positions)
    if method.calibrated and seq_len < options.seq_len:
        progress.message(f"calibration windows have {seq_len} tokens: the model has no more positions")
    return Plan(
        checkpoint,
        spec,
        out.expanduser().absolute(),
        options,
        method,
        bits,
        quantization,
        tensors,
        files,
        device,
        seq_len,
    )


def plan_figures(plan: Plan) -> dict[str, Any]:
    """What a dry run reports."""
    files = {file: sum(tensor.nbytes for tensor in tensors) for file, tensors in plan.files.items()}
    return {
        "files": files,
        "tensors": len(plan.tensors),
        "checkpoint_bytes": sum(files.values()),
        "memory_bytes": plan.memory_bytes(),
        "memory_available_bytes": memory.available_bytes(plan.device),
        "disk_bytes": planned_bytes(plan.files),
    }
