"""`llmkit deploy modal`: the file of a Modal app that runs `llmkit serve`."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.deploy.function_files import Package, python_list, python_text

PORT = 8000
VOLUME = "llmkit-models"
KEY_SECRET = "llmkit-api-key"  # noqa: S105 the name of Modal's secret
_MOUNT = "/models"
# Modal forwards requests from outside the container. The server needs a key there.
_ADDRESS = ("--host", "0.0.0.0", "--port", str(PORT))  # noqa: S104


@dataclass(frozen=True)
class ModalApp:
    """An app. model: a hub id, or the name of a folder or file in the volume."""

    model: str
    is_hub_id: bool
    name: str
    words: tuple[str, ...]
    package: Package
    gpu: str | None
    concurrency: int
    scaledown_window_s: int
    max_containers: int | None


def render_app(app: ModalApp, file: str) -> str:
    """The text of the app's file. file: its path, for the commands in its docstring."""
    model = app.model if app.is_hub_id else f"{_MOUNT}/{app.model}"
    download = _download(app) if app.is_hub_id else ""
    first = f"modal run {file}::download" if app.is_hub_id else _upload(app)
    packages = ", ".join(map(python_text, app.package.system_packages("gcc", "libc6-dev")))
    words = python_list((*_ADDRESS, *app.words))
    return f'''\
"""{app.name} on Modal, with the OpenAI API. Written by `llmkit deploy modal`.

{_indent(_commands(first, file))}
"""

import modal

MODEL = {python_text(model)}
NAME = {python_text(app.name)}  # the model's name in the API
# Options of `llmkit serve`.
OPTIONS = {words}
PORT = {PORT}

app = modal.App({python_text(_app_name(app.name))})
# Weights stay in this volume. Containers start from it.
models = modal.Volume.from_name({python_text(VOLUME)}, create_if_missing=True)
# Has LLMKIT_API_KEY, which requests must send.
api_key = modal.Secret.from_name({python_text(KEY_SECRET)}, required_keys=["LLMKIT_API_KEY"])
image = (
    modal.Image.debian_slim(python_version="3.12")
    .apt_install({packages})  # kernels are compiled
{_install(app.package)}
    .env({{"HF_HOME": "{_MOUNT}/huggingface"}})
)

{download}
@app.cls(
    image=image,
    gpu={python_text(app.gpu) if app.gpu else None},
    volumes={{"{_MOUNT}": models}},
    secrets=[api_key],
    min_containers=0,  # no request, no container: the first one then waits for a start
    max_containers={app.max_containers},
    scaledown_window={app.scaledown_window_s},  # seconds without a request until a container ends
    startup_timeout=1800,
    timeout=3600,  # of a request
)
@modal.concurrent(max_inputs={app.concurrency})  # requests that a container batches
class Server:
    @modal.enter()
    def start(self) -> None:
        from llmkit.cli.serve import serve_options
        from llmkit.deploy.container_server import ContainerServer

        self.server = ContainerServer(serve_options(MODEL, NAME, OPTIONS, None))
        self.server.wait_ready()

    @modal.web_server(PORT)
    def serve(self) -> None:
        """Modal forwards requests to the port. The server is ready by now."""

    @modal.exit()
    def stop(self) -> None:
        self.server.stop()
'''


def _commands(first: str, file: str) -> list[str]:
    return [
        f'modal secret create {KEY_SECRET} LLMKIT_API_KEY="$(openssl rand -hex 32)"',
        first,
        f"modal deploy {file}",
    ]


def next_steps(app: ModalApp, file: str) -> list[str]:
    """The commands that deploy the file."""
    first = f"modal run {file}::download" if app.is_hub_id else _upload(app)
    return ["pip install modal && modal setup", *_commands(first, file)]


def _upload(app: ModalApp) -> str:
    return f"modal volume create {VOLUME}; modal volume put {VOLUME} PATH_OF_THE_MODEL {app.model}"


def _download(app: ModalApp) -> str:
    return '''\

@app.function(image=image, volumes={"/models": models}, timeout=7200)
def download() -> None:
    """Fill the volume, on a container without a GPU. For a gated model, add a secret HF_TOKEN."""
    from huggingface_hub import snapshot_download

    snapshot_download(MODEL, ignore_patterns=["*.bin", "*.pt", "*.pth"])

'''


def _install(package: Package) -> str:
    if package.file is None:
        return f'    .pip_install({python_text(package.requirement)}, "nvidia-ml-py")'
    source = python_text(str(package.file.resolve()))
    target = python_text(package.in_image())
    return (
        f"    .add_local_file({source}, {target}, copy=True)\n"
        f'    .pip_install({target}, "nvidia-ml-py")'
    )


def _app_name(name: str) -> str:
    """A name that Modal allows for an app."""
    kept = [letter if letter.isalnum() or letter in "-_." else "-" for letter in name]
    return "".join(kept).strip("-.")[:60] or "llmkit"


def _indent(lines: list[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)
