"""The report's figures as inline SVG: the error of each linear layer, and its bits.

Colours are the page's, by class; a kind has a shape of its own too. Widths and heights are in the drawing's units.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmkit.checkpoint.page import WIDTH, escaped, figure, svg

KINDS = {  # the shapes of their marks
    "qkv": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "o": "M-4 -4h8v8h-8z",
    "gate_up": "M0 -5.2L5 4h-10z",
    "down": "M0 -5.6L5.6 0L0 5.6L-5.6 0z",
    "other": "M-4.5 -2h2.5v-2.5h4v2.5h2.5v4h-2.5v2.5h-4v-2.5h-2.5z",
}
SPAN = 1e-8  # of the largest error is the least that has a place of its own
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 16, 14, 46  # margins of a chart
_HEIGHT, _CELL = 380, 26
_LAYER = re.compile(r"layers\.(\d+)\.")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Entry = Mapping[str, Any]


def error_figure(linears: Iterable[Entry], axis: str) -> str:
    """The error of each linear by layer, with a legend; "" when none has an error. `axis` says what the error is."""
    points = [(layer, entry) for layer, entry in _by_layer(linears) if math.isfinite(number(entry.get("error")))]
    return _legend(entry for _, entry in points) + _chart(points, axis) if points else ""


def bits_figure(linears: Iterable[Entry]) -> str:
    """A grid of bits, kind by layer, with 16 for what is not quantized; "" when all linears have the same."""
    found: dict[tuple[str, int], set[int]] = {}
    for layer, entry in _by_layer(linears):
        found.setdefault((_kind(entry), layer), set()).add(int(entry.get("bits") or 16))
    kinds = [kind for kind in KINDS if any(kind == one for one, _ in found)]
    layers = 1 + max((layer for _, layer in found), default=-1)
    cells = {(kind, layer): found.get((kind, layer), {16}) for kind in kinds for layer in range(layers)}
    if len(set().union(*cells.values())) < 2:
        return ""
    parts = []
    for row, kind in enumerate(kinds):
        y = _TOP + row * _CELL
        parts.append(f'<text class=tick x={_LEFT - 10} y="{y + 17}" text-anchor=end>{kind}</text>')
        parts += [_cell(kind, layer, layers, y, cells[kind, layer]) for layer in range(layers)]
    bottom = _TOP + len(kinds) * _CELL
    parts += _layer_axis(layers, bottom + 2)
    return figure(svg(parts, bottom + _BOTTOM, "bits of each linear layer"))


def number(value: object) -> float:
    """A figure of the report; NaN where there is none."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def _legend(points: Iterable[Entry]) -> str:
    present = {_kind(entry) for entry in points}
    items = "".join(
        f'<li><svg class=key viewBox="-7 -7 14 14" aria-hidden=true><path class="mark {kind}" d="{mark}"/>'
        f"</svg>{kind}</li>"
        for kind, mark in KINDS.items()
        if kind in present
    )
    return f"<ul class=legend>{items}</ul>\n"


def _chart(points: Sequence[tuple[int, Entry]], axis: str) -> str:
    """Layers along x, error along y on a log scale; errors of 0 lie on the lower edge."""
    errors = [float(entry["error"]) for _, entry in points if entry["error"] > 0] or [1.0]
    high = max(errors)
    ticks = _ticks(max(min(errors), high * SPAN), high)
    bottom, top = math.log10(ticks[0][0]), math.log10(ticks[-1][0])
    layers = 1 + max(layer for layer, _ in points)
    floor = _HEIGHT - _BOTTOM

    def y_of(error: float) -> float:
        share = (math.log10(error) - bottom) / (top - bottom) if error > 0 else 0.0
        return floor - max(0.0, share) * (floor - _TOP)

    parts = [
        f'<line class=grid x1={_LEFT} x2={WIDTH - _RIGHT} y1="{y_of(value):.1f}" y2="{y_of(value):.1f}"/>'
        f'<text class=tick x={_LEFT - 10} y="{y_of(value) + 4:.1f}" text-anchor=end>{label}</text>'
        for value, label in _thinned(ticks)
    ]
    parts += _layer_axis(layers, floor)
    parts.append(
        f'<text class=axis transform="translate(16 {(floor + _TOP) / 2:.0f}) rotate(-90)" text-anchor=middle>'
        f"{escaped(axis)}</text>"
    )
    parts += [_mark(entry, _x(layer, layers), y_of(float(entry["error"])), _step(layers)) for layer, entry in points]
    label = f"{axis} by layer, on a log scale; the table of linear layers has the figures"
    return figure(svg(parts, _HEIGHT, label))


def _mark(entry: Entry, x: float, y: float, step: float) -> str:
    """A linear's mark, a little left or right of the layer's middle by its kind."""
    kind = _kind(entry)
    x += (list(KINDS).index(kind) - 1.5) * min(6.0, step / 5)
    hollow = " hollow" if entry.get("fallback") else ""
    return (
        f'<path class="mark {kind}{hollow}" transform="translate({x:.1f} {y:.1f})" d="{KINDS[kind]}">'
        f"<title>{escaped(_hover(entry))}</title></path>"
    )


def _by_layer(linears: Iterable[Entry]) -> list[tuple[int, Entry]]:
    """Each linear of a decoder layer with the layer's number."""
    matches = ((_LAYER.search(str(entry.get("name"))), entry) for entry in linears)
    return [(int(match[1]), entry) for match, entry in matches if match]


def _cell(kind: str, layer: int, layers: int, y: int, bits: set[int]) -> str:
    width = _step(layers)
    label = str(min(bits)) if len(bits) == 1 else f"{min(bits)}+"
    words = " and ".join(map(str, sorted(bits))) + " bits"
    x = _x(layer, layers)
    shown = f'<text class=bits x="{x:.1f}" y="{y + 17}" text-anchor=middle>{label}</text>' if width >= 14 else ""
    return (
        f'<g class="b{max(bits)}"><title>layer {layer}, {kind}: {words}</title>'
        f'<rect x="{x - width / 2 + 1:.1f}" y={y + 1} width="{max(1.0, width - 2):.1f}" height={_CELL - 2} rx=3 />'
        f"{shown}</g>"
    )


def _layer_axis(layers: int, y: float) -> list[str]:
    """The x axis: a number for every layer, or every second, fifth, ... where they are many."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, layers) if layers / step <= 32 or step == layers)
    numbers = [
        f'<text class=tick x="{_x(layer, layers):.1f}" y="{y + 18}" text-anchor=middle>{layer}</text>'
        for layer in range(0, layers, every)
    ]
    line = f'<line class=base x1={_LEFT} x2={WIDTH - _RIGHT} y1="{y}" y2="{y}"/>'
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    return [line, *numbers, f'<text class=axis x="{middle}" y="{y + 38}" text-anchor=middle>decoder layer</text>']


def _step(layers: int) -> float:
    return (WIDTH - _LEFT - _RIGHT) / layers


def _x(layer: int, layers: int) -> float:
    return _LEFT + (layer + 0.5) * _step(layers)


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """1, 2 and 5 times powers of ten and how they are written, from the last up to `low` to the first above `high`."""
    first, last = math.floor(math.log10(low)) - 1, math.floor(math.log10(high)) + 1
    steps = [(float(f"{factor}e{power}"), factor, power) for power in range(first, last + 1) for factor in (1, 2, 5)]
    start = max(index for index, (value, _, _) in enumerate(steps) if value <= low)
    stop = min(index for index, (value, _, _) in enumerate(steps) if value > high)
    return [(value, _written(factor, power)) for value, factor, power in steps[start : stop + 1]]


def _thinned(ticks: Sequence[tuple[float, str]]) -> Sequence[tuple[float, str]]:
    """Powers of ten alone where there are enough of them."""
    powers = [tick for tick in ticks if tick[1].startswith("10")]
    return powers if len(powers) > 2 else ticks


def _written(factor: int, power: int) -> str:
    written = "10" + str(power).translate(_SUPERSCRIPTS)
    return written if factor == 1 else f"{factor}·{written}"


def _hover(entry: Entry) -> str:
    words = f"{entry.get('name')}: error {number(entry.get('error')):.3e}, {entry.get('bits')} bits"
    return f"{words}\n{entry['fallback']}" if entry.get("fallback") else words


def _kind(entry: Entry) -> str:
    kind = str(entry.get("name")).rpartition(".")[2]
    return kind if kind in KINDS else "other"
