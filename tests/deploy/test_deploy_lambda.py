"""`llmkit deploy lambda`: the folder that it writes, and its function at Lambda's runtime API."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.function_folders import (
    deploy,
    failed_deploy,
    package_file,
    platform_environment,
    replace_in,
)
from support.lambda_api import Invocation, LambdaApi, url_event

from llmkit.deploy.lambda_function import EventError, read_event

MODEL = {"max_position_embeddings": 2048}
KEY = "key-of-the-function"
CHAT = "/v1/chat/completions"
AWS_RUNTIME = "awslambdaric"
OWN_RUNTIME = "llmkit.deploy.lambda_streaming"


def chat_body(**fields: Any) -> str:
    """The body of a chat request for a fixed number of greedy tokens."""
    messages = [{"role": "user", "content": "hello"}]
    fixed = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return json.dumps({"messages": messages, **fixed, **fields})


def chat(key: str = KEY, **fields: Any) -> dict[str, Any]:
    """The event of a chat request to the function's URL."""
    return url_event("POST", CHAT, chat_body(**fields), {"authorization": f"Bearer {key}"})


@contextlib.contextmanager
def function(folder: Path, runtime: str, **variables: str) -> Iterator[LambdaApi]:
    """The runtime API of a function that a runtime runs as the image's entry point does."""
    with LambdaApi() as api:
        environment = platform_environment(AWS_LAMBDA_RUNTIME_API=api.address, **variables)
        process = subprocess.Popen(
            [sys.executable, "-m", runtime, "handler.handler"],
            cwd=folder,
            env=environment,
            stderr=(folder / "log").open("w"),
        )
        api.process = process
        try:
            yield api
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A written folder, with the model's path on this machine in place of the image's."""
    from llmkit.cli.main import run

    parent = tmp_path_factory.mktemp("lambda")
    out = parent / "tiny"
    words = ["--package", str(package_file(parent)), "--name", "tiny", "--quiet"]
    words += ["--", "--engine-timeout", "5"]
    assert run(["deploy", "lambda", str(model), "-o", str(out), *words]) == 0
    replace_in(out / "handler.py", '"/opt/model"', json.dumps(str(out / "model")))
    return out


@pytest.fixture(scope="module")
def streaming(folder: Path) -> Iterator[LambdaApi]:
    with function(folder, OWN_RUNTIME, LLMKIT_API_KEY=KEY) as api:
        yield api


def test_folder_has_model_function_and_image(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "My Function"
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    try:
        words = ["lambda", str(model), "-o", str(out), "--package", str(package_file(tmp_path))]
        document = deploy(capsys, *words, "--stream", "--", "--max-model-len", "512")
    finally:
        (model / "pytorch_model.bin").unlink()
    assert document["memory_mb"] == 1769 and document["max_model_len"] == 512
    copied = {file.name for file in (out / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= copied
    assert "pytorch_model.bin" not in copied
    code = (out / "handler.py").read_text()
    compile(code, "handler.py", "exec")
    assert 'MODEL = "/opt/model"' in code and '"--max-model-len",\n    "512"' in code
    dockerfile = (out / "Dockerfile").read_text()
    assert "COPY llmkit-0.1.0.tar.gz /opt/packages/" in dockerfile
    assert 'ENTRYPOINT ["python", "-m", "llmkit.deploy.lambda_streaming"]' in dockerfile
    assert "download.pytorch.org/whl/cpu" in dockerfile
    steps = "\n".join(document["next"])
    assert "--function-name my-function" in steps and "--memory-size 1769" in steps
    assert "--invoke-mode RESPONSE_STREAM" in steps and "LLMKIT_API_KEY=$KEY" in steps


def test_whole_responses_are_sent_by_the_runtime_of_aws(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    package = "llmkit @ git+https://example.org/llmkit"
    document = deploy(capsys, "lambda", str(model), "-o", str(out), "--package", package)
    dockerfile = (out / "Dockerfile").read_text()
    assert f'pip install --no-cache-dir "{package}" awslambdaric' in dockerfile
    assert 'ENTRYPOINT ["python", "-m", "awslambdaric"]' in dockerfile
    assert "--invoke-mode BUFFERED" in "\n".join(document["next"])
    assert sorted(file.name for file in out.iterdir()) == ["Dockerfile", "handler.py", "model"]


def test_model_that_lambda_cannot_hold_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["lambda", str(model), "-o", str(out), "--package", "llmkit"]
    code, error = failed_deploy(capsys, *words, "--memory", "700")
    assert code == 3 and "does not fit into a Lambda function of 700 MB: the weights need" in error
    assert "700.0 MiB of it are for Python's processes" in error and "larger --memory" in error
    large = model / "extra.safetensors"
    with large.open("wb") as file:
        file.truncate(9 << 30)  # no space of the disk is used
    try:
        code, error = failed_deploy(capsys, *words)
    finally:
        large.unlink()
    assert code == 3 and "9.0 GiB, which is too much for a Lambda image" in error
    assert "At most 10.0 GiB" in error and "llmkit quantize --bits 4" in error
    assert not out.exists()


def test_missing_package_and_taken_output_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["lambda", str(model), "-o", str(tmp_path)]
    code, error = failed_deploy(capsys, *words, "--package", str(tmp_path / "llmkit.whl"))
    assert code == 3 and "llmkit.whl is not a file of a package" in error and "sdist" in error
    package = str(package_file(tmp_path))
    code, error = failed_deploy(capsys, *words, "--package", package)
    assert code == 5 and "exists and is not empty" in error


def test_event_of_a_url_becomes_a_request() -> None:
    request = read_event(url_event("POST", "/v1/completions?a=b", "{}", {"x-id": "1"}))
    assert (request.method, request.path, request.body) == ("POST", "/v1/completions?a=b", b"{}")
    assert request.headers["x-id"] == "1" and "host" not in request.headers
    assert read_event(url_event("POST", "/v1/files", b"\xff\x00")).body == b"\xff\x00"
    assert read_event(url_event("GET", "/v1/models/a b")).path == "/v1/models/a%20b"


def test_stage_of_an_http_api_is_no_part_of_the_path() -> None:
    event = url_event("GET", "/prod/v1/models")
    event["requestContext"]["stage"] = "prod"
    assert read_event(event).path == "/v1/models"


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ([], "the event is no request"),
        ({"question": "hello"}, "an object with messages or prompt"),
        ({"httpMethod": "GET", "path": "/v1/models"}, "payload format 1.0"),
        ({"prompt": "hello", "stream": True}, "needs a function URL"),
        ({**url_event("POST", CHAT), "body": "{", "isBase64Encoded": True}, "not base64"),
    ],
)
def test_event_that_is_no_request_is_an_error(event: Any, message: str) -> None:
    with pytest.raises(EventError, match=message):
        read_event(event)


def test_streaming_runtime_sends_tokens_as_they_arrive(streaming: LambdaApi) -> None:
    invocation = streaming.invoke(chat(stream=True, max_tokens=200))
    head, body = invocation.streamed()
    assert head["statusCode"] == 200, body
    assert head["headers"]["content-type"].startswith("text/event-stream")
    assert body.count(b"data: {") > 100 and body.endswith(b"data: [DONE]\n\n")
    times = [at for at, _ in invocation.parts]
    assert len(times) > 5 and times[-1] > times[0]


def test_streaming_runtime_sends_whole_responses_and_refusals(streaming: LambdaApi) -> None:
    head, body = streaming.invoke(chat()).streamed()
    assert head["statusCode"] == 200 and json.loads(body)["usage"]["completion_tokens"] == 12
    head, body = streaming.invoke(chat(key="wrong")).streamed()
    assert head["statusCode"] == 401 and "error" in json.loads(body)
    head, body = streaming.invoke(chat(temperature=9)).streamed()
    assert head["statusCode"] == 400 and json.loads(body)["error"]["param"] == "temperature"


def test_streaming_runtime_answers_plain_events_with_json(streaming: LambdaApi) -> None:
    invocation = streaming.invoke(json.loads(chat_body()))
    assert invocation.document()["usage"]["completion_tokens"] == 12
    assert invocation.headers["content-type"] == "application/json"
    failed = streaming.invoke({"question": "hello"})
    assert failed.error is not None and failed.error["errorType"] == "EventError"


def test_function_answers_after_it_was_suspended(streaming: LambdaApi) -> None:
    """Lambda suspends a container between events, for longer than an engine may be silent."""
    assert streaming.invoke(chat()).streamed()[0]["statusCode"] == 200
    root = psutil.Process(streaming.process.pid)
    family = [root, *root.children(recursive=True)]
    assert len(family) > 2
    for process in family:
        process.suspend()
    time.sleep(5.5)
    for process in family:
        process.resume()
    assert streaming.invoke(chat()).streamed()[0]["statusCode"] == 200


def test_url_without_a_key_is_refused_unless_aws_authorizes(folder: Path) -> None:
    with function(folder, OWN_RUNTIME) as api:
        head, body = api.invoke(chat()).streamed()
        assert head["statusCode"] == 401
        assert (
            "this function has no key: set LLMKIT_API_KEY" in json.loads(body)["error"]["message"]
        )
        event = chat()
        event["requestContext"]["authorizer"] = {"iam": {"accountId": "1"}}
        assert api.invoke(event).streamed()[0]["statusCode"] == 200
        lost = api.start(chat(stream=True, max_tokens=1500))
        lost.event["requestContext"]["authorizer"] = {"iam": {}}
        (server,) = psutil.Process(api.process.pid).children()
        _wait_for_parts(lost)
        server.kill()
        lost.done.get(timeout=60)
        assert lost.trailers["lambda-runtime-function-error-type"] == "Runtime.StreamError"
        assert lost.stream_error()["errorType"] == "IncompleteRead"
        # The next event finds no server: the process ends, and Lambda starts another one.
        api.start(event)
        assert api.process.wait(60) == 1


def test_failed_start_is_reported_to_lambda(folder: Path) -> None:
    broken = folder.with_name("broken")
    broken.mkdir()
    text = (folder / "handler.py").read_text()
    (broken / "handler.py").write_text(text.replace(str(folder / "model"), "/nothing/here"))
    with function(broken, OWN_RUNTIME, LLMKIT_API_KEY=KEY) as api:
        assert api.process.wait(60) == 1
        assert api.init_error is not None and api.init_error["errorType"] == "InputError"
        assert "/nothing/here" in api.init_error["errorMessage"]


@pytest.fixture(scope="module")
def aws_runtime(folder: Path) -> Iterator[LambdaApi]:
    if importlib.util.find_spec(AWS_RUNTIME) is None:
        pytest.skip("awslambdaric is not installed (make test-scale)")
    with function(folder, AWS_RUNTIME, LLMKIT_API_KEY=KEY) as api:
        yield api


@pytest.mark.scale
def test_aws_runtime_answers_events_of_a_url(aws_runtime: LambdaApi) -> None:
    response = aws_runtime.invoke(chat()).document()
    assert response["statusCode"] == 200 and response["isBase64Encoded"] is False
    assert json.loads(response["body"])["usage"]["completion_tokens"] == 12
    response = aws_runtime.invoke(chat(stream=True)).document()
    assert response["headers"]["content-type"].startswith("text/event-stream")
    assert response["body"].endswith("data: [DONE]\n\n")
    response = aws_runtime.invoke(chat(key="wrong")).document()
    assert response["statusCode"] == 401


@pytest.mark.scale
def test_aws_runtime_answers_plain_events(aws_runtime: LambdaApi) -> None:
    document = aws_runtime.invoke(json.loads(chat_body())).document()
    assert document["usage"]["completion_tokens"] == 12 and document["model"] == "tiny"
    document = aws_runtime.invoke({"prompt": "hello", "max_tokens": 3}).document()
    assert document["object"] == "text_completion"
    failed = aws_runtime.invoke({"prompt": "hello", "temperature": 9})
    assert failed.error is not None and failed.error["errorType"] == "RequestError"
    assert "temperature" in failed.error["errorMessage"]


@pytest.mark.scale
def test_aws_runtime_says_that_time_is_over(aws_runtime: LambdaApi) -> None:
    response = aws_runtime.invoke(chat(max_tokens=1900), timeout_s=1.2).document()
    assert response["statusCode"] == 504
    assert "the function's timeout" in json.loads(response["body"])["error"]["message"]
    assert aws_runtime.invoke(chat()).document()["statusCode"] == 200


@pytest.mark.scale
def test_aws_runtime_streams_nothing(aws_runtime: LambdaApi) -> None:
    """What docs/scale.md says, and why there is a runtime of our own."""
    invocation = aws_runtime.invoke(chat(stream=True, max_tokens=100))
    assert len(invocation.parts) == 1 and "content-length" in invocation.headers


def _wait_for_parts(invocation: Invocation) -> None:
    deadline = time.monotonic() + 60
    while len(invocation.parts) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
