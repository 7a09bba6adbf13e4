"""`quantize`: reads a checkpoint, writes a smaller one, and reports its quality, size and time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.journal import RunClock
from llmkit.checkpoint.output_directory import partial_path, sibling, write_errors
from llmkit.checkpoint.tokenizer import Tokenizer, check_copied_tokenizer, load_tokenizer
from llmkit.checkpoint.writer import CheckpointWriter, planned_bytes
from llmkit.common.errors import GateError, InputError
from llmkit.common.progress import Progress
from llmkit.model.families import checkpoint_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.model.weight_loader import load_model
from llmkit.quant import memory_estimate as memory
from llmkit.quant.algorithm import Solver
from llmkit.quant.calibration_data import CalibrationData, load_calibration_data
from llmkit.quant.calibration_text import windows_sha256
from llmkit.quant.check_finite import check_finite
from llmkit.quant.draft_acceptance import DraftAcceptance, measurable_head
from llmkit.quant.expert_pruning import choose_experts, measure_saliency, report_entries
from llmkit.quant.generated_text import GenerateFn, compare_answers
from llmkit.quant.gguf_parameter_writer import GgufParameterWriter
from llmkit.quant.grid import FULL_SEARCH
from llmkit.quant.layer_sensitivity import Sensitivity, measure_sensitivity
from llmkit.quant.layer_stream import LayerStream
from llmkit.quant.norm_tuning import is_tuned_norm
from llmkit.quant.output_layout import output_config, output_files
from llmkit.quant.output_quality import Quality, score_logits
from llmkit.quant.parameter_writer import ParameterWriter
from llmkit.quant.quantize_layers import quantize_layers
from llmkit.quant.quantize_linear import Entry, solve_locally
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.quantize_page import report_page
from llmkit.quant.quantize_plan import QuantizePlan, make_plan, plan_summary
from llmkit.quant.quantize_report import (
    EARLIER_RUNS,
    Report,
    Stopwatch,
    build_report,
    manifest_entries,
    report_json,
)
from llmkit.quant.round_parameters import round_parameters, write_parameter
from llmkit.quant.scheme_search import SchemeSearch
from llmkit.quant.token_windows import evaluation_windows

REPORT_FILE = "llmkit_report.json"
PAGE_FILE = "report.html"
# The suffix of a file beside the output: the state of a search of schemes that is not finished.
SEARCH_SUFFIX = ".partial.search"
# In the partial output only: the hidden states of the calibration text, when they lie on disk.
HIDDEN_FOLDER = "hidden"


def quantize(
    source: str,
    output: str,
    options: QuantizeOptions,
    progress: Progress,
    generate: GenerateFn | None = None,
    solver: Solver = solve_locally,
) -> Report:
    """Quantize `source` into the new directory `output`; return the report that lies in it.

    generate: generates text with a model, for the report's samples and for calibration "self".
    solver: quantizes linears that do not depend on each other, such as a layer's experts.

    With `dry_run` nothing is written and the report holds the plan. The output appears under its
    name only when it is complete. An interrupted run with the same options is continued and gives
    the same weights.

    Raises UsageError for conflicting options, InputError for an unusable source or calibration
    text, ShortageError for too little memory or disk, and OutputError for an output in the way.
    """
    watch = Stopwatch()
    clock = RunClock()
    plan = make_plan(source, Path(output), options, progress)
    tokenizer = _load_tokenizer(plan)
    if options.dry_run:
        return build_report(plan, watch, {"plan": plan_summary(plan)})
    _check_memory(plan)
    if options.resume and not partial_path(plan.out).is_dir():
        progress.message(f"nothing of {plan.out} was written yet: starting from the beginning")
    calibration = None
    with watch("read"):
        if plan.needs_text and tokenizer is not None:
            calibration = load_calibration_data(plan, tokenizer, generate, progress)
    with watch("check"):
        check_finite(plan.reference[0], _source_tensors(plan), progress)
    with watch("hash"):
        plan.source.source_hashes()
    pruning = None
    if plan.whole_source is not None and calibration is not None:
        with watch("experts"):
            plan, pruning = _prune_experts(plan, calibration, progress)
        if not plan.calibrated:
            calibration = None
    run = _Run(plan, watch, tokenizer, calibration, generate, progress, solver, clock, pruning)
    if options.mixed:
        return _quantize_mixed(run)
    report = run.write_output(plan)
    assert report is not None
    # Remove the state of a search that an interrupted run with other options may have left.
    sibling(plan.out, SEARCH_SUFFIX).unlink(missing_ok=True)
    return report


def check_gates(report: Report, options: QuantizeOptions) -> None:
    """Raises GateError when the quality is worse than the options allow; ignores dry runs."""
    quality = report.get("quality")
    if not quality:
        return
    failures = []
    least = options.min_acceptance
    if least is not None:
        before, after = (quality.get(f"{prefix}acceptance") for prefix in ("reference_", ""))
        if before is None or after is None:
            failures.append("the source has no MTP head whose acceptance could be measured")
        elif not after >= least * before:
            failures.append(
                f"the MTP head's acceptance is {after:.3f} after {before:.3f}, which is less than"
                f" {least:g} of it"
            )
    ratio = quality["perplexity"] / quality["reference_perplexity"]
    for name, value, limit in (
        ("mean KL", quality["mean_kl"], options.max_kl),
        ("perplexity ratio", ratio, options.max_ppl_ratio),
    ):
        if limit is None:
            continue
        # A NaN fails too: it is not <= the limit.
        if value is None or not value <= limit:
            shown = "not a number" if value is None else f"{value:.4g}"
            failures.append(f"the {name} is {shown}, above {limit:g}")
    if failures:
        raise GateError(
            "; ".join(failures), todo=f"{report['output']} was written; see its {REPORT_FILE}"
        )


def _load_tokenizer(plan: QuantizePlan) -> Tokenizer | None:
    """The tokenizer, which the output gets a copy of; None when the source has none to need.

    Raises InputError when it is malformed, or absent and calibration or evaluation needs it.
    """
    if plan.needs_text or plan.options.evaluate:
        return load_tokenizer(plan.source)
    return check_copied_tokenizer(plan.source)


def _check_memory(plan: QuantizePlan) -> None:
    """Raises ShortageError when the run needs more memory than is free."""
    offload = plan.offloads()
    needed = plan.memory_bytes(offload)
    free = memory.available_bytes(plan.device)
    bytes_per_sample = 0 if offload else memory.hidden_bytes(plan.spec, 1, plan.seq_len)
    memory.check_memory(needed, bytes_per_sample, plan.options.samples or 0, free, plan.calibrated)


def _source_tensors(plan: QuantizePlan) -> list[str]:
    """The source's tensors that the run reads, each once."""
    spec = plan.reference[1]
    names = [tensor for parameter in parameters(spec) for tensor in parameter.source_names]
    return list(dict.fromkeys(names))


def _prune_experts(
    plan: QuantizePlan, calibration: CalibrationData, progress: Progress
) -> tuple[QuantizePlan, list[dict[str, Any]]]:
    """The plan without the experts that add least, and the report's entries.

    The same text gives the same experts, so that an interrupted run resumes with them.
    """
    whole = plan.whole_source
    assert whole is not None and whole.spec.moe is not None
    stream = LayerStream.from_checkpoint(whole.checkpoint, whole.spec, plan.device)
    saliency = measure_saliency(stream, calibration.windows, progress)
    kept = choose_experts(saliency, whole.spec.moe, whole.num_kept)
    return plan.with_kept_experts(kept), report_entries(saliency, kept)


def _quantize_mixed(run: _Run) -> Report:
    """Write outputs with different schemes of linears until the search accepts one."""
    with run.watch("sensitivity"):
        search = _start_search(run)
    while True:
        schemes = search.schemes_by_module(search.next_choice())
        report = run.write_output(run.plan.with_schemes(schemes), search)
        if report is not None:
            search.remove_file()
            return report
        search.save()


def _start_search(run: _Run) -> SchemeSearch:
    """A new search of schemes, or that of an interrupted run with the same options."""
    options = run.plan.options
    target = {
        "target_bits": options.target_bits,
        "target_kl": options.target_kl,
        "candidates": run.plan.candidates,
        "eval_windows": options.eval_windows,
    }
    identity = json.dumps([run.identity(run.plan), target], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()
    file = sibling(run.plan.out, SEARCH_SUFFIX)
    with write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    return SchemeSearch.resume(
        file, key, options.target_bits, options.target_kl, run.measure_sensitivity
    )


@dataclass
class _Run:
    """What the attempts of a run share. Only a target KL needs more than one attempt."""

    plan: QuantizePlan
    watch: Stopwatch
    tokenizer: Tokenizer | None  # None: neither calibration nor evaluation needs it
    calibration: CalibrationData | None  # None: the method does not need it
    generate: GenerateFn | None
    progress: Progress
    solver: Solver
    clock: RunClock
    pruning: list[dict[str, Any]] | None = None  # what the report says about dropped experts
    num_attempts: int = 0

    def identity(self, plan: QuantizePlan) -> dict[str, Any]:
        """Everything that decides the weights' bytes. A run resumes one with an equal identity."""
        calibration = self.calibration
        return {
            "command": "quantize",
            "method": plan.options.method,
            "quantization": dataclasses.asdict(plan.quantization) if plan.quantization else None,
            "algorithm": repr(plan.algorithm) if calibration else None,
            "calibration text": calibration.info["windows_sha256"] if calibration else None,
            # The order of float additions depends on the number of threads.
            "number of threads": torch.get_num_threads() if calibration else None,
            "source": plan.source.source_hashes(),
            "dropped experts": [entry["dropped"] for entry in self.pruning or ()],
        }

    def measure_sensitivity(self) -> Sensitivity:
        """The KL divergence that each scheme costs at each linear, on the calibration text."""
        plan = self.plan
        assert self.calibration is not None
        stream = _source_stream(plan)
        return measure_sensitivity(
            stream, plan.units, plan.sensitivity_quantizer, self.calibration.windows, self.progress
        )

    def write_output(self, plan: QuantizePlan, search: SchemeSearch | None = None) -> Report | None:
        """Write the output of `plan`. Returns None when `search` needs another attempt instead."""
        with CheckpointWriter(
            plan.out, plan.files, plan.source, self.identity(plan), self.clock, plan.headers
        ) as checkpoint_writer:
            # A later attempt of a search of schemes replaces the one before it, which is no news.
            if checkpoint_writer.resume_note and not self.num_attempts:
                self.progress.message(checkpoint_writer.resume_note)
            self.num_attempts += 1
            if self.clock.earlier_s:
                self.watch.seconds[EARLIER_RUNS] = round(self.clock.earlier_s, 3)
            writer = _parameter_writer(plan, checkpoint_writer)
            with self.watch("quantize" if plan.quantization else "cast"):
                writer.write_carried()
                linears = self._write_parameters(plan, writer)
            quality = None
            if self.tokenizer is not None and plan.options.evaluate:
                with self.watch("evaluate"):
                    quality = _evaluate(plan, writer, self.tokenizer, self.progress)
            if search is not None and not self._accepts(search, quality):
                return None
            calibration_info = self.calibration.info if self.calibration else None
            results = _results(plan, writer, calibration_info, linears, quality)
            results["pruned_experts"] = self.pruning
            if search is not None:
                results |= search.report_entries()
            if self.tokenizer is not None and plan.options.evaluate:
                with self.watch("samples"):
                    results |= self._compare_samples(plan, writer, self.tokenizer)
            report = build_report(plan, self.watch, results)
            files = output_files(plan.source, plan.quantization, plan.gguf is not None)
            files[REPORT_FILE] = report_json(report)
            files[PAGE_FILE] = report_page(report)
            config = None
            if plan.gguf is None:
                config = output_config(plan.source, plan.quantization, plan.dtype)
            checkpoint_writer.finish(config, files, manifest_entries(plan, calibration_info))
        return report

    def _write_parameters(self, plan: QuantizePlan, writer: ParameterWriter) -> list[Entry]:
        """Write all tensors. Returns the report's entries of the linears."""
        if self.calibration is None:
            search = plan.rounding_search
            return round_parameters(writer, plan.device, self.progress, search)
        head_entries: list[Entry] = []
        for parameter in parameters(plan.spec):
            is_tuned = plan.algorithm.norm_tuning is not None and is_tuned_norm(parameter)
            if not parameter.name.startswith("layers.") and not is_tuned:
                head_entries += write_parameter(parameter, writer, plan.device, FULL_SEARCH)
        writer.commit()
        if plan.spec.transformers is not None:
            # transformers' modeling code takes seconds to import, and only the fallback needs it.
            from llmkit.quant.quantize_transformers import quantize_transformers_layers

            layer_entries = quantize_transformers_layers(
                plan.source,
                self.calibration.windows,
                writer,
                plan.algorithm,
                plan.device,
                self.progress,
                self.solver,
            )
            return layer_entries + head_entries
        hidden_folder = None
        if plan.offloads():
            hidden_folder = partial_path(plan.out) / HIDDEN_FOLDER
            with write_errors(hidden_folder):
                # The hidden states of the unquantized model, for learned rounding.
                (hidden_folder / "targets").mkdir(parents=True, exist_ok=True)
        layer_entries = quantize_layers(
            _source_stream(plan),
            _output_stream(plan, writer),
            self.calibration.windows,
            writer,
            plan.algorithm,
            self.progress,
            hidden_folder,
            self.solver,
        )
        if hidden_folder is not None:
            shutil.rmtree(hidden_folder)
        return layer_entries + head_entries

    def _accepts(self, search: SchemeSearch, quality: dict[str, Any] | None) -> bool:
        """Whether the attempt that was just written is the search's final one."""
        choice = search.next_choice()
        kl = quality["mean_kl"] if quality else 0.0
        if search.record_attempt(choice, kl):
            return True
        self.progress.message(
            f"{search.mean_bits(choice):.2f} bits a weight give a mean KL of {kl:.4f}; "
            "trying another mix"
        )
        return False

    def _compare_samples(
        self, plan: QuantizePlan, writer: ParameterWriter, tokenizer: Tokenizer
    ) -> dict[str, Any]:
        """Greedy answers of the source and the output, for the report."""
        if self.generate is None:
            return {"samples": [], "samples_note": "no engine was given to write them with"}
        self.progress.start("samples", 1, "comparison")
        source = plan.reference[0]
        if source.file_format == "gguf":
            source = source.with_dtype(plan.dtype)
        samples, note = compare_answers(
            source, _output_checkpoint(plan, writer), tokenizer, self.generate, plan.device.type
        )
        self.progress.finish()
        return {"samples": samples, "samples_note": note}


def _parameter_writer(plan: QuantizePlan, checkpoint_writer: CheckpointWriter) -> ParameterWriter:
    if plan.gguf is not None:
        return GgufParameterWriter(
            plan.source, plan.spec, plan.quantization, plan.gguf, checkpoint_writer
        )
    return ParameterWriter(
        plan.source, plan.spec, plan.quantization, plan.tensors, checkpoint_writer
    )


def _source_stream(plan: QuantizePlan) -> LayerStream:
    return LayerStream.from_checkpoint(plan.source, plan.spec, plan.device)


def _output_checkpoint(plan: QuantizePlan, writer: ParameterWriter) -> Checkpoint:
    config = {} if plan.gguf else output_config(plan.source, plan.quantization, plan.dtype)
    return writer.as_checkpoint(config)


def _output_stream(plan: QuantizePlan, writer: ParameterWriter) -> LayerStream:
    output = _output_checkpoint(plan, writer)
    return LayerStream.from_checkpoint(output, _spec_of(plan, output), plan.device)


def _spec_of(plan: QuantizePlan, checkpoint: Checkpoint) -> ModelSpec:
    """The spec of the source or the output. A GGUF file has names of its own for some tensors."""
    reference, spec = plan.reference
    if checkpoint is reference:
        return spec
    return plan.spec if plan.gguf is None else checkpoint_spec(checkpoint)


def _logits(
    checkpoint: Checkpoint,
    plan: QuantizePlan,
    windows: torch.Tensor,
    progress: Progress,
    acceptance: DraftAcceptance | None = None,
) -> Iterator[torch.Tensor]:
    """The logits, float32 [L, vocab], of each token window of [n, L]."""
    if plan.spec.transformers is None:
        stream = LayerStream.from_checkpoint(checkpoint, _spec_of(plan, checkpoint), plan.device)
        return stream.logits(windows, progress.advance, acceptance)
    # The layers of the fallback cannot be read one at a time.
    model = load_model(checkpoint, torch.float32, plan.device, spec=plan.spec)
    for _ in plan.spec.layers:
        progress.advance()
    return window_logits(model, windows)


def _evaluate(
    plan: QuantizePlan, writer: ParameterWriter, tokenizer: Tokenizer, progress: Progress
) -> dict[str, Any]:
    """Compare the output with the source on held-out text."""
    window_tokens = plan.eval_window_tokens
    windows = evaluation_windows(tokenizer, plan.options.eval_windows, window_tokens)
    progress.start("evaluate", 2 * len(plan.spec.layers), "layers")
    head = measurable_head(plan.source, plan.spec)
    # The output has the source's own head, byte for byte.
    after, before = (None if head is None else DraftAcceptance(*head) for _ in "12")
    output_logits = _logits(_output_checkpoint(plan, writer), plan, windows, progress, after)
    source_logits = _logits(plan.reference[0], plan, windows, progress, before)
    quality: Quality = score_logits(output_logits, source_logits, windows)
    progress.finish()
    if quality.reference_perplexity is None or not math.isfinite(quality.reference_perplexity):
        raise InputError(
            f"the logits of {plan.source.reference} itself are not finite",
            "Weights that give finite activations were expected",
            "Use --no-eval to write the output all the same",
        )
    acceptance = {}
    if before is not None and after is not None:
        acceptance = {"acceptance": after.rate, "reference_acceptance": before.rate}
    return {
        **dataclasses.asdict(quality),
        **acceptance,
        "text": "the part of pydoc_data.topics that is never calibrated with",
        "windows": len(windows),
        "window_tokens": window_tokens,
        "windows_sha256": windows_sha256(windows),
    }


def _results(
    plan: QuantizePlan,
    writer: ParameterWriter,
    calibration_info: dict[str, Any] | None,
    linears: list[Entry],
    quality: dict[str, Any] | None,
) -> dict[str, Any]:
    """The measured part of the report."""
    checkpoint_bytes = planned_bytes(plan.files, plan.headers)
    source_bytes = plan.reference[0].weight_bytes
    return {
        "calibration": calibration_info,
        "quality": quality,
        "sizes": {
            "source_bytes": source_bytes,
            "checkpoint_bytes": checkpoint_bytes,
            "ratio": checkpoint_bytes / max(1, source_bytes),
        },
        "fallbacks": [entry["name"] for entry in linears if entry["fallback"]],
        "overflows": writer.overflows,
        "gguf": plan.gguf.report_entries() if plan.gguf else None,
        "linears": linears,
    }
