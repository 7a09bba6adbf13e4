"""`llmkit deploy modal`: the app that it writes, and what Modal's own client makes of it."""

from __future__ import annotations

import ast
import json
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.function_folders import deploy, failed_deploy, package_file, platform_environment

from llmkit.common.errors import ShortageError
from llmkit.deploy.serve_command import ServeCommand

MODEL = {"max_position_embeddings": 256}


def test_app_of_a_hub_id_downloads_into_the_volume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "app.py"
    words = ["modal", "org/My-Model", "-o", str(out), "--package", "llmkit", "--gpu", "H100"]
    document = deploy(capsys, *words, "--", "--max-model-len", "8192")
    values = _assigned(out)
    assert values["MODEL"] == "org/My-Model"
    served = ["--served-model-name", "org/My-Model", "--max-model-len", "8192"]
    assert values["OPTIONS"] == served
    steps = document["next"]
    assert steps[-2:] == [f"modal run {out}::download", f"modal deploy {out}"]
    assert "LLMKIT_API_KEY" in steps[1] and "modal setup" in steps[0]


def test_app_of_a_local_model_names_its_path_in_the_volume(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "app.py"
    document = deploy(capsys, "modal", str(model), "-o", str(out), "--package", "llmkit")
    assert _assigned(out)["MODEL"] == f"/models/{model.name}"
    assert f"PATH_OF_THE_MODEL {model.name}" in document["next"][2]
    assert "def download" not in out.read_text() and "gpu=None" in out.read_text()


def test_existing_file_and_wrong_option_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "app.py"
    out.write_text("mine")
    words = ["modal", "org/name", "-o", str(out), "--package", "llmkit"]
    code, error = failed_deploy(capsys, *words)
    assert code == 5 and "exists and is a file" in error and out.read_text() == "mine"
    code, error = failed_deploy(capsys, *words, "--scaledown-window", "5000")
    assert code == 2 and "--scaledown-window" in error and "1200" in error


def test_serve_command_waits_until_ready_and_stops(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMKIT_API_KEY", "key")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ServeCommand([str(model), "--host", "127.0.0.1", "--device", "cpu"], port)
    try:
        server.wait_ready()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/models", headers={"authorization": "Bearer key"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            assert json.load(response)["object"] == "list"
        (process,) = [
            child for child in psutil.Process().children() if str(port) in child.cmdline()
        ]
        family = process.children(recursive=True)
        assert family
    finally:
        server.stop()
    assert not psutil.wait_procs(family, timeout=10)[1]


def test_serve_command_says_when_the_server_cannot_start(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMKIT_API_KEY", "key")
    server = ServeCommand(["/no/model", "--host", "127.0.0.1"], 1)
    with pytest.raises(ShortageError, match="ended with exit code 3 before it was ready"):
        server.wait_ready()
    assert "/no/model" in capfd.readouterr().err


@pytest.fixture
def deployed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The API after `modal deploy` of a written app."""
    pytest.importorskip("modal", reason="modal is not installed (make test-scale)")
    from support.modal_api import ModalApi

    out = tmp_path / "app.py"
    package = str(package_file(tmp_path))
    words = ["modal", "org/My-Model", "-o", str(out), "--package", package, "--gpu", "H100:2"]
    deploy(capsys, *words, "--concurrency", "24", "--max-containers", "3", "--", "--tp", "2")
    with ModalApi() as api:
        # No configuration of this machine's user is read.
        environment = platform_environment(**api.environment, HOME=str(tmp_path))
        done = subprocess.run(
            [sys.executable, "-m", "modal", "deploy", str(out)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        yield api


@pytest.mark.scale
def test_modal_deploys_the_app(deployed: Any) -> None:
    (volume,) = deployed.requests("VolumeGetOrCreate")
    assert volume.deployment_name == "llmkit-models"
    (secret,) = deployed.requests("SecretGetOrCreate")
    assert secret.deployment_name == "llmkit-api-key"
    assert secret.required_keys == ["LLMKIT_API_KEY"]

    functions = {
        request.function.function_name: request.function
        for request in deployed.requests("FunctionCreate")
    }
    server, download = functions["Server.*"], functions["download"]
    assert server.resources.gpu_config.gpu_type == "H100" and server.resources.gpu_config.count == 2
    assert server.autoscaler_settings.min_containers == 0  # it scales to zero
    assert server.autoscaler_settings.max_containers == 3
    assert server.autoscaler_settings.scaledown_window == 300
    assert server.max_concurrent_inputs == 24 and server.startup_timeout_secs == 1800
    assert len(server.secret_ids) == 1
    web = server.method_definitions["serve"].webhook_config
    assert (
        web.web_server_port == 8000
        and web.type
        == type(web)
        .DESCRIPTOR.fields_by_name["type"]
        .enum_type.values_by_name["WEBHOOK_TYPE_WEB_SERVER"]
        .number
    )
    for function in (server, download):
        assert [mount.mount_path for mount in function.volume_mounts] == ["/models"]
    assert download.resources.gpu_config.count == 0  # the download needs no GPU

    (published,) = deployed.requests("AppPublish")
    assert published.name == "org-My-Model" and "Server.*" in published.function_ids


@pytest.mark.scale
def test_modal_builds_an_image_with_llmkit(deployed: Any) -> None:
    commands = [
        command
        for request in deployed.requests("ImageGetOrCreate")
        for command in request.image.dockerfile_commands
    ]
    text = "\n".join(commands)
    assert "/opt/packages/llmkit-0.1.0.tar.gz nvidia-ml-py" in text
    assert "apt-get install -y gcc libc6-dev" in text
    assert "HF_HOME=/models/huggingface" in text.replace("'", "").replace('"', "")


def _assigned(path: Path) -> dict[str, Any]:
    """The constants of a Python file."""
    values = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:  # an object, no constant
                continue
    return values
