"""`llmkit convert`: writes a quantized checkpoint in another format, with equal values.

Codes, scales and zero points carry over bit for bit, or the conversion is refused. All weights are
checked before anything is written. What was written is read again and compared with the source.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.dtypes import DTYPE_NAMES
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.output_directory import check_output
from llmkit.checkpoint.quantized_formats import format_of
from llmkit.checkpoint.quantized_weight import Format, QuantizedWeight
from llmkit.checkpoint.tokenizer import check_copied_tokenizer
from llmkit.checkpoint.writer import CheckpointWriter, plan_files, planned_bytes
from llmkit.common.errors import InputError
from llmkit.common.progress import Progress, SilentProgress
from llmkit.model.checkpoint_tensors import check_checkpoint, kv_scales, packed_name
from llmkit.model.families import checkpoint_spec
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.quant.convert_plan import ConvertPlan, difference, plan_conversion
from llmkit.quant.convert_source import ConvertSource, StoredWeight
from llmkit.quant.output_layout import output_config, unquantized_dtype
from llmkit.quant.parameter_writer import ParameterWriter

COMMIT_BYTES = 2**30  # an interrupted run repeats at most about this much
# The files beside the weights that describe the source's format.
_FORMAT_FILES = ("quantize_config.json", "hf_quant_config.json")

Report = dict[str, Any]


def convert(
    source: str | Path,
    output: str | Path,
    target: Format,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the quantized checkpoint `source` in the format `target` into the new directory
    `output`.

    Raises InputError, naming the tensor and what would be lost, for values that the format does not
    hold; nothing is written then. OutputError and ShortageError as CheckpointWriter does.
    dry_run: check everything, and write nothing. An interrupted run is continued.
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
    plan = plan_conversion(convert_source, target, progress)
    files = plan_files(plan.tensors)
    check_output(out, checkpoint.path, planned_bytes(files))
    report = _report(plan, str(source), str(output), planned_bytes(files))
    if dry_run:
        return report | {"output": None, "verified": None}
    identity = {
        "command": "convert",
        "format": target,
        "quantization": dataclasses.asdict(plan.quantization),
        "source": checkpoint.stamps,
    }
    with CheckpointWriter(out, files, checkpoint, identity) as writer:
        if writer.resume_note:
            progress.message(writer.resume_note)
        verified = _Conversion(plan, writer, progress).write()
        recipe = {"command": "convert", **{name: report[name] for name in ("from", "format")}}
        config = output_config(checkpoint, plan.quantization, _dtype(checkpoint))
        side_files = {
            name: data
            for name, data in checkpoint.side_files().items()
            if name not in _FORMAT_FILES
        }
        side_files |= format_of(plan.quantization).extra_files(plan.quantization)
        writer.finish(config, side_files, {"recipe": recipe, "verified": verified})
    if writer.time_note():
        progress.message(writer.time_note())
    return report | {"verified": verified}


def _dtype(checkpoint: Checkpoint) -> str:
    """The dtype of the output's config.json: that of the source's, where it says one."""
    for config in (checkpoint.config, checkpoint.text_config):
        for key in ("dtype", "torch_dtype"):
            for dtype, name in DTYPE_NAMES.items():
                if config.get(key) == str(dtype).removeprefix("torch."):
                    return name
    return unquantized_dtype(checkpoint, None)


def _report(plan: ConvertPlan, source: str, output: str, nbytes: int) -> Report:
    """What is known before anything is written."""
    weights = plan.source.weights
    counts = Counter(plan.written.values())
    return {
        "source": source,
        "output": output,
        "from": plan.source.format,
        "format": plan.quantization.format,
        "schemes": [
            {**dataclasses.asdict(scheme), "label": scheme.label, "weights": count}
            for scheme, count in counts.most_common()
        ],
        "weights": len(weights),
        "tensors": len(plan.tensors),
        "source_bytes": plan.source.checkpoint.weight_bytes,
        "bytes": nbytes,
        "float32_tensors": plan.float32_tensors,
    }


@dataclass
class _Conversion:
    """Writes the tensors of a plan, and compares them with the source."""

    plan: ConvertPlan
    writer: CheckpointWriter
    progress: Progress
    _uncommitted: int = 0

    def write(self) -> dict[str, int]:
        """Write all tensors. Returns how many weights and values were compared."""
        plan = self.plan
        source = plan.source
        parameter_writer = ParameterWriter(
            source.checkpoint, source.spec, plan.quantization, plan.tensors, self.writer
        )
        sizes = {info.name: info.nbytes for info in plan.tensors}
        self.progress.start("convert", sum(sizes.values()), "bytes")
        parameter_writer.write_carried()
        num_values = 0
        names = dict.fromkeys(
            (name, parameter)
            for parameter in parameters(source.spec)
            for name in parameter.source_names
        )
        done: set[str] = set()
        for name, parameter in names:
            self._write_kv_scales(parameter, parameter_writer, done)
            if name in done:  # a tensor of several parameters
                continue
            done.add(name)
            weight = source.weights.get(name)
            if weight is None:
                parameter_writer.write_cast_tensor(name)
                stored = [name]
            else:
                self._write_weight(weight, parameter_writer)
                num_values += weight.shape[0] * weight.shape[1]
                stored = [packed_name(name, row.suffix) for row in plan.packed_tensors(weight)]
            self._advance(sum(sizes[stored_name] for stored_name in stored), name)
        self.writer.commit()
        self.progress.finish()
        return {"weights": len(source.weights), "values": num_values}

    def _advance(self, nbytes: int, name: str) -> None:
        self._uncommitted += nbytes
        if self._uncommitted >= COMMIT_BYTES:
            self.writer.commit()
            self._uncommitted = 0
        self.progress.advance(nbytes, name)

    def _write_weight(self, weight: StoredWeight, parameter_writer: ParameterWriter) -> None:
        """Write a weight, read what was written, and compare it with the source."""
        values = self.plan.source.read(weight)
        scheme = self.plan.written[weight.name]
        parameter_writer.write_quantized_tensor(weight.name, replace(values, scheme=scheme))
        reason = difference(values, self._read_back(weight))
        if reason:
            self.writer.discard()
            raise InputError(
                f"{self.plan.source.checkpoint.reference}: {weight.name} changed on the way:"
                f" {reason}",
                "A source that stays as it is was expected",
                "Run the command again",
            )

    def _read_back(self, weight: StoredWeight) -> QuantizedWeight:
        stored = {
            row.suffix: self.writer.read_back(packed_name(weight.name, row.suffix))
            for row in self.plan.packed_tensors(weight)
        }
        form = format_of(self.plan.quantization)
        return form.unpack(self.plan.written[weight.name], stored)

    def _write_kv_scales(
        self, parameter: Parameter, parameter_writer: ParameterWriter, done: set[str]
    ) -> None:
        checkpoint = self.plan.source.checkpoint
        names = kv_scales(parameter, self.plan.quantization)
        stored = kv_scales(parameter, checkpoint.quantization)
        for runtime_name, name in names.items():
            if name not in done:
                done.add(name)
                parameter_writer.write_kv_scale(name, checkpoint.read(stored[runtime_name]))
