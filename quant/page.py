"""The report as a page for people: one HTML file that loads nothing and runs nothing.

Everything that comes from the report is escaped; the page forbids itself scripts and connections besides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmkit.checkpoint.text import bytes_text
from llmkit.quant.chart import Entry, bits_figure, error_figure, escaped, number

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
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{"".join(sections)}</main>
</body>
</html>
"""
    return page.encode("utf-8", "replace")


def _headline(report: Entry) -> str:
    facts = [report.get("architecture"), _stored(report), report.get("device")]
    return (
        f"<header>\n<p class=eyebrow>llmkit quantize · {escaped(report.get('method'))}</p>\n"
        f"<h1>{escaped(_name(report.get('source')))}</h1>\n"
        f"<p class=lead>{' · '.join(escaped(fact) for fact in facts if fact)}</p>\n"
        f"<dl class=paths><dt>From</dt><dd>{escaped(report.get('source'))}</dd>"
        f"<dt>To</dt><dd>{escaped(report.get('output'))}</dd></dl>\n"
        f"{_table(('', 'Before', 'After', 'Change'), _figures(report), 'Before and after', 'headline')}"
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
    return _section("Command", f'<pre tabindex=0 role=region aria-label="Command">{words}</pre>\n')


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
    return _section("Error of each linear layer", f"<p>{words}</p>\n{figure}") if figure else ""


def _bits(report: Entry) -> str:
    figure = bits_figure(report.get("linears") or [])
    words = "<p>Bits of a weight, where layers differ. 16 bits: not quantized.</p>\n"
    return _section("Bits by layer", words + figure) if figure else ""


def _notes(report: Entry) -> str:
    """What did not go as asked: fallbacks with their reasons, values beyond the dtype's range."""
    reasons = {entry["name"]: entry["fallback"] for entry in report.get("linears") or [] if entry.get("fallback")}
    named = {name: reasons.get(name, "") for name in report.get("fallbacks") or reasons}
    parts = ""
    if named:
        rows = [(str(name), str(reason)) for name, reason in named.items()]
        parts += "<p>Rounded to the nearest code instead:</p>\n"
        parts += _table(("Linear layer", "Reason"), rows, "Fallbacks", "words")
    overflows: Mapping[str, int] = report.get("overflows") or {}
    if overflows:
        rows = [(name, f"{count:,}") for name, count in overflows.items()]
        parts += f"<p>Values beyond the range of {escaped(report.get('dtype'))}, stored as its largest:</p>\n"
        parts += _table(("Tensor", "Values"), rows, "Overflows")
    return _section("Fallbacks and overflows", parts) if parts else ""


def _samples(report: Entry) -> str:
    samples, note = report.get("samples") or [], report.get("samples_note")
    text = f"<p>{escaped(note)}</p>\n" if note else ""
    if samples:
        text += "<p>The most probable answer to each prompt. Marked: from where the answers differ.</p>\n"
        text += "".join(map(_sample, samples))
    return _section("Answers before and after", text) if text else ""


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
    facts = report.get("calibration")
    quality = report.get("quality") or {}
    rows = [(key.replace("_", " "), _fact(value)) for key, value in (facts or {}).items()]
    if quality.get("text"):
        scored = f"{quality['text']}, {_fact(quality.get('tokens'))} tokens"
        rows.append(("scored on", scored))
    return _section("Calibration and scoring text", _facts(rows)) if rows else ""


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
    parts = _facts(versions)
    if options:
        parts += f"<details><summary>All options</summary>\n{_facts(options)}</details>\n"
    return _section("Versions and options", parts) if versions or options else ""


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escaped(title)}</h2>\n{content}</section>\n"


def _folded(title: str, summary: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    return _section(title, f"<details><summary>{escaped(summary)}</summary>\n{_table(head, rows, title)}</details>\n")


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    return (
        f"<dl class=facts>{''.join(f'<dt>{escaped(key)}</dt><dd>{escaped(value)}</dd>' for key, value in rows)}</dl>\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], label: str, style: str = "") -> str:
    """A table of text; the first cell of a row names it."""
    heads = "".join(f"<th scope=col>{escaped(cell)}</th>" if cell else "<td></td>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{escaped(row[0])}</th>{''.join(f'<td>{escaped(cell)}</td>' for cell in row[1:])}</tr>\n"
        for row in rows
    )
    table = f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
    return f'<div class="scroll {style}" tabindex=0 role=region aria-label="{label}">{table}</div>\n'


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
:root{color-scheme:light dark;--page:#fcfcfb;--card:#f4f4f1;--ink:#16171a;--soft:#55585f;--line:#dcdcd6;--rule:#8b8d92;
--accent:#1f5fae;--mark:#ffe2a8;--qkv:#2a78d6;--o:#d9561f;--gate_up:#12875c;--down:#6a4fc4;--other:#6b6e75;
--b4:#cfe1f7;--b8:#86b3ea;--b16:#3e6ea8;--b16ink:#fff}
@media(prefers-color-scheme:dark){:root{--page:#17181b;--card:#202226;--ink:#ececea;--soft:#a9acb3;--line:#35373d;
--rule:#7c7f87;--accent:#8bb8f0;--mark:#5f4a12;--qkv:#5aa0f0;--o:#f08050;--gate_up:#35b587;--down:#a692f0;
--other:#9b9ea6;--b4:#22364f;--b8:#2f5d94;--b16:#8bb8f0;--b16ink:#10151c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1040px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:.1rem 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:0 0 .6rem}
h3{font-size:1rem;margin:0;font-weight:600;overflow-wrap:anywhere}
h4{font-size:.78rem;margin:0 0 .25rem;color:var(--soft);font-weight:600}
p{margin:.2rem 0 .8rem}
section{margin-top:2.6rem}
.eyebrow,.verdict,.note,section>p{color:var(--soft)}
.eyebrow{margin:0;font-size:.9rem}
.note{font-size:.85rem}
.lead{font-size:1.05rem;margin:0 0 .6rem}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.25rem 1rem;margin:0 0 1.2rem;font-size:.92rem}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
.scroll+p{margin-top:1.2rem}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.38rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th,thead td{border-bottom:1px solid var(--rule);color:var(--soft);font-weight:600}
th:first-child,td:first-child{text-align:left;padding-left:0}
th:last-child,td:last-child{padding-right:0}
tbody th{font-weight:500}
.headline{margin-top:1rem}
.headline table{font-size:1.02rem}
.headline td:nth-child(3){font-weight:650}
.headline td:last-child{white-space:normal;color:var(--soft);font-size:.9rem;text-align:left;padding-left:1.2rem}
.headline th:last-child{text-align:left;padding-left:1.2rem}
.words td,.words thead th{text-align:left;white-space:normal}
pre{margin:0;padding:.9rem 1rem;background:var(--card);border:1px solid var(--line);border-radius:8px;
font:.88rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-x:auto;user-select:all}
pre span{white-space:pre}
.chart{display:block;width:100%;min-width:640px;height:auto}
.grid{stroke:var(--line)}
.base{stroke:var(--rule)}
.tick,.axis,.bits{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}
.axis{font-size:13px}
.mark{stroke:var(--page);stroke-width:1}
.mark:hover{stroke:var(--ink);stroke-width:2}
.qkv{fill:var(--qkv)}.o{fill:var(--o)}.gate_up{fill:var(--gate_up)}.down{fill:var(--down)}.other{fill:var(--other)}
.hollow{fill:var(--page);stroke-width:2}
.hollow.qkv{stroke:var(--qkv)}.hollow.o{stroke:var(--o)}.hollow.gate_up{stroke:var(--gate_up)}
.hollow.down{stroke:var(--down)}.hollow.other{stroke:var(--other)}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;list-style:none;margin:0 0 .6rem;padding:0;font-size:.9rem}
.legend li{display:flex;align-items:center;gap:.45rem}
.key{width:16px;height:16px}
rect{fill:var(--b8)}.b4 rect{fill:var(--b4)}.b16 rect{fill:var(--b16)}
.bits{fill:var(--ink)}.b16 .bits{fill:var(--b16ink)}
article{padding:1rem 1.1rem;margin:0 0 .9rem;background:var(--card);border:1px solid var(--line);border-radius:8px}
.verdict{font-size:.85rem;margin:.1rem 0 .7rem}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr));gap:.8rem 1.6rem}
.answer{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.94rem}
mark{background:var(--mark);color:inherit;border-radius:3px;padding:0 .1em;box-decoration-break:clone;
-webkit-box-decoration-break:clone}
summary{cursor:pointer;color:var(--accent);padding:.3rem 0}
details dl{margin-top:.6rem}
:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
@media(max-width:640px){main{padding:1.5rem 1rem 3rem}th,td{padding:.38rem .45rem}.headline table{font-size:.86rem}
.headline th{white-space:normal}.headline td:last-child,.headline th:last-child{font-size:.78rem;padding-left:.45rem}}
@media print{body{background:#fff}section,article{break-inside:avoid}}
"""
