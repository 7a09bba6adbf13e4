"""`llmkit plan --pre-scale`: reading loads, their pattern, the schedule and KEDA's view of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.bench.bench_report import BenchReport, RequestMetrics, TargetReport
from llmkit.bench.load_modes import TraceRow
from llmkit.cli.main import run
from llmkit.common.errors import InputError, UsageError
from llmkit.common.progress import SilentProgress
from llmkit.deploy import schedule_replay
from llmkit.deploy.capacity_planning import Demand, Engine, plan_replicas
from llmkit.deploy.load_pattern import (
    HOURS,
    Period,
    RateBin,
    RecordedLoad,
    hourly_rates,
    local_minute,
    read_load,
)
from llmkit.deploy.pre_scaling import ReplicaSchedule, plan_schedule, scaled_object
from llmkit.deploy.queue_simulation import Arrival, Limits, SimulatedReplica, simulate
from llmkit.deploy.schedule_replay import MAX_REQUESTS, replay, replay_arrivals
from llmkit.deploy.step_time import FittedStepTime

UTC = ZoneInfo("UTC")
BERLIN = ZoneInfo("Europe/Berlin")
STEP = FittedStepTime(fixed_s=0.010, request_s=0.001, context_s=1e-6, prompt_s=1e-4, error=0.0)
ENGINE = Engine("server", 1, STEP, Limits(64, 512))
DEMAND = Demand(1.0, (200, 200), (30, 50), {"ttft": 1.0, "tpot": 0.06})
# Requests a second of each hour of a day.
DAY = [0.5] * 8 + [4, 12, 20, 20, 20, 12, 12, 12] + [4] * 4 + [0.5] * 4


# A slower server, so that the small rates of a fast test need several.
SLOW = Engine("slow", 1, FittedStepTime(0.4, 0.04, 4e-5, 4e-3, 0.0), Limits(64, 512))
SLOW_DEMAND = replace(DEMAND, slo={"ttft": 6.0, "tpot": 2.0})
SHARE = 24  # of DAY, in a replay


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_load_is_read_from_a_trace_with_dates(tmp_path: Path) -> None:
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"2026-03-02 13:0{minute}:30.5,100,{minute + 1}" for minute in (7, 0, 1)]
    load = read_load(write(tmp_path / "azure.csv", "\n".join(rows)), BERLIN)
    assert load.bins == [
        RateBin(1772456400, 300, 2 / 300),
        RateBin(1772456700, 300, 1 / 300),
    ]
    assert [row.output_tokens for row in load.requests] == [1, 2, 8]
    assert local_minute(load.requests[0].time_s, BERLIN, "day") == 14 * 60
    assert local_minute(load.requests[0].time_s, BERLIN, "week") == 14 * 60, "it is a Monday"


def test_load_without_dates_begins_where_it_is_told(tmp_path: Path) -> None:
    lines = [{"timestamp": ms, "input_length": 9, "output_length": 2} for ms in (5000, 65_000)]
    path = write(tmp_path / "mooncake.jsonl", "\n".join(map(json.dumps, lines)))
    load = read_load(path, BERLIN, "2026-07-01T08:59")
    assert [row.time_s for row in load.requests] == [1782889140, 1782889200]
    assert [one.start_s for one in load.bins] == [1782888900, 1782889200]
    assert local_minute(load.requests[1].time_s, BERLIN, "day") == 9 * 60
    with pytest.raises(UsageError, match="--trace-start: 'soon' is not a time"):
        read_load(path, BERLIN, "soon")


def test_rates_are_read_from_prometheus(tmp_path: Path) -> None:
    series = [
        {"metric": {"pod": "a"}, "values": [[600, "1.5"], [900, "NaN"]]},
        {"metric": {"pod": "b"}, "values": [[600, "0.5"], [900, "2"]]},
    ]
    document = {"status": "success", "data": {"resultType": "matrix", "result": series}}
    load = read_load(write(tmp_path / "range.json", json.dumps(document, indent=1)), UTC)
    assert load == RecordedLoad([RateBin(600, 300, 2.0), RateBin(900, 300, 2.0)], [])


def test_rates_are_read_from_csv_by_date_and_by_number(tmp_path: Path) -> None:
    dated = read_load(write(tmp_path / "a.csv", "hour,rate\n2026-03-02T01:00, 2.5\n"), BERLIN)
    assert dated.bins == [RateBin(1772409600, 3600, 2.5)]
    numbered = read_load(write(tmp_path / "b.csv", "hour,rate\n1,3\n0,4\n"), UTC)
    assert [local_minute(one.start_s, UTC, "week") for one in numbered.bins] == [0, 60]
    assert [one.rate for one in numbered.bins] == [4, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": {"result": [{"values": [[1, "x"]]}]}}', "is no result of a range query"),
        ('{"data": {"result": []}}', "is empty, or has a rate that is none"),
        ('{"data": {"result": [{"values": [[0, "1"], [7200, "1"]]}]}}', "a rate each 2 hours"),
        ("hour,rate\n1,-2\n", "is empty, or has a rate that is none"),
        ("hour,rate\nnoon,2\n", "has a row without an hour or a rate"),
        ("a,b\n1,2\n", "trace .* cannot be read"),
    ],
)
def test_loads_that_cannot_be_read_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_load(write(tmp_path / "load", text), UTC)
    assert caught.value.exit_code == 3
    with pytest.raises(InputError, match="cannot be read"):
        read_load(str(tmp_path / "missing"), UTC)


def test_pattern_takes_a_quantile_over_days_in_the_time_zone() -> None:
    # Three days, each with 100 times its number at 5:00 UTC, which is 6:00 in Berlin.
    bins = [
        RateBin((day * 24 + hour) * 3600.0, 3600, 100.0 * (day + 1) if hour == 5 else 1.0)
        for day in range(3)
        for hour in range(24)
    ]
    rates = hourly_rates(bins, BERLIN, "day", 0.5)
    assert rates[6] == 200 and sum(rates) == 223
    assert hourly_rates(bins, BERLIN, "day", 0.75)[6] == 250
    assert hourly_rates(bins, BERLIN, "day", 1.0)[6] == 300
    with pytest.raises(
        InputError, match=r"96 of the 168 hours of a week .* Monday 00:00"
    ) as caught:
        hourly_rates(bins, BERLIN, "week", 0.5)
    assert "--period day" in str(caught.value)
    with pytest.raises(InputError, match=r"4 of the 24 hours of a day \(the first is 20:00\)"):
        hourly_rates(bins[:20], UTC, "day", 0.5)


def test_schedule_requests_replicas_ahead_of_the_hours_that_need_them() -> None:
    schedule = ReplicaSchedule("day", "UTC", (1,) * 8 + (3,) * 2 + (2,) * 14, 10)
    requested = schedule.requested
    # Midnight needs one again, but the two of 23:00 are there until then.
    assert [requested[minute] for minute in (0, 469, 470, 599, 600, 1439)] == [1, 1, 3, 3, 2, 2]
    assert schedule.ready[480] == 3 and schedule.ready[479] == 1
    assert [window[:2] + window[-1:] for window in schedule.windows()] == [
        (470, 600, 3),
        (600, 0, 2),
    ]
    assert schedule.base == 1
    assert schedule.mean == pytest.approx((470 + 3 * 130 + 2 * 840) / 1440)


def test_a_constant_schedule_needs_no_window() -> None:
    schedule = ReplicaSchedule("day", "UTC", (2,) * 24, 5)
    assert schedule.windows() == [] and schedule.base == 2
    # With a lead of a day, every minute is ahead of the busiest hour.
    assert ReplicaSchedule("day", "UTC", (1,) * 23 + (4,), 24 * 60).base == 4


def next_minute(expression: str, after: int) -> int:
    """The first minute of the week, counted from Monday 0:00, at which a cron expression fires."""
    minute, hour, _, _, days = expression.split()
    of_day = int(hour) * 60 + int(minute)
    for day in range(after // 1440, after // 1440 + 9):
        # Cron counts days from Sunday.
        fires = days == "*" or str((day + 1) % 7) in days.split(",")
        if fires and day * 1440 + of_day > after:
            return day * 1440 + of_day
    raise AssertionError(expression)


def replicas_of_keda(document: dict[str, Any], minute: int) -> int:
    """What KEDA's cron scaler asks for.

    A trigger is active while its next end comes before its next start.
    """
    active = [document["spec"]["minReplicaCount"]]
    for trigger in document["spec"]["triggers"]:
        metadata = trigger["metadata"]
        if next_minute(metadata["end"], minute) < next_minute(metadata["start"], minute):
            active.append(int(metadata["desiredReplicas"]))
    return max(active)


@settings(max_examples=10)
@given(
    period=st.sampled_from(["day", "week"]),
    changes=st.lists(st.tuples(st.integers(0, 167), st.integers(1, 4)), max_size=10),
    lead=st.integers(0, 150),
    data=st.data(),
)
def test_keda_asks_for_what_the_schedule_requests(
    period: Period, changes: list[tuple[int, int]], lead: int, data: st.DataObject
) -> None:
    hours = [1] * HOURS[period]
    for start, replicas in changes:
        start %= len(hours)
        hours[start : start + 7] = [replicas] * len(hours[start : start + 7])
    schedule = ReplicaSchedule(period, "UTC", tuple(hours), lead)
    base = {"kind": "ScaledObject", "spec": {"triggers": [{"type": "cron", "metadata": {}}]}}
    document = scaled_object(schedule, base, "base")
    requested = schedule.requested
    edges = [minute for minute, count in enumerate(requested) if count != requested[minute - 1]]
    minutes = data.draw(st.lists(st.integers(0, len(requested) - 1), max_size=4)) + edges[:4]
    for minute in minutes:
        assert replicas_of_keda(document, minute) == requested[minute], minute
        assert schedule.ready[minute] >= hours[minute // 60]


def test_planned_replicas_are_those_of_each_rate() -> None:
    schedule = plan_schedule(ENGINE, DEMAND, DAY, "day", "UTC", 90.0, 2, SilentProgress())
    assert schedule.lead_minutes == 2
    assert schedule.hours[0] == 2, "at least so many at all times"
    rates = [rate / 4 for rate in DAY]
    planned = plan_schedule(SLOW, SLOW_DEMAND, rates, "day", "UTC", 90.0, 1, SilentProgress())
    assert planned.hours[0] < planned.hours[8] < planned.hours[9] < planned.hours[10]
    for hour in (0, 8, 9, 10):
        alone = plan_replicas(SLOW, replace(SLOW_DEMAND, rate=rates[hour]))
        # Rates were rounded up, and the search began elsewhere.
        assert alone is not None
        assert abs(planned.hours[hour] - alone.replicas) <= 1 + 0.1 * alone.replicas
    with pytest.raises(UsageError, match=r"no number of replicas keeps the bounds .* at 20"):
        plan_schedule(
            ENGINE,
            replace(DEMAND, slo={"tpot": 0.001}),
            DAY,
            "day",
            "UTC",
            90.0,
            1,
            SilentProgress(),
        )


def test_replay_keeps_the_bounds_with_fewer_replica_hours() -> None:
    bins = [RateBin(hour * 3600.0, 3600, rate / SHARE) for hour, rate in enumerate(DAY * 2)]
    load = RecordedLoad(bins, [])
    rates = hourly_rates(bins, UTC, "day", 0.95)
    schedule = plan_schedule(SLOW, SLOW_DEMAND, rates, "day", "UTC", 120.0, 1, SilentProgress())
    arrivals = replay_arrivals(load, SLOW_DEMAND)
    assert len(arrivals) == min(MAX_REQUESTS, round(sum(DAY) * 2 * 3600 / SHARE))
    by_schedule, most, mean = replay(SLOW, SLOW_DEMAND, arrivals, schedule, UTC)
    assert by_schedule.attained >= 0.975 and most.attained >= by_schedule.attained
    assert mean.attained < by_schedule.attained
    assert by_schedule.mean < 0.75 * most.mean
    assert most.fewest == most.most == by_schedule.most == max(schedule.hours)


def test_replay_of_a_trace_has_its_requests_around_the_busiest_time() -> None:
    rows = [TraceRow(index / 10, 50, 5, True) for index in range(MAX_REQUESTS * 2)]
    bins = [RateBin(0.0, 300, 10.0), RateBin(3000.0, 300, 11.0)]
    demand = replace(DEMAND, cached=0.5)
    arrivals = replay_arrivals(RecordedLoad(bins, rows), demand)
    assert len(arrivals) == MAX_REQUESTS
    assert arrivals[0] == Arrival(1500.0, 50, 5, 25)
    few = replay_arrivals(RecordedLoad(bins, rows[:7]), demand)
    assert [arrival.at_s for arrival in few] == [row.time_s for row in rows[:7]]


def test_replay_of_more_requests_than_memory_holds_draws_a_part_of_them() -> None:
    bins = [RateBin(0.0, 3600, 1e7), RateBin(3600.0, 3600, 2e7), RateBin(7200.0, 3600, 1.0)]
    arrivals = replay_arrivals(RecordedLoad(bins, []), DEMAND)
    assert len(arrivals) == MAX_REQUESTS
    before = [arrival.at_s for arrival in arrivals if arrival.at_s < 3600.0]
    assert len(before) == MAX_REQUESTS // 2
    assert before[0] == pytest.approx(3600 - MAX_REQUESTS / 2 / 1e7, abs=1e-6)
    after = [arrival.at_s for arrival in arrivals if arrival.at_s >= 3600.0]
    assert after[-1] <= 3600 + MAX_REQUESTS / 2 / 2e7 + 1e-6


def test_replay_of_rare_requests_has_all_of_them() -> None:
    """Each bin alone has less than one."""
    bins = [RateBin(index * 300.0, 300, 0.001) for index in range(100)]
    arrivals = replay_arrivals(RecordedLoad(bins, []), DEMAND)
    assert len(arrivals) == 30
    assert arrivals == sorted(arrivals, key=lambda arrival: arrival.at_s)


def test_replay_of_a_load_without_requests_is_refused() -> None:
    with pytest.raises(InputError, match="the recorded load has no request"):
        replay_arrivals(RecordedLoad([RateBin(0.0, 3600, 0.0)], []), DEMAND)


def test_replicas_that_are_never_ready_within_the_period_are_always_requested() -> None:
    schedule = ReplicaSchedule("day", "UTC", (1,) * 12 + (3,) * 12, lead_minutes=26 * 60)
    assert set(schedule.requested) == set(schedule.ready) == {3}


def test_replicas_that_are_not_ready_take_no_new_requests() -> None:
    replicas = [SimulatedReplica(STEP, Limits()) for _ in range(2)]
    arrivals = [Arrival(float(index), 8, 2) for index in range(10)]
    simulate(arrivals, replicas, lambda at_s: 1 if at_s < 5 else 2)
    first, second = (len(replica.finished) for replica in replicas)
    assert (first, second) == (10, 0), "an idle first replica is chosen before an idle second one"
    long = [Arrival(float(index), 8, 400) for index in range(10)]
    replicas = [SimulatedReplica(STEP, Limits()) for _ in range(2)]
    simulate(long, replicas, lambda at_s: 1 if at_s < 5 else 2)
    assert {one.sent_s for one in replicas[1].finished} <= {5.0, 6.0, 7.0, 8.0, 9.0}
    assert replicas[1].finished


def test_scaled_object_keeps_other_triggers_and_replaces_its_own() -> None:
    schedule = ReplicaSchedule("day", "Europe/Berlin", (1,) * 12 + (12,) * 12, 3)
    base = {
        "kind": "ScaledObject",
        "metadata": {"name": "x"},
        "spec": {
            "maxReplicaCount": 8,
            "cooldownPeriod": 60,
            "triggers": [{"type": "cron", "metadata": {}}, {"type": "prometheus"}],
        },
    }
    made = scaled_object(schedule, base, "base")
    assert made["spec"]["maxReplicaCount"] == 12 and made["spec"]["minReplicaCount"] == 1
    assert made["spec"]["cooldownPeriod"] == 60
    cron, other = made["spec"]["triggers"]
    assert other == {"type": "prometheus"}
    assert cron["metadata"] == {
        "timezone": "Europe/Berlin",
        "start": "57 11 * * *",
        "end": "0 0 * * *",
        "desiredReplicas": "12",
    }
    assert len(base["spec"]["triggers"]) == 2, "the object that was given stays as it is"
    del base["spec"]["maxReplicaCount"]
    assert scaled_object(schedule, base, "base")["spec"]["maxReplicaCount"] == 100, "KEDA's default"
    with pytest.raises(InputError, match="the spec of base is none of KEDA's"):
        scaled_object(schedule, base | {"spec": {"triggers": ["cron"]}}, "base")
    with pytest.raises(InputError, match=r"file\.yaml has kind Deployment. A ScaledObject"):
        scaled_object(schedule, {"kind": "Deployment"}, "file.yaml")


def bench_report(path: Path, ready_s: float | None = 100.0) -> str:
    """A report of a server with these step times."""
    random = Random(0)
    requests = {}
    for gap in (4.0, 0.3, 0.12, 0.06):
        lengths = [(random.randint(50, 900), random.randint(20, 200)) for _ in range(40)]
        arrivals = [Arrival(index * gap, *pair) for index, pair in enumerate(lengths)]
        requests[f"rate{gap}"] = [
            RequestMetrics(
                one.sent_s, one.ttft_s, one.e2e_s, one.prompt_tokens, 0, one.output_tokens
            )
            for one in simulate(arrivals, [SimulatedReplica(STEP, Limits(64, 512))])
        ]
    metrics = {} if ready_s is None else {"ready_s": ready_s}
    target = TargetReport("m", "m", "served", metrics, requests=requests)
    path.write_text(json.dumps(BenchReport([target]).to_json()))
    return str(path)


def test_plan_command_writes_a_scaled_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule_replay, "MAX_REQUESTS", 3000)
    rates = "".join(f"{hour},{rate / 4}\n" for hour, rate in enumerate(DAY))
    trace = write(tmp_path / "rates.csv", f"hour,rate\n{rates}")
    keda = tmp_path / "keda.yaml"
    words = ["plan", "--bench", bench_report(tmp_path / "report.json"), "--in", "900"]
    words += ["--out", "40", "--pre-scale", "--trace", trace, "--slo", "ttft:1s,tpot:60ms"]
    words += ["--time-zone", "America/New_York", "--price-per-hour", "2"]
    assert run([*words, "-o", str(keda), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["lead_minutes"] == 2, "ready_s of the report"
    assert [row["hour"] for row in result["hours"][8:10]] == ["08:00", "09:00"]
    assert result["hours"][10]["replicas"] > result["hours"][0]["replicas"]
    first = result["replay"][0]
    assert first["attained"] > 0.98
    assert first["price_per_day"] == pytest.approx(2 * first["replica_hours_per_day"])
    assert 0 < result["saved_share"] < 1
    document = yaml.safe_load(keda.read_text())
    assert document == result["scaled_object"]
    assert ScaledObject.model_validate(document).spec.min_replica_count == 1
    kinds = [trigger["type"] for trigger in document["spec"]["triggers"]]
    assert kinds.count("prometheus") == 2 and kinds.count("cron") == len(result["windows"]) > 0
    assert run([*words, "--period", "week"]) == 3
    assert "has nothing for 144 of the 168 hours" in capsys.readouterr().err
    assert run([*words, "--scaled-object", str(keda), "--lead-time", "5m"]) == 0
    shown = capsys.readouterr().out
    assert "always the most" in shown and "requested 5 minutes ahead" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trace", "t"], "--trace goes with --pre-scale"),
        (["--output", "o"], "--output goes with --pre-scale"),
        (["--quantile", "0.5"], "--quantile goes with --pre-scale"),
        (["--lead-time", "90s"], "--lead-time goes with --pre-scale"),
        (["--pre-scale"], "--pre-scale without --trace"),
        (["--pre-scale", "--trace", "t"], "--pre-scale without --slo"),
        (
            ["--pre-scale", "--trace", "t", "--slo", "ttft:1s", "--rate", "3/s"],
            "--rate and --replicas do not go with --pre-scale",
        ),
        (["--lead-time", "soon"], "--lead-time: 'soon' is not a duration. Write it like 90s"),
    ],
)
def test_plan_command_refuses_options_of_a_pattern_without_others(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "--bench", "report.json", *words]) == 2
    assert message in capsys.readouterr().err


def test_plan_command_names_what_a_pattern_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = bench_report(tmp_path / "report.json", ready_s=None)
    lines = [
        {"at_s": 1800.0 * index, "prompt_tokens": 9, "output_tokens": 2} for index in range(48)
    ]
    trace = write(tmp_path / "trace.jsonl", "\n".join(map(json.dumps, lines)))
    words = ["plan", "--bench", report, "--pre-scale", "--trace", trace, "--slo", "ttft:1s"]
    assert run(words) == 2
    assert "has no ready_s" in capsys.readouterr().err
    assert run([*words, "--in", "7"]) == 2
    assert "which has their lengths" in capsys.readouterr().err
    assert run([*words, "--time-zone", "Mars/Olympus"]) == 2
    assert "'Mars/Olympus' is not known on this machine" in capsys.readouterr().err
    assert run(["plan", "m", "--gpu", "h200", *words[3:]]) == 2
    assert "--pre-scale without --lead-time" in capsys.readouterr().err
    assert run([*words, "--lead-time", "90s", "--json"]) == 0
    assert math.isclose(json.loads(capsys.readouterr().out)["hours"][0]["rate"], 1 / 300)
