"""`llmkit convert`: writes a quantized checkpoint in another format, with equal values.

Codes, scales and zero points carry over bit for bit, or the conversion is refused. All weights are
checked before anything is written. What was written is read again and compared with the source.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.output_directory import check_output
from llmkit.checkpoint.tokenizer import check_copied_tokenizer
from llmkit.checkpoint.writer import CheckpointWriter, planned_bytes
from llmkit.common.errors import InputError
from llmkit.common.progress import Progress, SilentProgress
from llmkit.model.checkpoint_tensors import check_checkpoint, kv_scales
from llmkit.model.families import checkpoint_spec
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.quant.convert_difference import difference
from llmkit.quant.convert_gguf import GgufConvertPlan, GgufOutput, plan_gguf
from llmkit.quant.convert_plan import CheckpointOutput, ConvertPlan, plan_conversion
from llmkit.quant.convert_source import ConvertSource, StoredWeight

COMMIT_BYTES = 2**30  # an interrupted run repeats at most about this much
Target = Literal["gptq", "gptq_v2", "awq", "compressed-tensors", "modelopt", "fp8", "gguf"]
Report = dict[str, Any]


def convert(
    source: str | Path,
    output: str | Path,
    target: Target,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the quantized checkpoint `source` in the format `target` into the new directory
    `output`.

    dry_run: check everything, and write nothing. An interrupted run is continued.
    Raises InputError, naming the tensor and what would be lost, for values that the format does not
    hold; nothing is written then. OutputError and ShortageError as CheckpointWriter does.
    """
    progress = progress or SilentProgress()
    out = Path(output).expanduser().absolute()
    checkpoint = open_checkpoint(source)
    checkpoint.require_unsharded()
    check_copied_tokenizer(checkpoint)
    spec = checkpoint_spec(checkpoint)
    check_checkpoint(checkpoint, spec)
    convert_source = ConvertSource(checkpoint, spec)
    check_output(out, checkpoint.path, 0)
    plan = _plan(convert_source, target, progress)
    num_bytes = planned_bytes(plan.files, plan.headers)
    check_output(out, checkpoint.path, num_bytes)
    report = _report(plan, str(source), str(output), num_bytes)
    if dry_run:
        return report | {"output": None, "verified": None}
    identity: dict[str, Any] = {"command": "convert", "format": target}
    identity |= {"source": checkpoint.stamps, **plan.identity}
    with CheckpointWriter(out, plan.files, checkpoint, identity, headers=plan.headers) as writer:
        if writer.resume_note:
            progress.message(writer.resume_note)
        verified = _Conversion(plan, writer, plan.output(writer), progress).write()
        recipe = {"command": "convert", **{name: report[name] for name in ("from", "format")}}
        manifest = {"recipe": recipe, "verified": verified}
        writer.finish(plan.config, plan.side_files(), manifest)
    if writer.time_note():
        progress.message(writer.time_note())
    return report | {"verified": verified}


def _plan(
    source: ConvertSource, target: Target, progress: Progress
) -> ConvertPlan | GgufConvertPlan:
    if source.format == target:
        raise InputError(
            f"{source.checkpoint.reference} is in the format {target} already",
            "Another --format was expected",
        )
    if source.kv and target not in ("compressed-tensors", "modelopt"):
        raise InputError(
            f"{source.checkpoint.reference} has scales of an {source.kv.upper()} KV cache, and"
            f" {target} has no place for them",
            "compressed-tensors or modelopt was expected",
        )
    if target == "gguf":
        return plan_gguf(source, progress)
    return plan_conversion(source, target, progress)


def _report(plan: ConvertPlan | GgufConvertPlan, source: str, output: str, nbytes: int) -> Report:
    """What is known before anything is written."""
    counts = Counter(plan.written.values())
    return {
        "source": source,
        "output": output,
        "from": plan.source.format,
        "format": plan.format,
        "schemes": [
            {**dataclasses.asdict(scheme), "label": scheme.label, "weights": count}
            for scheme, count in counts.most_common()
        ],
        "weights": len(plan.source.weights),
        "tensors": sum(map(len, plan.files.values())),
        "source_bytes": plan.source.checkpoint.weight_bytes,
        "bytes": nbytes,
        "float32_tensors": plan.float32_tensors,
    }


@dataclass
class _Conversion:
    """Writes the tensors of a plan, and compares them with the source."""

    plan: ConvertPlan | GgufConvertPlan
    writer: CheckpointWriter
    output: CheckpointOutput | GgufOutput
    progress: Progress
    _uncommitted: int = 0

    def write(self) -> dict[str, int]:
        """Write all tensors. Returns how many weights and values were compared."""
        source = self.plan.source
        rows: dict[str, Parameter] = {}  # a tensor may be of several parameters
        for parameter in parameters(source.spec):
            for name in parameter.source_names:
                rows.setdefault(name, parameter)
        self.progress.start("convert", sum(map(self.output.stored_bytes, rows)), "bytes")
        self.output.parameters.write_carried()
        num_values = 0
        for name, parameter in rows.items():
            self._write_kv_scales(parameter)
            weight = source.weights.get(name)
            if weight is None:
                self.output.parameters.write_cast_tensor(name)
            else:
                self._write_weight(weight)
                num_values += weight.shape[0] * weight.shape[1]
            self._advance(self.output.stored_bytes(name), name)
        self.writer.commit()
        self.progress.finish()
        return {"weights": len(source.weights), "values": num_values}

    def _advance(self, nbytes: int, name: str) -> None:
        self._uncommitted += nbytes
        if self._uncommitted >= COMMIT_BYTES:
            self.writer.commit()
            self._uncommitted = 0
        self.progress.advance(nbytes, name)

    def _write_weight(self, weight: StoredWeight) -> None:
        """Write a weight, read what was written, and compare it with the source."""
        values = self.plan.source.read(weight)
        self.output.write_weight(weight, values)
        reason = difference(values, self.output.read_back(weight))
        if reason:
            self.writer.discard()
            raise InputError(
                f"{self.plan.source.checkpoint.reference}: {weight.name} changed on the way:"
                f" {reason}",
                "A source that stays as it is was expected",
                "Run the command again",
            )

    def _write_kv_scales(self, parameter: Parameter) -> None:
        if isinstance(self.plan, GgufConvertPlan):
            return
        scales = self.plan.source.read_kv_scales(parameter)
        for runtime_name, name in kv_scales(parameter, self.plan.quantization).items():
            self.output.parameters.write_kv_scale(name, scales[runtime_name])
