"""The workload is the same work everywhere, and its rounds are the same lengths with other text."""

import subprocess
import sys

import pytest

from llmkit.bench.workload import SCENARIOS, build_workload, builtin_text, require_context
from llmkit.checkpoint.errors import InputError, UsageError

TOKENS = [index * 7919 % 50_000 for index in range(100_000)]
ALL = tuple(SCENARIOS)


def test_shapes() -> None:
    requests = build_workload(TOKENS, ALL).rounds[0]
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
    requests = build_workload(TOKENS, ALL).rounds[0]
    pairs = list(zip(requests["batch"], requests["online"], strict=False))
    assert all(len(a.prompt) == len(b.prompt) and a.max_tokens == b.max_tokens for a, b in pairs)
    assert all(a.prompt != b.prompt for a, b in pairs)


def test_rounds_have_the_same_lengths_and_other_text() -> None:
    first, second = build_workload(TOKENS, ALL, rounds=2).rounds
    for name in ALL:
        assert [r.total_tokens for r in first[name]] == [r.total_tokens for r in second[name]]
        assert not {r.prompt for r in first[name]} & {r.prompt for r in second[name]}


def test_requests_do_not_depend_on_what_else_is_chosen() -> None:
    alone = build_workload(TOKENS, ["online"], rounds=1).rounds[0]["online"]
    among = build_workload(TOKENS, ALL, rounds=3).rounds[0]["online"]
    assert alone == among
    assert build_workload(TOKENS, ["online"], limit=5).rounds[0]["online"] == alone[:5]


def test_the_digest_names_the_work() -> None:
    digest = build_workload(TOKENS, ["quick"]).sha256
    assert digest == build_workload(TOKENS, ["quick", "quick"]).sha256
    others = [
        build_workload(TOKENS, ["quick"], seed=1),
        build_workload(TOKENS, ["quick"], rounds=2),
        build_workload(TOKENS, ["quick"], limit=3),
        build_workload(TOKENS[1:], ["quick"]),
        build_workload(TOKENS, ["single"]),
    ]
    assert len({digest, *(other.sha256 for other in others)}) == 6


def test_the_digest_is_the_same_in_another_process() -> None:
    code = (
        "from llmkit.bench.workload import build_workload\n"
        "tokens = [index * 7919 % 50_000 for index in range(100_000)]\n"
        "print(build_workload(tokens, ['quick', 'prefix'], seed=3).sha256)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == build_workload(TOKENS, ["quick", "prefix"], seed=3).sha256


def test_description() -> None:
    assert build_workload(TOKENS, ["single"]).describe() == [
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
        build_workload(TOKENS, scenarios, rounds, limit=limit)


def test_too_little_text() -> None:
    with pytest.raises(InputError, match=r"text is 100 tokens long. More than 128"):
        build_workload(TOKENS[:100], ["single"])


def test_prompts_are_never_shortened_to_fit() -> None:
    workload = build_workload(TOKENS, ["quick", "single"])
    require_context(workload, 256, "x")
    with pytest.raises(InputError, match=r"scenario single needs a context of 256 tokens and x has 255.*fit: quick"):
        require_context(workload, 255, "x")
