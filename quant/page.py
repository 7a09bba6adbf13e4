"""The report as a page for people: one HTML file that loads nothing and runs nothing.

Everything that comes from the report is escaped; the page forbids itself scripts and connections besides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

KINDS = (("qkv", "circle"), ("o", "square"), ("gate_up", "triangle"), ("down", "diamond"), ("other", "cross"))
_MARKS = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "square": "M-4 -4h8v8h-8z",
    "triangle": "M0 -5.2L5 4h-10z",
    "diamond": "M0 -5.6L5.6 0L0 5.6L-5.6 0z",
    "cross": "M-4.5 -2h2.5v-2.5h4v2.5h2.5v4h-2.5v2.5h-4v-2.5h-2.5z",
}
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 16, 14, 46  # margins of a chart
_WIDTH, _HEIGHT, _CELL = 960, 380, 26
_LAYER = re.compile(r"layers\.(\d+)\.")
_UNPRINTABLE = re.compile(r"[^\t\n\x20-\x7e\xa0-\U0010ffff]")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NONE = "\N{EN DASH}"

Entry = Mapping[str, Any]


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
<title>{_text(title)}</title>
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
    facts = [report.get("architecture"), stored_text(report), report.get("device")]
    return (
        f"<header>\n<p class=eyebrow>llmkit quantize · {_text(report.get('method'))}</p>\n"
        f"<h1>{_text(_name(report.get('source')))}</h1>\n"
        f"<p class=lead>{' · '.join(_text(fact) for fact in facts if fact)}</p>\n"
        f"<dl class=paths><dt>From</dt><dd>{_text(report.get('source'))}</dd>"
        f"<dt>To</dt><dd>{_text(report.get('output'))}</dd></dl>\n"
        f"{_table(('', 'Before', 'After', 'Change'), _figures(report), 'headline')}</header>\n"
    )


def _figures(report: Entry) -> list[tuple[str, ...]]:
    """The rows of the headline: what, before, after, change."""
    rows: list[tuple[str, ...]] = []
    sizes, quality = report.get("sizes"), report.get("quality")
    if sizes:
        change = f"{sizes['ratio']:.1%} of the size"
        rows.append(("Size of the weights", _bytes(sizes["source_bytes"]), _bytes(sizes["checkpoint_bytes"]), change))
    if quality:
        before, after = _number(quality.get("reference_perplexity")), _number(quality.get("perplexity"))
        change = f"{after / before - 1:+.2%}" if before else NONE
        rows += [
            ("Perplexity", f"{before:.3f}", f"{after:.3f}", change),
            ("KL divergence, mean", NONE, f"{_number(quality.get('mean_kl')):.4f}", "nats a token"),
            ("KL divergence, 99th percentile", NONE, f"{_number(quality.get('p99_kl')):.4f}", "nats a token"),
            ("Same most likely token", NONE, f"{_number(quality.get('top1')):.1%}", "of the tokens"),
        ]
    seconds: Mapping[str, float] = report.get("seconds") or {}
    if seconds:
        stages = ", ".join(f"{stage} {_seconds(value)}" for stage, value in seconds.items())
        rows.append(("Time", NONE, _seconds(sum(seconds.values())), stages))
    return rows


def stored_text(report: Entry) -> str:
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
    return _section("Command", f'<pre class=command tabindex=0 aria-label="Command">{_text(line)}</pre>\n')


def _errors(report: Entry) -> str:
    """The chart of each linear's error."""
    linears = [entry for entry in report.get("linears") or [] if _layer(entry) is not None]
    points = [entry for entry in linears if math.isfinite(_number(entry.get("error")))]
    if not points:
        return ""
    calibrated = any(entry.get("tokens") for entry in points)
    what = "output" if calibrated else "weights"
    text = (
        f"<p>The share of the energy of each linear layer's {what} that rounding loses"
        f"{', on the calibration text' if calibrated else ''}. Lower is better; hollow marks are fallbacks.</p>\n"
    )
    return _section("Error of each linear layer", text + _legend(points) + _chart(points, f"lost energy of the {what}"))


def _legend(points: Iterable[Entry]) -> str:
    present = {_kind(entry) for entry in points}
    items = "".join(
        f'<li><svg class=key viewBox="-7 -7 14 14" aria-hidden=true><path class="mark {kind}" d="{_MARKS[mark]}"/>'
        f"</svg>{kind}</li>"
        for kind, mark in KINDS
        if kind in present
    )
    return f"<ul class=legend>{items}</ul>\n"


def _chart(points: Sequence[Entry], axis: str) -> str:
    """Layers along x, error along y on a log scale; errors of 0 lie on the lower edge."""
    errors = [float(entry["error"]) for entry in points if entry["error"] > 0] or [1.0]
    ticks = _ticks(min(errors), max(errors))
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    layers = 1 + max(_layer(entry) or 0 for entry in points)
    floor = _HEIGHT - _BOTTOM

    def y_of(error: float) -> float:
        share = (math.log10(error) - low) / (high - low) if error > 0 else 0.0
        return floor - share * (floor - _TOP)

    few = _labelled(ticks)
    parts = [
        f'<line class=grid x1={_LEFT} x2={_WIDTH - _RIGHT} y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}"/>'
        + (f'<text class=tick x={_LEFT - 10} y="{y_of(tick) + 4:.1f}" text-anchor=end>{_power(tick)}</text>')
        for tick in few
    ]
    parts += _layer_axis(layers, floor)
    parts.append(
        f'<text class=axis transform="translate(16 {(floor + _TOP) / 2:.0f}) rotate(-90)" text-anchor=middle>'
        f"{_text(axis)}</text>"
    )
    for entry in points:
        kind = _kind(entry)
        position = KINDS.index((kind, dict(KINDS)[kind])) - 1.5
        x = _x(_layer(entry) or 0, layers) + position * min(6.0, _step(layers) / 5)
        hollow = " hollow" if entry.get("fallback") else ""
        parts.append(
            f'<path class="mark {kind}{hollow}" transform="translate({x:.1f} {y_of(float(entry["error"])):.1f})" '
            f'd="{_MARKS[dict(KINDS)[kind]]}"><title>{_text(_hover(entry))}</title></path>'
        )
    return _svg(parts, _HEIGHT, f"{axis} by layer, on a log scale; the table of linear layers has the figures")


def _bits(report: Entry) -> str:
    """A grid of bits, kind by layer; nothing when all linears have the same."""
    linears = [entry for entry in report.get("linears") or [] if _layer(entry) is not None]
    if not linears:
        return ""
    layers = 1 + max(_layer(entry) or 0 for entry in linears)
    found: dict[tuple[str, int], set[int]] = {}
    for entry in linears:
        found.setdefault((_kind(entry), _layer(entry) or 0), set()).add(int(entry.get("bits") or 0))
    kinds = [kind for kind, _ in KINDS if any(kind == one for one, _ in found)]
    cells = {(kind, layer): found.get((kind, layer), {16}) for kind in kinds for layer in range(layers)}
    if len(set().union(*cells.values())) < 2:
        return ""
    parts = []
    for row, kind in enumerate(kinds):
        y = _TOP + row * _CELL
        parts.append(f'<text class=tick x={_LEFT - 10} y="{y + 17}" text-anchor=end>{kind}</text>')
        parts += [_cell(kind, n, layers, y, cells[kind, n], (kind, n) in found) for n in range(layers)]
    bottom = _TOP + len(kinds) * _CELL
    parts += _layer_axis(layers, bottom + 2)
    text = "<p>Bits of a weight, where layers differ. 16 bits: not quantized.</p>\n"
    return _section("Bits by layer", text + _svg(parts, bottom + _BOTTOM, "bits of each linear layer"))


def _cell(kind: str, layer: int, layers: int, y: int, bits: set[int], quantized: bool) -> str:
    width = _step(layers)
    label = str(min(bits)) if len(bits) == 1 else f"{min(bits)}+"
    words = " and ".join(map(str, sorted(bits))) + " bits" if quantized else "not quantized"
    x = _x(layer, layers)
    shown = f'<text class=bits x="{x:.1f}" y="{y + 17}" text-anchor=middle>{label}</text>' if width >= 14 else ""
    return (
        f'<g class="b{max(bits)}"><title>layer {layer}, {kind}: {words}</title>'
        f'<rect x="{x - width / 2 + 1:.1f}" y={y + 1} width="{max(1.0, width - 2):.1f}" height={_CELL - 2} rx=3 />'
        f"{shown}</g>"
    )


def _notes(report: Entry) -> str:
    """What did not go as asked: fallbacks with their reasons, values beyond the dtype's range."""
    reasons = {entry["name"]: entry["fallback"] for entry in report.get("linears") or [] if entry.get("fallback")}
    named = {name: reasons.get(name, "") for name in report.get("fallbacks") or reasons}
    parts = ""
    if named:
        rows = [(str(name), str(reason)) for name, reason in named.items()]
        parts += f"<p>{len(rows)} linear layers were rounded to the nearest code instead.</p>\n"
        parts += _table(("Linear layer", "Reason"), rows, "words")
    overflows: Mapping[str, int] = report.get("overflows") or {}
    if overflows:
        rows = [(name, f"{count:,}") for name, count in overflows.items()]
        parts += f"<p>Values beyond the range of {_text(report.get('dtype'))}, stored as its largest:</p>\n"
        parts += _table(("Tensor", "Values"), rows)
    return _section("Fallbacks and overflows", parts) if parts else ""


def _samples(report: Entry) -> str:
    samples, note = report.get("samples") or [], report.get("samples_note")
    text = f"<p>{_text(note)}</p>\n" if note else ""
    if samples:
        text += "<p>The most probable answer to each prompt. Marked: from where the answers differ.</p>\n"
        text += "".join(map(_sample, samples))
    return _section("Answers before and after", text) if text else ""


def _sample(sample: Entry) -> str:
    before, after = str(sample.get("before") or ""), str(sample.get("after") or "")
    same, tokens = int(sample.get("same_tokens") or 0), int(sample.get("tokens") or 0)
    verdict = "the same" if before == after else f"the same for {same} of {tokens} tokens"
    start = 0 if before != after and not same else _common(before, after)
    sides = "".join(
        f"<div><h4>{name}</h4><p class=answer dir=auto>{_marked(text, start)}</p></div>"
        for name, text in (("Before", before), ("After", after))
    )
    return (
        f"<article><h3 dir=auto>{_text(sample.get('prompt'))}</h3><p class=verdict>{verdict}</p>"
        f"<div class=sides>{sides}</div></article>\n"
    )


def _marked(text: str, start: int) -> str:
    if not text:
        return "<em>(nothing)</em>"
    rest = f"<mark>{_text(text[start:])}</mark>" if text[start:] else ""
    return _text(text[:start]) + rest


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
    rows = [(str(e.get("name")), _fact(e.get("bits")), f"{_number(e.get('kl')):.3e}") for e in entries]
    return _folded("Sensitivity", f"{len(rows)} measurements", ("Linear layer", "Bits", "KL"), rows)


def _linears(report: Entry) -> str:
    head = ("Linear layer", "Shape", "Method", "Bits", "Group", "Error", "Tokens", "Damp", "Fallback")
    rows = [
        (
            str(entry.get("name")),
            " \N{MULTIPLICATION SIGN} ".join(map(str, entry.get("shape") or [])),
            str(entry.get("method") or NONE),
            _fact(entry.get("bits")),
            {-1: "row"}.get(entry.get("group_size") or 0, _fact(entry.get("group_size"))),
            f"{_number(entry.get('error')):.3e}",
            _fact(entry.get("tokens")),
            _fact(entry.get("damp")),
            str(entry.get("fallback") or ""),
        )
        for entry in report.get("linears") or []
    ]
    return _folded("All linear layers", f"{len(rows)} linear layers", head, rows)


def _details(report: Entry) -> str:
    versions = [(key, str(value)) for key, value in (report.get("versions") or {}).items()]
    options = [(key.replace("_", " "), _fact(value)) for key, value in (report.get("options") or {}).items()]
    parts = _facts(versions)
    if options:
        parts += f"<details><summary>All options</summary>\n{_facts(options)}</details>\n"
    return _section("Versions and options", parts) if versions or options else ""


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{content}</section>\n"


def _folded(title: str, summary: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    return _section(title, f"<details><summary>{_text(summary)}</summary>\n{_table(head, rows)}</details>\n")


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    return f"<dl class=facts>{''.join(f'<dt>{_text(key)}</dt><dd>{_text(value)}</dd>' for key, value in rows)}</dl>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> str:
    """A table of text; the first cell of a row names it."""
    heads = "".join(f"<th scope=col>{_text(cell)}</th>" if cell else "<td></td>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{_text(row[0])}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in row[1:])}</tr>\n"
        for row in rows
    )
    table = f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
    return f'<div class="scroll {style}" tabindex=0 role=region aria-label="Table">{table}</div>\n'


def _svg(parts: Iterable[str], height: int, label: str) -> str:
    return (
        f'<div class=scroll><svg class=chart viewBox="0 0 {_WIDTH} {height}" role=img aria-label="{_text(label)}">\n'
        + "\n".join(parts)
        + "\n</svg></div>\n"
    )


def _layer_axis(layers: int, y: float) -> list[str]:
    """The x axis: a number for every layer, or every second, fifth, ... where they are many."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, layers) if layers / step <= 32 or step == layers)
    numbers = [
        f'<text class=tick x="{_x(layer, layers):.1f}" y="{y + 18}" text-anchor=middle>{layer}</text>'
        for layer in range(0, layers, every)
    ]
    line = f'<line class=base x1={_LEFT} x2={_WIDTH - _RIGHT} y1="{y}" y2="{y}"/>'
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return [line, *numbers, f'<text class=axis x="{middle}" y="{y + 38}" text-anchor=middle>decoder layer</text>']


def _step(layers: int) -> float:
    return (_WIDTH - _LEFT - _RIGHT) / layers


def _x(layer: int, layers: int) -> float:
    return _LEFT + (layer + 0.5) * _step(layers)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last one below `low` to the first one above `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    steps = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    start = max(index for index, step in enumerate(steps) if step <= low * (1 + 1e-9))
    stop = min(index for index, step in enumerate(steps) if step > high)
    return steps[start : stop + 1]


def _labelled(ticks: Sequence[float]) -> Sequence[float]:
    """Those that get a line and a number: powers of ten when there are enough of them."""
    powers = [tick for tick in ticks if math.log10(tick).is_integer()]
    return powers if len(powers) > 2 else ticks


def _power(value: float) -> str:
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = round(value / 10.0**exponent)
    power = "10" + str(exponent).translate(_SUPERSCRIPTS)
    return power if factor == 1 else f"{factor}·{power}"


def _hover(entry: Entry) -> str:
    words = f"{entry.get('name')}: error {_number(entry.get('error')):.3e}, {entry.get('bits')} bits"
    return f"{words}\n{entry['fallback']}" if entry.get("fallback") else words


def _kind(entry: Entry) -> str:
    kind = str(entry.get("name")).rpartition(".")[2]
    return kind if kind in dict(KINDS) else "other"


def _layer(entry: Entry) -> int | None:
    match = _LAYER.search(str(entry.get("name")))
    return int(match[1]) if match else None


def _name(reference: object) -> str:
    """The last part of a path or a hub id."""
    return str(reference or "model").rstrip("/").rpartition("/")[2]


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _fact(value: object) -> str:
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _text(value: object) -> str:
    """Escaped, for elements and quoted attributes; what HTML cannot hold becomes U+FFFD."""
    return escape(_UNPRINTABLE.sub("\ufffd", str(value).encode("utf-8", "replace").decode()))


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


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
.eyebrow,.verdict,section>p{color:var(--soft)}
.eyebrow{margin:0;font-size:.9rem}
.lead{font-size:1.05rem;margin:0 0 .6rem}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.25rem 1rem;margin:0 0 1.2rem;font-size:.92rem}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
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
font:.88rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;
user-select:all}
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
@media print{body{background:#fff}section,article{break-inside:avoid}}
"""
