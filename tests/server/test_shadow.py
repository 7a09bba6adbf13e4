"""Shadows: clients get the model's answers only, and both models' answers are compared."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import yaml
from fastapi import Request
from fastapi.responses import StreamingResponse
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from starlette.types import Message
from support.free_ports import free_port
from support.recording_upstream import RecordingUpstream
from support.router_process import LlmkitRouter
from support.scripted_model import TEMPLATE, scripted_checkpoint, trigger
from support.server_process import wait_for
from tokenizers import Tokenizer

from llmkit.bench.load_client import Server
from llmkit.bench.server_quality import PromptLogprobsClient, score_prompt_logprobs
from llmkit.cli import main
from llmkit.runtime.process_channel import API_KEY_VARIABLE, ROUTER_KEY_VARIABLE
from llmkit.runtime.server.http.api_keys import find_client, load_api_keys
from llmkit.runtime.server.router.client_stream import UpstreamAnswer
from llmkit.runtime.server.router.model_pool import ModelPool, PooledModel
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server.shadow.logprob_divergence import answer_divergence, divergence_bound
from llmkit.runtime.server.shadow.shadow_answer import read_answer
from llmkit.runtime.server.shadow.shadow_client import ShadowClient, ShadowFailedError
from llmkit.runtime.server.shadow.shadow_judge import JUDGE_PROMPT
from llmkit.runtime.server.shadow.shadow_options import Shadow, ShadowOptions, parse_shadow
from llmkit.runtime.server.shadow.shadow_queue import MAX_BYTES, Shadows
from llmkit.runtime.server.shadow.shadowed_response import ShadowedResponse
from llmkit.runtime.server.tiers.tier import TierAnswer, TierRequest

EASY, SAME = trigger("easy"), trigger("same")
MODEL = {"easy": "Of this I am sure.", "same": "Both say this."}
NEXT = {"easy": "A large one would add it.", "same": "Both say this."}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class GatedUpstream(RecordingUpstream):
    """Answers nothing while its gate is closed."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        super().__init__()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        self.gate.wait(60)
        return super().answer(body)


class Judge(RecordingUpstream):
    """Prefers the answer of the next model, wherever it stands, or says what a test wants."""

    word: str | None = None

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["messages"][0]["content"]
        is_first = f"<answer_a>\n{NEXT['easy']}\n</answer_a>" in prompt
        document = super().answer(body)
        document["choices"][0]["message"]["content"] = self.word or ("**A**" if is_first else "B.")
        return document


def answer_as(folder: Path, script: str, other: str) -> None:
    """Let a scripted model answer the trigger of a script as that of another one."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    weights = load_file(folder / "model.safetensors")
    columns = [tokenizer.token_to_id(trigger(name)) for name in (script, other)]
    weights["lm_head.weight"][:, columns[0]] = weights["lm_head.weight"][:, columns[1]]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


class Setup:
    """A router with shadows, and the servers at its URLs."""

    def __init__(self, folder: Path) -> None:
        self.afar = GatedUpstream()
        self.judge = Judge()
        self.log = folder / "shadow.jsonl"
        # Both have the same vocabulary.
        scripts = {**MODEL, "other": NEXT["easy"]}
        scripted_checkpoint(folder / "model", scripts, TEMPLATE)
        scripted_checkpoint(folder / "next", scripts, TEMPLATE, unsure=("easy",))
        answer_as(folder / "next", "easy", "other")
        (folder / "keys").write_text("key-one name=one\nkey-two max_tokens_per_minute=36\n")
        (folder / "afar-key").write_text("operator-key\n")
        (folder / "own-key").write_text("key-one\n")
        port = free_port()
        # The router is its own upstream: a model at a URL can have a shadow, too.
        own = {"url": f"http://127.0.0.1:{port}/v1", "api_key_file": str(folder / "own-key")}
        upstreams: dict[str, Any] = {
            "near": {**own, "model": "plain"},
            "far": {**own, "model": "plain"},
            "gone": {"url": "http://127.0.0.1:9/v1"},
            "afar": {"url": self.afar.url, "api_key_file": str(folder / "afar-key")},
            "judge": {"url": self.judge.url},
        }
        (folder / "routes.yaml").write_text(yaml.safe_dump({"upstreams": upstreams}))
        models = {
            "model": folder / "model",
            "plain": folder / "model",
            "next": folder / "next",
        }
        options = ["--route-config", str(folder / "routes.yaml"), "--port", str(port)]
        options += ["--api-key-file", str(folder / "keys"), "--max-num-seqs", "8"]
        for word in ("model=next", "near=gone", "far=afar:100%"):
            options += ["--shadow", word]
        options += ["--shadow-judge", "judge", "--shadow-log", str(self.log)]
        options += ["--max-loaded", "3", "--shadow-log-texts"]
        self.router = LlmkitRouter(folder / "log", models, *options, key="key-one")

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def record(self, answer: httpx.Response) -> dict[str, Any]:
        """The record of a request, once it is there."""
        assert answer.status_code == 200, answer.text
        own = answer.headers["x-request-id"]
        wait_for(lambda: any(record["request_id"] == own for record in self.records()))
        return next(record for record in self.records() if record["request_id"] == own)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    made = Setup(tmp_path_factory.mktemp("shadows"))
    with made.router as router:
        router.wait_ready()
        yield made
    made.afar.close()
    made.judge.close()


@pytest.fixture
def http(setup: Setup) -> Iterator[httpx.Client]:
    setup.afar.reset()
    setup.judge.reset()
    setup.judge.word = None
    setup.afar.gate.set()
    with setup.router.client() as client:
        yield client


def metric(http: httpx.Client, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return sum(
        sample.value
        for sample in samples
        if sample.name == f"llmkit:shadow_{name}" and sample.labels.items() >= labels.items()
    )


def ended(http: httpx.Client, model: str) -> float:
    """Chosen requests of a model that are done with."""
    return metric(http, "requests_total", model=model)


def body_of(path: str, model: str, prompt: str, **fields: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": prompt}]}
    if path == COMPLETIONS:
        asked = {"prompt": prompt}  # type: ignore[dict-item]
    return {"model": model, **asked, "max_tokens": 64, "temperature": 0, **fields}


def ask(http: httpx.Client, setup: Setup, model: str, prompt: str, **fields: Any) -> dict[str, Any]:
    """Send a chat, and return its record in the log."""
    return setup.record(http.post(CHAT, json=body_of(CHAT, model, prompt, **fields)))


def without_ids(text: str) -> str:
    """The JSON of an answer without what differs between two runs."""
    return re.sub(r'"(id|created)":("[^"]*"|\d+)', r'"\1"', text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_shadowed_model_answers_byte_for_byte_as_without_a_shadow(
    setup: Setup, http: httpx.Client, path: str, stream: bool
) -> None:
    for model in ("model", "plain"):  # so that both find a cached prefix
        http.post(path, json=body_of(path, model, EASY))
    answers = [
        http.post(path, json=body_of(path, model, EASY, stream=stream))
        for model in ("model", "plain")
    ]
    texts = [without_ids(answer.text).replace('"plain"', '"model"') for answer in answers]
    assert texts[0] == texts[1] and MODEL["easy"][:2] in texts[0]
    names = [[name for name, _ in answer.headers.raw] for answer in answers]
    assert names[0] == names[1]
    record = setup.record(answers[0])
    assert record["answer"]["text"] == MODEL["easy"]
    assert record["shadow_answer"]["text"] == NEXT["easy"]
    asked = body_of(path, "model", EASY, stream=stream)
    assert (record["path"], record["same"], record["request"]) == (path, False, asked)


def test_shadow_divergence_is_that_of_bench(
    setup: Setup, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMKIT_API_KEY", "key-one")
    labels = {"model": "model", "shadow": "next"}
    before = {
        name: metric(http, f"{name}_total", **labels)
        for name in ("compared_tokens", "same_top_tokens", "kl_nats", "same_answers")
    }
    record = ask(http, setup, "model", EASY)
    after = {
        name: metric(http, f"{name}_total", **labels) - count for name, count in before.items()
    }
    tokens = []
    for fields in (
        {"messages": [{"role": "user", "content": EASY}]},
        {"prompt": MODEL["easy"], "add_special_tokens": False},
    ):
        answer = http.post("/tokenize", json={"model": "plain", **fields})
        tokens.append(answer.json()["tokens"])
    window = torch.tensor([tokens[0] + tokens[1]])
    clients = [
        PromptLogprobsClient(Server(setup.router.url, name, name), "ids")
        for name in ("next", "plain")
    ]
    (target, baseline) = (list(client.prompt_logprobs(window)) for client in clients)
    answer_only = [
        [type(one)(*(value[-len(tokens[1]) :] for value in vars(one).values())) for one in side]
        for side in (target, baseline)
    ]
    metrics, _ = score_prompt_logprobs(
        iter(answer_only[0]), iter(answer_only[1]), window[:, -len(tokens[1]) - 1 :]
    )
    assert metrics["mean_kl_bound"] > 0.01
    assert record["mean_kl"] == pytest.approx(metrics["mean_kl_bound"], rel=1e-4)
    assert record["max_kl"] == pytest.approx(metrics["max_kl_bound"], rel=1e-4)
    assert record["top1"] == pytest.approx(metrics["top1"], abs=1e-5)
    assert record["tokens"] == len(tokens[1]) == after["compared_tokens"]
    assert after["kl_nats"] == pytest.approx(record["mean_kl"] * record["tokens"], rel=1e-4)
    assert after["same_top_tokens"] == round(record["top1"] * record["tokens"])
    assert after["same_answers"] == 0


def test_shadow_judge_is_asked_in_both_orders(setup: Setup, http: httpx.Client) -> None:
    assert ask(http, setup, "model", EASY)["verdict"] == "shadow"
    prompts = [body["messages"][0]["content"] for _, _, body in setup.judge.requests]
    texts = {"a": MODEL["easy"], "b": NEXT["easy"]}
    request = f"user: {EASY}"
    assert prompts[0] == JUDGE_PROMPT.format(request=request, **texts)
    assert prompts[1] == JUDGE_PROMPT.format(request=request, a=texts["b"], b=texts["a"])
    for word, verdict in (("A", "equal"), ("equal", "equal"), ("Perhaps", "unclear")):
        setup.judge.word = word
        assert ask(http, setup, "model", EASY)["verdict"] == verdict, word
    setup.judge.status = 500
    assert ask(http, setup, "model", EASY)["verdict"] == "failed"
    setup.judge.reset()
    same = ask(http, setup, "model", SAME)
    assert (same["same"], same["verdict"], setup.judge.requests) == (True, "equal", [])
    assert metric(http, "verdicts_total", verdict="shadow", shadow="next") >= 1


def test_dead_shadow_changes_no_answer(setup: Setup, http: httpx.Client) -> None:
    before = ended(http, "near")
    for number in range(5):
        answer = http.post(CHAT, json=body_of(CHAT, "near", EASY))
        assert answer.json()["choices"][0]["message"]["content"] == MODEL["easy"]
        wait_for(lambda number=number: ended(http, "near") > before + number)  # type: ignore[misc]
    failed = metric(http, "requests_total", model="near", outcome="failed")
    assert failed == 3, "after three failures in a row the shadow is left alone for a while"
    assert metric(http, "requests_total", model="near", outcome="dropped") == 2
    assert "cannot be reached" in setup.records()[-1]["error"]


def test_slow_shadow_delays_no_answer(setup: Setup, http: httpx.Client) -> None:
    before = ended(http, "far")
    setup.afar.gate.clear()
    for _ in range(12):
        answer = http.post(CHAT, json=body_of(CHAT, "far", EASY))
        assert answer.json()["choices"][0]["message"]["content"] == MODEL["easy"]
    wait_for(lambda: len(setup.afar.requests) == 8)
    assert metric(http, "requests_waiting", model="far") == 4
    assert ended(http, "far") == before, "all answers came while the shadow has given none"
    setup.afar.gate.set()
    wait_for(lambda: ended(http, "far") == before + 12)
    wait_for(lambda: metric(http, "incomparable_total", model="far", reason="tokenize") >= 12)
    assert len(setup.afar.requests) >= 12


def test_shadow_at_a_url_gets_no_key_or_header_of_a_client(
    setup: Setup, http: httpx.Client
) -> None:
    headers = {"cookie": "a=b", "x-secret": "mine", "x-api-key": "key-one"}
    asked = body_of(CHAT, "far", EASY, user="me", stream=True)
    setup.record(http.post(CHAT, json=asked, headers=headers))
    path, sent, body = setup.afar.requests[0]
    assert (path, body["model"], body["stream"], body["user"]) == (CHAT, "afar", False, "me")
    assert sent["authorization"] == "Bearer operator-key"
    assert "key-one" not in json.dumps(setup.afar.requests)
    assert not {"cookie", "x-secret", "x-api-key", "x-request-id"} & set(sent)
    assert all("authorization" not in headers for _, headers, _ in setup.judge.requests)


def test_shadow_uses_no_quota_of_the_client(setup: Setup, http: httpx.Client) -> None:
    body = body_of(CHAT, "model", SAME)
    used = http.post(CHAT, json=body).json()["usage"]["total_tokens"]
    assert 36 / 2 > used > 36 / 3, "so that the shadow's requests would use up the key's limit"
    own = {"authorization": "Bearer key-two"}
    for _ in range(2):
        setup.record(http.post(CHAT, json=body, headers=own))


def test_shadow_skips_what_has_no_complete_answer(setup: Setup, http: httpx.Client) -> None:
    def skipped() -> float:
        return metric(http, "requests_total", model="model", outcome="skipped")

    before = skipped()
    records = len(setup.records())
    assert http.post(CHAT, json=body_of(CHAT, "model", EASY, temperature=-1)).status_code == 400
    assert http.post(CHAT, json=body_of(CHAT, "model", EASY, n=2)).status_code == 200
    wait_for(lambda: skipped() == before + 2)
    long = body_of(CHAT, "model", EASY, stream=True, max_tokens=3000, ignore_eos=True)
    with http.stream("POST", CHAT, json=long) as response:
        next(response.iter_bytes())  # and then the client goes
    wait_for(lambda: skipped() == before + 3)
    assert len(setup.records()) == records
    assert http.post("/tokenize", json={"model": "model", "prompt": "a"}).status_code == 200
    assert skipped() == before + 3


def test_shadow_works_with_the_real_client(setup: Setup, http: httpx.Client) -> None:
    before = metric(http, "same_answers_total", model="model")
    with openai.OpenAI(base_url=f"{setup.router.url}/v1", api_key="key-one") as client:
        chunks = client.chat.completions.create(
            model="model",
            messages=[{"role": "user", "content": SAME}],
            stream=True,
            temperature=0,
            stream_options={"include_usage": True},
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == MODEL["same"]
    wait_for(lambda: metric(http, "same_answers_total", model="model") == before + 1)
    assert setup.log.stat().st_mode & 0o077 == 0


class StuckTier:
    """A tier that is asked and never answers."""

    name = "stuck"
    num_asked = 0

    @contextlib.asynccontextmanager
    async def open(self, request: TierRequest) -> AsyncIterator[TierAnswer]:
        self.num_asked += 1
        await asyncio.Event().wait()
        yield TierAnswer(UpstreamAnswer(200, [], None, request.client.stream()))


def stuck_shadows(tier: StuckTier) -> Shadows:
    options = ShadowOptions([Shadow("stuck", "stuck")])
    return Shadows(options, {"stuck": tier}, ModelPool([], 1, 0.0))


def values(shadows: Shadows) -> dict[str, float]:
    families = text_string_to_metric_families(shadows.metrics.render().decode())
    samples = [sample for family in families for sample in family.samples]
    return {
        sample.labels.get("outcome", "waiting"): sample.value
        for sample in samples
        if sample.name in ("llmkit:shadow_requests_total", "llmkit:shadow_requests_waiting")
    }


async def send_through(
    shadows: Shadows, chunks: list[bytes], request: bytes = b"{}"
) -> list[Message]:
    """Send a response of `chunks` with a shadow; returns what the client gets."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def body() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "state": {}}
    queue = shadows.queue_of("stuck")
    assert queue is not None
    inner = StreamingResponse(body(), media_type="application/json")
    response = ShadowedResponse(inner, queue, Request(scope), request)
    await response({**scope, "asgi": {"spec_version": "2.4"}}, receive, send)
    return sent


def test_shadow_queue_is_bounded_in_requests() -> None:
    answer = json.dumps({"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]})

    async def run() -> None:
        tier = StuckTier()
        shadows = stuck_shadows(tier)
        for _ in range(300):
            sent = await send_through(shadows, [answer.encode()])
            assert b"".join(message.get("body", b"") for message in sent) == answer.encode()
            await asyncio.sleep(0)
        assert tier.num_asked == 8
        assert values(shadows) == {"waiting": 256, "dropped": 300 - 256 - 8}
        await asyncio.wait_for(shadows.close(), 60)

    asyncio.run(run())


def test_shadow_queue_is_bounded_in_bytes() -> None:
    chunk = bytes(MAX_BYTES // 10)

    async def run() -> None:
        shadows = stuck_shadows(StuckTier())
        queue = shadows.queue_of("stuck")
        assert queue is not None
        sent = await send_through(shadows, [chunk] * 11)
        assert sum(len(message.get("body", b"")) for message in sent) == 11 * len(chunk)
        assert values(shadows) == {"dropped": 1}
        assert queue.budget.take(MAX_BYTES), "all of it was given back"
        queue.budget.give_back(MAX_BYTES)
        await send_through(shadows, [], request=bytes(MAX_BYTES + 1))
        assert values(shadows) == {"dropped": 2}
        assert queue.budget.take(MAX_BYTES)
        await shadows.close()

    asyncio.run(run())


def test_answer_that_ends_after_the_server_was_told_to_stop_is_not_copied() -> None:
    async def run() -> None:
        tier = StuckTier()
        shadows = stuck_shadows(tier)
        await shadows.close()
        num_tasks = len(asyncio.all_tasks())
        await send_through(shadows, [b"{}"])
        await asyncio.sleep(0)
        assert tier.num_asked == 0 and len(asyncio.all_tasks()) == num_tasks
        assert values(shadows) == {"dropped": 1}

    asyncio.run(run())


def test_shadow_share_chooses_that_many_requests() -> None:
    options = ShadowOptions([parse_shadow("stuck=stuck:10%")])
    shadows = Shadows(options, {"stuck": StuckTier()}, ModelPool([], 1, 0.0))
    chosen = sum(shadows.queue_of("stuck") is not None for _ in range(10_000))
    assert 700 < chosen < 1300  # ten standard deviations
    assert shadows.queue_of("other") is None


def test_shadow_unloads_no_other_model() -> None:
    started: list[str] = []
    models = [PooledModel(name, name, lambda: started.append("a server")) for name in ("a", "b")]
    pool = ModelPool(models, 1, 0.0)
    models[0].server = object()  # as if it were loaded
    assert pool.has_place(models[0]) and not pool.has_place(models[1])
    tier = StuckTier()
    tier.name = "b"
    client = ShadowClient(tier, pool, None)
    for request in (client.load(), client.post(CHAT, {})):
        with pytest.raises(ShadowFailedError, match="has no place"):
            asyncio.run(request)  # type: ignore[arg-type]
    assert (started, tier.num_asked) == ([], 0)


def test_router_key_is_accepted_behind_a_router_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ROUTER_KEY_VARIABLE, "inner")
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    (tmp_path / "keys").write_text("outer\n")
    with_keys = ServeOptions("m", api_key_file=tmp_path / "keys")
    assert find_client(load_api_keys(with_keys), b"inner") is None
    behind = replace(with_keys, behind_router=True)
    assert find_client(load_api_keys(behind), b"inner") is not None
    assert load_api_keys(ServeOptions("m", behind_router=True)) == (), "an open server stays open"


def test_divergence_bound_merges_what_one_side_does_not_know() -> None:
    p = {"1": -0.1, "2": -3.0}
    assert divergence_bound(p, p) == 0
    assert divergence_bound(p, {"1": -0.1, "3": -3.0}) == 0
    far = divergence_bound({"1": -0.01}, {"1": -3.0})
    assert far == pytest.approx(2.9149, abs=1e-4)  # 0.99005 ln(0.99005 / 0.04979) + the rest
    found = answer_divergence([p, {"1": -0.01}], [p, {"1": -3.0, "2": -0.1}])
    assert (found.num_tokens, found.num_same_top) == (2, 1)
    assert found.max_kl == pytest.approx(far, rel=0.01) and found.mean_kl == found.kl_sum / 2


@pytest.mark.parametrize(
    ("content", "is_stream"),
    [
        (b"", False),
        (b"[]", False),
        (b'{"choices": []}', False),
        (b'{"error": {"message": "x"}, "choices": [{"finish_reason": "stop"}]}', False),
        (b'{"choices": [{"message": {"content": "a"}, "finish_reason": null}]}', False),
        (b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n', True),
        (b'data: {"error": {"message": "x"}}\n\ndata: [DONE]\n\n', True),
        (b"data: [DONE]\n\n", True),
        (b"", True),
    ],
)
def test_read_answer_takes_no_part_of_an_answer(content: bytes, is_stream: bool) -> None:
    assert read_answer(content, is_stream) is None


def test_read_answer_joins_calls_of_a_stream() -> None:
    parts = [
        {"content": "Sure. "},
        {"tool_calls": [{"index": 1, "function": {"name": "add", "arguments": '{"a":'}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": " 1}"}}]},
        {"reasoning": "why"},
    ]
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": part}]} for part in parts]
    chunks.append({"choices": [{"index": 1, "delta": {"content": "of another choice"}}]})
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    chunks.append({"choices": [], "usage": {}})
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    answer = read_answer(b": keep-alive\n\n" + stream.encode(), True)
    assert answer is not None
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("Sure. ", "why", "tool_calls")
    assert (answer.tool_calls[1].name, answer.tool_calls[1].arguments) == ("add", '{"a": 1}')
    whole = {"content": "Sure. ", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    document = {"choices": [{"message": whole, "finish_reason": "tool_calls"}]}
    other = read_answer(json.dumps(document).encode(), False)
    assert other is not None and not other.is_same(answer)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--shadow", "a"], ["--shadow 'a' is not understood", "NAME=SHADOW[:SHARE]"]),
        (["--shadow", "a=b:0%"], ["the share '0%' is wrong", "above 0% and up to 100%"]),
        (["--shadow", "a=b:1"], ["the share '1' is wrong"]),
        (["--shadow", "a=c"], ["'c' is not a model of this server", "Models are a, b, u"]),
        (["--shadow", "a=a"], ["a model cannot be its own shadow"]),
        (["--shadow", "a=b", "--shadow", "a=u"], ["'a' has two shadows"]),
        (["--shadow", "a=b", "--shadow-judge", "x"], ["--shadow-judge x: 'x' is not a model"]),
        (["--shadow-judge", "a"], ["--shadow-judge is for --shadow, which is not given"]),
        (["--shadow-log", "f"], ["--shadow-log is for --shadow, which is not given"]),
        (["--shadow", "a=b", "--shadow-log-texts"], ["--shadow-log-texts is for --shadow-log"]),
        (["--shadow", "a=b", "--max-loaded", "1"], ["--max-loaded 1: a model, its shadow and"]),
        (["--shadow", "a=own"], ["'own' is asked with the clients' keys", "api_key_env"]),
    ],
)
def test_wrong_shadow_options_are_refused(
    words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "routes.yaml").write_text(
        "upstreams: {own: {url: 'http://127.0.0.1:9', forward_client_key: true}}\n"
    )
    models = ["a=/none/a", "b=/none/b", "u=http://127.0.0.1:9/v1"]
    if "a=own" in words:
        words = [*words, "--route-config", str(tmp_path / "routes.yaml")]
    assert main.run(["serve", *models, *words]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message


def test_shadow_of_one_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["serve", "/none/a", "--shadow", "a=b"]) == 2
    assert "--shadow is for several models, and there is one" in capsys.readouterr().err
