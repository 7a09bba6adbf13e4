"""The requests of Open WebUI 0.12.4 (November 2026), as its backend sends them, and what it reads.

They were written down from its routers `ollama.py` and `openai.py`, its conversions in
`utils/payload.py` and `utils/response.py`, and its embeddings in `retrieval/utils.py`. It never
asks for llama.cpp's /completion, /props or /slots.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.scripted_model import TOOLS, start_scripted_server, trigger

KEY = "sk-webui"
# What it adds with ENABLE_FORWARD_USER_INFO_HEADERS, which many installations set.
USER_HEADERS = {
    "x-openwebui-user-name": "J%C3%BCrgen",
    "x-openwebui-user-id": "0f6c",
    "x-openwebui-user-email": "j@example.com",
    "x-openwebui-user-role": "admin",
    "x-openwebui-chat-id": "c1",
}
# Every parameter that its settings of an Ollama model have.
OPTIONS: dict[str, Any] = {
    "temperature": 0.8,
    "top_p": 0.9,
    "seed": 42,
    "mirostat": 0,
    "mirostat_eta": 0.1,
    "mirostat_tau": 5.0,
    "num_ctx": 2048,
    "num_batch": 512,
    "num_keep": 24,
    "num_predict": 128,
    "repeat_last_n": 64,
    "top_k": 40,
    "min_p": 0.0,
    "repeat_penalty": 1.1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "stop": ["<|never|>"],
    "num_gpu": 50,
    "use_mmap": True,
    "use_mlock": True,
    "num_thread": 4,
}
# The same of an OpenAI model: what OpenAI does not have is sent as it is.
PARAMETERS: dict[str, Any] = {
    "temperature": 0.8,
    "top_p": 0.9,
    "max_tokens": 128,
    "seed": 42,
    "stop": ["<|never|>"],
    "top_k": 40,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repeat_penalty": 1.1,
    "mirostat": 0,
    "tfs_z": 1,
    "repeat_last_n": 64,
    "num_ctx": 2048,
    "num_keep": 24,
    "keep_alive": "5m",
}


def say(name: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": trigger(name)}]


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("webui")
    (folder / "keys").write_text(f"{KEY}\n")
    options = {"api_key_file": str(folder / "keys")}
    with (
        start_scripted_server(folder, "thinker", key=KEY, **options) as server,
        server.client() as client,
    ):
        client.headers.update(USER_HEADERS)
        yield client


def post(http: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    """Send a body as it does: bytes of JSON with their content type."""
    data = json.dumps(body).encode()
    answer = http.post(path, content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    return answer


def test_open_webui_verifies_and_lists_an_ollama_connection(http: httpx.Client) -> None:
    version = http.get("/api/version").json()["version"]
    # It compares the versions of all connections so.
    assert tuple(map(int, re.sub(r"^v|-.*", "", version).split("."))) > (0, 6)
    (model,) = http.get("/api/tags").json()["models"]
    assert {"name", "model", "modified_at", "size", "digest", "details"} <= model.keys()
    (loaded,) = http.get("/api/ps").json()["models"]
    assert loaded["model"] == model["model"]
    assert isinstance(loaded["expires_at"], str)
    shown = post(http, "/api/show", {"model": model["model"]}).json()
    assert {"details", "model_info", "capabilities", "template"} <= shown.keys()
    assert http.get("/api/version", headers={"authorization": "Bearer no"}).status_code == 401


def test_open_webui_chats_over_ollama(http: httpx.Client) -> None:
    listed = http.get("/api/tags").json()["models"][0]["model"]
    body = {
        "model": listed,
        "messages": [{"role": "system", "content": "Be brief."}, *say("think")],
        "stream": True,
        "options": OPTIONS,
        "think": True,
        "keep_alive": "5m",
        "tools": [tool | {"type": "function"} for tool in TOOLS],
    }
    answer = post(http, "/api/chat", body)
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    *parts, last = [json.loads(line) for line in answer.text.splitlines()]
    assert "".join(part["message"].get("thinking", "") for part in parts) == "A call?"
    assert "".join(part["message"]["content"] for part in parts) == "Yes:"
    (call,) = [call for part in parts for call in part["message"].get("tool_calls", [])]
    # It writes the arguments as JSON text for its own client, and needs the id again.
    assert call["function"] == {"index": 0, "name": "add", "arguments": {"a": 1}}
    assert call["id"]
    # It computes its figures from these.
    for name in ("eval_count", "eval_duration", "prompt_eval_count", "total_duration"):
        assert last[name] > 0
    assert (last["done"], last["done_reason"]) == (True, "stop")


def test_open_webui_sends_results_of_tools_over_ollama(http: httpx.Client) -> None:
    call = {"index": 0, "id": "call_1", "function": {"name": "add", "arguments": {"a": 1}}}
    conversation = [
        *say("think"),
        {"role": "assistant", "thinking": "A call?", "tool_calls": [call], "content": ""},
        {"role": "tool", "content": "2", "tool_call_id": "call_1"},
        *say("plain"),
    ]
    body = {"model": "said", "messages": conversation, "stream": False, "tools": TOOLS}
    message = post(http, "/api/chat", body).json()["message"]
    assert message["content"] == "Just words."


def test_open_webui_asks_for_titles_over_ollama(http: httpx.Client) -> None:
    # Its background tasks: titles, tags, follow-ups, queries. They are not streamed.
    body = {
        "model": "said:latest",
        "messages": say("plain"),
        "stream": False,
        "options": {"num_predict": 1000},
    }
    answer = post(http, "/api/chat", body).json()
    assert answer["message"]["content"] == "Just words."
    schema = {"type": "object", "properties": {"title": {"const": "x"}}, "required": ["title"]}
    post(http, "/api/chat", body | {"format": schema, "options": {"num_predict": 16}})


def test_open_webui_generates_and_unloads_over_ollama(http: httpx.Client) -> None:
    body = {"model": "said", "prompt": trigger("plain"), "stream": True, "raw": False}
    *parts, last = map(json.loads, post(http, "/api/generate", body).text.splitlines())
    assert "".join(part["response"] for part in parts) == "Just words."
    assert last["done"] is True
    unload = {"model": "said", "keep_alive": 0, "prompt": ""}
    assert post(http, "/api/generate", unload).json()["done"] is True


def test_open_webui_embeds_over_both_connections(http: httpx.Client) -> None:
    texts = ["first chunk", "second chunk"]
    over_ollama = post(http, "/api/embed", {"input": texts, "model": "said", "truncate": True})
    (one, two) = over_ollama.json()["embeddings"]
    over_openai = post(http, "/v1/embeddings", {"input": texts, "model": "said"}).json()["data"]
    assert [entry["embedding"] for entry in over_openai] == [
        pytest.approx(one, abs=1e-6),
        pytest.approx(two, abs=1e-6),
    ]
    legacy = post(http, "/api/embeddings", {"model": "said", "prompt": texts[0]}).json()
    assert legacy["embedding"] == pytest.approx(one, abs=1e-6)


def test_open_webui_lists_and_chats_over_openai(http: httpx.Client) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    body = {
        **PARAMETERS,
        "model": model["id"],
        "messages": [{"role": "system", "content": "Be brief."}, *say("think")],
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": TOOLS,
    }
    answer = post(http, "/v1/chat/completions", body)
    events = [
        json.loads(line.removeprefix("data: "))
        for line in answer.text.splitlines()
        if line.startswith("data: {")
    ]
    assert answer.text.endswith("data: [DONE]\n\n")
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "A call?"
    assert "".join(delta.get("content") or "" for delta in deltas) == "Yes:"
    pieces = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert pieces[0]["function"]["name"] == "add"
    arguments = "".join(piece["function"]["arguments"] for piece in pieces)
    assert json.loads(arguments) == {"a": 1}
    assert events[-1]["usage"]["total_tokens"] > 0
    named = set(answer.headers["x-llmkit-ignored"].split(", "))
    assert named == {"mirostat", "tfs_z", "repeat_last_n", "num_ctx", "num_keep", "keep_alive"}


def test_open_webui_continues_an_answer_over_openai(http: httpx.Client) -> None:
    # The button Continue, on a connection whose provider is llama.cpp.
    body = {
        "model": "said",
        "messages": [*say("plain"), {"role": "assistant", "content": trigger("plain")}],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "stream": False,
    }
    choice = post(http, "/v1/chat/completions", body).json()["choices"][0]
    assert choice["message"]["content"] == "Just words."


def test_open_webui_shows_errors_of_both_connections(http: httpx.Client) -> None:
    # It shows the user `error` of an Ollama connection, and `error.message` of an OpenAI one.
    body = {"model": "unheard", "messages": say("plain"), "stream": True}
    answer = http.post("/api/chat", json=body)
    assert (answer.status_code, "unheard" in answer.json()["error"]) == (404, True)
    answer = http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, "unheard" in answer.json()["error"]["message"]) == (404, True)
    # What its page for administrators offers, and this server does not have.
    for method, path in (
        ("POST", "/api/pull"),
        ("POST", "/api/create"),
        ("DELETE", "/api/delete"),
        ("POST", "/api/copy"),
    ):
        refused = http.request(method, path, json={"model": "said"})
        assert (refused.status_code, refused.json()["code"]) == (404, "not_supported")
    refused = http.post("/v1/audio/speech", json={"model": "tts-1", "input": "x", "voice": "a"})
    assert refused.json()["error"]["code"] == "not_supported"
