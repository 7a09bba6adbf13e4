"""The quantize report's charts: the error of each linear layer, and its bits.

Every kind of linear ("qkv", "down", ...) has a shape, and a colour: the CSS class of its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmkit.common import svg_charts as draw
from llmkit.common.svg_charts import MARKERS, WIDTH

# The shape of each kind of linear.
KINDS = dict(zip(("qkv", "o", "gate_up", "down", "other"), MARKERS, strict=True))
# Errors below this fraction of the largest error are drawn at the lower edge.
ERROR_SPAN = 1e-8

# The margins of a chart.
_LEFT = 74
_RIGHT = 16
_TOP = 14
_BOTTOM = 46
_HEIGHT = 380
_CELL_HEIGHT = 26
_MIN_LABEL_WIDTH = 14  # narrower cells have no number
_MAX_LAYER_NUMBERS = 32
_LAYER = re.compile(r"layers\.(\d+)\.")

Entry = Mapping[str, Any]  # of the report, for a linear


def error_chart(linears: Iterable[Entry], axis: str) -> str:
    """The error of each linear by layer on a log scale; "" when none has an error.

    axis: the axis' title, which says what the error is. An error of 0 lies on the lower edge.
    """
    points = _finite_errors(linears)
    if not points:
        return ""
    errors = [float(entry["error"]) for _, entry in points if entry["error"] > 0] or [1.0]
    highest = max(errors)
    ticks = draw.log_ticks(max(min(errors), highest * ERROR_SPAN), highest)
    low = math.log10(ticks[0][0])
    high = math.log10(ticks[-1][0])
    num_layers = 1 + max(layer for layer, _ in points)
    bottom = _HEIGHT - _BOTTOM

    def y_of(error: float) -> float:
        share = (math.log10(error) - low) / (high - low) if error > 0 else 0.0
        return bottom - max(0.0, share) * (bottom - _TOP)

    parts = []
    for value, label in _visible_ticks(ticks):
        y = y_of(value)
        parts.append(draw.line("grid", (_LEFT, y), (WIDTH - _RIGHT, y)))
        parts.append(draw.text("tick", _LEFT - 10, y + 4, label, "end"))
    parts += _layer_axis(num_layers, bottom)
    parts.append(draw.vertical_text("axis", 16, (bottom + _TOP) / 2, axis))
    parts += [
        _error_marker(entry, layer, num_layers, y_of(float(entry["error"])))
        for layer, entry in points
    ]
    label = f"{axis} by layer, on a log scale; the table of linear layers has the figures"
    return draw.svg(parts, _HEIGHT, label)


def error_legend(linears: Iterable[Entry]) -> str:
    """The legend of the error chart, as HTML."""
    present = {_kind(entry) for _, entry in _finite_errors(linears)}
    return draw.legend((kind, shape, kind) for kind, shape in KINDS.items() if kind in present)


def bits_chart(linears: Iterable[Entry]) -> str:
    """A grid of bits, kinds by layers; "" when all linears have the same bits.

    A linear that the report does not list is not quantized and counts as 16 bits.
    """
    found: dict[tuple[str, int], set[int]] = {}
    for layer, entry in _by_layer(linears):
        bits = int(entry.get("bits") or 16)
        found.setdefault((_kind(entry), layer), set()).add(bits)
    present = {kind for kind, _ in found}
    kinds = [kind for kind in KINDS if kind in present]
    num_layers = 1 + max((layer for _, layer in found), default=-1)
    cells = {
        (kind, layer): found.get((kind, layer), {16})
        for kind in kinds
        for layer in range(num_layers)
    }
    if len(set().union(*cells.values())) < 2:
        return ""
    parts = []
    for row, kind in enumerate(kinds):
        y = _TOP + row * _CELL_HEIGHT
        parts.append(draw.text("tick", _LEFT - 10, y + 17, kind, "end"))
        parts += [
            _bits_cell(kind, layer, num_layers, y, cells[kind, layer])
            for layer in range(num_layers)
        ]
    bottom = _TOP + len(kinds) * _CELL_HEIGHT
    parts += _layer_axis(num_layers, bottom + 2)
    return draw.svg(parts, bottom + _BOTTOM, "bits of each linear layer")


def number(value: object) -> float:
    """A number of the report; NaN for anything else."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def _finite_errors(linears: Iterable[Entry]) -> list[tuple[int, Entry]]:
    """The linears of decoder layers that have an error, with the layer's number."""
    return [
        (layer, entry)
        for layer, entry in _by_layer(linears)
        if math.isfinite(number(entry.get("error")))
    ]


def _by_layer(linears: Iterable[Entry]) -> list[tuple[int, Entry]]:
    """The linears of decoder layers, with the layer's number."""
    found = []
    for entry in linears:
        match = _LAYER.search(str(entry.get("name")))
        if match:
            found.append((int(match[1]), entry))
    return found


def _kind(entry: Entry) -> str:
    kind = str(entry.get("name")).rpartition(".")[2]
    return kind if kind in KINDS else "other"


def _error_marker(entry: Entry, layer: int, num_layers: int, y: float) -> str:
    """A linear's mark, a little left or right of its layer's middle by its kind."""
    kind = _kind(entry)
    offset = (list(KINDS).index(kind) - 1.5) * min(6.0, _layer_width(num_layers) / 5)
    css_class = f"{kind} hollow" if entry.get("fallback") else kind
    tooltip = (
        f"{entry.get('name')}: error {number(entry.get('error')):.3e}, {entry.get('bits')} bits"
    )
    if entry.get("fallback"):
        tooltip += f"\n{entry['fallback']}"
    x = _layer_x(layer, num_layers) + offset
    return draw.marker(css_class, KINDS[kind], x, y, tooltip)


def _bits_cell(kind: str, layer: int, num_layers: int, y: int, bits: set[int]) -> str:
    width = _layer_width(num_layers)
    x = _layer_x(layer, num_layers)
    cell = draw.rect(
        "cell", x - width / 2 + 1, y + 1, max(1.0, width - 2), _CELL_HEIGHT - 2, radius=3
    )
    if width >= _MIN_LABEL_WIDTH:
        label = str(min(bits)) if len(bits) == 1 else f"{min(bits)}+"
        cell += draw.text("bits", x, y + 17, label)
    words = " and ".join(map(str, sorted(bits)))
    return draw.group(cell, f"layer {layer}, {kind}: {words} bits", f"b{max(bits)}")


def _layer_axis(num_layers: int, y: float) -> list[str]:
    """The x axis: a number for every layer, or for every second, fifth, ... of many."""
    step = next(
        (step for step in (1, 2, 5, 10, 20, 50, 100) if num_layers / step <= _MAX_LAYER_NUMBERS),
        num_layers,
    )
    parts = [draw.line("base", (_LEFT, y), (WIDTH - _RIGHT, y))]
    parts += [
        draw.text("tick", _layer_x(layer, num_layers), y + 18, layer)
        for layer in range(0, num_layers, step)
    ]
    parts.append(draw.text("axis", (_LEFT + WIDTH - _RIGHT) / 2, y + 38, "decoder layer"))
    return parts


def _layer_width(num_layers: int) -> float:
    return (WIDTH - _LEFT - _RIGHT) / num_layers


def _layer_x(layer: int, num_layers: int) -> float:
    return _LEFT + (layer + 0.5) * _layer_width(num_layers)


def _visible_ticks(ticks: Sequence[tuple[float, str]]) -> Sequence[tuple[float, str]]:
    """Only the powers of ten, when there are enough of them."""
    powers = [tick for tick in ticks if tick[1].startswith("10")]
    return powers if len(powers) > 2 else ticks
