"""The loads of `--mode`: their scenarios, their times, traces, and when a sweep ends."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean, pvariance

import pytest

from llmkit.bench.loads import SWEEP, Load, gamma_arrivals, load_scenarios, read_trace, saturated
from llmkit.bench.workload import Data, build_workload
from llmkit.checkpoint.errors import InputError, UsageError

DATA = Data("tokens", range(100_000))


def names(load: Load) -> list[tuple[str, int]]:
    return [(scenario.name, scenario.clients) for scenario in load_scenarios(load)]


def test_modes() -> None:
    assert names(Load()) == [("c8", 8)]
    assert names(Load(concurrency=(4, 1, 4))) == [("c1", 1), ("c4", 4)]
    assert names(Load("latency", concurrency=(1, 32))) == [("batch1", 1), ("batch32", 32)]
    assert names(Load("throughput", requests=100)) == [("throughput", 100)]
    assert names(Load(rates=(4.0, 0.5))) == [("rate0.5", 32), ("rate4", 40)]
    assert [clients for _, clients in names(Load("sweep"))] == list(SWEEP)


def test_lengths_prefix_and_turns() -> None:
    load = Load(requests=5, input_tokens=(10, 20), output_tokens=(3, 3), prefix_tokens=7, turns=2)
    (requests,) = build_workload(DATA, load_scenarios(load)).rounds[0].values()
    assert len(requests) == 10
    assert {request.max_tokens for request in requests} == {3}
    first = [request for request in requests if not request.follows]
    assert all(17 <= len(request.prompt) <= 27 for request in first)
    assert len({request.prompt[:7] for request in requests}) == 1
    for before, after in zip(first, (request for request in requests if request.follows), strict=True):
        assert 10 <= len(after.prompt) - before.total_tokens <= 20, "a later turn has no prefix of its own"


def test_a_batch_is_sent_at_once() -> None:
    (scenario,) = load_scenarios(Load("latency", concurrency=(3,)))
    assert len(build_workload(DATA, [scenario]).rounds[0]["batch3"]) == scenario.clients == 3


@pytest.mark.parametrize(
    ("load", "told"),
    [
        (Load("fast"), "no such mode: fast"),
        (Load("latency", rates=(1.0,)), "--rate does not go with --mode latency"),
        (Load(rates=(1.0,), concurrency=(1,)), "--rate does not go with"),
        (Load("throughput", concurrency=(4,)), "--mode throughput sends all at once"),
        (Load("latency", requests=8), "--mode latency sends one request a client"),
        (Load(trace="trace.jsonl", turns=2), "a trace says itself"),
        (Load(rates=(0.0,)), "more than 0"),
        (Load(burstiness=0), "more than 0"),
        (Load(burstiness=math.nan), "more than 0"),
        (Load("sweep", trace="x"), "a trace says itself"),
    ],
)
def test_refused(load: Load, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        load_scenarios(load)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_distributed(burstiness: float) -> None:
    times = gamma_arrivals(5.0, burstiness)(Random(0), 20_001)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert times[0] == 0 and min(gaps) >= 0
    assert fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert pvariance(gaps) == pytest.approx(0.2**2 / burstiness, rel=0.15)


def test_arrivals_are_seeded_and_the_same_in_every_round() -> None:
    scenarios = load_scenarios(Load(rates=(2.0,), requests=9))
    one, two = (build_workload(DATA, scenarios, rounds=2, seed=seed) for seed in (0, 1))
    times = [[request.at_s for request in rounds["rate2"]] for rounds in one.rounds]
    assert times[0] == times[1]
    assert times[0] != [request.at_s for request in two.rounds[0]["rate2"]]


def test_when_a_sweep_ends() -> None:
    def levels(*figures: tuple[float, float]) -> bool:
        return saturated([{"output_tps": tps, "e2e_p50_ms": ms} for tps, ms in figures])

    assert not levels((10, 100))
    assert not levels((10, 100), (19, 110))
    assert not levels((10, 100), (10.1, 101)), "a slow machine, not a full one"
    assert levels((10, 100), (19, 110), (19.5, 200))
    assert levels((10, 100), (19, 110), (15, 200))
    assert not levels((10, 100), (19, 300)), "slower, but more of it"


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_traces_of_every_kind(tmp_path: Path) -> None:
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
    assert read_trace(write(tmp_path / "b.csv", *azure)) == [(0.0, 30, 4), (pytest.approx(1.5), 10, 2)]
    own = ("at_s,prompt_tokens,output_tokens", "7,30,4", "8.5,10,2")
    path = write(tmp_path / "c.csv", *own)
    assert read_trace(path) == rows
    (scenario,) = load_scenarios(Load(trace=path))
    requests = build_workload(DATA, [scenario]).rounds[0]["trace"]
    assert [(r.at_s, len(r.prompt), r.max_tokens) for r in requests] == rows


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (("{",), "cannot be read"),
        (("when,how", "1,2"), "cannot be read"),
        (("at_s,prompt_tokens,output_tokens",), "is empty"),
        (("at_s,prompt_tokens,output_tokens", "1,0,3"), "a request without tokens"),
        (("at_s,prompt_tokens,output_tokens", "1,2,3", "nan,2,3"), "without a time"),
        (('{"at_s": 1, "prompt_tokens": Infinity, "output_tokens": 2}',), "cannot be read"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, lines: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_trace(write(tmp_path / "x.csv", *lines))
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(str(tmp_path / "missing.csv"))
