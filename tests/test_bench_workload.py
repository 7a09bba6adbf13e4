"""The workload is the same work everywhere, and its rounds are the same lengths with other text."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from llmkit.bench.workload import (
    SCENARIOS,
    Data,
    Workload,
    build_workload,
    builtin_text,
    chains,
    choose,
    require_context,
)
from llmkit.checkpoint.errors import InputError, UsageError

TOKENS = [index * 7919 % 50_000 for index in range(100_000)]
ALL = tuple(SCENARIOS)


def build(
    tokens: Sequence[int], names: Sequence[str], rounds: int = 1, seed: int = 0, limit: int | None = None
) -> Workload:
    return build_workload(Data("tokens", tokens), choose(names, rounds, limit), rounds, seed, limit)


def test_shapes() -> None:
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
    assert {name: SCENARIOS[name].clients for name in ALL} == {
        "single": 1, "batch": 32, "online": 16, "prefix": 16, "quick": 4,
    }  # fmt: skip
    ids = [r.id for name in ALL for r in requests[name]]
    assert len(ids) == len(set(ids))


def test_online_begins_with_the_lengths_of_batch_and_other_text() -> None:
    requests = build(TOKENS, ALL).rounds[0]
    pairs = list(zip(requests["batch"], requests["online"], strict=False))
    assert all(len(a.prompt) == len(b.prompt) and a.max_tokens == b.max_tokens for a, b in pairs)
    assert all(a.prompt != b.prompt for a, b in pairs)


def test_rounds_have_the_same_lengths_and_other_text() -> None:
    first, second = build(TOKENS, ALL, rounds=2).rounds
    for name in ALL:
        assert [r.total_tokens for r in first[name]] == [r.total_tokens for r in second[name]]
        assert not {r.prompt for r in first[name]} & {r.prompt for r in second[name]}


def test_requests_do_not_depend_on_what_else_is_chosen() -> None:
    alone = build(TOKENS, ["online"], rounds=1).rounds[0]["online"]
    among = build(TOKENS, ALL, rounds=3).rounds[0]["online"]
    assert alone == among
    assert build(TOKENS, ["online"], limit=5).rounds[0]["online"] == alone[:5]


def test_the_digest_names_the_work() -> None:
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


def test_the_digest_is_the_same_in_another_process() -> None:
    code = (
        "from llmkit.bench.workload import Data, build_workload, choose\n"
        "tokens = [index * 7919 % 50_000 for index in range(100_000)]\n"
        "chosen = choose(['quick', 'prefix'], 1, None)\n"
        "print(build_workload(Data('tokens', tokens), chosen, seed=3).sha256)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == build(TOKENS, ["quick", "prefix"], seed=3).sha256


def test_description() -> None:
    assert build(TOKENS, ["single"]).describe() == [
        {"name": "single", "requests": 4, "clients": 1, "prompt_tokens": 512, "output_tokens": 512}
    ]


def test_the_text_is_there() -> None:
    assert len(builtin_text()) > 100_000


@pytest.mark.parametrize(
    ("scenarios", "rounds", "limit", "told"),
    [
        (["quik"], 1, None, "no such scenario: quik. Scenarios are single, batch, online, prefix, quick"),
        ([], 1, None, "no such scenario"),
        (["quick"], 0, None, "0 rounds"),
        (["quick"], 1, 0, "limit of 0"),
    ],
)
def test_refused(scenarios: list[str], rounds: int, limit: int | None, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        build(TOKENS, scenarios, rounds, limit=limit)


def test_too_little_text() -> None:
    with pytest.raises(InputError, match=r"text is 100 tokens long. More than 128"):
        build(TOKENS[:100], ["single"])


def test_prompts_are_never_shortened_to_fit() -> None:
    workload = build(TOKENS, ["quick", "single"])
    require_context(workload, 256, "x")
    with pytest.raises(InputError, match=r"scenario single needs a context of 256 tokens and x has 255.*fit: quick"):
        require_context(workload, 255, "x")


CONVERSATIONS = [
    [(range(10 * i, 10 * i + 3), range(4)), (range(10 * i + 5, 10 * i + 7), range(6))] for i in range(1, 9)
]


def test_conversations_have_what_was_said_before_in_their_prompts() -> None:
    data = Data("talks", TOKENS, CONVERSATIONS)
    scenario = replace(SCENARIOS["quick"], turns=2)
    requests = build_workload(data, [scenario], limit=4).rounds[0]["quick"]
    assert [request.follows for request in requests] == [False, True] * 4
    assert [[r.id for r in chain] for chain in chains(requests)][1] == ["quick-0-1-0", "quick-0-1-1"]
    for first, second in chains(requests):
        (talk,) = [talk for talk in CONVERSATIONS if tuple(talk[0][0]) == first.prompt]
        assert second.prompt == (*first.prompt, *talk[0][1], *talk[1][0])
        assert (first.max_tokens, second.max_tokens) == (4, 6)
    assert len({request.prompt for request in requests}) == 8, "no conversation twice while there are others"
    (one,) = build_workload(data, [SCENARIOS["quick"]], limit=1).rounds[0]["quick"]
    assert one.max_tokens == 4


def test_rounds_have_other_conversations_while_there_are_any() -> None:
    rounds = build_workload(Data("talks", TOKENS, CONVERSATIONS), [SCENARIOS["quick"]], rounds=3, limit=4).rounds
    prompts = [[request.prompt for request in requests["quick"]] for requests in rounds]
    assert len({*prompts[0], *prompts[1]}) == 8
    assert prompts[2] == prompts[0]


def test_turns_cut_from_a_text() -> None:
    scenario = replace(SCENARIOS["prefix"], turns=3)
    (chain,) = chains(build_workload(Data("text", TOKENS), [scenario], limit=1).rounds[0]["prefix"])
    assert [len(request.prompt) for request in chain] == [544, 544 + 32 + 32, 544 + 2 * (32 + 32)], "one common prefix"
    for earlier, later in pairwise(chain):
        assert later.prompt[: len(earlier.prompt)] == earlier.prompt
    require_context(build_workload(Data("text", TOKENS), [scenario], limit=1), chain[-1].total_tokens, "x")


def test_times_are_part_of_the_work() -> None:
    timed = replace(SCENARIOS["quick"], arrivals=lambda random, count: [random.random() + i for i in range(count)])
    workload = build_workload(Data("text", TOKENS), [timed], rounds=2)
    times = [[request.at_s for request in requests["quick"]] for requests in workload.rounds]
    assert times[0] == times[1] and None not in times[0]
    assert workload.sha256 != build(TOKENS, ["quick"], rounds=2).sha256
    assert workload.sha256 == build_workload(Data("text", TOKENS), [timed], rounds=2).sha256
    assert workload.describe()[0]["arrivals_per_s"] == pytest.approx(7 / (times[0][-1] - times[0][0]))
