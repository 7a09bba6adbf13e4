"""The report as a page: whole, escaped, and readable when parts of the report are missing."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from support.html_parser import Page

from llmkit.quant.quantize_charts import KINDS, bits_chart, error_chart, error_legend
from llmkit.quant.quantize_page import report_page
from llmkit.quant.scheme_charts import scheme_chart

SHAPES = {
    "attn.qkv": (192, 64),
    "attn.o": (64, 64),
    "mlp.gate_up": (256, 64),
    "mlp.down": (64, 128),
}


def linear(layer: int, name: str, **changes: Any) -> dict[str, Any]:
    error = 1e-5 * (layer + 1) * len(name)
    return {
        "name": f"layers.{layer}.{name}",
        "tensors": [f"model.layers.{layer}.{name}.weight"],
        "shape": list(SHAPES.get(name, (64, 64))),
        "method": "gptq",
        "bits": 4,
        "group_size": 64,
        "error": error,
        "tokens": 16384,
        "damp": 0.01,
        "fallback": None,
    } | changes


def report(**changes: Any) -> dict[str, Any]:
    return {
        "command": "quantize",
        "versions": {"llmkit": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "source": "someone/Some-Model",
        "output": "out/some-int4",
        "architecture": "LlamaForCausalLM",
        "method": "gptq",
        "format": "gptq",
        "schemes": [
            {"label": "INT4 in groups of 64", "bits": 4, "group_size": 64, "weights": 1000}
        ],
        "kv": None,
        "dtype": "BF16",
        "device": "cpu",
        "options": {"method": "gptq", "bits": None, "evaluate": True, "samples": 128},
        "calibration": {
            "source": "builtin",
            "name": "pydoc_data.topics",
            "windows": 16,
            "tokens": 16384,
        },
        "quality": {
            "perplexity": 12.0,
            "reference_perplexity": 10.0,
            "mean_kl": 0.1269,
            "p99_kl": 0.7965,
            "top1": 0.8193,
            "tokens": 8192,
            "text": "held-out text",
        },
        "sizes": {"source_bytes": 2 << 20, "checkpoint_bytes": 1 << 20, "ratio": 0.5},
        "fallbacks": [],
        "overflows": {},
        "linears": [linear(layer, name) for layer in range(3) for name in SHAPES],
        "seconds": {"check": 1.5, "quantize": 100.0},
        "command_line": "llmkit quantize someone/Some-Model --method gptq -o 'out/some int4'",
        "samples": [
            {
                "prompt": "What is 1 < 2?",
                "before": "It is true, of course.",
                "after": "It is trivial.",
                "same_tokens": 2,
                "tokens": 6,
            },
            {"prompt": "Hello", "before": "Hi.", "after": "Hi.", "same_tokens": 2, "tokens": 2},
            {"prompt": "More", "before": "some", "after": "", "same_tokens": 0, "tokens": 1},
        ],
        "samples_note": None,
    } | changes


def test_page_is_complete_and_names_everything() -> None:
    data = report_page(report())
    page = Page(data)
    assert data.startswith(b"<!DOCTYPE html>\n<html lang=")
    names = page.within("th")
    assert all(entry["name"] in names for entry in report()["linears"])
    assert page.within("h1") == ["Some-Model"]
    for words in (
        "2.0 MiB",
        "1.0 MiB",
        "50.0% of the size",
        "12.000",
        "+20.00%",
        "0.1269",
        "81.9%",
        "1 min 41 s",
    ):
        assert words in page.within("td"), words
    assert "check 1.5 s, quantize 1 min 40 s" in page.text
    assert "INT4 in groups of 64; gptq format" in page.text
    assert report()["command_line"] in page.text
    assert {"2.13.0", "16,384", "held-out text, 8,192 tokens", "yes"} <= set(page.within("dd"))
    assert "<h2>Bits by layer" not in data.decode()
    assert "<h2>Fallbacks" not in data.decode()


def test_page_loads_and_runs_nothing() -> None:
    data = report_page(report())
    text = data.decode()
    page = Page(data)
    assert (
        "http://" not in text
        and "https://" not in text
        and "url(" not in text
        and "@import" not in text
    )
    assert not {"script", "link", "img", "iframe", "form", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "href", "action", "style"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    policy = [
        a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme: dark" in text


def test_page_escapes_everything_from_the_report() -> None:
    evil = "<script>alert('1')</script>\"><img src=x onerror=a>&amp;\x00\ud800"

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                evil + key if key == "check" else key: poison(item) for key, item in value.items()
            }
        if isinstance(value, list):
            return [poison(item) for item in value]
        return value + evil if isinstance(value, str) else value

    with_nan = poison(
        report(samples_note="note", overflows={"tensor": 3}, sensitivity=[{"name": "n", "bits": 4}])
    )
    with_nan["linears"][0]["fallback"] = evil
    page = Page(report_page(with_nan))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    harmless = evil.replace("\x00", "\ufffd").replace("\ud800", "?")
    answers = "".join(text for tag, text in page.texts if tag in ("p", "mark"))
    assert f"It is true, of course.{harmless}" in answers
    assert page.text.count("<script>alert('1')</script>") > 40


def test_page_marks_answers_from_where_they_differ() -> None:
    page = Page(report_page(report()))
    assert page.within("mark") == ["true, of course.", "trivial.", "some"]
    assert page.within("em") == ["(nothing)"]
    assert [text for text in page.within("p") if "same" in text or "different" in text] == [
        "the same for 2 of 6 tokens",
        "the same answer",
        "different from the first token on",
    ]
    assert page.text.count("Hi.") == 1


@pytest.mark.parametrize("empty", [None, "absent"])
def test_page_leaves_out_missing_parts(empty: str | None) -> None:
    optional = (
        "quality",
        "calibration",
        "samples",
        "command_line",
        "sizes",
        "seconds",
        "schemes",
        "versions",
        "kv",
    )
    given = report()
    for name in (
        *optional,
        "options",
        "linears",
        "fallbacks",
        "overflows",
        "samples_note",
        "format",
    ):
        if empty is None:
            given[name] = None
        else:
            del given[name]
        page = Page(report_page(given))
        assert "None" not in page.text
    assert page.within("h2") == []
    assert "BF16" in page.text
    Page(report_page({}))


def test_page_shows_the_note_in_place_of_samples() -> None:
    page = Page(report_page(report(samples=[], samples_note="the weights need 9 bytes & more")))
    assert "the weights need 9 bytes & more" in page.within("p")


def test_page_names_fallbacks_and_overflows() -> None:
    reason = "saw 3 calibration tokens of the 128 an expert needs"
    linears = [linear(0, "mlp.experts.1.down", fallback=reason), linear(0, "attn.o")]
    given = report(
        linears=linears,
        fallbacks=["layers.0.mlp.experts.1.down"],
        overflows={"model.norm.weight": 1234},
    )
    page = Page(report_page(given))
    assert page.within("td").count(reason) == 2  # among the fallbacks and in the table of all
    assert "1,234" in page.within("td")
    marks = [
        attributes["class"]
        for tag, attributes in page.tags
        if tag == "path" and "transform" in attributes
    ]
    assert marks == ["mark down hollow", "mark o"]


MIXED: dict[str, Any] = {
    "sensitivity": [
        {
            "name": "layers.0.attn.o",
            "weights": 300,
            "scheme": "fp8",
            "bits": 8.0,
            "kl": {"w4a16": 0.25, "fp8": 0.0125},
        },
        {
            "name": "layers.0.mlp.down",
            "weights": 100,
            "scheme": "16-bit",
            "bits": 16.0,
            "kl": {"w4a16": 0.5},
        },
    ],
    "mean_bits": 10.0,
    "attempts": [{"mean_bits": 8.0, "mean_kl": 0.06}, {"mean_bits": 10.0, "mean_kl": 0.03}],
    "uniform": [
        {"scheme": "w4a16", "mean_bits": 4.25, "mean_kl": 0.9},
        {"scheme": "fp8", "mean_bits": 8.0, "mean_kl": 0.02},
        {"scheme": "w8a16", "mean_bits": 8.25, "mean_kl": 0.018},
    ],
    "frontier": [
        {"mean_bits": 4.25, "mean_kl": 0.8},
        {"mean_bits": 8.0, "mean_kl": 0.05},
        {"mean_bits": 12.0, "mean_kl": 0.02},
        {"mean_bits": 16.0, "mean_kl": 0.0},
    ],
    "options": {"method": "rtn", "target_kl": 0.04},
}


def test_page_lists_the_sensitivity_of_each_scheme() -> None:
    page = Page(report_page(report(**MIXED)))
    assert "Measurements: 2" in page.within("summary")
    assert {"KL, w4a16", "KL, fp8", "Chosen schemes"} <= {
        *page.within("th"),
        *(attributes.get("aria-label") for _, attributes in page.tags),
    }
    cells = page.within("td")
    assert {"2.50e-01", "1.25e-02", "5.00e-01", "75.0%", "25.0%"} <= set(cells)


def test_scheme_chart_places_choices_by_bits_and_kl() -> None:
    figure = scheme_chart(report(**MIXED))
    marks = places(figure)
    assert len(marks) == 5
    uniform, attempts = marks[:3], marks[3:]
    # More bits lie further right, a lower KL lower; bits are linear, KL is logarithmic.
    assert uniform[0][0] < uniform[1][0] == pytest.approx(attempts[0][0], abs=0.1)
    assert uniform[0][1] < attempts[0][1] < attempts[1][1] < uniform[1][1] < uniform[2][1]
    step = (attempts[1][0] - attempts[0][0]) / 2
    assert uniform[0][0] == pytest.approx(attempts[0][0] - 3.75 * step, abs=0.2)
    halving = attempts[1][1] - attempts[0][1]
    assert uniform[0][1] == pytest.approx(attempts[0][1] - math.log2(0.9 / 0.06) * halving, abs=0.3)
    for words in ("target", "w4a16 for all layers: 4.25 bits, KL 0.9", "attempt 2: 10.00 bits"):
        assert words in figure
    (ring,) = re.findall(r'class="ring" cx="([\d.]+)" cy="([\d.]+)"', figure)
    assert tuple(map(float, ring)) == attempts[1]
    # The labels of close marks do not cover each other.
    labels = [
        float(y)
        for y, name in re.findall(r'y="([\d.]+)" text-anchor="start">([^<]+)<', figure)
        if name in ("fp8", "w8a16")
    ]
    assert abs(labels[0] - labels[1]) >= 13


def test_scheme_chart_needs_measurements() -> None:
    assert scheme_chart(report()) == ""
    assert "<h2>Schemes" not in report_page(report()).decode()
    assert "<h2>Schemes" in report_page(report(**MIXED)).decode()
    broken = {"attempts": [{"mean_bits": None, "mean_kl": math.nan}], "frontier": [{}]}
    assert scheme_chart(report(**(MIXED | broken))) == ""
    bits = scheme_chart(report(**(MIXED | {"options": {"target_bits": 10.0}})))
    assert 'class="target"' in bits


def places(figure: str) -> list[tuple[float, float]]:
    found = re.findall(r'class="mark [^"]*" transform="translate\(([\d.]+) ([\d.]+)\)"', figure)
    return [(float(x), float(y)) for x, y in found]


def test_error_chart_has_a_mark_for_each_linear_on_a_log_scale() -> None:
    errors = [1e-5, 1e-4, 1e-3, 0.0, None, math.nan, 1e-30]
    figure = error_chart(
        [linear(layer, "attn.o", error=error) for layer, error in enumerate(errors)], "lost energy"
    )
    marks = places(figure)
    assert len(marks) == 5
    (x0, y0), (x1, y1), (_, y2), (_, zero), (_, tiny) = marks
    assert x1 > x0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y0 > y1 > y2
    assert zero == tiny == max(y for _, y in marks)
    assert "layers.2.attn.o: error 1.000e-03, 4 bits" in figure
    assert error_chart([linear(0, "attn.o", error=None)], "x") == error_chart([], "x") == ""


@pytest.mark.parametrize(
    "errors",
    [[0.0], [1e-3], [1.0, 2.0], [5e-324, 1.0], [1e-12, 1e300], [0.0999, 0.1], [9.9e-4, 1.01e-3]],
)
def test_error_chart_keeps_marks_within_its_edges(errors: list[float]) -> None:
    figure = error_chart([linear(0, "mlp.down", error=error) for error in errors], "x")
    marks = places(figure)
    assert len(marks) == len(errors)
    assert all(14 <= y <= 334 for _, y in marks)
    lines = re.findall(r'<line class="grid" [^>]*>', figure)
    assert len(lines) >= 2


def test_error_chart_gives_every_kind_a_shape() -> None:
    names = ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.experts.7.down", "mlp.router")
    linears = [linear(0, name) for name in names]
    page = Page((error_legend(linears) + error_chart(linears, "x")).encode())
    assert page.within("li") == list(KINDS)
    assert len({attributes["d"] for tag, attributes in page.tags if tag == "path"}) == 5


def test_bits_chart_is_drawn_where_bits_differ() -> None:
    linears = [linear(layer, name) for layer in range(3) for name in SHAPES]
    assert bits_chart(linears) == bits_chart([]) == ""
    linears[1]["bits"] = 8
    assert len(re.findall("<rect", bits_chart(linears))) == 12
    assert "layer 0, o: 8 bits" in bits_chart(linears)
    missing = bits_chart([entry for entry in linears if entry["name"] != "layers.1.mlp.down"])
    assert "layer 1, down: 16 bits" in missing
    experts = [
        linear(0, f"mlp.experts.{index}.down", bits=bits) for index, bits in enumerate((4, 8, 4))
    ]
    assert "layer 0, down: 4 and 8 bits" in bits_chart(experts)
    assert ">4+<" in bits_chart(experts)
    assert "<h2>Bits by layer" in report_page(report(linears=linears)).decode()


def test_charts_of_many_layers_are_drawn() -> None:
    linears = [linear(layer, "attn.o", bits=4 + 4 * (layer % 2)) for layer in range(400)]
    assert len(places(error_chart(linears, "x"))) == 400
    Page(report_page(report(linears=linears)))
