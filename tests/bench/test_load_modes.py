"""The modes of `--mode`: scenarios, arrival times, traces, and the end of a sweep."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean, pvariance

import pytest

from llmkit.bench.bench_options import LoadOptions
from llmkit.bench.load_modes import (
    DEFAULT_CONCURRENCY,
    gamma_arrivals,
    is_saturated,
    load_scenarios,
    read_trace,
)
from llmkit.bench.workload import PromptDataset, build_workload
from llmkit.common.errors import InputError, UsageError

DATA = PromptDataset("tokens", range(100_000))


def scenario_names(load: LoadOptions) -> list[tuple[str, int]]:
    return [(scenario.name, scenario.max_concurrency) for scenario in load_scenarios(load)]


def test_load_modes_have_their_scenarios() -> None:
    assert scenario_names(LoadOptions()) == [("c8", 8)]
    assert scenario_names(LoadOptions(concurrency=(4, 1, 4))) == [("c1", 1), ("c4", 4)]
    assert scenario_names(LoadOptions("latency", concurrency=(1, 32))) == [
        ("batch1", 1),
        ("batch32", 32),
    ]
    assert scenario_names(LoadOptions("throughput", requests=100)) == [("throughput", 100)]
    assert scenario_names(LoadOptions(rates=(4.0, 0.5))) == [("rate0.5", 32), ("rate4", 40)]
    assert [clients for _, clients in scenario_names(LoadOptions("sweep"))] == list(
        DEFAULT_CONCURRENCY["sweep"]
    )


def test_load_lengths_prefix_and_turns() -> None:
    load = LoadOptions(
        requests=5, input_tokens=(10, 20), output_tokens=(3, 3), prefix_tokens=7, turns=2
    )
    (requests,) = build_workload(DATA, load_scenarios(load)).rounds[0].values()
    assert len(requests) == 10
    assert {request.max_tokens for request in requests} == {3}
    first = [request for request in requests if not request.is_follow_up]
    assert all(17 <= len(request.prompt) <= 27 for request in first)
    assert len({request.prompt[:7] for request in requests}) == 1
    for before, after in zip(
        first, (request for request in requests if request.is_follow_up), strict=True
    ):
        assert 10 <= len(after.prompt) - before.total_tokens <= 20, (
            "a later turn has no prefix of its own"
        )


def test_load_latency_mode_sends_a_batch_at_once() -> None:
    (scenario,) = load_scenarios(LoadOptions("latency", concurrency=(3,)))
    assert (
        len(build_workload(DATA, [scenario]).rounds[0]["batch3"]) == scenario.max_concurrency == 3
    )


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (LoadOptions("fast"), "no such mode: fast"),
        (LoadOptions("latency", rates=(1.0,)), "--rate does not go with --mode latency"),
        (LoadOptions(rates=(1.0,), concurrency=(1,)), "--rate does not go with"),
        (LoadOptions("throughput", concurrency=(4,)), "--mode throughput sends all at once"),
        (LoadOptions("latency", requests=8), "--mode latency sends one request a client"),
        (LoadOptions(trace="trace.jsonl", turns=2), "a trace sets the times"),
        (LoadOptions(rates=(0.0,)), "more than 0"),
        (LoadOptions(burstiness=0), "more than 0"),
        (LoadOptions(burstiness=math.nan), "more than 0"),
        (LoadOptions("sweep", trace="x"), "a trace sets the times"),
    ],
)
def test_load_refuses_conflicting_options(load: LoadOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_scenarios(load)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrival_gaps_are_gamma_distributed(burstiness: float) -> None:
    times = gamma_arrivals(5.0, burstiness)(Random(0), 20_001)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert times[0] == 0 and min(gaps) >= 0
    assert fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert pvariance(gaps) == pytest.approx(0.2**2 / burstiness, rel=0.15)


def test_arrivals_are_seeded_and_the_same_in_every_round() -> None:
    scenarios = load_scenarios(LoadOptions(rates=(2.0,), requests=9))
    one, two = (build_workload(DATA, scenarios, rounds=2, seed=seed) for seed in (0, 1))
    times = [[request.send_at_s for request in rounds["rate2"]] for rounds in one.rounds]
    assert times[0] == times[1]
    assert times[0] != [request.send_at_s for request in two.rounds[0]["rate2"]]


def test_sweep_ends_when_saturated() -> None:
    def levels(*figures: tuple[float, float]) -> bool:
        return is_saturated([{"output_tps": tps, "e2e_p50_ms": ms} for tps, ms in figures])

    assert not levels((10, 100))
    assert not levels((10, 100), (19, 110))
    assert not levels((10, 100), (10.1, 101)), "a slow machine, not a full one"
    assert levels((10, 100), (19, 110), (19.5, 200))
    assert levels((10, 100), (19, 110), (15, 200))
    assert not levels((10, 100), (19, 300)), "slower, but more of it"


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_trace_formats_are_read(tmp_path: Path) -> None:
    rows = [(0.0, 30, 4), (1.5, 10, 2)]
    mooncake = [
        {"timestamp": 2500, "input_length": 10, "output_length": 2, "hash_ids": [1]},
        {"timestamp": 1000, "input_length": 30, "output_length": 4},
    ]
    assert read_trace(write(tmp_path / "a.jsonl", *map(json.dumps, mooncake))) == rows
    azure = (
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,30,4",
        "2023-11-16 18:15:48.1805900,10,2",
    )
    assert read_trace(write(tmp_path / "b.csv", *azure)) == [
        (0.0, 30, 4),
        (pytest.approx(1.5), 10, 2),
    ]
    own = ("at_s,prompt_tokens,output_tokens", "7,30,4", "8.5,10,2")
    path = write(tmp_path / "c.csv", *own)
    assert read_trace(path) == rows
    (scenario,) = load_scenarios(LoadOptions(trace=path))
    requests = build_workload(DATA, [scenario]).rounds[0]["trace"]
    assert [(r.send_at_s, len(r.prompt), r.max_tokens) for r in requests] == rows


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("{",), "trace .*, line 1: not JSON"),
        (("when,how", "1,2"), "cannot be read"),
        (("at_s,prompt_tokens,output_tokens",), "is empty"),
        (("at_s,prompt_tokens,output_tokens", "1,0,3"), "a request without tokens"),
        (("at_s,prompt_tokens,output_tokens", "1,2,3", "nan,2,3"), "without a time"),
        (('{"at_s": 1, "prompt_tokens": Infinity, "output_tokens": 2}',), "cannot be read"),
    ],
)
def test_trace_refuses_other_files(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_trace(write(tmp_path / "x.csv", *lines))
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(str(tmp_path / "missing.csv"))
