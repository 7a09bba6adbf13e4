"""`llmkit deploy replicate`: the folder that it writes, and its model with cog's own server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from safetensors.torch import load_file, save_file
from support.free_ports import free_port
from support.function_folders import deploy, failed_deploy, package_file, platform_environment
from support.server_process import wait_for
from support.tiny_models import EOS_ID

from llmkit.deploy.local_request import chat_request

MODEL = {"max_position_embeddings": 16_384}
CONCURRENCY = 3
GREEDY = {"prompt": "hello", "temperature": 0}
# `cog build` writes such a schema from run.py; cog's server reads it.
SCHEMA = {
    "openapi": "3.0.2",
    "info": {"title": "Cog", "version": "0.1.0"},
    "paths": {"/predictions": {"post": {"x-cog-streaming": True}}},
    "components": {
        "schemas": {
            "Input": {
                "type": "object",
                "properties": {
                    "prompt": {"type": "string", "default": ""},
                    "system_prompt": {"type": "string", "default": ""},
                    "messages": {"type": "string", "default": ""},
                    "max_tokens": {"type": "integer", "default": 512, "minimum": 1},
                    "temperature": {"type": "number", "default": 0.7},
                    "top_p": {"type": "number", "default": 1.0},
                    "seed": {"type": "integer", "default": -1},
                },
            },
            "Output": {
                "type": "array",
                "items": {"type": "string"},
                "x-cog-array-type": "iterator",
                "x-cog-array-display": "concatenate",
            },
        }
    },
}


def edit_model(path: Path) -> None:
    """Make greedy answers long: cog's inputs have no ignore_eos."""
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"][EOS_ID] = 0
    save_file(tensors, file, {"format": "pt"})


def test_folder_has_weights_runner_and_requirements(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    package = package_file(tmp_path)
    document = deploy(capsys, "replicate", str(model), "-o", str(out), "--package", str(package))
    cog = yaml.safe_load((out / "cog.yaml").read_text())
    assert cog["run"] == "run.py:Runner" and cog["build"]["gpu"] is True
    lines = (out / cog["build"]["python_requirements"]).read_text().splitlines()
    assert lines == ["./llmkit-0.1.0.tar.gz", "nvidia-ml-py"] and (out / package.name).is_file()
    assert (out / "weights" / "model.safetensors").is_file()
    code = (out / "run.py").read_text()
    compile(code, "run.py", "exec")
    assert 'MODEL = "weights"' in code and "    def run(" in code and "@concurrent" not in code
    assert any(step.startswith("cog push") for step in document["next"])


def test_folder_of_a_hub_id_has_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["replicate", "org/name", "-o", str(out), "--package", "llmkit", "--no-gpu"]
    document = deploy(capsys, *words)
    assert sorted(file.name for file in out.iterdir()) == ["cog.yaml", "requirements.txt", "run.py"]
    assert 'MODEL = "org/name"' in (out / "run.py").read_text()
    assert yaml.safe_load((out / "cog.yaml").read_text())["build"]["gpu"] is False
    assert "each new container downloads the weights" in document["next"][-1]


def test_output_in_the_model_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model / "out"
    code, error = failed_deploy(
        capsys, "replicate", str(model), "-o", str(out), "--package", "llmkit"
    )
    assert code == 5 and "is the source or lies in it" in error and not out.exists()


def test_weights_can_be_read_by_every_user_of_the_image(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "private")
    (tmp_path / "private" / "config.json").chmod(0o600)
    (tmp_path / "private").chmod(0o700)
    out = tmp_path / "out"
    words = ["replicate", str(tmp_path / "private"), "-o", str(out), "--package", "llmkit"]
    deploy(capsys, *words)
    modes = {path: path.stat().st_mode & 0o777 for path in out.rglob("*")}
    assert modes[out / "weights"] == 0o755
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o644}


def test_interrupted_copy_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copy2", interrupt)
    words = ["replicate", str(model), "-o", str(tmp_path / "out"), "--package", "llmkit"]
    code, _ = failed_deploy(capsys, *words)
    assert code == 130 and list(tmp_path.iterdir()) == []


def test_prompt_or_messages_become_a_chat() -> None:
    body = chat_request("hello", "Be short.", "", max_tokens=5, seed=None).body
    assert body is not None and body["stream"] is True and body["max_tokens"] == 5
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "seed" not in body
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    body = chat_request("ignored", "", json.dumps(messages)).body
    assert body is not None and body["messages"] == messages
    with pytest.raises(ValueError, match="neither a prompt nor messages"):
        chat_request("", "Be short.", "")
    with pytest.raises(ValueError, match="messages is not JSON"):
        chat_request("", "", "[{")


@contextmanager
def cog_server(folder: Path, model: Path, concurrency: int) -> Iterator[httpx.Client]:
    """Cog's HTTP server, as the image that `cog build` makes starts it."""
    from llmkit.cli.main import run

    pytest.importorskip("cog", reason="cog is not installed (make test-scale)")
    out = folder / "out"
    words = ["--package", str(package_file(folder)), "--no-gpu", "--quiet"]
    words += ["--concurrency", str(concurrency), "--", "--device", "cpu", "--max-num-seqs", "4"]
    assert run(["deploy", "replicate", str(model), "-o", str(out), *words]) == 0
    (out / ".cog").mkdir()
    (out / ".cog" / "openapi_schema.json").write_text(json.dumps(SCHEMA))
    port = str(free_port())
    limits = re.findall(r"@concurrent\(max=(\d+)\)", (out / "run.py").read_text())
    environment = platform_environment(
        PORT=port,
        COG_PREDICT_TYPE_STUB=yaml.safe_load((out / "cog.yaml").read_text())["run"],
        COG_MAX_CONCURRENCY=(limits or ["1"])[0],  # the image has it from run.py
        # It starts its worker by the name `python`.
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )
    log = out / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"],
            cwd=out,
            env=environment,
            stdout=file,
            stderr=file,
        )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                status = client.get("/health-check").json()["status"]
            except httpx.TransportError:
                return False
            assert status in ("STARTING", "READY"), log.read_text()
            return bool(status == "READY")

        wait_for(is_ready)
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("serve_process" in " ".join(child.cmdline()) for child in family)
        yield client
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert not psutil.wait_procs(family, timeout=60)[1]


@pytest.fixture(scope="module")
def streamed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with cog_server(tmp_path_factory.mktemp("streamed"), model, 1) as client:
        yield client


@pytest.fixture(scope="module")
def batched(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with cog_server(tmp_path_factory.mktemp("batched"), model, CONCURRENCY) as client:
        yield client


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """The names and data of cog's server-sent events."""
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def predict(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    """A prediction as one document. Cog may still free the slot of the one before: then 409."""
    responses: list[httpx.Response] = []

    def is_taken() -> bool:
        responses.append(client.post("/predictions", json={"input": fields}))
        return responses[-1].status_code != httpx.codes.CONFLICT

    wait_for(is_taken)
    document: dict[str, Any] = responses[-1].json()
    return document


@contextmanager
def stream(client: httpx.Client, name: str, max_tokens: int) -> Iterator[httpx.Response]:
    """The server-sent events of a prediction with a name."""
    body = {"input": {**GREEDY, "max_tokens": max_tokens}}
    accept = {"accept": "text/event-stream"}
    with client.stream("PUT", f"/predictions/{name}", json=body, headers=accept) as response:
        assert response.status_code == 200
        yield response


@pytest.mark.scale
def test_prediction_is_streamed(streamed: httpx.Client) -> None:
    with stream(streamed, "streamed", 20) as response:
        seen = list(events(response))
    chunks = [data["chunk"] for name, data in seen if name == "output"]
    name, last = seen[-1]
    assert name == "completed" and last["status"] == "succeeded" and len(chunks) > 1
    whole = predict(streamed, **GREEDY, max_tokens=20)
    assert whole["status"] == "succeeded" and "".join(whole["output"]) == "".join(chunks) != ""


@pytest.mark.scale
def test_streamed_prediction_is_canceled_after_its_first_text(streamed: httpx.Client) -> None:
    chunks = 0
    last = {}
    with stream(streamed, "long", 16_000) as response:
        for name, data in events(response):
            if name == "output" and chunks == 0:
                assert streamed.post("/predictions/long/cancel").status_code == 200
            chunks += name == "output"
            last = data
    assert last["status"] == "canceled" and 0 < chunks < 15_000
    assert predict(streamed, **GREEDY, max_tokens=4)["status"] == "succeeded"


@pytest.mark.scale
def test_messages_and_seed_decide_the_answer(streamed: httpx.Client) -> None:
    messages = json.dumps([{"role": "user", "content": "hello"}])
    same = predict(streamed, messages=messages, temperature=0, max_tokens=8)
    assert same["output"] == predict(streamed, **GREEDY, max_tokens=8)["output"]
    sampled = {"prompt": "hello", "temperature": 1.5, "seed": 3, "max_tokens": 8}
    assert predict(streamed, **sampled)["output"] == predict(streamed, **sampled)["output"]


@pytest.mark.scale
def test_wrong_prediction_fails_with_a_reason(streamed: httpx.Client) -> None:
    failed = predict(streamed, system_prompt="Be short.")
    assert failed["status"] == "failed" and "neither a prompt nor messages" in failed["error"]
    failed = predict(streamed, messages='[{"role": "nobody", "content": "a"}]')
    assert failed["status"] == "failed" and "role" in failed["error"]
    assert predict(streamed, **GREEDY, max_tokens=2)["status"] == "succeeded"


@pytest.mark.scale
def test_predictions_are_batched(batched: httpx.Client) -> None:
    ended = []

    def run_long() -> None:
        with stream(batched, "long", 16_000) as response:
            ended.extend(data for name, data in events(response) if name == "completed")

    thread = threading.Thread(target=run_long)
    thread.start()
    wait_for(lambda: batched.get("/health-check").json().get("concurrency", {}).get("current") != 0)
    assert predict(batched, **GREEDY, max_tokens=4)["status"] == "succeeded"
    assert not ended  # the short one was not behind the long one
    assert batched.post("/predictions/long/cancel").status_code == 200
    thread.join(60)
    assert ended[0]["status"] == "canceled"
    assert predict(batched, **GREEDY, max_tokens=4)["status"] == "succeeded"
