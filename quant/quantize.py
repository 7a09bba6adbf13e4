"""The one entry point: a checkpoint in, a smaller one out, with a report of what it cost."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkit.checkpoint.errors import GateError, InputError, UsageError
from llmkit.checkpoint.output import partial_path, sibling, writing
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.quantized import Scheme
from llmkit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from llmkit.checkpoint.writer import CheckpointWriter, planned_bytes
from llmkit.model.layout import parameters
from llmkit.model.loader import scheme_of
from llmkit.quant import memory
from llmkit.quant.algorithm import Site, Solve
from llmkit.quant.grid import FULL_SEARCH
from llmkit.quant.mixed import BitSearch, Unit, sensitivity
from llmkit.quant.page import report_page
from llmkit.quant.pipeline import quantize_layers, round_parameters, site_of, solve_here, write_row
from llmkit.quant.plan import Plan, QuantizeOptions, make_plan, plan_figures
from llmkit.quant.quality import Quality, score_logits
from llmkit.quant.report import Report, Stopwatch, report_json, versions
from llmkit.quant.samples import Generate, sampled_windows, side_by_side
from llmkit.quant.storage import (
    Storage,
    check_finite,
    output_config,
    output_files,
)
from llmkit.quant.stream import LayerStream
from llmkit.quant.text import BUILTIN, SELF, load_text, windows_sha256
from llmkit.quant.tokens import EVALUATION_TOKENS, calibration_windows, evaluation_windows

__all__ = ["QuantizeOptions", "quantize"]

REPORT, PAGE = "llmkit_report.json", "report.html"
SEARCH = ".partial.search"  # next to the output: the search of a run with a target
HIDDEN = "hidden"  # in the partial output only: the calibration text's hidden states, when they lie on disk
_READ_AHEAD = 32  # characters of calibration text read per token needed, so that the seed has a choice


def quantize(
    source: str,
    output: str,
    options: QuantizeOptions,
    progress: Progress,
    generate: Generate | None = None,
    solve: Solve = solve_here,
) -> Report:
    """Write `source` to the new directory `output` by `options.method`; return the report that lies in it.

    solve: what finds the codes of linears that do not need one another, such as a layer's experts.
    `generate` writes text with a model: the samples of the report and, with calibration "self", the calibration text.
    With `dry_run` nothing is written and the report holds the plan. The output appears under its name only when it
    is complete; an interrupted run of the same options is continued and gives the same weights.
    Raises UsageError for options that do not go together, InputError for a source or a text that cannot be used,
    ShortageError for too little memory or disk, OutputError when the output is in the way.
    """
    watch = Stopwatch()
    plan = make_plan(source, Path(output), options, progress)
    if options.dry_run:
        return _report(plan, watch, {"plan": plan_figures(plan)})
    offload = plan.offloads()
    need, have = plan.memory_bytes(offload), memory.available_bytes(plan.device)
    per_sample = 0 if offload else memory.hidden_bytes(plan.spec, 1, plan.seq_len)
    memory.check_memory(need, per_sample, options.samples, have, plan.calibrated)
    if options.resume and not partial_path(plan.out).is_dir():
        progress.message(f"nothing of {plan.out} was written yet: starting from the beginning")
    needs_text = plan.calibrated or options.evaluate
    tokenizer = load_tokenizer(plan.source) if needs_text else None
    with watch("read"):
        calibration, figures = _calibration(plan, tokenizer, generate, progress)
    with watch("check"):
        check_finite(
            plan.source, list(dict.fromkeys(t for row in parameters(plan.spec) for t in row.tensors)), progress
        )
    with watch("hash"):
        plan.source.source_hashes()
    run = _Run(plan, watch, tokenizer, calibration, figures, generate, progress, solve)
    if not options.mixed:
        report = run.write(plan, None)
        assert report is not None
        sibling(plan.out, SEARCH).unlink(missing_ok=True)  # of an interrupted run with other options
        return report
    with watch("sensitivity"):
        search = _search(plan, run)
    while (report := run.write(plan.with_bits(search.by_module(search.choice())), search)) is None:
        search.save()
    search.remove()
    return report


@dataclass
class _Run:
    """What the attempts of one run share; there are several only for mixed precision with a target KL."""

    plan: Plan
    watch: Stopwatch
    tokenizer: Tokenizer | None
    calibration: torch.Tensor | None
    figures: dict[str, Any] | None
    generate: Generate | None
    progress: Progress
    solve: Solve

    def identity(self, plan: Plan) -> dict[str, Any]:
        """Everything that decides the bytes of the weights."""
        return {
            "command": "quantize",
            "method": plan.options.method,
            "quantization": dataclasses.asdict(plan.quantization) if plan.quantization else None,
            "algorithm": repr(plan.algorithm) if self.calibration is not None else None,
            "windows_sha256": self.figures["windows_sha256"] if self.figures else None,
            # Sums of floats depend on how many threads share them: another number begins anew.
            "threads": torch.get_num_threads() if self.calibration is not None else None,
            "source": plan.source.source_hashes(),
        }

    def sensitivity(self) -> list[Unit]:
        """What rounding each unit of the model costs, measured on the calibration text."""
        plan = self.plan
        assert self.calibration is not None and plan.quantization is not None
        sites: dict[int, list[Site]] = {}
        for row in parameters(plan.spec):
            site = site_of(row, plan.quantization) if row.linear else None
            if site is not None:
                sites.setdefault(row.stages[0], []).append(site)
        stream = LayerStream.of(plan.source, plan.spec, plan.device)
        return sensitivity(stream, sites, self.calibration, self.progress)

    def write(self, plan: Plan, search: BitSearch | None) -> Report | None:
        """Write the output of `plan`; None when `search` wants another attempt instead."""
        with CheckpointWriter(plan.out, plan.files, plan.source, self.identity(plan)) as writer:
            storage = Storage(plan.source, plan.spec, plan.quantization, plan.tensors, writer)
            with self.watch("quantize" if plan.quantization else "cast"):
                linears = _convert(plan, storage, self.calibration, self.progress, self.solve)
            quality = None
            if self.tokenizer is not None and plan.options.evaluate:
                with self.watch("evaluate"):
                    quality = _evaluate(plan, storage, self.tokenizer, self.progress)
            if search is not None and not search.tell(search.choice(), quality["mean_kl"] if quality else 0.0):
                bits, kl = search.attempts[-1]
                mean = search.size(bits) / search.weights
                self.progress.message(f"{mean:.2f} bits a weight give a mean KL of {kl:.4f}; trying another mix")
                return None
            results = _results(plan, storage, self.figures, linears, quality)
            if search is not None:
                results |= search.figures()
            if self.tokenizer is not None and plan.options.evaluate:
                with self.watch("samples"):
                    results |= _samples(plan, storage, self.tokenizer, self.generate, self.progress)
            config = output_config(plan.source, plan.quantization, plan.dtype)
            report = _report(plan, self.watch, results)
            side_files = output_files(plan.source, plan.quantization) | {
                REPORT: report_json(report),
                PAGE: report_page(report),
            }
            writer.finish(config, side_files, _manifest(plan, self.figures))
        return report


def _search(plan: Plan, run: _Run) -> BitSearch:
    """The search for bits, taken up where an interrupted run left it."""
    options = plan.options
    target = {"target_bits": options.target_bits, "target_kl": options.target_kl}
    key = hashlib.sha256(json.dumps([run.identity(plan), target], sort_keys=True).encode()).hexdigest()
    file = sibling(plan.out, SEARCH)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    return BitSearch.resume(file, key, options.target_bits, options.target_kl, run.sensitivity)


def check_gates(report: Report, options: QuantizeOptions) -> None:
    """Raises GateError when the result is worse than the options allow; nothing for a dry run."""
    quality = report.get("quality")
    if not quality:
        return
    bad = []
    ratio = quality["perplexity"] / quality["reference_perplexity"]
    for name, figure, bound in (
        ("mean KL", quality["mean_kl"], options.max_kl),
        ("perplexity ratio", ratio, options.max_ppl_ratio),
    ):
        if bound is not None and not (figure is not None and figure <= bound):
            shown = "not a number" if figure is None else f"{figure:.4g}"
            bad.append(f"the {name} is {shown}, above {bound:g}")
    if bad:
        raise GateError("; ".join(bad), todo=f"{report['output']} was written; see its {REPORT}")


def _calibration(
    plan: Plan, tokenizer: Tokenizer | None, generate: Generate | None, progress: Progress
) -> tuple[torch.Tensor | None, dict[str, Any] | None]:
    """The calibration windows [n, L] and what the report says of them; None for methods that need none."""
    options = plan.options
    if not plan.calibrated or tokenizer is None:
        return None, None

    def render(messages: list[dict[str, Any]]) -> str:
        return tokenizer.render_chat(messages, add_generation_prompt=False)

    if options.calibration == SELF:
        return _own_text(plan, tokenizer, generate, progress)
    limit = options.samples * plan.seq_len * _READ_AHEAD
    text = load_text(options.calibration, render if tokenizer.chat_template else None, limit)
    builtin = options.calibration == BUILTIN
    chosen = calibration_windows(tokenizer, text, builtin, options.samples, plan.seq_len, options.seed)
    if int(chosen.max()) >= plan.spec.vocab:
        raise InputError(
            f"the tokenizer gives the id {int(chosen.max())} and the model's embedding has {plan.spec.vocab} rows",
            "A tokenizer that belongs to the model was expected",
        )
    if len(chosen) < options.samples:
        progress.message(
            f"{text.name} has {len(chosen)} windows of {plan.seq_len} tokens for calibration, "
            f"fewer than the {options.samples} asked for; all are used"
        )
    return chosen, {
        "source": options.calibration,
        "name": text.name,
        "text_sha256": text.sha256,
        "truncated": text.truncated,
        "windows": len(chosen),
        "window_tokens": plan.seq_len,
        "tokens": chosen.numel(),
        "windows_sha256": windows_sha256(chosen),
    }


def _own_text(
    plan: Plan, tokenizer: Tokenizer, generate: Generate | None, progress: Progress
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Calibration text that the model itself writes."""
    if generate is None:
        raise UsageError("--calibration self needs an engine to write the text with", "A generator was expected")
    options = plan.options
    progress.message(f"the model writes {options.samples * plan.seq_len:,} tokens to calibrate on")
    source = plan.source.imported("BF16") if plan.source.kind == "gguf" else plan.source
    chosen = sampled_windows(source, tokenizer, generate, options.samples, plan.seq_len, options.seed, plan.device.type)
    return chosen, {
        "source": SELF,
        "name": "text that the model wrote",
        "windows": len(chosen),
        "window_tokens": plan.seq_len,
        "tokens": chosen.numel(),
        "windows_sha256": windows_sha256(chosen),
    }


def _samples(
    plan: Plan, storage: Storage, tokenizer: Tokenizer, generate: Generate | None, progress: Progress
) -> dict[str, Any]:
    """Greedy answers before and after, for the report."""
    if generate is None:
        return {"samples": [], "samples_note": "no engine was given to write them with"}
    progress.start("samples", 1, "comparison")
    output = storage.written(output_config(plan.source, plan.quantization, plan.dtype))
    source = plan.source.imported(plan.dtype) if plan.source.kind == "gguf" else plan.source
    samples, note = side_by_side(source, output, tokenizer, generate, plan.device.type)
    progress.finish()
    return {"samples": samples, "samples_note": note}


def _convert(
    plan: Plan, storage: Storage, calibration: torch.Tensor | None, progress: Progress, solve: Solve
) -> list[dict[str, Any]]:
    """Write all tensors; return what the report says of the linears."""
    if calibration is None:
        return round_parameters(storage, plan.device, progress)
    head: list[dict[str, Any]] = []
    for row in parameters(plan.spec):
        if not row.name.startswith("layers."):
            head += write_row(row, storage, plan.device, FULL_SEARCH)
    storage.writer.commit()
    source = LayerStream.of(plan.source, plan.spec, plan.device)
    folder = None
    if plan.offloads():
        folder = partial_path(plan.out) / HIDDEN
        with writing(folder):
            (folder / "wanted").mkdir(parents=True, exist_ok=True)
    linears = quantize_layers(
        source, _written(plan, storage), calibration, storage, plan.algorithm, progress, folder, solve
    )
    if folder is not None:
        shutil.rmtree(folder)
    return linears + head


def _written(plan: Plan, storage: Storage) -> LayerStream:
    config = output_config(plan.source, plan.quantization, plan.dtype)
    return LayerStream.of(storage.written(config), plan.spec, plan.device)


def _evaluate(plan: Plan, storage: Storage, tokenizer: Tokenizer, progress: Progress) -> dict[str, Any]:
    """Compare what was written with the source on held-out text."""
    length = min(EVALUATION_TOKENS, plan.spec.max_positions)
    windows = evaluation_windows(tokenizer, plan.options.eval_windows, length)
    progress.start("evaluate", 2 * len(plan.spec.layers), "layers")
    ours = _written(plan, storage).logits(windows, progress.advance)
    theirs = LayerStream.of(plan.source, plan.spec, plan.device).logits(windows, progress.advance)
    quality: Quality = score_logits(ours, theirs, windows)
    progress.finish()
    if quality.reference_perplexity is None or not math.isfinite(quality.reference_perplexity):
        raise InputError(
            f"the logits of {plan.source.reference} itself are not finite",
            "Weights that give finite activations were expected",
            "Use --no-eval to write the output all the same",
        )
    return {
        **dataclasses.asdict(quality),
        "text": "the part of pydoc_data.topics that is never calibrated with",
        "windows": len(windows),
        "window_tokens": length,
        "windows_sha256": windows_sha256(windows),
    }


def _results(
    plan: Plan,
    storage: Storage,
    calibration: dict[str, Any] | None,
    linears: list[dict[str, Any]],
    quality: dict[str, Any] | None,
) -> dict[str, Any]:
    written = planned_bytes(plan.files)
    return {
        "calibration": calibration,
        "quality": quality,
        "sizes": {
            "source_bytes": plan.source.weight_bytes,
            "checkpoint_bytes": written,
            "ratio": written / max(1, plan.source.weight_bytes),
        },
        "fallbacks": [entry["name"] for entry in linears if entry["fallback"]],
        "overflows": storage.overflows,
        "linears": linears,
    }


def _report(plan: Plan, watch: Stopwatch, results: dict[str, Any]) -> Report:
    scheme = plan.quantization.scheme if plan.quantization else None
    return {
        "command": "quantize",
        "versions": versions(),
        "command_line": plan.options.command_line(plan.source.reference, str(plan.out)),
        "source": plan.source.reference,
        "output": str(plan.out),
        "architecture": plan.spec.architecture,
        "method": plan.options.method,
        "format": plan.quantization.format if plan.quantization else None,
        "bits": plan.bits,
        "group_size": scheme.group_size if scheme else None,
        "schemes": _schemes(plan),
        "kv": plan.quantization.kv or None if plan.quantization else None,
        "dtype": plan.dtype,
        "device": str(plan.device),
        "options": dataclasses.asdict(plan.options),
        **results,
        "seconds": watch.seconds,
    }


def _schemes(plan: Plan) -> list[dict[str, Any]]:
    """How linears are stored, in words and figures, with how many of the model's weights that are."""
    counts: Counter[Scheme | None] = Counter()
    for row in parameters(plan.spec):
        if row.linear or scheme_of(row, row.tensors[0], plan.quantization):
            counts[scheme_of(row, row.tensors[0], plan.quantization)] += math.prod(row.shape)
    kept = dataclasses.asdict(Scheme(16)) | {"label": "not quantized"}
    return [
        (dataclasses.asdict(scheme) | {"label": scheme.label} if scheme else kept) | {"weights": count}
        for scheme, count in counts.most_common()
        if plan.quantization is not None
    ]


def _manifest(plan: Plan, calibration: dict[str, Any] | None) -> dict[str, Any]:
    recipe: dict[str, Any] = {"command": "quantize", "method": plan.options.method, "effort": plan.options.effort}
    if plan.quantization is not None:
        recipe |= {"format": plan.quantization.format, "schemes": _schemes(plan)}
    if plan.options.method == "gptq":
        recipe["damp"] = plan.options.damp
    return {"recipe": recipe, "seed": plan.options.seed, "calibration": calibration}
