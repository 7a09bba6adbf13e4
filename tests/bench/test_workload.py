"""Workloads are the same everywhere, and rounds have the same lengths with other text."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from llmkit.bench.workload import (
    SCENARIOS,
    PromptDataset,
    Workload,
    build_workload,
    builtin_prompt_text,
    check_context_length,
    group_conversations,
    select_scenarios,
)
from llmkit.common.errors import InputError, UsageError

TOKENS = [index * 7919 % 50_000 for index in range(100_000)]
ALL = tuple(SCENARIOS)


def build(
    tokens: Sequence[int],
    names: Sequence[str],
    rounds: int = 1,
    seed: int = 0,
    limit: int | None = None,
) -> Workload:
    return build_workload(
        PromptDataset("tokens", tokens), select_scenarios(names, rounds, limit), rounds, seed, limit
    )


def test_workload_scenarios_have_their_sizes() -> None:
    requests = build(TOKENS, ALL).rounds[0]
    assert [(len(r.prompt), r.max_tokens) for r in requests["single"]] == [(128, 128)] * 4
    assert [(len(r.prompt), r.max_tokens) for r in requests["prefix"]] == [(544, 32)] * 32
    assert {r.prompt[:512] for r in requests["prefix"]} == {requests["prefix"][0].prompt[:512]}
    assert len({r.prompt[512:] for r in requests["prefix"]}) == 32
    for name, count in (("batch", 32), ("online", 64)):
        assert len(requests[name]) == count
        assert all(64 <= len(r.prompt) <= 512 and 32 <= r.max_tokens <= 256 for r in requests[name])
    assert len(requests["quick"]) == 8
    assert all(64 <= len(r.prompt) <= 128 and r.max_tokens == 32 for r in requests["quick"])
    assert {name: SCENARIOS[name].max_concurrency for name in ALL} == {
        "single": 1,
        "batch": 32,
        "online": 16,
        "prefix": 16,
        "quick": 4,
    }
    ids = [r.id for name in ALL for r in requests[name]]
    assert len(ids) == len(set(ids))


def test_workload_online_begins_with_the_lengths_of_batch() -> None:
    requests = build(TOKENS, ALL).rounds[0]
    pairs = list(zip(requests["batch"], requests["online"], strict=False))
    assert all(len(a.prompt) == len(b.prompt) and a.max_tokens == b.max_tokens for a, b in pairs)
    assert all(a.prompt != b.prompt for a, b in pairs)


def test_workload_rounds_have_the_same_lengths_and_other_text() -> None:
    first, second = build(TOKENS, ALL, rounds=2).rounds
    for name in ALL:
        assert [r.total_tokens for r in first[name]] == [r.total_tokens for r in second[name]]
        assert not {r.prompt for r in first[name]} & {r.prompt for r in second[name]}


def test_workload_requests_do_not_depend_on_other_scenarios() -> None:
    alone = build(TOKENS, ["online"], rounds=1).rounds[0]["online"]
    among = build(TOKENS, ALL, rounds=3).rounds[0]["online"]
    assert alone == among
    assert build(TOKENS, ["online"], limit=5).rounds[0]["online"] == alone[:5]


def test_workload_digest_changes_with_the_work() -> None:
    digest = build(TOKENS, ["quick"]).sha256
    assert digest == build(TOKENS, ["quick", "quick"]).sha256
    others = [
        build(TOKENS, ["quick"], seed=1),
        build(TOKENS, ["quick"], rounds=2),
        build(TOKENS, ["quick"], limit=3),
        build(TOKENS[1:], ["quick"]),
        build(TOKENS, ["single"]),
    ]
    assert len({digest, *(other.sha256 for other in others)}) == 6


def test_workload_digest_is_the_same_in_another_process() -> None:
    code = (
        "from llmkit.bench.workload import PromptDataset, build_workload, select_scenarios\n"
        "tokens = [index * 7919 % 50_000 for index in range(100_000)]\n"
        "chosen = select_scenarios(['quick', 'prefix'], 1, None)\n"
        "print(build_workload(PromptDataset('tokens', tokens), chosen, seed=3).sha256)"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert other == build(TOKENS, ["quick", "prefix"], seed=3).sha256


def test_workload_description() -> None:
    assert build(TOKENS, ["single"]).describe() == [
        {"name": "single", "requests": 4, "clients": 1, "prompt_tokens": 512, "output_tokens": 512}
    ]


def test_workload_has_a_builtin_text() -> None:
    assert len(builtin_prompt_text()) > 100_000


@pytest.mark.parametrize(
    ("scenarios", "rounds", "limit", "message"),
    [
        (
            ["quik"],
            1,
            None,
            "no such scenario: quik. Scenarios are single, batch, online, prefix, quick",
        ),
        ([], 1, None, "no such scenario"),
        (["quick"], 0, None, "0 rounds"),
        (["quick"], 1, 0, "limit of 0"),
    ],
)
def test_workload_refuses_bad_options(
    scenarios: list[str], rounds: int, limit: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build(TOKENS, scenarios, rounds, limit=limit)


def test_workload_refuses_a_short_text() -> None:
    with pytest.raises(InputError, match=r"text is 100 tokens long. More than 128"):
        build(TOKENS[:100], ["single"])


def test_workload_never_shortens_prompts() -> None:
    workload = build(TOKENS, ["quick", "single"])
    check_context_length(workload, 256, "x")
    with pytest.raises(
        InputError, match=r"scenario single needs a context of 256 tokens and x has 255.*fit: quick"
    ):
        check_context_length(workload, 255, "x")


CONVERSATIONS = [
    [(range(10 * i, 10 * i + 3), range(4)), (range(10 * i + 5, 10 * i + 7), range(6))]
    for i in range(1, 9)
]


def test_workload_prompts_hold_earlier_turns() -> None:
    data = PromptDataset("talks", TOKENS, CONVERSATIONS)
    scenario = replace(SCENARIOS["quick"], turns=2)
    requests = build_workload(data, [scenario], limit=4).rounds[0]["quick"]
    assert [request.is_follow_up for request in requests] == [False, True] * 4
    assert [[r.id for r in chain] for chain in group_conversations(requests)][1] == [
        "quick-0-1-0",
        "quick-0-1-1",
    ]
    for first, second in group_conversations(requests):
        (talk,) = [talk for talk in CONVERSATIONS if tuple(talk[0][0]) == first.prompt]
        assert second.prompt == (*first.prompt, *talk[0][1], *talk[1][0])
        assert (first.max_tokens, second.max_tokens) == (4, 6)
    assert len({request.prompt for request in requests}) == 8, (
        "no conversation twice while there are others"
    )
    (one,) = build_workload(data, [SCENARIOS["quick"]], limit=1).rounds[0]["quick"]
    assert one.max_tokens == 4


def test_workload_rounds_have_different_conversations() -> None:
    rounds = build_workload(
        PromptDataset("talks", TOKENS, CONVERSATIONS), [SCENARIOS["quick"]], rounds=3, limit=4
    ).rounds
    prompts = [[request.prompt for request in requests["quick"]] for requests in rounds]
    assert len({*prompts[0], *prompts[1]}) == 8
    assert prompts[2] == prompts[0]


def test_workload_samples_turns_from_a_text() -> None:
    scenario = replace(SCENARIOS["prefix"], turns=3)
    (chain,) = group_conversations(
        build_workload(PromptDataset("text", TOKENS), [scenario], limit=1).rounds[0]["prefix"]
    )
    assert [len(request.prompt) for request in chain] == [
        544,
        544 + 32 + 32,
        544 + 2 * (32 + 32),
    ], "one common prefix"
    for earlier, later in pairwise(chain):
        assert later.prompt[: len(earlier.prompt)] == earlier.prompt
    check_context_length(
        build_workload(PromptDataset("text", TOKENS), [scenario], limit=1),
        chain[-1].total_tokens,
        "x",
    )


def test_workload_digest_includes_arrival_times() -> None:
    timed = replace(
        SCENARIOS["quick"],
        draw_arrivals=lambda random, count: [random.random() + i for i in range(count)],
    )
    workload = build_workload(PromptDataset("text", TOKENS), [timed], rounds=2)
    times = [[request.send_at_s for request in requests["quick"]] for requests in workload.rounds]
    assert times[0] == times[1] and None not in times[0]
    assert workload.sha256 != build(TOKENS, ["quick"], rounds=2).sha256
    assert (
        workload.sha256 == build_workload(PromptDataset("text", TOKENS), [timed], rounds=2).sha256
    )
    assert workload.describe()[0]["arrivals_per_s"] == pytest.approx(
        7 / (times[0][-1] - times[0][0])
    )
