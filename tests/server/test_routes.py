"""Routes of several tiers: which tier answers, and what the client gets of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support.free_ports import free_port
from support.recording_upstream import RecordingUpstream
from support.router_process import LlmkitRouter
from support.scripted_model import TEMPLATE, scripted_checkpoint, trigger
from support.server_process import held, wait_for

from llmkit.cli import main
from llmkit.runtime.server.tiers.routed_response import ROUTE_HEADER

EASY, HARD = trigger("easy"), trigger("hard")
SMALL = {"easy": "Of this I am sure.", "hard": "Well, it might perhaps be so or not, who knows?"}
LARGE = {"easy": "A large one would say this.", "hard": "Surely four, which everybody can count."}
ZERO = {"mean_logprob": 0.0, "min_logprob": 0.0, "first_entropy": 0.0}
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"]
# An answer is sure if its tokens have a mean probability above a half.
GATE = {
    "tokens": 4,
    "first": {"bias": 0.69, "weights": {"mean_logprob": 1.0}, "threshold": 0.5},
}


def calibration(bias: float, tokens: int) -> dict[str, Any]:
    return {"small": {"tokens": tokens, "first": {"bias": bias, "weights": ZERO, "threshold": 0.5}}}


@pytest.fixture(scope="module")
def afar() -> Iterator[RecordingUpstream]:
    upstream = RecordingUpstream()
    yield upstream
    upstream.close()


@pytest.fixture(autouse=True)
def _as_at_first(afar: RecordingUpstream) -> None:
    afar.reset()


@pytest.fixture(scope="module")
def router(
    tmp_path_factory: pytest.TempPathFactory, afar: RecordingUpstream
) -> Iterator[LlmkitRouter]:
    folder = tmp_path_factory.mktemp("routes")
    for name, scripts in (("small", SMALL), ("large", LARGE)):
        scripted_checkpoint(folder / name, scripts, TEMPLATE, unsure=("hard",))
    (folder / "keys").write_text("key-one name=one\nkey-two name=best\n")
    (folder / "upstream-key").write_text("operator-key\n")
    (folder / "own-key").write_text("key-one\n")
    port = free_port()
    # The router is its own upstream: its models are asked over URLs, too.
    own = {"url": f"http://127.0.0.1:{port}/v1", "api_key_file": str(folder / "own-key")}
    afar_upstream = {"url": afar.url, "model": "big", "api_key_file": str(folder / "upstream-key")}
    config = {
        "upstreams": {
            "near": {**own, "model": "small"},
            "far": {**own, "model": "large"},
            "afar": afar_upstream,
            "slow": {**afar_upstream, "timeout": 1},
            "keyless": {"url": afar.url, "forward_client_key": True},
        },
        "routes": {
            "auto": {"tiers": ["small", "large"], "uncertainty": {"small": GATE}},
            "ruled": {
                "tiers": ["small", "large"],
                "aliases": ["ruled-best"],
                "uncertainty": {},
                "rules": [
                    {"when": {"tools": True}, "tier": "large"},
                    {"when": {"min_prompt_chars": 200}, "tier": "large"},
                    {"when": {"headers": {"x-tier": "best"}}, "tier": "large"},
                    {"when": {"key": "best"}, "tier": "large"},
                    {"when": {"model": "ruled-best"}, "tier": "large"},
                ],
            },
            "urls": {"tiers": ["near", "far"], "uncertainty": {"near": GATE}},
            "mixed": {"tiers": ["small", "afar"], "uncertainty": {"small": GATE}},
            "broken": {"tiers": ["small", "gone"], "uncertainty": {"small": GATE}},
            "late": {"tiers": ["small", "slow"], "uncertainty": {"small": GATE}},
            "brittle": {
                "tiers": ["small", "gone"],
                "uncertainty": {"small": GATE},
                "fallback": False,
            },
            "silent": {"tiers": ["afar", "large"], "uncertainty": {"afar": GATE}},
            "patient": {"tiers": ["small", "large"], "uncertainty": calibration(9.0, 1024)},
            "learned": {
                "tiers": ["small", "large"],
                "uncertainty": {},
                "learned": {"model": "small", "bias": -2.0, "weights": [0.0], "threshold": 0.5},
            },
        },
    }
    width = json.loads((folder / "small/config.json").read_text())["hidden_size"]
    config["routes"]["learned"]["learned"]["weights"] = [0.0] * width
    (folder / "routes.yaml").write_text(yaml.safe_dump(config))
    models: dict[str, Any] = {"small": folder / "small", "large": folder / "large"}
    models["gone"] = "url:http://127.0.0.1:9/v1#some-model"
    options = ["--route-config", str(folder / "routes.yaml"), "--port", str(port)]
    options += ["--api-key-file", str(folder / "keys"), "--max-num-seqs", "8"]
    with LlmkitRouter(folder / "log", models, *options, key="key-one") as running:
        running.wait_ready()
        yield running


@pytest.fixture
def http(router: LlmkitRouter) -> Iterator[httpx.Client]:
    with router.client() as client:
        yield client


def body_of(path: str, model: str, prompt: str, **fields: Any) -> dict[str, Any]:
    asked = {"/v1/completions": "prompt", "/v1/responses": "input"}.get(path, "messages")
    content: Any = [{"role": "user", "content": prompt}] if asked == "messages" else prompt
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    return {"model": model, asked: content, limit: 64, "temperature": 0, **fields}


def without_ids(text: str) -> str:
    """A response without what differs between two answers to the same request."""
    text = re.sub(r"(chatcmpl|cmpl|msg|resp|rs|fc)[-_][0-9a-f]+", "ID", text)
    return re.sub(r'"(created|created_at|completed_at|cached_tokens)":\d+', '"":0', text)


def chat(http: httpx.Client, model: str, prompt: str, **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", {})
    path = "/v1/chat/completions"
    return http.post(path, json=body_of(path, model, prompt, **fields), headers=headers)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def metric(http: httpx.Client, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return sum(
        sample.value
        for sample in samples
        if sample.name == f"llmkit:{name}" and sample.labels.items() >= labels.items()
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_route_gives_exactly_the_answer_of_the_tier_that_is_sure(
    http: httpx.Client, path: str, stream: bool
) -> None:
    for prompt, tier, reason in ((EASY, "small", "sure"), (HARD, "large", "unsure")):
        http.post(path, json=body_of(path, tier, prompt))  # so that both find a cached prefix
        own = http.post(path, json=body_of(path, tier, prompt, stream=stream))
        routed = http.post(path, json=body_of(path, "auto", prompt, stream=stream))
        assert (own.status_code, routed.status_code) == (200, 200), routed.text
        assert without_ids(routed.text) == without_ids(own.text)
        assert routed.headers["content-type"] == own.headers["content-type"]
        assert routed.headers[ROUTE_HEADER].startswith(f"{tier}; reason={reason}")
        assert "x-llmkit-confidence" not in routed.headers
        given_up = re.search(r"small_tokens=(\d+)", routed.headers[ROUTE_HEADER])
        assert (given_up is None) == (tier == "small")
        if given_up is not None and stream:
            assert int(given_up[1]) >= 4


def test_route_works_with_the_real_clients(router: LlmkitRouter) -> None:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="key-one", max_retries=0) as client:
        chunks = client.chat.completions.create(
            model="auto",
            messages=[{"role": "user", "content": HARD}],
            stream=True,
            temperature=0,
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == LARGE["hard"]
        assert "auto" in [model.id for model in client.models.list()]
        entry = client.models.retrieve("auto").model_dump()
        assert entry["tiers"] == ["small", "large"]
    with anthropic.Anthropic(base_url=router.url, api_key="key-one", max_retries=0) as claude:
        message = claude.messages.create(
            model="auto",
            max_tokens=64,
            messages=[{"role": "user", "content": EASY}],
            extra_body={"temperature": 0},
        )
        assert message.content[0].text == SMALL["easy"]  # type: ignore[union-attr]


def test_route_asks_for_log_probabilities_only_if_the_client_does(http: httpx.Client) -> None:
    for model in ("auto", "urls"):
        for stream in (False, True):
            plain = chat(http, model, EASY, stream=stream)
            assert '"logprobs":null' in plain.text.replace(" ", "")
            assert '"top_logprobs"' not in plain.text
        wanted = chat(http, model, EASY, logprobs=True, top_logprobs=2).json()
        content = wanted["choices"][0]["logprobs"]["content"]
        assert len(content) > 3 and all(len(entry["top_logprobs"]) == 2 for entry in content)
        body = body_of("/v1/completions", model, EASY, logprobs=1)
        completion = http.post("/v1/completions", json=body).json()
        tops = completion["choices"][0]["logprobs"]["top_logprobs"]
        assert len(tops) > 3 and all(len(top) == 1 for top in tops)


def test_route_decides_on_the_least_sure_of_several_answers(http: httpx.Client) -> None:
    answers = chat(http, "auto", EASY, n=3)
    assert answers.headers[ROUTE_HEADER].startswith("small; reason=sure")
    assert len(answers.json()["choices"]) == 3
    body = body_of("/v1/completions", "auto", "") | {"prompt": [EASY, HARD]}
    batch = http.post("/v1/completions", json=body)
    assert [choice["text"] for choice in batch.json()["choices"]] == [LARGE["easy"], LARGE["hard"]]


@pytest.mark.parametrize(
    ("model", "fields", "tier"),
    [
        ("ruled", {}, "small"),
        ("ruled-best", {}, "large"),
        ("ruled", {"headers": {"X-Tier": "best"}}, "large"),
        ("ruled", {"headers": {"X-Tier": "other"}}, "small"),
        ("ruled", {"headers": {"authorization": "Bearer key-two"}}, "large"),
        ("learned", {}, "large"),
    ],
)
def test_route_follows_its_rules(
    http: httpx.Client, model: str, fields: dict[str, Any], tier: str
) -> None:
    answer = chat(http, model, EASY, **fields)
    assert text_of(answer) == {"small": SMALL, "large": LARGE}[tier]["easy"]
    reason = {"small": "first", "large": "learned" if model == "learned" else "rule"}[tier]
    assert answer.headers[ROUTE_HEADER] == f"{tier}; reason={reason}"


def test_route_counts_long_prompts_and_tools(http: httpx.Client) -> None:
    assert text_of(chat(http, "ruled", "long " * 50 + EASY)) == LARGE["easy"]
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    refused = chat(http, "ruled", EASY, tools=[tool])
    assert refused.headers[ROUTE_HEADER] == "large; reason=rule"


@pytest.mark.parametrize("stream", [False, True])
def test_route_over_urls_gives_the_same_text(http: httpx.Client, stream: bool) -> None:
    for prompt, tier, reason in ((EASY, "near", "sure"), (HARD, "far", "unsure")):
        for path in PATHS[:2]:
            routed = http.post(path, json=body_of(path, "urls", prompt, stream=stream))
            assert routed.headers[ROUTE_HEADER].startswith(f"{tier}; reason={reason}")
            expected = {"near": SMALL["easy"], "far": LARGE["hard"]}[tier]
            assert joined_text(routed.text, path, stream) == expected


def joined_text(text: str, path: str, stream: bool) -> str:
    documents = [text]
    if stream:
        assert text.endswith("data: [DONE]\n\n")
        documents = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    choices = [json.loads(document)["choices"][0] for document in documents]
    if path == "/v1/completions":
        return "".join(choice["text"] for choice in choices)
    part = "delta" if stream else "message"
    return "".join(choice[part].get("content") or "" for choice in choices)


def test_route_takes_no_log_probabilities_for_doubt(
    http: httpx.Client, afar: RecordingUpstream
) -> None:
    answer = chat(http, "silent", EASY)
    assert text_of(answer) == LARGE["easy"], "a server without them cannot be sure"
    (_, _, asked) = afar.requests[0]
    assert (asked["model"], asked["logprobs"], asked["top_logprobs"]) == ("big", True, 5)
    afar.requests.clear()
    body = body_of("/v1/messages", "silent", EASY)
    message = http.post("/v1/messages", json=body)
    assert message.json()["content"][0]["text"] == LARGE["easy"]
    assert afar.requests == [], "an API without log probabilities is not asked"
    afar.logprobs = {"content": [{"token": "a", "logprob": -0.01, "top_logprobs": []}] * 4}
    sure = chat(http, "silent", EASY)
    assert (text_of(sure), sure.json()["choices"][0]["logprobs"]) == ("From afar.", None)


def test_route_keeps_keys_and_headers_of_clients_from_urls(
    http: httpx.Client, afar: RecordingUpstream
) -> None:
    headers = {"cookie": "a=b", "x-secret": "mine", "x-api-key": "key-one", "x-request-id": "id-1"}
    afar.headers = {"set-cookie": "spy=1", "x-powered-by": "other"}
    answer = chat(http, "mixed", HARD, headers=headers)
    assert text_of(answer) == "From afar."
    assert "set-cookie" not in answer.headers and "x-powered-by" not in answer.headers
    path, sent, body = afar.requests[0]
    assert (path, body["model"], body["messages"][0]["content"]) == (
        "/v1/chat/completions",
        "big",
        HARD,
    )
    assert sent["authorization"] == "Bearer operator-key"
    assert sent["x-request-id"] == "id-1"
    assert not {"cookie", "x-secret", "x-api-key"} & set(sent)
    assert "key-one" not in json.dumps(sent)
    assert text_of(chat(http, "keyless", EASY)) == "From afar."
    assert afar.requests[1][1]["authorization"] == "Bearer key-one", "as the operator wants"


def test_route_falls_back_when_a_tier_is_down(http: httpx.Client, afar: RecordingUpstream) -> None:
    for stream in (False, True):
        answer = chat(http, "broken", HARD, stream=stream)
        assert joined_text(answer.text, PATHS[0], stream) == SMALL["hard"]
        assert answer.headers[ROUTE_HEADER].startswith("small; reason=fallback; small_prob")
    assert metric(http, "route_failures_total", route="broken", tier="gone") == 2
    refused = chat(http, "brittle", HARD)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "upstream_down")
    assert text_of(chat(http, "brittle", EASY)) == SMALL["easy"]
    for status in (401, 404, 429, 500):
        afar.status = status
        assert text_of(chat(http, "mixed", HARD)) == SMALL["hard"], status
    alone = chat(http, "afar", HARD)
    assert (alone.status_code, alone.json()["error"]["code"]) == (503, "upstream_failed")
    assert "operator-key" not in alone.text
    afar.status = 400
    wrong = chat(http, "mixed", HARD)
    assert wrong.status_code == 400, "a wrong request is wrong everywhere"
    afar.reset()
    afar.delay_s = 1.5
    late = chat(http, "late", HARD)
    assert late.headers[ROUTE_HEADER].startswith("small; reason=fallback")


def test_route_aborts_what_the_client_does_not_wait_for(
    router: LlmkitRouter, http: httpx.Client
) -> None:
    def running() -> float:
        return router.of_model("small", "num_requests_running")

    body = body_of(PATHS[0], "patient", HARD, stream=True, max_tokens=3000, ignore_eos=True)
    with (
        router.client() as client,
        # The small model writes a thousand tokens before the decision.
        held(*router.engines()),
        pytest.raises(httpx.ReadTimeout),
        client.stream("POST", PATHS[0], json=body, timeout=httpx.Timeout(60, read=0.1)),
    ):
        raise AssertionError("the status was sent before the decision")
    wait_for(lambda: running() == 0)
    chat(http, "auto", HARD)
    wait_for(lambda: running() == 0)  # an answer that was given up is not computed any further


def test_route_counts_requests_escalations_and_held_seconds(http: httpx.Client) -> None:
    names = {
        "small": ("route_requests_total", {"tier": "small", "reason": "sure"}),
        "large": ("route_requests_total", {"tier": "large", "reason": "unsure"}),
        "escalations": ("route_escalations_total", {"tier": "small"}),
        "tokens": ("route_abandoned_tokens_total", {"tier": "small"}),
        "held": ("route_held_seconds_count", {}),
    }

    def read() -> dict[str, float]:
        return {
            key: metric(http, name, route="auto", **labels) for key, (name, labels) in names.items()
        }

    before = read()
    for prompt in (EASY, EASY, HARD):
        chat(http, "auto", prompt)
    after = read()
    assert {key: after[key] - before[key] for key in ("small", "large", "escalations", "held")} == {
        "small": 2,
        "large": 1,
        "escalations": 1,
        "held": 3,
    }
    assert after["tokens"] - before["tokens"] >= 4


def test_route_takes_no_orders_from_clients(http: httpx.Client) -> None:
    order = {"tokens": 1, "first": {"bias": -9, "weights": ZERO, "threshold": 1}}
    answer = chat(http, "small", EASY, headers={"x-llmkit-uncertainty": json.dumps(order)})
    assert text_of(answer) == SMALL["easy"]
    assert "x-llmkit-confidence" not in answer.headers


def test_route_answers_wrong_requests(http: httpx.Client) -> None:
    body = body_of("/v1/responses", "auto", EASY, previous_response_id="resp_1")
    continued = http.post("/v1/responses", json=body)
    assert continued.status_code == 400
    assert continued.json()["error"]["param"] == "previous_response_id"
    wrong = chat(http, "auto", EASY, max_completion_tokens=-5)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "max_completion_tokens")
    unknown = chat(http, "nobody", EASY)
    assert unknown.status_code == 404 and "'auto'" in unknown.json()["error"]["message"]
    infer = http.post("/v2/models/auto/infer", json={})
    assert infer.status_code == 404 and "is a route" in infer.json()["error"]
    tokens = http.post("/tokenize", json={"model": "auto", "prompt": "a b"}).json()
    assert tokens == http.post("/tokenize", json={"model": "small", "prompt": "a b"}).json()
    without_key = httpx.post(str(http.base_url.join("/v1/chat/completions")), json={})
    assert without_key.status_code == 401


def test_bench_route_calibrates_on_running_servers(
    router: LlmkitRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    # The large tier's answer is right for hard prompts, both answers are for easy ones.
    prompts = [{"prompt": EASY, "reference": ["sure", "large"]}] * 14
    prompts += [{"prompt": HARD, "reference": ["four"]}] * 10
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    monkeypatch.setenv("LLMKIT_API_KEY", "key-one")
    words = [f"cheap={router.url}/v1#small", f"dear={router.url}/v1#large", "--json"]
    words += ["--prompts", str(tmp_path / "prompts.jsonl"), "--html", str(tmp_path / "r.html")]
    words += ["--route-file", str(tmp_path / "r.yaml")]
    words += ["--prices", "1,10", "--learned", "--tokens", "4"]
    gates = ["--gate", "route_gap>=0.9", "--gate", "route_large<=0.5"]
    assert main.run(["bench", "route", *words, *gates]) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)
    assert report["measure"] == "reference"
    metrics = report["metrics"]
    assert (metrics["route_gap"], metrics["route_auc"]) == (1.0, 1.0)
    assert (metrics["small_quality"], metrics["large_quality"]) == (pytest.approx(14 / 24), 1.0)
    assert metrics["route_large"] <= 0.5 and 0.1 < metrics["route_cost"] < 0.8
    assert set(report["gaps"]) == {"reference", "exact", "likelihood", "embedding"}
    assert {"first tokens", "whole answer", "learned", "random", "oracle"} == set(report["curves"])
    assert "<svg" in (tmp_path / "r.html").read_text()
    route = yaml.safe_load((tmp_path / "r.yaml").read_text())["routes"]["auto"]
    assert route["tiers"] == ["cheap", "dear"] and route["uncertainty"]["cheap"]["tokens"] == 4
    assert main.run(["bench", "route", *words, "--gate", "route_gap>=1.1"]) == 1
