"""The report as a page for people: one HTML file that loads nothing and runs nothing.

Everything that comes from the report is escaped; the page forbids itself scripts and connections besides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.checkpoint.page import escaped, facts, page, section, table
from llmkit.checkpoint.text import bytes_text
from llmkit.quant.chart import Entry, bits_figure, error_figure, number

NONE = "\N{EN DASH}"


def report_page(report: Mapping[str, Any]) -> bytes:
    """A quantize report as a self-contained HTML5 page in UTF-8.

    What the report lacks (quality, calibration, samples, ...) is left out of the page.
    """
    title = f"{_name(report.get('source'))}, quantized: {report.get('method') or NONE}"
    sections = (
        _headline(report),
        _command(report),
        _errors(report),
        _bits(report),
        _notes(report),
        _samples(report),
        _calibration(report),
        _sensitivity(report),
        _linears(report),
        _details(report),
    )
    return page(title, "".join(sections), _STYLE)


def _headline(report: Entry) -> str:
    facts = [report.get("architecture"), _stored(report), report.get("device")]
    return (
        f"<header>\n<p class=eyebrow>llmkit quantize · {escaped(report.get('method'))}</p>\n"
        f"<h1>{escaped(_name(report.get('source')))}</h1>\n"
        f"<p class=lead>{' · '.join(escaped(fact) for fact in facts if fact)}</p>\n"
        f"<dl class=paths><dt>From</dt><dd>{escaped(report.get('source'))}</dd>"
        f"<dt>To</dt><dd>{escaped(report.get('output'))}</dd></dl>\n"
        f"{table(('', 'Before', 'After', 'Change'), _figures(report), 'Before and after', 'headline')}"
        f"<p class=note>{escaped(_stages(report))}</p>\n</header>\n"
    )


def _figures(report: Entry) -> list[tuple[str, ...]]:
    """The rows of the headline: what, before, after, change."""
    rows: list[tuple[str, ...]] = []
    sizes, quality = report.get("sizes"), report.get("quality")
    if sizes:
        change = f"{sizes['ratio']:.1%} of the size"
        rows.append(
            ("Size of the weights", bytes_text(sizes["source_bytes"]), bytes_text(sizes["checkpoint_bytes"]), change)
        )
    if quality:
        before, after = quality.get("reference_perplexity"), quality.get("perplexity")
        change = _shown(number(after) / number(before) - 1, "+.2%") if before else NONE
        rows += [
            ("Perplexity", _shown(before, ".3f"), _shown(after, ".3f"), change),
            ("KL divergence, mean", NONE, _shown(quality.get("mean_kl"), ".4f"), "nats a token"),
            ("KL divergence, 99th percentile", NONE, _shown(quality.get("p99_kl"), ".4f"), "nats a token"),
            ("Same most likely token", NONE, _shown(quality.get("top1"), ".1%"), "of the tokens"),
        ]
    if report.get("seconds"):
        rows.append(("Time", NONE, _seconds(sum(report["seconds"].values())), ""))
    return rows


def _stages(report: Entry) -> str:
    seconds: Mapping[str, float] = report.get("seconds") or {}
    return ", ".join(f"{stage} {_seconds(value)}" for stage, value in seconds.items())


def _stored(report: Entry) -> str:
    """How the weights are stored: "INT4 in groups of 64; gptq format"."""
    schemes = report.get("schemes") or []
    if not schemes:
        return str(report.get("dtype") or "")
    total = sum(scheme["weights"] for scheme in schemes) or 1
    labels = [f"{scheme['weights'] / total:.0%} {scheme['label']}" for scheme in schemes]
    kv = [f"{str(report['kv']).upper()} KV cache"] if report.get("kv") else []
    return "; ".join([*(labels if len(labels) > 1 else [schemes[0]["label"]]), *kv, f"{report.get('format')} format"])


def _command(report: Entry) -> str:
    line = report.get("command_line")
    if not line:
        return ""
    words = " ".join(f"<span>{escaped(word)}</span>" for word in str(line).split(" "))  # wrapped between words only
    return section("Command", f'<pre tabindex=0 role=region aria-label="Command">{words}</pre>\n')


def _errors(report: Entry) -> str:
    """The chart of each linear's error."""
    points = [entry for entry in report.get("linears") or [] if math.isfinite(number(entry.get("error")))]
    calibrated = any(entry.get("tokens") for entry in points)
    what = "output" if calibrated else "weights"
    hollow = "; hollow marks are fallbacks" if any(entry.get("fallback") for entry in points) else ""
    figure = error_figure(points, f"lost energy of the {what}")
    words = (
        f"The share of the energy of each linear layer's {what} that rounding loses"
        f"{', on the calibration text' if calibrated else ''}. Lower is better{hollow}."
    )
    return section("Error of each linear layer", f"<p>{words}</p>\n{figure}") if figure else ""


def _bits(report: Entry) -> str:
    figure = bits_figure(report.get("linears") or [])
    words = "<p>Bits of a weight, where layers differ. 16 bits: not quantized.</p>\n"
    return section("Bits by layer", words + figure) if figure else ""


def _notes(report: Entry) -> str:
    """What did not go as asked: fallbacks with their reasons, values beyond the dtype's range."""
    reasons = {entry["name"]: entry["fallback"] for entry in report.get("linears") or [] if entry.get("fallback")}
    named = {name: reasons.get(name, "") for name in report.get("fallbacks") or reasons}
    parts = ""
    if named:
        rows = [(str(name), str(reason)) for name, reason in named.items()]
        parts += "<p>Rounded to the nearest code instead:</p>\n"
        parts += table(("Linear layer", "Reason"), rows, "Fallbacks", "words")
    overflows: Mapping[str, int] = report.get("overflows") or {}
    if overflows:
        rows = [(name, f"{count:,}") for name, count in overflows.items()]
        parts += f"<p>Values beyond the range of {escaped(report.get('dtype'))}, stored as its largest:</p>\n"
        parts += table(("Tensor", "Values"), rows, "Overflows")
    return section("Fallbacks and overflows", parts) if parts else ""


def _samples(report: Entry) -> str:
    samples, note = report.get("samples") or [], report.get("samples_note")
    text = f"<p>{escaped(note)}</p>\n" if note else ""
    if samples:
        text += "<p>The most probable answer to each prompt. Marked: from where the answers differ.</p>\n"
        text += "".join(map(_sample, samples))
    return section("Answers before and after", text) if text else ""


def _sample(sample: Entry) -> str:
    before, after = str(sample.get("before") or ""), str(sample.get("after") or "")
    same, tokens = int(sample.get("same_tokens") or 0), int(sample.get("tokens") or 0)
    start = _common(before, after) if same or before == after else 0
    if before == after:
        verdict = "the same answer"
        answers: tuple[tuple[str, str], ...] = (("Before and after", before),)
    else:
        verdict = f"the same for {same} of {tokens} tokens" if same else "different from the first token on"
        answers = (("Before", before), ("After", after))
    sides = "".join(
        f"<div><h4>{name}</h4><p class=answer dir=auto>{_marked(answer, start)}</p></div>" for name, answer in answers
    )
    return (
        f"<article><h3 dir=auto>{escaped(sample.get('prompt'))}</h3><p class=verdict>{verdict}</p>"
        f"<div class=sides>{sides}</div></article>\n"
    )


def _marked(text: str, start: int) -> str:
    if not text:
        return "<em>(nothing)</em>"
    rest = f"<mark>{escaped(text[start:])}</mark>" if text[start:] else ""
    return escaped(text[:start]) + rest


def _common(one: str, other: str) -> int:
    """Characters that two texts begin with in common, up to a word's start; all of them when the texts are equal."""
    if one == other:
        return len(one)
    differing = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    start = next(differing, min(len(one), len(other)))
    return len(re.sub(r"\w+$", "", one[:start]))


def _calibration(report: Entry) -> str:
    text = report.get("calibration")
    quality = report.get("quality") or {}
    rows = [(key.replace("_", " "), _fact(value)) for key, value in (text or {}).items()]
    if quality.get("text"):
        scored = f"{quality['text']}, {_fact(quality.get('tokens'))} tokens"
        rows.append(("scored on", scored))
    return section("Calibration and scoring text", facts(rows)) if rows else ""


def _sensitivity(report: Entry) -> str:
    entries = report.get("sensitivity") or []
    rows = [(str(e.get("name")), _fact(e.get("bits")), _shown(e.get("kl"), ".3e")) for e in entries]
    return _folded("Sensitivity", f"Measurements: {len(rows)}", ("Linear layer", "Bits", "KL"), rows)


def _linears(report: Entry) -> str:
    head = ("Linear layer", "Shape", "Method", "Bits", "Group", "Error", "Tokens", "Damp", "Fallback")
    rows = [
        (
            str(entry.get("name")),
            " \N{MULTIPLICATION SIGN} ".join(map(str, entry.get("shape") or [])),
            str(entry.get("method") or NONE),
            _fact(entry.get("bits")),
            {-1: "row"}.get(entry.get("group_size") or 0, _fact(entry.get("group_size"))),
            _shown(entry.get("error"), ".3e"),
            _fact(entry.get("tokens")),
            _fact(entry.get("damp")),
            str(entry.get("fallback") or ""),
        )
        for entry in report.get("linears") or []
    ]
    return _folded("All linear layers", f"Linear layers: {len(rows)}", head, rows)


def _details(report: Entry) -> str:
    versions = [(key, str(value)) for key, value in (report.get("versions") or {}).items()]
    options = [(key.replace("_", " "), _fact(value)) for key, value in (report.get("options") or {}).items()]
    parts = facts(versions)
    if options:
        parts += f"<details><summary>All options</summary>\n{facts(options)}</details>\n"
    return section("Versions and options", parts) if versions or options else ""


def _folded(title: str, summary: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    return section(title, f"<details><summary>{escaped(summary)}</summary>\n{table(head, rows, title)}</details>\n")


def _name(reference: object) -> str:
    """The last part of a path or a hub id."""
    return str(reference or "model").rstrip("/").rpartition("/")[2]


def _shown(value: object, form: str) -> str:
    figure = number(value)
    return format(figure, form) if math.isfinite(figure) else NONE


def _fact(value: object) -> str:
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


_STYLE = """
:root{--qkv:#2a78d6;--o:#d9561f;--gate_up:#12875c;--down:#6a4fc4;--other:#6b6e75;
--b4:#cfe1f7;--b8:#86b3ea;--b16:#3e6ea8;--b16ink:#fff}
@media(prefers-color-scheme:dark){:root{--qkv:#5aa0f0;--o:#f08050;--gate_up:#35b587;--down:#a692f0;
--other:#9b9ea6;--b4:#22364f;--b8:#2f5d94;--b16:#8bb8f0;--b16ink:#10151c}}
.qkv{fill:var(--qkv)}.o{fill:var(--o)}.gate_up{fill:var(--gate_up)}.down{fill:var(--down)}.other{fill:var(--other)}
.hollow{fill:var(--page);stroke-width:2}
.hollow.qkv{stroke:var(--qkv)}.hollow.o{stroke:var(--o)}.hollow.gate_up{stroke:var(--gate_up)}
.hollow.down{stroke:var(--down)}.hollow.other{stroke:var(--other)}
rect{fill:var(--b8)}.b4 rect{fill:var(--b4)}.b16 rect{fill:var(--b16)}
.bits{font-size:12px;font-variant-numeric:tabular-nums;fill:var(--ink)}.b16 .bits{fill:var(--b16ink)}
article{padding:1rem 1.1rem;margin:0 0 .9rem;background:var(--card);border:1px solid var(--line);border-radius:8px}
.verdict{font-size:.85rem;margin:.1rem 0 .7rem}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr));gap:.8rem 1.6rem}
.answer{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.94rem}
mark{background:var(--mark);color:inherit;border-radius:3px;padding:0 .1em;box-decoration-break:clone;
-webkit-box-decoration-break:clone}
"""
