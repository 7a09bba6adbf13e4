"""`llmkit deploy triton` inside a real Triton, on the CPU, with Triton's own client.

It is Triton 2.51, of the package nvidia-pytriton.

That Triton's Python backend is older than NumPy 2. Its Python is therefore a small environment in
which NumPy 1 comes with the other packages of this one.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import site
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.free_ports import free_port
from support.tiny_models import tiny_checkpoint

from llmkit.cli.main import run

VERSION = f"python3.{sys.version_info.minor}"
PACKAGES = Path(__file__).parents[2] / ".venv-triton" / "lib" / VERSION / "site-packages"
TRITON = PACKAGES / "pytriton" / "tritonserver"
pytestmark = [
    pytest.mark.scale,
    pytest.mark.skipif(
        not TRITON.exists(), reason="no Triton here: `make .venv-triton/.ready` installs it"
    ),
]
SAMPLING = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
Ask = Callable[..., list[dict[str, Any]]]


def python_with_numpy_1(folder: Path) -> Path:
    """The folder of programs of an environment with this one's packages, but for NumPy."""
    packages = folder / "packages"
    packages.mkdir(parents=True)
    for path in Path(site.getsitepackages()[0]).iterdir():
        if path.name != "numpy" and not path.name.startswith(("numpy-", "numpy.libs")):
            (packages / path.name).symlink_to(path)
    for path in PACKAGES.glob("numpy*"):
        (packages / path.name).symlink_to(path)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    line = f"import site; site.addsitedir({str(packages)!r})\n"
    (environment / "lib" / VERSION / "site-packages" / "packages.pth").write_text(line)
    return environment / "bin"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Triton with the ensemble `chat` and the model `plain`; the address of its gRPC service."""
    folder = tmp_path_factory.mktemp("triton")
    model = tiny_checkpoint(folder / "tiny", dtype="float32", max_position_embeddings=2048)
    words = ["deploy", "triton", str(model), "-o", str(folder / "models"), "--quiet"]
    options = ["--", "--device", "cpu", "--max-num-seqs", "4"]
    assert run([*words, "--name", "chat", "--ensemble", *options]) == 0
    assert run([*words, "--name", "plain", *options]) == 0
    backends = shutil.copytree(TRITON / "backends", folder / "backends")
    stub = f"3.{sys.version_info.minor}/triton_python_backend_stub"
    shutil.copy(TRITON / "python_backend_stubs" / stub, backends / "python")
    (backends / "python" / "triton_python_backend_stub").chmod(0o755)
    program = shutil.copy(TRITON / "bin" / "tritonserver", folder)
    Path(program).chmod(0o755)
    libraries = (sysconfig.get_config_var("LIBDIR"), PACKAGES / "nvidia_pytriton.libs")
    http = free_port()
    grpc = free_port()
    command = [
        *(program, "--model-repository", str(folder / "models")),
        *("--backend-directory", str(backends), "--allow-metrics", "false"),
        *("--http-address", "127.0.0.1", "--http-port", str(http)),
        *("--grpc-address", "127.0.0.1", "--grpc-port", str(grpc)),
    ]
    environment = {
        **os.environ,
        "PATH": f"{python_with_numpy_1(folder / 'python')}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
    }
    log = folder / "triton.log"
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        wait_until_ready(server, f"http://127.0.0.1:{http}/v2/health/ready", log)
        yield f"127.0.0.1:{grpc}"
    finally:
        server.terminate()
        server.wait(60)


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(log.read_text(errors="replace")[-3000:])


@pytest.fixture
def ask(address: str) -> Iterator[Ask]:
    """Sends a request, and returns its responses: the first values of their outputs by name."""
    client_module = pytest.importorskip("tritonclient.grpc")
    client = client_module.InferenceServerClient(address)

    def send(model: str, **values: Any) -> list[dict[str, Any]]:
        inputs = []
        for name, value in values.items():
            is_text = isinstance(value, str)
            tensor = client_module.InferInput(name, [1], "BYTES" if is_text else "BOOL")
            array = np.array([value.encode()], dtype=object) if is_text else np.array([value])
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        found: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.start_stream(lambda result, error: found.put((result, error)))
        client.async_stream_infer(model, inputs, enable_empty_final_response=True)
        responses: list[dict[str, Any]] = []
        is_final = False
        try:
            while not is_final:
                result, error = found.get(timeout=120)
                if error is not None:
                    raise RuntimeError(str(error))
                response = result.get_response()
                names = [output.name for output in response.outputs]
                if names:
                    responses.append({name: result.as_numpy(name).tolist()[0] for name in names})
                is_final = response.parameters["triton_final_response"].bool_param
        finally:
            client.stop_stream()
        return responses

    yield send
    client.close()


@pytest.mark.parametrize("prompt", ["hello", "the quick brown fox", "wörld", "one two three"])
def test_triton_answers_with_the_text_of_the_plain_model(ask: Ask, prompt: str) -> None:
    sampling = json.dumps(SAMPLING)
    (plain,) = ask(
        "plain", text_input=prompt, sampling_parameters=sampling, exclude_input_in_output=True
    )
    (whole,) = ask("chat", text_input=prompt, sampling_parameters=sampling)
    parts = ask("chat", text_input=prompt, sampling_parameters=sampling, stream=True)
    assert whole["text_output"] == plain["text_output"] != b""
    assert b"".join(part["text_output"] for part in parts) == whole["text_output"]
    assert len(parts) > 3 and sum(part["num_output_tokens"] for part in parts) == 60
    assert [part["finish_reason"] for part in parts[-2:]] == [b"", b"length"]


def test_triton_takes_a_request_without_the_optional_inputs(ask: Ask) -> None:
    (response,) = ask("chat", text_input="hello")
    assert response["num_input_tokens"] == 1 and response["finish_reason"] in (b"length", b"stop")


def test_triton_gives_the_reason_for_a_refused_request(ask: Ask) -> None:
    with pytest.raises(RuntimeError, match="stop is not supported in an ensemble"):
        ask("chat", text_input="x", sampling_parameters=json.dumps(SAMPLING | {"stop": ["a"]}))
    with pytest.raises(RuntimeError, match="temperature"):
        ask("chat", text_input="x", sampling_parameters='{"temperature": 9}')
    assert ask("chat", text_input="hello")
