"""Gates: how they are parsed and checked, and that a gate on nothing never passes."""

import math

import pytest

from llmkit.bench.gates import (
    Gate,
    check_gates,
    parse_gate,
    require_gate_metrics,
    require_passed,
)
from llmkit.common.errors import GateError, UsageError


@pytest.mark.parametrize(
    ("text", "metric", "operator", "number", "relative_to_baseline"),
    [
        ("mean_kl<=0.02", "mean_kl", "<=", 0.02, False),
        (" perplexity < 1.5e1 ", "perplexity", "<", 15.0, False),
        ("output_tps>=0.9*baseline", "output_tps", ">=", 0.9, True),
        ("online.ttft_p99_ms <= baseline * 1.1", "online.ttft_p99_ms", "<=", 1.1, True),
        ("acceptance>=0.9x", "acceptance", ">=", 0.9, True),
        ("online.ttft_p99_ms <= 1.5e0 x", "online.ttft_p99_ms", "<=", 1.5, True),
        ("checkpoint_bytes<baseline", "checkpoint_bytes", "<", 1.0, True),
        ("top1>.9", "top1", ">", 0.9, False),
    ],
)
def test_gate_is_parsed(
    text: str, metric: str, operator: str, number: float, relative_to_baseline: bool
) -> None:
    assert parse_gate(text) == Gate(text, metric, operator, number, relative_to_baseline)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mean_kl",
        "mean_kl<=",
        "<=3",
        "mean_kl=0.2",
        "mean_kl<=nan",
        "mean_kl<=0.2 GiB",
        "mean_kl<=0.9*base",
        "mean_kl<=-1",
        "mean_kl<=x",
        "mean_kl<=x0.9",
        "mean_kl<=0.9x*baseline",
        "mean_kl<=0.9x2",
        "mean_kl<=0.02<=1",
    ],
)
def test_gate_with_a_syntax_error_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not understood. Expected"):
        parse_gate(text)


@pytest.mark.parametrize(
    ("texts", "canonical"),
    [
        (("mean_kl<=0.020", " mean_kl <= 2e-2"), "mean_kl<=0.02"),
        (("top1>=0.97x", "top1 >= 0.97 * baseline", "top1>=baseline*.97"), "top1>=0.97*baseline"),
        (("top1>=1x", "top1>=baseline", "top1 >= 1.0*baseline"), "top1>=baseline"),
        (("checkpoint_bytes<1234567890",), "checkpoint_bytes<1234567890"),
    ],
)
def test_gate_has_one_form_in_reports(texts: tuple[str, ...], canonical: str) -> None:
    base = {"mean_kl": 1.0, "top1": 1.0, "checkpoint_bytes": 1.0}
    for text in texts:
        assert parse_gate(text).canonical == canonical
        assert parse_gate(canonical).canonical == canonical
        (result,) = check_gates([parse_gate(text)], {"x": base}, base)
        assert result.gate == canonical


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("mean_lk<=1", "The nearest is mean_kl"),
        ("online.output_tsp>=1", "The nearest is output_tps"),
        ("online.perplexity<=3", "The nearest is perplexity"),
        ("online.<=1", "Metrics are perplexity, mean_kl.*output_tps"),
    ],
)
def test_gate_on_an_unknown_metric_is_refused(text: str, hint: str) -> None:
    with pytest.raises(UsageError, match=rf"names no metric. {hint}"):
        parse_gate(text)


FIGURES = {"mean_kl": 0.03, "single.output_tps": 90.0, "online.output_tps": 40.0}
BASE = {"perplexity": 10.0, "single.output_tps": 100.0, "online.output_tps": 50.0}


def check(*gates: str) -> list[tuple[str, float, bool]]:
    results = check_gates([parse_gate(gate) for gate in gates], {"int4": FIGURES}, BASE)
    return [(result.metric, result.limit, result.passed) for result in results]


def test_gate_compares_with_its_limit() -> None:
    assert check("mean_kl<=0.03", "mean_kl<0.03", "mean_kl>=0.03", "mean_kl>0.02") == [
        ("mean_kl", 0.03, True),
        ("mean_kl", 0.03, False),
        ("mean_kl", 0.03, True),
        ("mean_kl", 0.02, True),
    ]


def test_gate_without_a_scenario_checks_every_scenario() -> None:
    assert check("output_tps>=0.9*baseline") == [
        ("single.output_tps", 90.0, True),
        ("online.output_tps", 45.0, False),
    ]
    assert check("single.output_tps>=80") == [("single.output_tps", 80.0, True)]


def test_gate_without_a_scenario_fails_where_one_has_no_value() -> None:
    expected = {"int4": ["mean_kl", "single.output_tps", "burst.output_tps", "online.output_tps"]}
    results = check_gates([parse_gate("output_tps>=1")], {"int4": FIGURES}, BASE, expected)
    assert [(result.metric, result.passed) for result in results] == [
        ("single.output_tps", True),
        ("burst.output_tps", False),
        ("online.output_tps", True),
    ]
    with pytest.raises(GateError, match=r"1 of 3.*int4: burst\.output_tps was not measured"):
        require_passed(results)
    (result,) = check_gates([parse_gate("single.output_tps>=1")], {"int4": FIGURES}, BASE, expected)
    assert result.passed, "a gate that names its scenario asks for no other"


def test_gate_without_a_scenario_needs_all_of_the_baselines() -> None:
    base = {"single.output_tps": 100.0}
    results = check_gates([parse_gate("output_tps>=0.5x")], {"int4": FIGURES}, base)
    assert [(result.metric, result.passed) for result in results] == [
        ("single.output_tps", True),
        ("online.output_tps", False),
    ]
    with pytest.raises(GateError, match=r"online\.output_tps is 40 .*the baseline has none"):
        require_passed(results)


def test_gate_is_not_checked_at_loads_at_which_a_sweeps_baseline_was_saturated() -> None:
    base = {"single.output_tps": 100.0}

    def checked(gate: str) -> list[tuple[str, bool]]:
        results = check_gates([parse_gate(gate)], {"int4": FIGURES}, base, None, {"online"})
        return [(result.metric, result.passed) for result in results]

    assert checked("output_tps>=0.5x") == [("single.output_tps", True)]
    assert checked("output_tps>=0.95x") == [("single.output_tps", False)]
    assert checked("online.output_tps>=0.5x") == [("online.output_tps", False)], "it is named"
    (result,) = check_gates(
        [parse_gate("output_tps>=0.5x")], {"int4": FIGURES}, base, None, {"online", "single"}
    )
    assert not result.passed, "a gate that compares nothing fails"
    assert checked("output_tps>=50") == [("single.output_tps", True), ("online.output_tps", False)]


def test_gate_is_not_on_metrics_whose_name_only_ends_like_its_own() -> None:
    """Those of tasks, which lm-evaluation-harness names."""
    tasks = {"task.wikitext.word_perplexity": 50.0, "task.lambada.perplexity": 60.0}
    gate = parse_gate("perplexity<=12")
    (result,) = check_gates([gate], {"int4": tasks}, None)
    assert math.isnan(result.value) and not result.passed
    with pytest.raises(UsageError, match="not measured for x"):
        require_gate_metrics([gate], ["word_perplexity"], "x")
    (result,) = check_gates([gate], {"int4": tasks | {"perplexity": 11.0}}, None)
    assert (result.metric, result.value, result.passed) == ("perplexity", 11.0, True)
    (result,) = check_gates([parse_gate("task.lambada.perplexity<=12")], {"int4": tasks}, None)
    assert (result.metric, result.passed) == ("task.lambada.perplexity", False)
    (result,) = check_gates([parse_gate("tpot_mean_ms<=9")], {"x": {"c1.tpot_mean_ms": 9.0}}, None)
    assert (result.metric, result.passed) == ("c1.tpot_mean_ms", True)


def test_gate_never_passes_nan() -> None:
    for gate in ("mean_kl<=1", "mean_kl>=0"):
        (result,) = check_gates([parse_gate(gate)], {"x": {"mean_kl": math.nan}}, None)
        assert not result.passed


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (
            "perplexity<=12",
            r"on perplexity, which is not measured for int4."
            r" Measured are mean_kl, single.output_tps",
        ),
        ("batch.output_tps>=1", "on batch.output_tps, which is not measured"),
    ],
)
def test_gate_on_a_metric_that_will_not_be_measured_is_refused(gate: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        require_gate_metrics([parse_gate(gate)], list(FIGURES), "int4")


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("perplexity<=12", r"int4: perplexity was not measured \(perplexity<=12, limit 12\)"),
        ("perplexity>=0", "int4: perplexity was not measured"),
        ("mean_kl<=baseline", r"mean_kl is 0.03 \(mean_kl<=baseline, the baseline has none\)"),
        ("mean_kl>=baseline", "the baseline has none"),
    ],
)
def test_gate_on_a_metric_that_was_not_measured_fails(gate: str, message: str) -> None:
    results = check_gates([parse_gate(gate)], {"int4": FIGURES}, BASE)
    with pytest.raises(GateError, match=message) as caught:
        require_passed(results)
    assert caught.value.exit_code == 1


def test_gate_needs_a_baseline_to_compare_with() -> None:
    with pytest.raises(UsageError, match="there is no baseline"):
        check_gates([parse_gate("output_tps>=baseline")], {"x": FIGURES}, None)


def test_gate_is_refused_when_nothing_is_measured() -> None:
    with pytest.raises(UsageError, match="Measured are no metrics"):
        require_gate_metrics([parse_gate("top1>=1")], [], "x")
