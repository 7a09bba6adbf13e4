"""/ping and /invocations: the contract of SageMaker's containers, by HTTP."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import botocore.session
import httpx
import pytest
from support.router_process import LlmkitRouter
from support.sagemaker_container import ENTRYPOINT, entrypoint_environment
from support.server_process import LlmkitServer, serving
from support.tiny_adapters import write_adapter
from support.tiny_models import tiny_checkpoint

from llmkit.cli.main import run
from llmkit.common.errors import UsageError
from llmkit.runtime.server.router.router_app import ROUTED_BY_BODY
from llmkit.runtime.server.run_server import check_exposure, log_open_doors
from llmkit.runtime.server.sagemaker.invocations import INVOKED_ROUTES
from llmkit.runtime.server.serve_options import ServeOptions

SAY = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
PROMPT = [5, 9, 11, 300] * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("invocations")
    model = tiny_checkpoint(folder / "model", dtype="float32")
    write_adapter(model, folder / "loras" / "first")
    (folder / "keys").write_text("key\n")
    return folder


@pytest.fixture(scope="module")
def invoked_server(folder: Path) -> Iterator[LlmkitServer]:
    options = {"lora_dir": str(folder / "loras"), "kv_cache_memory": 2**25}
    keys = {"api_key_file": str(folder / "keys")}
    with serving(folder / "log", folder / "model", "key", **options, **keys) as running:
        yield running


@pytest.fixture
def http(invoked_server: LlmkitServer) -> Iterator[httpx.Client]:
    with invoked_server.client() as client:
        yield client


def invoke(http: httpx.Client, body: Any, **headers: str) -> httpx.Response:
    """An invocation. headers: session_id stands for X-Amzn-SageMaker-Session-Id."""
    names = {name: f"X-Amzn-SageMaker-{name.replace('_', '-')}" for name in headers}
    return http.post(
        "/invocations", json=body, headers={names[name]: headers[name] for name in headers}
    )


def without_ids(answer: httpx.Response) -> Any:
    """The JSON of an answer without what differs between two runs."""
    text = json.dumps(answer.raise_for_status().json())
    text = re.sub(r'"(id|created|created_at|completed_at)": ("[^"]*"|\d+(\.\d+)?)', r'"\1"', text)
    return re.sub(r'"\w+_tokens_details": \{[^}]*\}', "", text)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": SAY, **GREEDY}),
        ("/v1/completions", {"prompt": PROMPT, **GREEDY}),
        ("/v1/embeddings", {"input": "hello"}),
        ("/", {"inputs": "hello", "parameters": {"max_new_tokens": 6}}),
        ("/v1/score", {"text_1": "hello", "text_2": "world"}),
        ("/v1/rerank", {"query": "hello", "documents": ["one", "two"]}),
    ],
)
def test_invocation_is_answered_as_the_route_of_its_fields(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    assert without_ids(invoke(http, body)) == without_ids(http.post(path, json=body))


def test_invocation_streams_as_its_route_does(http: httpx.Client) -> None:
    full = invoke(http, {"prompt": PROMPT, **GREEDY}).json()["choices"][0]["text"]
    body = {"prompt": PROMPT, **GREEDY, "stream": True}
    with http.stream("POST", "/invocations", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(event["choices"][0]["text"] for event in events) == full


@pytest.mark.parametrize(
    ("route", "body", "field"),
    [
        ("/v1/responses", {"input": "hello", "max_output_tokens": 3}, "output"),
        ("/v1/messages", {"messages": SAY, "max_tokens": 3}, "stop_reason"),
        ("/tokenize", {"prompt": "hello"}, "tokens"),
    ],
)
def test_custom_attribute_names_the_route(
    http: httpx.Client, route: str, body: dict[str, Any], field: str
) -> None:
    answer = invoke(http, body, Custom_Attributes=f"trace=7;route={route}")
    assert field in answer.raise_for_status().json()


def test_custom_attribute_names_no_other_route(http: httpx.Client) -> None:
    for route in ("/v1/load_lora_adapter", "/invocations", "/metrics", "nowhere"):
        answer = invoke(http, {"prompt": "x"}, Custom_Attributes=f"route={route}")
        assert answer.status_code == 400
        assert f"'{route}' cannot be invoked. These can: /, " in answer.json()["error"]["message"]


def test_invoked_routes_are_routes_of_every_server(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    for route in INVOKED_ROUTES:
        assert "post" in paths[route]
        assert route in ROUTED_BY_BODY


def test_wrong_invocations_get_errors(http: httpx.Client) -> None:
    nothing = invoke(http, {"model": "x"})
    assert nothing.status_code == 400
    assert "none of the fields messages, prompt, query" in nothing.json()["error"]["message"]
    for data, code in ((b"{", "invalid_json"), (b"\xff", "invalid_json"), (b"[]", "invalid_type")):
        answer = http.post(
            "/invocations", content=data, headers={"content-type": "application/json"}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    wrong = invoke(http, {"prompt": "x", "temperature": 9})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "temperature")
    csv = http.post("/invocations", content=b"1,2", headers={"content-type": "text/csv"})
    assert csv.status_code == 415


def test_ping_needs_no_key_and_invocations_do(invoked_server: LlmkitServer) -> None:
    with httpx.Client(base_url=invoked_server.url) as stranger:
        assert stranger.get("/ping").status_code == 200
        assert stranger.post("/invocations", json={"prompt": "x"}).status_code == 401


def test_response_has_its_request_id_as_a_custom_attribute(http: httpx.Client) -> None:
    answer = invoke(http, {"prompt": "x", "max_tokens": 1})
    attributes = answer.headers["x-amzn-sagemaker-custom-attributes"]
    assert attributes == f"x-request-id={answer.headers['x-request-id']}"


def test_session_has_an_id_that_sagemaker_accepts(http: httpx.Client) -> None:
    model = botocore.session.get_session().get_service_model("sagemaker-runtime")
    pattern = str(model.shape_for("NewSessionResponseHeader").metadata["pattern"])
    for body in ({"requestType": "NEW_SESSION"}, {"prompt": "x", "max_tokens": 1}):
        answer = invoke(http, body, Session_Id="NEW_SESSION").raise_for_status()
        session = answer.headers["x-amzn-sagemaker-new-session-id"]
        assert re.fullmatch(pattern, session)
        name, _, expires = session.partition("; Expires=")
        left = datetime.fromisoformat(expires) - datetime.now(UTC)
        assert timedelta(minutes=15) < left < timedelta(minutes=21)
    again = invoke(http, {"prompt": "x", "max_tokens": 1}, Session_Id=name)
    assert "x-amzn-sagemaker-new-session-id" not in again.raise_for_status().headers
    closed = invoke(http, {"requestType": "CLOSE"}, Session_Id=name).raise_for_status()
    assert closed.headers["x-amzn-sagemaker-closed-session-id"] == name
    assert invoke(http, {"requestType": "CLOSE"}).status_code == 400
    wrong = invoke(http, {"requestType": "OPEN"}).json()["error"]["message"]
    assert wrong == "requestType must be NEW_SESSION or CLOSE."


def test_adapter_is_loaded_invoked_and_unloaded(http: httpx.Client) -> None:
    ask = {"prompt": PROMPT, **GREEDY}
    base = invoke(http, ask).json()
    loaded = http.post("/adapters", json={"name": "one", "src": "first", "preload": True})
    assert loaded.raise_for_status().json() == {"lora_name": "one", "status": "loaded"}
    answer = invoke(http, ask, Adapter_Identifier="one").raise_for_status().json()
    assert answer["model"] == "one"
    assert answer["choices"][0]["text"] != base["choices"][0]["text"]
    assert http.delete("/adapters/one").raise_for_status().json()["status"] == "unloaded"
    gone = invoke(http, ask, Adapter_Identifier="one")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


def test_openapi_has_the_routes(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert set(paths) >= {"/ping", "/invocations", "/adapters", "/adapters/{name}"}
    invocation = paths["/invocations"]["post"]
    schemas = invocation["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert {"$ref": "#/components/schemas/ChatBody"} in schemas
    assert "text/event-stream" in invocation["responses"]["200"]["content"]


@pytest.mark.slow  # routes of a router are those of one server
def test_router_answers_invocations_by_the_models_name(folder: Path, tmp_path: Path) -> None:
    models = {"a": folder / "model", "b": folder / "model"}
    with LlmkitRouter(tmp_path / "log", models) as router, router.wait_ready().client() as http:
        assert http.get("/ping").status_code == 200
        answer = invoke(http, {"prompt": PROMPT, "model": "b", **GREEDY}).raise_for_status()
        assert answer.json()["model"] == "b"
        nameless = invoke(http, {"prompt": PROMPT, **GREEDY})
        assert nameless.json()["error"]["message"] == "model is missing. Name one of a, b."


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "/opt/ml/model --sagemaker single-model"),
        ({"HF_MODEL_ID": "org/name"}, "org/name --sagemaker single-model"),
        ({"SAGEMAKER_MULTI_MODEL": "true"}, "/opt/ml/models --sagemaker multi-model"),
    ],
)
def test_entrypoint_starts_the_server_of_the_container(
    tmp_path: Path, variables: dict[str, str], words: str
) -> None:
    fake = tmp_path / "llmkit"
    fake.write_text('#!/bin/sh\necho "$*" "$LLMKIT_SERVE_PORT" "$LLMKIT_SERVE_DRAIN_TIMEOUT"\n')
    fake.chmod(0o755)
    environment = entrypoint_environment(tmp_path) | variables
    done = subprocess.run(
        [ENTRYPOINT, "serve"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"serve {words} {environment['SAGEMAKER_BIND_TO_PORT']} 25\n"


def test_sagemaker_needs_no_key_on_other_addresses_and_warns() -> None:
    lines: list[str] = []
    options = ServeOptions("model", host="0.0.0.0")
    with pytest.raises(UsageError, match="other machines could use the server without a key"):
        check_exposure(options, [])
    options = replace(options, sagemaker="single-model")
    check_exposure(options, [])
    log_open_doors(options, [], lines.append)
    assert lines == [
        "warning: with --sagemaker, whoever reaches 0.0.0.0 can use the server without a key. "
        "Only SageMaker's endpoint may reach it"
    ]


def test_key_and_sagemaker_exclude_each_other(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", str(folder / "model"), "--sagemaker", "single-model", "--device", "cpu"]
    assert run([*words, "--api-key-file", str(folder / "keys")]) == 2
    assert (
        "an API key and --sagemaker single-model exclude each other. SageMaker sends no key"
        in capsys.readouterr().err
    )
