"""`llmkit deploy runpod`: the folder that it writes, and its worker with RunPod's own library."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.free_ports import free_port
from support.function_folders import (
    deploy,
    failed_deploy,
    package_file,
    platform_environment,
    replace_in,
)
from support.runpod_api import RunpodApi
from support.server_process import wait_for

from llmkit.deploy.local_request import LocalRequest
from llmkit.deploy.runpod_worker import read_job

MODEL = {"max_position_embeddings": 16_384}
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0, "ignore_eos": True}


def write_folder(model: Path, parent: Path) -> Path:
    """A written folder, with the model's path on this machine in place of the volume's."""
    from llmkit.cli.main import run

    out = parent / "worker"
    words = ["--package", str(package_file(parent)), "--name", "tiny", "--quiet"]
    serve = ["--", "--device", "cpu", "--max-num-seqs", "8"]
    assert run(["deploy", "runpod", str(model), "-o", str(out), *words, *serve]) == 0
    replace_in(out / "handler.py", f'"/runpod-volume/{model.name}"', json.dumps(str(model)))
    return out


def test_folder_of_a_hub_id_uses_the_models_that_runpod_caches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["runpod", "org/name", "-o", str(out), "--package", "llmkit", "--concurrency", "7"]
    document = deploy(capsys, *words, "--", "--max-model-len", "4096")
    code = (out / "handler.py").read_text()
    compile(code, "handler.py", "exec")
    assert 'MODEL = "org/name"' in code and '"4096"' in code and "CONCURRENCY = 7" in code
    dockerfile = (out / "Dockerfile").read_text()
    assert "HF_HUB_CACHE=/runpod-volume/huggingface-cache/hub" in dockerfile
    assert 'pip install --no-cache-dir "llmkit" nvidia-ml-py runpod' in dockerfile
    assert "messages" in json.loads((out / "test_input.json").read_text())["input"]
    steps = "\n".join(document["next"])
    assert "Model to org/name" in steps and "0 active workers" in steps


def test_folder_of_a_local_model_uses_a_network_volume(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    package = package_file(tmp_path)
    document = deploy(capsys, "runpod", str(model), "-o", str(out), "--package", str(package))
    assert f'MODEL = "/runpod-volume/{model.name}"' in (out / "handler.py").read_text()
    assert f"COPY {package.name} /opt/packages/" in (out / "Dockerfile").read_text()
    assert (out / package.name).is_file()
    assert f"s3://VOLUME/{model.name}" in "\n".join(document["next"])


def test_wrong_model_and_wrong_serve_option_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "out"), "--package", "llmkit"]
    code, error = failed_deploy(capsys, "runpod", "/no/model", *out)
    assert code == 3 and "/no/model does not exist" in error
    code, error = failed_deploy(capsys, "runpod", "org/name", *out, "--", "--max-seqs", "3")
    assert code == 2 and "--max-num-seqs" in error
    code, error = failed_deploy(capsys, "runpod", "org/name", *out, "--", "--port", "9000")
    assert code == 2 and "--port is not for a server in a container" in error
    assert not (tmp_path / "out").exists()


def test_package_from_git_brings_git_and_names_suit_docker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "My Worker"
    package = "llmkit @ git+https://example.com/llmkit"
    document = deploy(capsys, "runpod", "org/name", "-o", str(out), "--package", package)
    dockerfile = (out / "Dockerfile").read_text()
    assert "gcc libc6-dev libgomp1 git " in dockerfile and f'"{package}"' in dockerfile
    build, push = document["next"][:2]
    assert build == f"docker build --platform linux/amd64 -t $REGISTRY/my-worker '{out}'"
    assert push == "docker push $REGISTRY/my-worker"


def test_job_becomes_a_request() -> None:
    route = {"openai_route": "/v1/models"}
    assert read_job(route, "tiny") == LocalRequest("GET", "/v1/models")
    body = {"messages": MESSAGES, "stream": True}
    request = read_job({"openai_route": CHAT, "openai_input": {**body, "model": "other"}}, "tiny")
    assert request == LocalRequest("POST", CHAT, {**body, "model": "other"}) and request.is_stream
    request = read_job({"messages": MESSAGES, "sampling_params": {"max_tokens": 3}}, "tiny")
    expected = {"model": "tiny", "max_tokens": 3, "stream": False, "messages": MESSAGES}
    assert request == LocalRequest("POST", CHAT, expected)
    assert read_job({"prompt": "a"}, "tiny").path == "/v1/completions"


@pytest.mark.parametrize(
    ("job_input", "message"),
    [
        ("hello", "not an object"),
        ({"text": "hello"}, "none of messages, prompt and openai_route"),
        ({"openai_route": "v1/models"}, "a path such as /v1/chat/completions"),
        ({"openai_route": CHAT, "openai_input": "hello"}, "openai_input is not an object"),
        ({"prompt": "a", "sampling_params": [1]}, "sampling_params is not an object"),
    ],
)
def test_wrong_job_is_refused(job_input: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_job(job_input, "tiny")


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("runpod", reason="runpod is not installed (make test-scale)")
    return write_folder(model, tmp_path_factory.mktemp("runpod"))


@pytest.fixture(scope="module")
def local_api(folder: Path) -> Iterator[httpx.Client]:
    """RunPod's own test server, with the written handler."""
    port = str(free_port())
    arguments = ["--rp_serve_api", "--rp_api_port", port, "--rp_api_host", "127.0.0.1"]
    with (folder / "api.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "handler.py", *arguments],
            cwd=folder,
            env=platform_environment(),
            stdout=log,
            stderr=log,
        )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        def answers() -> bool:
            assert process.poll() is None, (folder / "api.log").read_text()
            try:
                return client.get("/").status_code == 200
            except httpx.TransportError:
                return False

        wait_for(answers)
        yield client
    server = _server_of(process.pid)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert not server.is_running()


@pytest.mark.scale
def test_test_server_runs_jobs(local_api: httpx.Client) -> None:
    job = {"messages": MESSAGES, "sampling_params": {"max_tokens": 5, **GREEDY}}
    result = local_api.post("/runsync", json={"input": job}).json()
    assert result["status"] == "COMPLETED"
    (document,) = result["output"]
    assert document["usage"]["completion_tokens"] == 5 and document["model"] == "tiny"
    (models,) = local_api.post("/runsync", json={"input": {"openai_route": "/v1/models"}}).json()[
        "output"
    ]
    assert [model["id"] for model in models["data"]] == ["tiny"]
    (refused,) = local_api.post("/runsync", json={"input": {"text": 1}}).json()["output"]
    assert "none of messages" in refused["error"]["message"]
    job = {"openai_route": "/metrics"}
    (refused,) = local_api.post("/runsync", json={"input": job}).json()["output"]
    assert refused["error"]["message"] == "/metrics answers no JSON"


@pytest.mark.scale
def test_test_server_streams_the_same_text(local_api: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 200, **GREEDY}
    job = {"openai_route": CHAT, "openai_input": body}
    (whole,) = local_api.post("/runsync", json={"input": job}).json()["output"]
    stream = {"openai_route": CHAT, "openai_input": {**body, "stream": True}}
    job_id = local_api.post("/run", json={"input": stream}).json()["id"]
    parts = [part["output"] for part in local_api.post(f"/stream/{job_id}").json()["stream"]]
    assert len(parts) > 1 and all(part.endswith("\n\n") for part in parts)
    assert _text("".join(parts)) == whole["choices"][0]["message"]["content"] != ""


@pytest.mark.scale
def test_worker_takes_jobs_streams_cancels_and_drains(folder: Path) -> None:
    with RunpodApi() as api, (folder / "worker.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "handler.py"],
            cwd=folder,
            env=platform_environment(**api.environment),
            stdout=log,
            stderr=log,
        )
        try:
            chat = {"messages": MESSAGES, "sampling_params": {"max_tokens": 5, **GREEDY}}
            api.submit("first", chat)
            assert api.result("first")["output"][0]["usage"]["completion_tokens"] == 5
            server = _server_of(process.pid)

            # Two at the same time: the short one is not behind the long one.
            long = {**chat, "stream": True, "sampling_params": {"max_tokens": 16_000, **GREEDY}}
            api.submit("long", long)
            wait_for(lambda: len(api.parts["long"]) > 2)
            api.submit("short", chat)
            assert api.result("short")["output"][0]["object"] == "chat.completion"
            assert api.results["long"].empty()
            api.cancel("long")
            wait_for(lambda: "Job stopped" in (folder / "worker.log").read_text())
            assert "[DONE]" not in "".join(api.texts("long"))

            # The running job ends before the worker does.
            last = {**chat, "stream": True, "sampling_params": {"max_tokens": 300, **GREEDY}}
            api.submit("last", last)
            wait_for(lambda: len(api.parts["last"]) > 2)
            process.terminate()
            assert "".join(api.result("last")["output"]).endswith("data: [DONE]\n\n")
            assert process.wait(60) == 0
            assert not server.is_running()
        finally:
            process.kill()
            process.wait()


@pytest.mark.scale
def test_worker_without_its_server_ends(folder: Path) -> None:
    with RunpodApi() as api, (folder / "lost.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "handler.py"],
            cwd=folder,
            env=platform_environment(**api.environment),
            stdout=log,
            stderr=log,
        )
        try:
            api.submit("first", {"messages": MESSAGES, "sampling_params": {"max_tokens": 1}})
            api.result("first")
            _server_of(process.pid).kill()
            assert process.wait(60) == 1
            assert "The container ends" in (folder / "lost.log").read_text()
        finally:
            process.kill()
            process.wait()


def _server_of(pid: int) -> psutil.Process:
    """The server process of a worker."""
    (server,) = [
        child
        for child in psutil.Process(pid).children()
        if "llmkit.runtime.server.serve_process" in child.cmdline()
    ]
    return server


def _text(events: str) -> str:
    """The text in the events of a streamed chat."""
    documents = [
        json.loads(line.removeprefix("data: "))
        for line in events.splitlines()
        if line.startswith("data: {")
    ]
    return "".join(
        choice["delta"].get("content") or ""
        for document in documents
        for choice in document["choices"]
    )
