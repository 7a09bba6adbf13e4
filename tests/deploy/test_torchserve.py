"""recipes/torchserve: the handler inside a real TorchServe (Java and `.venv-torchserve`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from support.free_ports import free_port
from support.server_process import wait_for
from support.tiny_models import tiny_checkpoint

FOLDER = Path(__file__).parents[2]
RECIPE = FOLDER / "recipes/torchserve"
PACKAGES = FOLDER / ".venv-torchserve/lib"
CHAT = "v1/chat/completions"

pytestmark = [
    pytest.mark.scale,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("java") is None, reason="no Java here"),
]


@dataclass
class TorchServe:
    """A running TorchServe with one model."""

    process: psutil.Process
    inference: str
    management: str

    def ask(self, path: str, body: Any) -> httpx.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        return httpx.post(f"{self.inference}/{path}", content=data, headers=headers, timeout=60)


def body_of(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hi"}]
    return {"messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}


@pytest.fixture(scope="module")
def torchserve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    folder = tmp_path_factory.mktemp("torchserve")
    (packages,) = PACKAGES.glob("python3*/site-packages")
    environment = dict(os.environ) | {
        "PYTHONPATH": str(packages),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    config = yaml.safe_load((RECIPE / "model-config.yaml").read_text())
    assert config["asyncCommunication"] is True and config["batchSize"] == 1
    config["deviceType"] = "cpu"
    options = ["--device", "cpu", "--kv-cache-memory", "32MiB"]
    config["handler"] = {"model": str(folder / "weights"), "serve_options": options}
    tiny_checkpoint(folder / "weights")
    temp, store = folder / "temp", folder / "store"
    temp.mkdir()
    store.mkdir()  # not the working directory: TorchServe takes a folder there for the model
    (folder / "model-config.yaml").write_text(yaml.safe_dump(config))
    words = ["--model-name", "chat", "--version", "1.0", "--archive-format", "no-archive"]
    words += ["--handler", str(RECIPE / "llmkit_handler.py"), "--export-path", str(store)]
    words += ["--config-file", str(folder / "model-config.yaml")]
    subprocess.run(
        [sys.executable, "-m", "model_archiver.model_packaging", *words],
        env=environment,
        check=True,
        cwd=folder,
    )
    inference, management, metrics, grpc, grpc_management = (free_port() for _ in range(5))
    (folder / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{inference}\n"
        f"management_address=http://127.0.0.1:{management}\n"
        f"metrics_address=http://127.0.0.1:{metrics}\n"
        f"grpc_inference_port={grpc}\ngrpc_management_port={grpc_management}\n"
    )
    start = "from ts.model_server import start; start()"
    words = ["--start", "--foreground", "--ncs", "--model-store", str(store)]
    words += ["--models", "chat=chat", "--ts-config", str(folder / "config.properties")]
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", start, *words, "--disable-token-auth"],
            env={**environment, "TEMP": str(temp)},  # where it puts its workers' sockets
            cwd=folder,
            stdout=stream,
            stderr=stream,
        )
    urls = f"http://127.0.0.1:{inference}/predictions/chat/1.0", f"http://127.0.0.1:{management}"
    running = TorchServe(psutil.Process(process.pid), *urls)

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            return "READY" in httpx.get(f"{running.management}/models/chat").text
        except httpx.TransportError:
            return False

    try:
        wait_for(is_ready, 240)
        yield running
    finally:
        family = running.process.children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        for one in family:
            if one.is_running():
                one.kill()


def test_torchserve_handler_answers_chats_completions_and_lists_models(
    torchserve: TorchServe,
) -> None:
    chat = torchserve.ask(CHAT, body_of())
    assert chat.status_code == 200, chat.text
    assert chat.json()["usage"]["completion_tokens"] == 8
    body = {"prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
    completion = torchserve.ask("v1/completions", body)
    assert completion.json()["usage"]["completion_tokens"] == 3
    assert torchserve.ask("v1/models", {}).json()["data"][0]["id"] == "chat"


def test_torchserve_handler_streams(torchserve: TorchServe) -> None:
    whole = torchserve.ask(CHAT, body_of()).json()["choices"][0]["message"]["content"]
    stream = torchserve.ask(CHAT, body_of(stream=True)).text
    assert stream.endswith("data: [DONE]\n\n") and stream.count("data: [DONE]") == 1
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    parts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert len(parts) > 2 and "".join(parts) == whole


def test_torchserve_handler_answers_at_the_same_time(torchserve: TorchServe) -> None:
    """A short answer ends while a long one runs."""
    with ThreadPoolExecutor() as pool:
        url = f"{torchserve.inference}/{CHAT}"
        long = body_of(stream=True, max_tokens=2000)
        with httpx.stream("POST", url, json=long, timeout=60) as response:
            next(response.iter_text())
            short = pool.submit(torchserve.ask, CHAT, body_of()).result(30)
            assert short.status_code == 200
            response.close()


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("v1/other", {}, 404, "/v1/other is none of /v1/chat/completions"),
        (CHAT, {"messages": []}, 400, "messages: List should have at least 1 item"),
        (CHAT, b"nonsense", 400, "the body is not a JSON object"),
        (CHAT, b"[1]", 400, "the body is not a JSON object"),
    ],
)
def test_torchserve_handler_refuses_wrong_requests(
    torchserve: TorchServe, path: str, body: Any, status: int, text: str
) -> None:
    answer = torchserve.ask(path, body)
    assert answer.status_code == status and text in answer.json()["message"], answer.text


def test_torchserve_handler_ends_with_torchserve(torchserve: TorchServe) -> None:
    family = torchserve.process.children(recursive=True)
    servers = [one for one in family if "llmkit.runtime" in " ".join(one.cmdline())]
    assert servers
    torchserve.process.terminate()
    for one in family:
        if one.name() == "java":
            one.terminate()
    _, alive = psutil.wait_procs(family, 60)
    assert alive == []
