"""Alert rules made from repetitions: bounds, expressions, refusals, the server's own metrics."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from support.server_process import LlmkitServer

from llmkit.bench.alert_rules import (
    MIN_ROUNDS,
    choose_load,
    make_alert_rules,
    prediction_interval,
)
from llmkit.bench.bench_report import BenchReport, TargetReport
from llmkit.cli.main import run
from llmkit.common.errors import InputError, UsageError
from llmkit.runtime.server.server_metrics import TTFT_BUCKETS_S

SERVER = {"speculate": 2}
ALL_RULES = {
    "LlmkitTtftAboveBench",
    "LlmkitTpotAboveBench",
    "LlmkitQueueAboveBench",
    "LlmkitKvCacheAboveBench",
    "LlmkitErrorsAboveBench",
    "LlmkitPrefixHitsBelowBench",
    "LlmkitAcceptanceBelowBench",
}


def rounds(count: int = 6, requests: int = 100, wall_s: float = 20.0) -> list[dict[str, float]]:
    random = Random(1)

    def about(value: float) -> float:
        return random.gauss(value, value / 50)

    return [
        {
            "requests": requests,
            "wall_s": wall_s,
            "ttft_p99_ms": about(90),
            "ttft_p90_ms": about(70),
            "tpot_p99_ms": about(21),
            "tpot_p90_ms": about(19),
            "queue_mean_ms": about(5),
            "kv_cache_usage_max": about(0.5),
            "cache_hit_rate": about(0.4),
            "acceptance": about(0.6),
        }
        for _ in range(count)
    ]


def target(made: list[dict[str, float]]) -> TargetReport:
    return TargetReport("m", "m", "served", rounds={"c8": made}, scenarios={"c8": made[0]})


def bounds(made: list[dict[str, float]]) -> dict[str, float]:
    found = make_alert_rules(target(made), "c8", "llmkit")
    return {rule.name: rule.bound for rule in found.rules}


def test_prediction_interval_holds_the_next_repetition() -> None:
    assert prediction_interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2 - 4.303 * math.sqrt(4 / 3), 2 + 4.303 * math.sqrt(4 / 3))
    )
    random = Random(0)
    inside = 0
    for _ in range(2000):
        *values, following = (random.gauss(10, 1) for _ in range(7))
        low, high = prediction_interval(values)
        inside += low <= following <= high
    assert inside / 2000 == pytest.approx(0.95, abs=0.02)


def test_bounds_come_from_the_repetitions() -> None:
    made = rounds()
    found = bounds(made)
    assert found.keys() == ALL_RULES
    high = prediction_interval([values["ttft_p99_ms"] for values in made])[1] / 1000
    assert 0.08 < high < 0.1
    # The edge of the histogram's bucket that the bound lies in.
    assert found["LlmkitTtftAboveBench"] == min(edge for edge in TTFT_BUCKETS_S if edge >= high)
    queue = prediction_interval([values["queue_mean_ms"] for values in made])[1] / 1000
    assert 0.005 < queue <= found["LlmkitQueueAboveBench"] == 0.01
    cache = prediction_interval([values["kv_cache_usage_max"] for values in made])[1]
    assert cache <= found["LlmkitKvCacheAboveBench"] < 1.01 * cache
    hits = prediction_interval([values["cache_hit_rate"] for values in made])[0]
    assert 0.99 * hits < found["LlmkitPrefixHitsBelowBench"] <= hits
    # 600 requests without a failure: 3 / 600, by the rule of three.
    assert found["LlmkitErrorsAboveBench"] == pytest.approx(3 / 600, rel=0.01)


def test_few_requests_have_a_lower_percentile_and_long_rounds_a_longer_window() -> None:
    made = make_alert_rules(target(rounds(requests=12, wall_s=400.0)), "c8", "x")
    assert made.window_minutes == 7
    ttft = made.rules[0]
    assert ttft.metric == "ttft_p90_ms"
    assert ttft.expression == (
        "histogram_quantile(0.9, sum by (job, instance, le)"
        ' (rate(llmkit:time_to_first_token_seconds_bucket{job="x"}[7m]))) > 0.08'
    )
    assert made.document("x")["groups"][0]["rules"][0]["for"] == "7m"


def test_rules_without_figures_or_with_useless_bounds_are_left_out_with_a_reason() -> None:
    made = rounds()
    del made[2]["acceptance"]
    for index, values in enumerate(made):
        values["cache_hit_rate"] = 0.01 * index
        values["kv_cache_usage_max"] = 0.97 + 0.02 * (index % 2)
        values["ttft_p99_ms"] = 200_000.0 + index
    found = make_alert_rules(target(made), "c8", "llmkit")
    assert found.missing["LlmkitAcceptanceBelowBench"] == (
        "acceptance was not measured in all repetitions"
    )
    assert "is never passed" in found.missing["LlmkitPrefixHitsBelowBench"]
    assert "is never passed" in found.missing["LlmkitKvCacheAboveBench"]
    assert "above the last bucket" in found.missing["LlmkitTtftAboveBench"]
    assert len(found.rules) == len(ALL_RULES) - 4


def test_reports_without_enough_repetitions_are_refused() -> None:
    with pytest.raises(InputError, match=r"was measured 4 times. At least 5 repetitions") as caught:
        make_alert_rules(target(rounds(MIN_ROUNDS - 1)), "c8", "llmkit")
    assert caught.value.exit_code == 3 and "--repeats 10" in str(caught.value)


def test_load_is_the_named_or_the_only_one() -> None:
    one = target(rounds())
    assert choose_load(one, None) == choose_load(one, "c8") == "c8"
    with pytest.raises(UsageError, match=r"no load 'c9'\. One of c8"):
        choose_load(one, "c9")
    one.rounds["c16"] = rounds()
    with pytest.raises(UsageError, match=r"several loads \(c8, c16\).* --load"):
        choose_load(one, None)
    with pytest.raises(UsageError, match="the report has no load"):
        choose_load(TargetReport("m", "m", "served"), None)


def written(tmp_path: Path) -> tuple[Path, Path]:
    report = tmp_path / "report.json"
    report.write_text(json.dumps(BenchReport([target(rounds())]).to_json()))
    return report, tmp_path / "rules.yaml"


def test_alerts_command_writes_a_file_of_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, rules = written(tmp_path)
    assert run(["bench", "alerts", str(report), "-o", str(rules), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert yaml.safe_load(rules.read_text()) == document["rules_file"]
    (group,) = document["rules_file"]["groups"]
    assert {rule["alert"] for rule in group["rules"]} == ALL_RULES
    for rule in group["rules"]:
        assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"[0-9]+m", rule["for"])
        assert 'job="llmkit"' in rule["expr"]
        assert rule["expr"].count("(") == rule["expr"].count(")")
    assert run(["bench", "alerts", str(report)]) == 0
    assert "LlmkitTtftAboveBench" in capsys.readouterr().out
    assert run(["bench", "alerts", str(report), "--job", 'a"b']) == 2
    assert "--job: 'a\"b' is not a job" in capsys.readouterr().err


def families(text: str) -> dict[str, set[str]]:
    """The labels of each sample's name in an answer of /metrics."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        match = re.fullmatch(r"(llmkit:\w+)(?:\{(.*)\})? \S+", line)
        if match is not None:
            found.setdefault(match[1], set()).update(re.findall(r"(\w+)=", match[2] or ""))
    return found


def test_rules_name_metrics_labels_and_buckets_of_the_server(server: LlmkitServer) -> None:
    body: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
    with server.client() as client:
        assert client.post("/v1/completions", json=body).status_code == 200
        text = client.get("/metrics").text
    has = families(text)
    for rule in make_alert_rules(target(rounds()), "c8", "llmkit").rules:
        names = re.findall(r"(llmkit:\w+)\{(.*?)\}", rule.expression)
        assert names
        for name, labels in names:
            assert name in has, name
            # Prometheus adds job and instance itself.
            assert set(re.findall(r"(\w+)=", labels)) - {"job"} <= has[name]
        if "histogram_quantile" in rule.expression:
            assert f'{names[0][0]}{{le="{rule.bound}"}}' in text
    assert 'llmkit:request_success_total{finished_reason="error"}' in text


@pytest.mark.scale
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_accepts_the_rules(tmp_path: Path) -> None:
    report, rules = written(tmp_path)
    assert run(["bench", "alerts", str(report), "-o", str(rules), "--quiet"]) == 0
    checked = subprocess.run(
        ["promtool", "check", "rules", str(rules)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0 and "7 rules found" in checked.stdout, checked
    tests = {
        "rule_files": [str(rules)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {
                        "series": f'llmkit:request_queue_time_seconds_{kind}{{job="llmkit", '
                        'instance="a"}',
                        "values": values,
                    }
                    # A second of waiting for each request, after ten minutes without any.
                    for kind, values in (("sum", "0x10 0+60x30"), ("count", "0+60x40"))
                ],
                "alert_rule_test": [
                    {"eval_time": "9m", "alertname": "LlmkitQueueAboveBench", "exp_alerts": []},
                ],
                "promql_expr_test": [
                    {
                        "expr": 'ALERTS{alertname="LlmkitQueueAboveBench", alertstate="firing"}',
                        "eval_time": "25m",
                        "exp_samples": [
                            {
                                "labels": 'ALERTS{alertname="LlmkitQueueAboveBench",'
                                'alertstate="firing", instance="a", job="llmkit",'
                                'severity="warning"}',
                                "value": 1,
                            }
                        ],
                    }
                ],
            }
        ],
    }
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    tested = subprocess.run(
        ["promtool", "test", "rules", str(tmp_path / "tests.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
