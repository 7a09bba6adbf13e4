"""The quantize report as an HTML page.

This module turns the report into text, tables and charts; `templates/quantize_report.html.jinja`
lays them out. What the report lacks (quality, calibration, samples, ...) is left out of the page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.common.formatting import bytes_text
from llmkit.common.html_page import render_page
from llmkit.quant.quantize_charts import Entry, bits_chart, error_chart, error_legend, number
from llmkit.quant.scheme_charts import scheme_chart, scheme_legend

TEMPLATES = Path(__file__).parent / "templates"
NONE = "\N{EN DASH}"
LINEARS_HEAD = (
    "Linear layer",
    "Shape",
    "Method",
    "Bits",
    "Group",
    "Error",
    "Tokens",
    "Damp",
    "Fallback",
)


def report_page(report: Mapping[str, Any]) -> bytes:
    """A quantize report as a self-contained HTML5 page in UTF-8."""
    name = _model_name(report.get("source"))
    linears = report.get("linears") or []
    lead = [report.get("architecture"), _storage(report), report.get("device")]
    return render_page(
        TEMPLATES,
        "quantize_report.html.jinja",
        title=f"{name}, quantized: {report.get('method') or NONE}",
        method=report.get("method"),
        name=name,
        lead=[fact for fact in lead if fact],
        source=report.get("source"),
        source_weights=report.get("source_weights"),
        output=report.get("output"),
        headline=_headline(report),
        stages=_stages(report),
        command_line=str(report.get("command_line") or ""),
        **_errors(linears),
        bits_chart=bits_chart(linears),
        scheme_chart=scheme_chart(report),
        scheme_legend=scheme_legend(),
        scheme_shares=_scheme_shares(report),
        fallbacks=_fallbacks(report, linears),
        overflows=_overflows(report),
        dtype=report.get("dtype"),
        samples_note=report.get("samples_note"),
        samples=[_sample(sample) for sample in report.get("samples") or []],
        calibration=_calibration(report),
        sensitivity_head=_sensitivity_head(report),
        sensitivity=_sensitivity(report),
        linears_head=LINEARS_HEAD,
        linears=[_linear(entry) for entry in linears],
        versions=[(key, str(value)) for key, value in (report.get("versions") or {}).items()],
        options=_facts(report.get("options")),
    )


def _headline(report: Entry) -> list[Sequence[str]]:
    """The rows of the first table: what, before, after, change."""
    rows: list[Sequence[str]] = []
    sizes = report.get("sizes")
    if sizes:
        before = bytes_text(sizes["source_bytes"])
        after = bytes_text(sizes["checkpoint_bytes"])
        rows.append(("Size of the weights", before, after, f"{sizes['ratio']:.1%} of the size"))
    carried = report.get("carried")
    if carried:
        size = bytes_text(carried["bytes"])
        parts = f"as they were: {', '.join(carried['prefixes'])}"
        rows.append((f"{carried['tensors']:,} tensors that do not run", size, size, parts))
    quality = report.get("quality")
    if quality:
        rows += _quality_rows(quality)
    if report.get("seconds"):
        rows.append(("Time", NONE, _seconds(sum(report["seconds"].values())), ""))
    return rows


def _quality_rows(quality: Entry) -> list[Sequence[str]]:
    before = quality.get("reference_perplexity")
    after = quality.get("perplexity")
    change = NONE
    if before:
        change = _formatted(number(after) / number(before) - 1, "+.2%")
    mean_kl = _formatted(quality.get("mean_kl"), ".4f")
    p99_kl = _formatted(quality.get("p99_kl"), ".4f")
    top1 = _formatted(quality.get("top1"), ".1%")
    of_head: list[Sequence[str]] = []
    if "acceptance" in quality:
        shares = [_formatted(quality.get(f"{of}acceptance"), ".1%") for of in ("reference_", "")]
        of_head.append(("Drafts of the MTP head accepted", *shares, "of the first draft tokens"))
    return [
        ("Perplexity", _formatted(before, ".3f"), _formatted(after, ".3f"), change),
        ("KL divergence, mean", NONE, mean_kl, "nats a token"),
        ("KL divergence, 99th percentile", NONE, p99_kl, "nats a token"),
        ("Same most likely token", NONE, top1, "of the tokens"),
        *of_head,
    ]


def _stages(report: Entry) -> str:
    """The seconds of each stage."""
    seconds: Mapping[str, float] = report.get("seconds") or {}
    return ", ".join(f"{stage} {_seconds(value)}" for stage, value in seconds.items())


def _storage(report: Entry) -> str:
    """How the weights are stored: "INT4 in groups of 64; gptq format"."""
    schemes = report.get("schemes") or []
    if not schemes:
        return str(report.get("dtype") or "")
    if len(schemes) == 1:
        labels = [schemes[0]["label"]]
    else:
        total = sum(scheme["weights"] for scheme in schemes) or 1
        labels = [f"{scheme['weights'] / total:.0%} {scheme['label']}" for scheme in schemes]
    if report.get("kv"):
        labels.append(f"{str(report['kv']).upper()} KV cache")
    labels.append(f"{report.get('format')} format")
    return "; ".join(labels)


def _errors(linears: Sequence[Entry]) -> dict[str, str]:
    """The chart of each linear's error, its legend and its note."""
    points = [entry for entry in linears if math.isfinite(number(entry.get("error")))]
    calibrated = any(entry.get("tokens") for entry in points)
    has_fallback = any(entry.get("fallback") for entry in points)
    what = "output" if calibrated else "weights"
    note = f"The share of the energy of each linear layer's {what} that rounding loses"
    if calibrated:
        note += ", on the calibration text"
    note += ". Lower is better"
    if has_fallback:
        note += "; hollow marks are fallbacks"
    return {
        "error_chart": error_chart(points, f"lost energy of the {what}"),
        "error_legend": error_legend(points),
        "error_note": f"{note}.",
    }


def _fallbacks(report: Entry, linears: Sequence[Entry]) -> list[tuple[str, str]]:
    """The linears that were rounded to nearest instead, and why."""
    reasons = {entry["name"]: entry["fallback"] for entry in linears if entry.get("fallback")}
    names = report.get("fallbacks") or reasons
    return [(str(name), str(reasons.get(name, ""))) for name in names]


def _overflows(report: Entry) -> list[tuple[str, str]]:
    """The tensors with values beyond the dtype's range, and how many."""
    overflows: Mapping[str, int] = report.get("overflows") or {}
    return [(name, f"{count:,}") for name, count in overflows.items()]


def _sample(sample: Entry) -> dict[str, Any]:
    """A prompt with its answers. same_until: the first character that may differ."""
    before = str(sample.get("before") or "")
    after = str(sample.get("after") or "")
    same_tokens = int(sample.get("same_tokens") or 0)
    if before == after:
        verdict = "the same answer"
        answers = [("Before and after", before)]
    elif same_tokens:
        verdict = f"the same for {same_tokens} of {int(sample.get('tokens') or 0)} tokens"
        answers = [("Before", before), ("After", after)]
    else:
        verdict = "different from the first token on"
        answers = [("Before", before), ("After", after)]
    same_until = _common_prefix(before, after) if same_tokens or before == after else 0
    return {
        "prompt": sample.get("prompt"),
        "verdict": verdict,
        "answers": answers,
        "same_until": same_until,
    }


def _common_prefix(before: str, after: str) -> int:
    """The characters that two texts have in common, up to the start of the word that differs."""
    if before == after:
        return len(before)
    length = 0
    for a, b in zip(before, after, strict=False):
        if a != b:
            break
        length += 1
    return len(re.sub(r"\w+$", "", before[:length]))


def _calibration(report: Entry) -> list[tuple[str, str]]:
    """What the report says about the calibration text and the evaluation text."""
    rows = _facts(report.get("calibration"))
    quality = report.get("quality") or {}
    if quality.get("text"):
        tokens = _fact(quality.get("tokens"))
        rows.append(("scored on", f"{quality['text']}, {tokens} tokens"))
    return rows


def _scheme_shares(report: Entry) -> list[Sequence[str]]:
    """The rows of the table of chosen schemes: name, linears, share of the weights, bits."""
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in report.get("sensitivity") or []:
        size = number(entry.get("weights")), number(entry.get("bits"))
        if all(map(math.isfinite, size)) and size[0] > 0:
            found.setdefault(str(entry.get("scheme")), []).append(size)
    total = sum(weights for sizes in found.values() for weights, _ in sizes)
    rows: list[Sequence[str]] = []
    for name, sizes in sorted(found.items()):
        weights = sum(count for count, _ in sizes)
        bits = sum(count * bits for count, bits in sizes) / weights
        rows.append((name, f"{len(sizes):,}", f"{weights / total:.1%}", f"{bits:.2f}"))
    return rows


def _kl_by_scheme(entry: Entry) -> Mapping[str, Any]:
    """The KL of each scheme that was measured at a linear."""
    kl = entry.get("kl")
    return kl if isinstance(kl, dict) else {}


def _candidates(report: Entry) -> list[str]:
    """The names of the schemes that were measured."""
    names = [name for entry in report.get("sensitivity") or [] for name in _kl_by_scheme(entry)]
    return list(dict.fromkeys(names))


def _sensitivity_head(report: Entry) -> Sequence[str]:
    return ("Linear layer", "Scheme", "Bits", *(f"KL, {name}" for name in _candidates(report)))


def _sensitivity(report: Entry) -> list[Sequence[str]]:
    candidates = _candidates(report)
    return [
        (
            str(entry.get("name")),
            _fact(entry.get("scheme")),
            _formatted(entry.get("bits"), ".2f"),
            *(_formatted(_kl_by_scheme(entry).get(name), ".2e") for name in candidates),
        )
        for entry in report.get("sensitivity") or []
    ]


def _linear(entry: Entry) -> Sequence[str]:
    """A linear's row of the table of all linears."""
    group_size = entry.get("group_size")
    return (
        str(entry.get("name")),
        " \N{MULTIPLICATION SIGN} ".join(map(str, entry.get("shape") or [])),
        str(entry.get("method") or NONE),
        _fact(entry.get("bits")),
        "row" if group_size == -1 else _fact(group_size),
        _formatted(entry.get("error"), ".3e"),
        _fact(entry.get("tokens")),
        _fact(entry.get("damp")),
        str(entry.get("fallback") or ""),
    )


def _model_name(reference: object) -> str:
    """The last part of a path or a hub id."""
    return str(reference or "model").rstrip("/").rpartition("/")[2]


def _formatted(value: object, spec: str) -> str:
    figure = number(value)
    return format(figure, spec) if math.isfinite(figure) else NONE


def _facts(values: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), _fact(value)) for key, value in (values or {}).items()]


def _fact(value: object) -> str:
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"
