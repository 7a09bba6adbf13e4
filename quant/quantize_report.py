"""The report of a run: plain data, in the output's llmkit_report.json and on the command line.

The keys are an interface: programs read them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.common.formatting import finite
from llmkit.common.version import version
from llmkit.model.checkpoint_tensors import carried_summary, scheme_of
from llmkit.model.parameter_table import parameters
from llmkit.quant.output_layout import with_stored_dtypes
from llmkit.quant.quantize_plan import QuantizePlan, method_options

Report = dict[str, Any]
# Among a report's seconds: the time of the interrupted runs that this run continued.
EARLIER_RUNS = "earlier runs"


class Stopwatch:
    """Measures the wall-clock seconds of each stage: `with watch("evaluate"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to `stage`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + elapsed, 3)


def build_report(plan: QuantizePlan, watch: Stopwatch, results: dict[str, Any]) -> Report:
    """The report of a run with these `results`."""
    quantization = plan.quantization
    scheme = quantization.scheme if quantization else None
    return {
        "command": "quantize",
        "versions": versions(),
        "command_line": plan.options.command_line(plan.source.reference, str(plan.out)),
        "source": plan.source.reference,
        "source_weights": (plan.quantized_source.label or None) if plan.quantized_source else None,
        "output": str(plan.out),
        "architecture": plan.spec.architecture,
        "method": plan.options.method,
        "scheme": "mixed" if plan.options.mixed else method_options(plan.options).chosen_scheme,
        "format": quantization.format if quantization else None,
        "bits": plan.bits,
        "group_size": scheme.group_size if scheme else None,
        "schemes": scheme_entries(plan),
        "kv": quantization.kv or None if quantization else None,
        "dtype": plan.dtype,
        "carried": carried_summary(with_stored_dtypes(plan.source, plan.method.dtype), plan.spec),
        "device": str(plan.device),
        "options": dataclasses.asdict(plan.options),
        **results,
        "seconds": watch.seconds,
    }


def scheme_entries(plan: QuantizePlan) -> list[dict[str, Any]]:
    """The schemes of the linears with their numbers of weights, the most common scheme first."""
    if plan.quantization is None:
        return []
    counts: Counter[Scheme | None] = Counter()
    for parameter in parameters(plan.spec):
        scheme = scheme_of(parameter, parameter.source_names[0], plan.quantization)
        if parameter.is_linear or scheme:
            counts[scheme] += math.prod(parameter.shape)
    entries = []
    for scheme, count in counts.most_common():
        label = scheme.label if scheme else "not quantized"
        fields = dataclasses.asdict(scheme or Scheme(16))
        entries.append(fields | {"label": label, "weights": count})
    return entries


def manifest_entries(plan: QuantizePlan, calibration: dict[str, Any] | None) -> dict[str, Any]:
    """What the output's llmkit.json says about the run."""
    recipe: dict[str, Any] = {
        "command": "quantize",
        "method": plan.options.method,
        "scheme": "mixed" if plan.options.mixed else method_options(plan.options).chosen_scheme,
        "effort": plan.options.effort,
    }
    if plan.quantization is not None:
        recipe |= {"format": plan.quantization.format, "schemes": scheme_entries(plan)}
    if plan.options.method in ("gptq", "auto"):
        recipe["damp"] = method_options(plan.options).dampening_frac
    return {"recipe": recipe, "seed": plan.options.seed, "calibration": calibration}


def versions() -> dict[str, str]:
    """The versions that the figures were measured with."""
    return {"llmkit": version(), "torch": torch.__version__, "python": platform.python_version()}


def report_json(report: Report) -> bytes:
    """The report as a JSON file."""
    text = json.dumps(finite(report), indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()
