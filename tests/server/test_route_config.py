"""Routes as data, and the arithmetic of uncertainty, without a server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from llmkit.cli import main
from llmkit.common.errors import InputError, UsageError
from llmkit.runtime.server.router.client_stream import ClientStream, UpstreamAnswer
from llmkit.runtime.server.tiers.prompt_facts import PromptFacts, holds
from llmkit.runtime.server.tiers.route_config import (
    Condition,
    Upstream,
    load_routing,
    parse_route,
    split_upstreams,
)
from llmkit.runtime.server.tiers.routed_response import embedding_in
from llmkit.runtime.server.tiers.signals import (
    AnswerSignals,
    logistic,
    sigmoid,
    token_entropy,
    token_margin,
)
from llmkit.runtime.server.tiers.uncertainty import Calibration, Uncertainty
from llmkit.runtime.server.tiers.url_logprobs import LogprobsFilter, UrlConfidence, num_choices
from llmkit.runtime.server.tiers.url_tier import UrlTier

MEAN = {"mean_logprob": 1.0}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("auto", "--route 'auto' is not understood"),
        ("=small,large", "is not understood"),
        ("auto=small,,large", "is not understood"),
        ("auto=small,big", "the tier 'big' of 'auto' is not a model of this server"),
        ("auto=small,small", "a tier of 'auto' is named twice"),
        ("large=small,large", "the name 'large' is taken"),
        ("auto=small,large:often", "the rule 'often' is not understood"),
        ("auto=small,large:prompt_chars>=0", "is not understood"),
        ("auto=small,large:header.a b=c", "is not understood"),
        ("auto=small,large:threshold=1.5", "the threshold '1.5' is wrong"),
        ("auto=small,large:key=nobody", "no key has the name 'nobody'"),
    ],
)
def test_route_option_refuses_what_it_cannot_do(word: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        load_routing([word], None, ["small", "large"], {}, ["one"])
    assert message in str(error.value)


def test_route_option_has_rules_and_a_threshold() -> None:
    name, route = parse_route("auto=a,b,c:tools:prompt_chars>=800:key=k:header.X-T=v:threshold=0.7")
    assert (name, route.tiers) == ("auto", ["a", "b", "c"])
    assert [rule.tier for rule in route.rules] == ["c"] * 4
    assert [rule.when for rule in route.rules] == [
        Condition(tools=True),
        Condition(min_prompt_chars=800),
        Condition(key="k"),
        Condition(headers={"X-T": "v"}),
    ]
    assert route.uncertainty is not None and set(route.uncertainty) == {"a", "b"}
    assert route.uncertainty["a"].first.threshold == 0.7
    assert parse_route("auto=a,b")[1].uncertainty is None, "the builtin weights"


@pytest.mark.parametrize(
    ("lines", "place", "message"),
    [
        ("routes: [1]", ":1", "routes"),
        ("routes:\n  auto:\n    tiers: [small, large]\n    rulez: []", ":4", "rules"),
        ("routes:\n  auto: {tiers: []}", ":2", "tiers"),
        ("routes:\n  auto: {tiers: [small, far]}", ":2", "'far'"),
        (
            "routes:\n  auto:\n    tiers: [small]\n    rules:\n      - {when: {}, tier: small}",
            ":2",
            "has no condition",
        ),
        (
            "routes:\n  auto:\n    tiers: [small, large]\n    rules:\n"
            "      - {when: {model: other}, tier: large}",
            ":2",
            "'other' is no name of 'auto'",
        ),
        (
            "routes:\n  auto:\n    tiers: [small]\n    rules:\n"
            "      - {when: {tools: true}, tier: large}",
            ":2",
            "rules names 'large', which is no tier",
        ),
        (
            "routes:\n  auto:\n    tiers: [small, large]\n    uncertainty:\n      large:\n"
            "        first: {bias: 0, weights: {mean_logprob: 1}, threshold: 0.5}",
            ":2",
            "the last tier",
        ),
        (
            "routes:\n  auto:\n    tiers: [small, large]\n    uncertainty:\n      small:\n"
            "        first: {bias: .nan, weights: {mean_logprob: 1}, threshold: 0.5}",
            ":6",
            "finite",
        ),
        ("upstreams:\n  x: {url: 'ftp://a'}", ":2", "url"),
        ("upstreams:\n  x: {url: 'http://user:pass@a/v1'}", ":2", "url"),
        ("upstreams:\n  small: {url: 'http://a/v1'}", ":2", "'small' is a model already"),
        (
            "routes:\n  auto: {tiers: [small], aliases: [large]}",
            ":2",
            "the name 'large' is taken",
        ),
    ],
)
def test_route_file_errors_name_the_line(
    tmp_path: Path, lines: str, place: str, message: str
) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text(lines)
    with pytest.raises(UsageError) as error:
        load_routing([], path, ["small", "large"], {})
    assert f"{path}{place}:" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model", "--route", "auto=a,b"], "--route and --route-config are for several models"),
        (["a=x", "b=y", "--route", "auto=a,c"], "the tier 'c' of 'auto' is not a model"),
        (
            ["a=x", "b=y", "--route", "auto=a,b", "--max-loaded", "1"],
            "--max-loaded 1: a route has 2 models",
        ),
        (["a=x", "b=http://u:p@host/v1"], "http://HOST/v1 or https://HOST/v1 was expected"),
        (["a=x", "b=y", "--route-config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_serve_refuses_wrong_routes_before_a_model_is_read(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["serve", *words]) == 2
    assert message in capsys.readouterr().err


def test_upstreams_are_told_from_models() -> None:
    local, upstreams = split_upstreams(
        {
            "a": "org/model",
            "b": "https://host/v1#gpt",
            "c": "url:http://127.0.0.1:1",
            "d": "https://huggingface.co/org/model",
        }
    )
    assert local == {"a": "org/model", "d": "https://huggingface.co/org/model"}
    assert (upstreams["b"].url, upstreams["b"].model) == ("https://host/v1", "gpt")
    assert (upstreams["c"].url, upstreams["c"].model) == ("http://127.0.0.1:1", None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"api_key_env": "LLMKIT_TEST_ABSENT"}, "LLMKIT_TEST_ABSENT is not set"),
        ({"api_key_file": "absent"}, "cannot be read"),
        ({"ca_file": "absent"}, "ca_file of the upstream 'x' cannot be used"),
    ],
)
def test_upstream_needs_its_key_and_certificates(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        UrlTier("x", Upstream(url="https://host/v1", **fields))
    assert message in str(error.value)


def test_signals_are_those_of_the_definition() -> None:
    answer = AnswerSignals()
    assert answer.values() is None
    answer.add(math.log(0.5), [math.log(0.5), math.log(0.25)])
    answer.add(-30.0, [0.0])
    values = answer.values()
    assert values is not None
    assert values["mean_logprob"] == pytest.approx((math.log(0.5) - 20) / 2)
    assert values["min_logprob"] == -20
    entropy = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert token_entropy([math.log(0.5), math.log(0.25)]) == pytest.approx(entropy)
    assert values["first_entropy"] == pytest.approx(entropy / 2, abs=1e-6)
    assert values["min_margin"] == pytest.approx(math.log(2))
    assert token_margin([-0.5, -0.1, -3.0]) == pytest.approx(0.4)
    assert (token_margin([-0.1]), token_margin([]), token_margin([0.0, -90.0])) == (20, 20, 20)
    assert logistic(1.0, {"mean_logprob": 2.0}, {"mean_logprob": -0.5}) == 0.5
    assert (sigmoid(-1000), sigmoid(1000)) == (0.0, 1.0)


def test_prompt_facts_are_read_from_every_api() -> None:
    def facts(**body: Any) -> PromptFacts:
        return PromptFacts.of(body, "one", {"x-a": "b"}.get)

    parts = [{"type": "text", "text": "two"}, {"type": "text", "text": "x"}]
    chat = facts(system="ab", messages=[{"content": "one"}, {"content": parts}])
    assert (chat.prompt_chars, chat.question, chat.has_tools) == (9, "two x", False)
    assert facts(prompt=[1, 2, 3]).prompt_chars == 12
    assert facts(input="hello", tools=[{}]).has_tools
    assert facts(input=[{"role": "user", "content": "hi"}]).question == "hi"
    nested: Any = "deep"
    for _ in range(100):
        nested = [nested]
    assert facts(messages=nested).prompt_chars == 0
    assert holds(Condition(headers={"x-a": "*"}, key="one"), chat)
    assert not holds(Condition(headers={"x-b": "*"}), chat)
    assert holds(Condition(max_prompt_chars=9), chat) and not holds(
        Condition(min_prompt_chars=10), chat
    )


def test_log_probabilities_of_urls_are_read_and_removed() -> None:
    body = {"model": "m", "logprobs": True, "top_logprobs": 1, "n": 2}
    logprobs = LogprobsFilter("/v1/chat/completions", body)
    assert logprobs.body["top_logprobs"] == 5 and body["top_logprobs"] == 1
    gate = Uncertainty(tokens=2, first=Calibration(bias=0.7, weights=MEAN, threshold=0.5))
    confidence = UrlConfidence(gate, logprobs, num_choices(body), stream=True)
    tops = [{"logprob": -0.1}, {"logprob": -3.0}]
    content = [{"logprob": -0.1, "top_logprobs": tops}]

    def chunk(index: int, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "logprobs": {"content": content}, "finish_reason": finish}
        return {"choices": [choice]}

    confidence.add(chunk(0))
    confidence.add(chunk(0))
    assert not confidence.is_ready, "the second answer has no tokens"
    confidence.add(chunk(1, "stop"))
    assert confidence.is_ready
    assert confidence.result().is_sure
    assert confidence.result().probability == pytest.approx(sigmoid(0.6), abs=1e-4)
    cleaned = logprobs.clean(chunk(0))
    assert len(cleaned["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 1
    for junk in (None, [], {"choices": 3}, {"choices": [3]}, {"choices": [{"index": "x"}]}):
        confidence.add(junk)
        logprobs.clean(junk)
    assert num_choices({"prompt": ["a", "b"], "n": 3}) == 6
    assert num_choices({"prompt": [1, 2], "n": "x"}) == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "logprobs",
    [
        5,
        {"content": 5, "token_logprobs": "abc", "top_logprobs": 5},
        {"content": [{"logprob": None, "top_logprobs": [{"logprob": "a"}]}]},
        {"token_logprobs": [None, "a"], "top_logprobs": [["a"], {"a": "b"}]},
    ],
)
def test_log_probabilities_of_urls_may_have_any_form(path: str, logprobs: Any) -> None:
    gate = Uncertainty(
        first=Calibration(bias=0.0, weights={"mean_logprob": 1.0}, threshold=0.5), tokens=1
    )
    for asked in ({}, {"logprobs": True, "top_logprobs": 2}, {"logprobs": 2}):
        own = LogprobsFilter(path, asked)
        signals = UrlConfidence(gate, own, 1, stream=False)
        document = {"choices": [{"index": 0, "logprobs": logprobs}]}
        signals.add(document)
        assert not signals.result().is_sure
        assert own.clean(document) is document


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"data": [{"embedding": [1, 0.5]}]}, [1, 0.5]),
        ({"data": [{"embedding": [1, "a"]}]}, []),
        ({"data": [{"embedding": "AAAA"}]}, []),
        ({"data": []}, []),
        ([], []),
        (None, []),
    ],
)
def test_embedding_of_a_learned_route_may_have_any_form(document: Any, expected: Any) -> None:
    assert embedding_in(document) == expected


def test_route_header_is_a_comment_of_a_stream_that_has_begun() -> None:
    """While a tier is silent the client gets comments, and so the headers have been sent."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def chunks() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"

    async def run() -> None:
        client = ClientStream(send, "/v1/chat/completions", keep_alive_s=0.001)
        held = asyncio.Event()
        waiting = asyncio.ensure_future(client.wait(held.wait()))
        while len(sent) < 3:
            await asyncio.sleep(0.001)
        held.set()
        await waiting
        answer = UpstreamAnswer(200, [(b"x-other", b"1")], True, chunks())
        await client.forward(answer, [(b"x-llmkit-route", b"large; reason=unsure")])

    asyncio.run(run())
    start, *bodies = sent
    assert (start["status"], dict(start["headers"]).get(b"x-other")) == (200, None)
    text = b"".join(message["body"] for message in bodies).decode()
    assert text.startswith(": keep-alive\n\n: keep-alive\n\n")
    assert text.endswith(": x-llmkit-route: large; reason=unsure\n\n:\n\ndata: 1\n\n")
