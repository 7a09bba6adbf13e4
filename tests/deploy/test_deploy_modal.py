"""`llmkit deploy modal`: the app that it writes, and what Modal's own client makes of it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.free_ports import free_port
from support.function_folders import deploy, failed_deploy, package_file, platform_environment

MODEL = {"max_position_embeddings": 256}


def test_app_of_a_hub_id_downloads_into_the_volume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "app.py"
    words = ["modal", "org/My-Model", "-o", str(out), "--package", "llmkit", "--gpu", "H100"]
    document = deploy(capsys, *words, "--", "--max-model-len", "8192")
    values = _assigned(out)
    assert values["MODEL"] == "org/My-Model"
    assert values["NAME"] == "org/My-Model"
    address = ["--host", "0.0.0.0", "--port", "8000"]
    assert values["OPTIONS"] == [*address, "--max-model-len", "8192"]
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


# What the app of Modal does, in a process of its own: the end of its server ends it.
CONTAINER = """
import sys
from llmkit.cli.serve import serve_options
from llmkit.deploy.container_server import ContainerServer

server = ContainerServer(serve_options(sys.argv[1], "chat", sys.argv[2:], None))
server.wait_ready()
print("ready", flush=True)
sys.stdin.read()
server.stop()
print("stopped", flush=True)
"""


def container(model: str, port: int, host: str, **variables: str) -> subprocess.Popen[str]:
    words = [model, "--host", host, "--port", str(port), "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-c", CONTAINER, *words],
        env=platform_environment(**variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("is_killed", [False, True])
def test_container_ends_with_its_server(model: Path, is_killed: bool) -> None:
    port = free_port()
    with container(str(model), port, "127.0.0.1", LLMKIT_API_KEY="key") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/models", headers={"authorization": "Bearer key"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["data"][0]["id"] == "chat"
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        if is_killed:
            psutil.Process(process.pid).children()[0].kill()
            process.wait(60)
        out, err = process.communicate(timeout=60)
        if is_killed:
            assert process.returncode == 1 and "The container ends." in err, err
        else:
            assert process.returncode == 0 and out == "stopped\n", err
    assert not psutil.wait_procs(family, timeout=60)[1]


@pytest.mark.parametrize(
    ("name", "host", "reason"),
    [
        ("/no/model", "127.0.0.1", "/no/model"),
        ("", "0.0.0.0", "other machines could use the server without a key"),
    ],
)
def test_container_says_why_its_server_cannot_start(
    model: Path, name: str, host: str, reason: str
) -> None:
    with container(name or str(model), free_port(), host) as process:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and reason in err.splitlines()[-1], err


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
