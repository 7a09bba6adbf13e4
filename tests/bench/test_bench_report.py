"""Reports: JSON, comparisons, saved baselines, and the table for terminals."""

import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from llmkit.bench.bench_report import (
    BenchReport,
    RequestMetrics,
    TargetReport,
    comparability_notes,
    compare_reports,
    read_report,
    require_single_target,
)
from llmkit.bench.gates import GateResult
from llmkit.bench.report_tables import render_report
from llmkit.common.errors import GateError, InputError


def make_report(**changes: object) -> BenchReport:
    speed = {"output_tps": 120.5, "ttft_p50_ms": 30.25, "requests": 8}
    fields: dict[str, object] = {
        "targets": [
            TargetReport(
                "bf16", "models/bf16", "served", {"perplexity": 10.0, "checkpoint_bytes": 2**30}
            ),
            TargetReport(
                "int4 [g64]",
                "models/int4",
                "served",
                {"perplexity": math.inf, "mean_kl": math.nan},
                {"quick": speed},
                {"quick": [speed, speed]},
            ),
        ],
        "baseline": "bf16",
        "environment": {"cpu": "A CPU", "cores": 2, "gpu": None, "torch": "2"},
        "command": "llmkit bench models/int4",
        "workload": {
            "sha256": "ab" * 32,
            "seed": 0,
            "rounds": 2,
            "scenarios": [
                {
                    "name": "quick",
                    "requests": 8,
                    "clients": 4,
                    "prompt_tokens": 1,
                    "output_tokens": 1,
                }
            ],
        },
        "evaluation": {"sha256": "cd" * 32, "text": "builtin"},
        "gates": [GateResult("perplexity<=12", "int4 [g64]", "perplexity", math.inf, 12.0, False)],
        "notes": ["a note"],
    }
    return BenchReport(**(fields | changes))  # type: ignore[arg-type]


def write(report: BenchReport, path: Path) -> Path:
    path.write_text(json.dumps(report.to_json(), allow_nan=False))
    return path


def test_report_survives_json(tmp_path: Path) -> None:
    report = make_report()
    again = read_report(write(report, tmp_path / "report.json"))
    assert again.to_json() == report.to_json()
    assert again.targets[0] == report.targets[0]
    assert again.gates == report.gates
    assert math.isnan(again.targets[1].metrics["mean_kl"])
    assert again.targets[1].metrics["perplexity"] == math.inf
    assert again.targets[1].all_metrics()["quick.output_tps"] == 120.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a report"),
        ("{}", "is not a report"),
        ('{"format_version": 99}', "format version 99. Version 1 is read"),
        (
            '{"format_version": 1, "targets": [1]}',
            r"is not a report of llmkit bench \(targets\.0: ",
        ),
        ('{"format_version": 1, "targets": []}', "is not a report"),
    ],
)
def test_report_refuses_other_json(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        read_report(path)
    assert str(path) in str(raised.value)


def test_report_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.json cannot be read \(No such file"):
        read_report(tmp_path / "x.json")


def test_report_refuses_duplicate_names() -> None:
    document = make_report().to_json()
    document["targets"].append(document["targets"][0])
    with pytest.raises(InputError, match="is not a report"):
        BenchReport.from_json(document)


def test_report_raises_for_failed_gates() -> None:
    with pytest.raises(
        GateError, match=r"1 of 1 gate checks failed: int4 \[g64\]: perplexity is inf .*limit 12"
    ):
        make_report().require_gates()
    make_report(gates=[]).require_gates()


def text(report: BenchReport) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(render_report(report))
    return captured.get()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("┃", "│").strip(" ").strip("│").split("│")]


def row(output: str, title: str) -> list[str]:
    (line,) = [line for line in output.splitlines() if title in line]
    return cells(line)


def test_report_table() -> None:
    base, other = make_report().targets
    base.scenarios = {"quick": {"output_tps": 241.0}}
    other.metrics = {"perplexity": 12.0, "checkpoint_bytes": 2**28, "top1": 0.875}
    output = text(make_report(targets=[base, other]))
    assert cells(output.splitlines()[2]) == ["metric", "unit", "bf16", "int4 [g64]", "vs base"]
    assert row(output, "perplexity  ") == ["perplexity", "", "10", "12", "1.20x"]
    assert row(output, "checkpoint ") == ["checkpoint", "GiB", "1.000", "0.250", "0.25x"]
    assert row(output, "same token") == ["same token as baseline", "%", "-", "87.50", ""]
    assert row(output, "tokens/s") == ["output throughput", "tokens/s", "241.0", "120.5", "0.50x"]
    assert "quick: 8 requests, 4 at a time" in output
    assert "medians of 2 rounds" in output
    assert "FAIL" in output
    assert "Note: a note." in output


def test_report_has_one_target_under_test() -> None:
    assert require_single_target(make_report(), "x").name == "int4 [g64]"
    alone = make_report(targets=[TargetReport("a", "a", "url")], baseline=None)
    assert require_single_target(alone, "x").name == "a"
    three = make_report(targets=[*make_report().targets, TargetReport("c", "c", "url")])
    with pytest.raises(
        InputError, match=r"x holds 2 targets \(int4 \[g64\], c\). A baseline is one target"
    ):
        require_single_target(three, "x")


def test_reports_are_compared_side_by_side() -> None:
    a = make_report()
    b = make_report(
        targets=[
            TargetReport("bf16", "b", "url", {"perplexity": 9.0}),
            TargetReport("new", "n", "url"),
        ]
    )
    both = compare_reports(a, b)
    assert [target.name for target in both.targets] == ["bf16 (a)", "int4 [g64]", "bf16 (b)", "new"]
    assert both.baseline == "bf16 (a)"
    assert both.workload == a.workload
    assert row(
        text(make_report(targets=both.targets, baseline=both.baseline, gates=[])), "perplexity "
    ) == [
        "perplexity",
        "",
        "10",
        "inf",
        "",
        "9",
        "0.90x",
        "-",
        "",
    ]
    assert a.targets[0].name == "bf16", "the reports themselves stay as they were"


def test_reports_note_what_is_not_comparable() -> None:
    a = make_report()
    b = make_report(
        workload=a.workload | {"sha256": "0"}, evaluation={"sha256": "1"}, environment={"cpu": "B"}
    )
    message = "; ".join(comparability_notes(a, b))
    assert "the workloads differ: speed does not compare" in message
    assert "the evaluation windows differ: quality does not compare" in message
    assert "cpu differs (A CPU and B)" in message
    assert compare_reports(a, b).workload == {}
    assert comparability_notes(make_report(workload={}), a) == []


def repeated(name: str, *speeds: float) -> TargetReport:
    rounds = [{"output_tps": speed} for speed in speeds]
    return TargetReport(
        name,
        name,
        "url",
        {},
        {"quick": {"output_tps": sorted(speeds)[len(speeds) // 2]}},
        {"quick": rounds},
    )


def test_report_marks_insignificant_differences() -> None:
    alike = make_report(
        targets=[repeated("a", 100, 90, 110), repeated("b", 104, 95, 101)], baseline="a", gates=[]
    )
    faster = make_report(
        targets=[repeated("a", 100, 90, 110), repeated("b", 121, 110, 131)], baseline="a", gates=[]
    )
    assert row(text(alike), "output throughput")[-1] == "~1.01x"
    assert row(text(faster), "output throughput")[-1] == "1.21x", (
        "every round was faster by about as much"
    )
    assert alike.to_json()["targets"][0]["intervals"] == {
        "quick.output_tps": [pytest.approx(75.16, abs=0.01), pytest.approx(124.84, abs=0.01)]
    }
    assert "±25" in text(alike)


def test_report_uses_welch_for_targets_without_turns() -> None:
    a = make_report(targets=[repeated("a", 100, 90, 110)], baseline=None, gates=[])
    b = make_report(targets=[repeated("b", 109, 99, 119)], baseline=None, gates=[])
    both = compare_reports(a, b)
    assert both.differs(both.targets[1], "quick.output_tps") is False
    together = make_report(targets=[*a.targets, *b.targets], baseline="a", gates=[])
    assert together.differs(together.targets[1], "quick.output_tps") is True
    assert together.differs(together.targets[1], "perplexity") is None
    assert BenchReport.from_json(both.to_json()).joined


def test_report_keeps_requests() -> None:
    one = make_report()
    one.targets[1].requests["quick"] = [RequestMetrics(0.0, 0.1, 0.5, 10, 0, 4)]
    again = BenchReport.from_json(json.loads(json.dumps(one.to_json())))
    assert again.targets[1].requests == one.targets[1].requests
    assert "TTFT" in one.to_json()["definitions"]
