"""Ollama's API through its own clients, against a model that writes what a test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from support.scripted_model import TOOLS, start_scripted_server, trigger
from support.server_process import LlmkitServer

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.runtime.model_card import model_card
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.ollama.keep_alive import keep_alive_seconds
from llmkit.runtime.server.ollama.model_facts import FOREVER, ModelFacts, tagged, untagged
from llmkit.runtime.server.ollama.ollama_options import OllamaOptions
from llmkit.runtime.server.ollama.ollama_request import OllamaChatRequest
from llmkit.runtime.server.ollama.ollama_response import OllamaChatResponseBuilder
from llmkit.runtime.server.schemas.base_request import parse_request
from llmkit.runtime.server.text.dialect_detection import detect_chat_dialect

IGNORED = "x-llmkit-ignored"
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
METRICS = (
    "total_duration",
    "load_duration",
    "prompt_eval_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
)


def say(name: str) -> list[dict[str, str]]:
    """A conversation that the script `name` answers."""
    return [{"role": "user", "content": trigger(name)}]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlmkitServer]:
    """A model with tools whose chat template has thoughts."""
    with start_scripted_server(tmp_path_factory.mktemp("thinker"), "thinker") as server:
        yield server


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlmkitServer]:
    """A model with tools and without thoughts; a key is needed."""
    folder = tmp_path_factory.mktemp("hermes")
    (folder / "keys").write_text("sk-ollama\n")
    options = {"api_key_file": str(folder / "keys"), "stream_keep_alive": 0.01}
    with start_scripted_server(folder, "hermes", key="sk-ollama", **options) as server:
        yield server


@pytest.fixture(scope="module")
def client(thinker: LlmkitServer) -> ollama.Client:
    return ollama.Client(host=thinker.url)


@pytest.fixture(scope="module")
def keyed(hermes: LlmkitServer) -> ollama.Client:
    return ollama.Client(host=hermes.url, headers={"authorization": "Bearer sk-ollama"})


@pytest.fixture
def http(thinker: LlmkitServer) -> Iterator[httpx.Client]:
    with thinker.client() as plain:
        yield plain


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.text.splitlines()]


def test_ollama_chat_streams_lines_and_reports_its_figures(http: httpx.Client) -> None:
    body = {"model": "said", "messages": say("plain")}
    answer = http.post("/api/chat", json=body)
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    *parts, last = lines(answer)
    assert "".join(part["message"]["content"] for part in parts) == "Just words."
    assert not any(part["done"] for part in parts)
    assert (last["done"], last["done_reason"], last["message"]["content"]) == (True, "stop", "")
    whole = http.post("/api/chat", json=body | {"stream": False}).json()
    assert whole["message"] == {"role": "assistant", "content": "Just words."}
    for final in (last, whole):
        assert all(isinstance(final[name], int) for name in METRICS)
        assert final["eval_count"] == 5
        assert final["prompt_eval_count"] > 1
        assert final["total_duration"] >= final["eval_duration"] > 0
        assert final["created_at"].endswith("Z")


def test_ollama_chat_has_thoughts_and_calls_with_arguments_as_objects(
    client: ollama.Client,
) -> None:
    whole = client.chat("said", say("think"), tools=TOOLS)
    parts = list(client.chat("said:latest", say("think"), tools=TOOLS, stream=True))
    assert parts[-1].done_reason == whole.done_reason == "stop"
    for messages in ([whole.message], [part.message for part in parts]):
        assert "".join(message.thinking or "" for message in messages) == "A call?"
        assert "".join(message.content or "" for message in messages) == "Yes:"
        (call,) = [call for message in messages for call in message.tool_calls or []]
        assert (call.function.name, call.function.arguments) == ("add", {"a": 1})
    assert parts[0].model == "said:latest"


def test_ollama_async_client_streams_the_same(hermes: LlmkitServer, keyed: ollama.Client) -> None:
    async def stream() -> list[ollama.ChatResponse]:
        headers = {"authorization": "Bearer sk-ollama"}
        client = ollama.AsyncClient(host=hermes.url, headers=headers)
        parts = await client.chat("said", say("two"), tools=TOOLS, stream=True)
        return [part async for part in parts]

    calls = [call for part in asyncio.run(stream()) for call in part.message.tool_calls or []]
    assert calls == list(keyed.chat("said", say("two"), tools=TOOLS).message.tool_calls or [])
    assert [call.function.name for call in calls] == ["get_weather", "add"]


def test_ollama_call_cut_by_num_predict_has_whole_members(http: httpx.Client) -> None:
    # A strict tool's call begins, and what is certain of it is sent when it is cut.
    body = {
        "model": "said",
        "messages": say("think"),
        "tools": [{**TOOLS[1], "function": {**TOOLS[1]["function"], "strict": True}}],
        "options": {"num_predict": 24},
    }
    *parts, last = lines(http.post("/api/chat", json=body))
    calls = [call for part in parts for call in part["message"].get("tool_calls", [])]
    assert last["done_reason"] == "length"
    assert [call["function"]["arguments"] for call in calls] == [{}], parts


def test_ollama_tool_results_reach_the_template(client: ollama.Client) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1, "ß": [True, None]}}}
    conversation: list[Any] = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "thinking": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_name": "add", "content": "2"},
        *say("plain"),
    ]
    assert client.chat("said", conversation).message.content == "Just words."


def test_ollama_messages_become_openais() -> None:
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("b", "a")]
    messages = [
        {"role": "User", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_name": "a", "content": "of a"},
        {"role": "tool", "content": "of b"},
        {"role": "assistant", "tool_calls": [{"id": "call_x", "index": 3, **calls[0]}]},
        {"role": "tool", "tool_call_id": "call_x", "content": None},
    ]
    data = json.dumps({"model": "m", "messages": messages}).encode()
    conversation = parse_request(OllamaChatRequest, data).chat.conversation
    ids = [call["id"] for call in conversation[1]["tool_calls"]]
    assert [message.get("tool_call_id") for message in conversation[2:4]] == ids[::-1]
    assert conversation[5]["tool_call_id"] == "call_x"
    assert [message["role"] for message in conversation[:2]] == ["user", "assistant"]


def test_ollama_generate_uses_the_template_unless_raw(http: httpx.Client) -> None:
    body = {"model": "said", "prompt": trigger("plain"), "system": "Be brief."}
    *parts, last = lines(http.post("/api/generate", json=body))
    assert "".join(part["response"] for part in parts) == "Just words."
    assert len(last["context"]) == last["prompt_eval_count"] + last["eval_count"]
    raw = {"model": "said", "prompt": trigger("plain"), "raw": True, "stream": False}
    answer = http.post("/api/generate", json=raw).json()
    assert answer["response"] == "Just words."
    assert answer["prompt_eval_count"] == 1
    assert "context" not in answer
    refused = http.post("/api/generate", json=raw | {"system": "x"})
    assert (refused.status_code, refused.json()["param"]) == (400, "system")


def test_ollama_generate_continues_a_context(client: ollama.Client) -> None:
    first = client.generate("said", "hello", options={"num_predict": 2})
    assert first.context
    second = client.generate("said", trigger("plain"), context=first.context)
    alone = client.generate("said", trigger("plain"))
    assert second.response == "Just words."
    assert second.prompt_eval_count == alone.prompt_eval_count + len(first.context)
    small = {"num_ctx": alone.prompt_eval_count + 3}
    cut = client.generate("said", trigger("plain"), context=first.context, options=small)
    assert cut.prompt_eval_count == alone.prompt_eval_count + 2, "the context's end is kept"
    assert (cut.eval_count, cut.done_reason) == (1, "length")
    with pytest.raises(ollama.ResponseError, match="outside the vocabulary"):
        client.generate("said", "x", context=[10**6])


def test_ollama_format_is_json_or_a_schema(keyed: ollama.Client) -> None:
    for asked in ("json", SCHEMA):
        answer = keyed.chat("said", say("json"), format=asked, options={"num_predict": 64})
        assert isinstance(json.loads(answer.message.content or ""), dict)
    whole = keyed.generate("said", "no script", format=SCHEMA, options={"temperature": 0})
    assert json.loads(whole.response) == {"colour": "blue"}


def test_ollama_think_asks_for_thoughts(
    client: ollama.Client, keyed: ollama.Client, http: httpx.Client, hermes: LlmkitServer
) -> None:
    assert client.chat("said", say("think"), think=True).message.thinking == "A call?"
    with pytest.raises(ollama.ResponseError, match="does not support thinking") as raised:
        keyed.chat("said", say("plain"), think=True)
    assert raised.value.status_code == 400
    assert keyed.chat("said", say("plain"), think=False).message.content == "Just words."
    for wrong in ("hard", 1, []):
        refused = http.post("/api/chat", json={"messages": say("plain"), "think": wrong})
        assert (refused.status_code, refused.json()["param"]) == (400, "think")
    # The scripted model's template has thoughts, and nothing that turns them off.
    off = http.post("/api/chat", json={"messages": say("plain"), "think": False})
    assert off.headers[IGNORED] == "think"
    with hermes.client() as other:
        asked = {"messages": say("plain"), "think": False}
        assert IGNORED not in other.post("/api/chat", json=asked).headers


def test_ollama_logprobs_belong_to_the_tokens(client: ollama.Client) -> None:
    for answer in (
        client.chat("said", say("plain"), logprobs=True, top_logprobs=2),
        client.generate("said", trigger("plain"), raw=True, logprobs=True, top_logprobs=2),
    ):
        assert answer.logprobs is not None
        assert "".join(entry.token for entry in answer.logprobs) == "Just words."
        assert all(len(entry.top_logprobs or ()) == 2 for entry in answer.logprobs)
    parts = client.chat("said", say("plain"), logprobs=True, stream=True)
    tokens = [entry.token for part in parts for entry in part.logprobs or []]
    assert "".join(tokens) == "Just words."
    with pytest.raises(ollama.ResponseError, match="top_logprobs"):
        client.chat("said", say("plain"), top_logprobs=2)


def test_ollama_options_reach_the_engine_or_are_named(http: httpx.Client) -> None:
    body: dict[str, Any] = {"model": "said", "messages": say("plain"), "stream": False}
    cut = http.post("/api/chat", json=body | {"options": {"num_predict": 2.0}}).json()
    assert (cut["message"]["content"], cut["done_reason"]) == ("Just w", "length")
    stopped = http.post("/api/chat", json=body | {"options": {"stop": ["wor"]}}).json()
    assert (stopped["message"]["content"], stopped["done_reason"]) == ("Just ", "stop")
    used = {
        "temperature": 0.1,
        "top_k": 40.0,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": -1,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "num_predict": -2,
        "num_ctx": 2048,
        "repeat_last_n": 0,
        "typical_p": 1.0,
    }
    answer = http.post("/api/chat", json=body | {"options": used})
    assert answer.json()["message"]["content"] == "Just words."
    assert IGNORED not in answer.headers
    unused = {"num_gpu": 99, "mirostat": 1, "repeat_last_n": 64, "num_ctx": 10**6, "unheard": 1}
    answer = http.post("/api/chat", json=body | {"options": unused, "keep_alive": "5m"})
    named = {
        "options.num_gpu",
        "options.mirostat",
        "options.repeat_last_n",
        "options.num_ctx",
        "options.unheard",
        "keep_alive",
    }
    assert set(answer.headers[IGNORED].split(", ")) == named
    assert set(OllamaOptions.without_effect) < set(OllamaOptions.model_fields)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 9}, "options.temperature"),
        ({"temperature": "hot"}, "options.temperature"),
        ({"top_p": 0}, "options.top_p"),
        ({"top_k": 1.5}, "options.top_k"),
        ({"num_predict": -3}, "options.num_predict"),
        ({"num_ctx": 0}, "options.num_ctx"),
        ({"stop": "x"}, "options.stop"),
        ({"stop": [""]}, "options.stop.0"),
        ({"repeat_penalty": 0}, "options.repeat_penalty"),
        ({"typical_p": 0.5}, "options.typical_p"),
        ({"num_gpu": "all"}, "options.num_gpu"),
        ({"seed": 2**64}, "options.seed"),
    ],
)
def test_ollama_options_out_of_range_are_named(
    http: httpx.Client, options: dict[str, Any], param: str
) -> None:
    for path in ("/api/chat", "/api/generate", "/api/embed"):
        body = {"messages": say("plain")} if path == "/api/chat" else {"prompt": "x"}
        answer = http.post(path, json={"model": "said", "options": options, **body})
        assert (answer.status_code, answer.json()["param"]) == (400, param)
        assert isinstance(answer.json()["error"], str)


def test_ollama_long_chat_loses_its_oldest_messages(client: ollama.Client) -> None:
    turns = [
        {"role": role, "content": f"{role} {number} " + "blah " * 40}
        for number in range(12)
        for role in ("user", "assistant")
    ]
    conversation = [{"role": "system", "content": "Be brief."}, *turns, *say("plain")]
    whole = client.chat("said", conversation)
    assert whole.message.content == "Just words."
    asked: dict[str, Any] = {"num_ctx": whole.prompt_eval_count // 2}
    cut = client.chat("said", conversation, options=asked)
    assert cut.message.content == "Just words."
    assert whole.prompt_eval_count // 3 < cut.prompt_eval_count < asked["num_ctx"]
    kept = [conversation[0], *conversation[-1:]]
    least = client.chat("said", kept).prompt_eval_count
    assert least is not None
    smallest = client.chat("said", conversation, options={"num_ctx": least + 2})
    assert (smallest.prompt_eval_count, smallest.eval_count) == (least, 2)
    with pytest.raises(ollama.ResponseError, match="too short"):
        client.chat("said", conversation, options={"num_ctx": least})


def test_ollama_truncate_false_refuses_a_long_chat(http: httpx.Client) -> None:
    body = {"messages": say("plain"), "options": {"num_ctx": 4}, "truncate": False}
    answer = http.post("/api/chat", json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "context_length_exceeded")
    too_long = {"messages": [{"role": "user", "content": "x" * 5000}, *say("plain")]}
    assert http.post("/api/chat", json=too_long | {"truncate": False}).status_code == 400
    assert http.post("/api/chat", json=too_long | {"stream": False}).status_code == 200


def test_ollama_num_predict_beyond_the_context_ends_with_it(client: ollama.Client) -> None:
    answer = client.generate(
        "said", "x", raw=True, options={"num_predict": 10**6, "num_ctx": 6, "temperature": 0}
    )
    assert answer.eval_count is not None
    assert answer.eval_count <= 5


def test_ollama_lists_and_shows_models(client: ollama.Client, http: httpx.Client) -> None:
    (listed,) = client.list().models
    (running,) = client.ps().models
    shown = client.show("said:latest")
    assert listed.model == running.model == "said:latest"
    assert listed.digest == running.digest
    assert listed.size == running.size
    assert listed.size > 0
    assert running.size_vram == 0
    assert (running.context_length, running.expires_at.year) == (4096, 9999)
    assert shown.details == listed.details
    assert shown.details is not None
    assert (shown.details.family, shown.details.quantization_level) == ("llama", "F32")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.modelinfo["llama.context_length"] == 4096
    assert shown.modelinfo["general.parameter_count"] > 0
    assert "add_generation_prompt" in shown.template
    assert "temperature 1" in shown.parameters
    assert http.post("/api/show", json={"name": "said", "verbose": True}).status_code == 200
    assert http.post("/api/show", json={"model": "unheard"}).status_code == 404
    version = http.get("/api/version").json()["version"]
    assert [int(part) for part in version.split(".")] > [0, 6, 4]


def test_ollama_embeds_one_or_more_texts(client: ollama.Client, http: httpx.Client) -> None:
    several = client.embed("said", ["ab", "cd"], dimensions=0)
    assert len(several.embeddings) == 2
    assert several.prompt_eval_count == 4
    assert sum(value**2 for value in several.embeddings[0]) == pytest.approx(1, abs=1e-3)
    one = client.embed("said", "ab")
    assert list(one.embeddings[0]) == pytest.approx(list(several.embeddings[0]))
    older = client.embeddings("said", "ab")
    assert list(older.embedding) == pytest.approx(list(one.embeddings[0]))
    short = client.embed("said", "a" * 9000)
    assert short.prompt_eval_count == 4096
    assert client.embed("said", "abcdef", options={"num_ctx": 2}).prompt_eval_count == 2
    with pytest.raises(ollama.ResponseError, match="too short"):
        client.embed("said", "a" * 9000, truncate=False)
    with pytest.raises(ollama.ResponseError, match="dimensions"):
        client.embed("said", "a", dimensions=3)
    for wrong in (5, {}, [5], ["a", None], [""]):
        answer = http.post("/api/embed", json={"model": "said", "input": wrong})
        assert (answer.status_code, answer.json()["param"]) == (400, "input")


def test_ollama_request_without_a_prompt_loads_the_model(http: httpx.Client) -> None:
    for path, body, expected in (
        ("/api/chat", {"messages": []}, {"done_reason": "load", "done": True}),
        ("/api/generate", {}, {"done_reason": "load", "response": ""}),
        ("/api/generate", {"prompt": "", "keep_alive": 0}, {"done_reason": "load"}),
        ("/api/embed", {"input": []}, {"embeddings": []}),
        ("/api/embeddings", {"prompt": ""}, {"embedding": []}),
    ):
        answer = http.post(path, json={"model": "said", **body})
        assert answer.status_code == 200
        assert expected.items() <= answer.json().items()
        # This server has one model, which stays loaded.
        assert answer.headers.get(IGNORED) == ("keep_alive" if "keep_alive" in body else None)


def test_ollama_errors_have_its_form(
    client: ollama.Client, http: httpx.Client, hermes: LlmkitServer
) -> None:
    chat: Callable[..., Any] = client.chat
    for call, status in (
        (lambda: chat("unheard", say("plain")), 404),
        (lambda: chat("said", [{"role": "robot", "content": "x"}]), 400),
        (lambda: chat("said", [{"role": "user", "content": "x", "images": ["aGk="]}]), 400),
        (lambda: client.generate("said", "x", images=["aGk="]), 400),
        (lambda: client.generate("said", "x", suffix="y"), 400),
        (lambda: client.generate("said", "x", template="{{ .Prompt }}"), 400),
        (lambda: client.pull("said"), 404),
        (lambda: client.push("said"), 404),
        (lambda: client.create("new", from_="said"), 404),
        (lambda: client.copy("said", "new"), 404),
        (lambda: client.delete("said"), 404),
    ):
        with pytest.raises(ollama.ResponseError) as raised:
            call()
        assert raised.value.status_code == status
        assert not raised.value.error.startswith("{"), "the message, not the body"
    assert http.post("/api/chat", content=b"{").json()["code"] == "invalid_json"
    for path in ("/api/unheard", "/api/tags"):
        refused = http.post(path, json={})
        assert refused.status_code in (404, 405)
        assert isinstance(refused.json()["error"], str)
    assert isinstance(httpx.get(f"{hermes.url}/api/tags").json()["error"], str)
    assert httpx.get(f"{hermes.url}/api/tags").status_code == 401


def test_ollama_stream_has_nothing_but_documents(
    hermes: LlmkitServer, keyed: ollama.Client
) -> None:
    body = {"model": "said", "prompt": "x" * 3000, "raw": True, "options": {"num_predict": 200}}
    with hermes.client() as http:
        answer = http.post("/api/generate", json=body)  # with a keep-alive interval of 10 ms
    assert all({"model", "response", "done"} <= line.keys() for line in lines(answer))
    refused = keyed.generate("said", "x", stream=True, options={"top_p": 7})
    with pytest.raises(ollama.ResponseError, match=r"options\.top_p"):
        list(refused)


def test_ollama_error_in_a_stream_is_a_line() -> None:
    tokenizer: Any = None
    builder = OllamaChatResponseBuilder("m", tokenizer, None, arrival_time=0.0)
    line = builder.error_event(ApiError(503, "It has ended.", code="engine_dead"))
    assert line.endswith(b"}\n")
    assert json.loads(line)["error"] == "It has ended."


def test_ollama_accepts_curls_content_type_and_heads(http: httpx.Client) -> None:
    data = json.dumps({"model": "said", "prompt": trigger("plain"), "stream": False}).encode()
    for headers in ({"content-type": "application/x-www-form-urlencoded"}, {}):
        answer = http.post("/api/generate", content=data, headers=headers)
        assert answer.json()["response"] == "Just words."
        evil = {"origin": "http://evil.example"}
        assert http.post("/api/generate", content=data, headers=headers | evil).status_code == 403
    assert (
        http.post("/api/generate", content=data, headers={"content-type": "text/html"}).json()[
            "code"
        ]
        == "content_type"
    )
    assert http.head("/").status_code == 200
    assert http.head("/api/version").status_code == 200
    assert http.head("/api/blobs/sha256:00").status_code == 404


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (0, 0),
        (300, 300),
        (1.5, 1.5),
        (-1, float("inf")),
        (2**70, float("inf")),
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("300ms", 0.3),
        ("0", 0),
        ("5", 5),
        ("-1", float("inf")),
        ("-1m", float("inf")),
        ("24h", 86_400),
    ],
)
def test_keep_alive_is_seconds_or_a_duration(value: Any, seconds: float | None) -> None:
    assert keep_alive_seconds(value) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("value", [True, "", "soon", "5 m", "m", "1d", [], {}, "9" * 99 + "s"])
def test_keep_alive_refuses_what_is_no_duration(value: Any) -> None:
    with pytest.raises(ApiError, match="keep_alive must be") as raised:
        keep_alive_seconds(value)
    assert (raised.value.status, raised.value.param) == (400, "keep_alive")


def test_model_facts_come_from_the_checkpoint(model: Path) -> None:
    def read() -> ModelFacts:
        checkpoint = open_checkpoint(model)
        card = model_card(checkpoint)
        tokenizer = load_tokenizer(checkpoint)
        dialect = detect_chat_dialect(tokenizer.chat_templates, tokenizer.settings)
        return ModelFacts.read(
            checkpoint, tokenizer, dialect, card, "bfloat16", {"temperature": 0.6}
        )

    facts = read()
    assert facts.capabilities == ["completion"]
    entry = facts.tag("mine", parent="base")
    assert (entry["name"], entry["details"]["parent_model"]) == ("mine:latest", "base")
    assert entry["details"]["quantization_level"] == "BF16"
    assert entry["size"] == (model / "model.safetensors").stat().st_size
    assert facts.show("mine")["parameters"] == "temperature 0.6"
    assert facts.running("mine", "cuda:0", 64, FOREVER)["size_vram"] == entry["size"]
    assert read().digest == facts.digest
    (model / "LICENSE").write_text("Apache 2.0")
    (model / "1_Pooling").mkdir()
    edited = read()
    assert (edited.license, edited.capabilities) == ("Apache 2.0", ["embedding"])
    assert edited.digest != facts.digest


def test_model_names_have_ollamas_default_tag() -> None:
    assert tagged("org/name") == "org/name:latest"
    assert tagged("org:5/name:8b") == "org:5/name:8b"
    known = ["a", "b:latest"]
    assert [untagged(name, known) for name in ("a", "a:latest", "b:latest", "c:latest")] == [
        "a",
        "a",
        "b:latest",
        "c:latest",
    ]


def test_ollama_takes_the_requests_of_langchain_and_continue(http: httpx.Client) -> None:
    # langchain-ollama 1.1, ChatOllama with tools, after a call.
    call = {"type": "function", "id": "5f0c", "function": {"name": "add", "arguments": {"a": 1}}}
    langchain = {
        "model": "said",
        "messages": [
            {"role": "user", "content": "add", "images": []},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "5f0c"},
            *say("plain"),
        ],
        "tools": TOOLS,
        "stream": True,
        "options": {"temperature": 0.0, "num_ctx": 2048, "tfs_z": 1.0, "repeat_last_n": 64},
        "keep_alive": "5m",
    }
    *parts, _ = lines(http.post("/api/chat", json=langchain))
    assert "".join(part["message"]["content"] for part in parts) == "Just words."
    # Continue's chat and its prompt for edits.
    options = {"num_predict": 600, "num_ctx": 8192, "stop": ["<|end|>"], "num_thread": 4}
    chat = {"model": "said", "messages": say("plain"), "options": options, "keep_alive": 1800}
    *parts, _ = lines(http.post("/api/chat", json=chat | {"stream": True}))
    assert "".join(part["message"]["content"] for part in parts) == "Just words."
    edit = {"model": "said", "prompt": trigger("plain"), "raw": True, "options": options}
    *parts, _ = lines(http.post("/api/generate", json=edit | {"keep_alive": 1800, "suffix": ""}))
    assert "".join(part["response"] for part in parts) == "Just words."
