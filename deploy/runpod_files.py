"""`llmkit deploy runpod`: a folder from which `docker build` makes a RunPod serverless worker."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from llmkit.deploy.function_files import (
    Package,
    image_name,
    python_list,
    python_text,
    write_files,
)

# Where RunPod mounts a network volume, and where it puts the models that it caches.
_MOUNT = "/runpod-volume"


@dataclass(frozen=True)
class RunpodWorker:
    """A worker. model: a hub id, or the name of a folder or file in the network volume."""

    model: str
    is_hub_id: bool
    name: str
    words: tuple[str, ...]
    package: Package
    concurrency: int


def write_worker(folder: Path, worker: RunpodWorker) -> list[str]:
    """Write the folder and return its files. Raises what `write_files` raises."""
    messages = [{"role": "user", "content": "Say hello."}]
    test_input = {"input": {"messages": messages, "sampling_params": {"max_tokens": 16}}}
    texts = {
        "Dockerfile": _dockerfile(worker, folder),
        "handler.py": handler(worker),
        "test_input.json": json.dumps(test_input, indent=2) + "\n",
    }
    return write_files(folder, texts, {worker.package.requirement: worker.package.file})


def handler(worker: RunpodWorker) -> str:
    """The worker's code."""
    model = worker.model if worker.is_hub_id else f"{_MOUNT}/{worker.model}"
    return f'''\
"""A worker of RunPod serverless. Written by `llmkit deploy runpod`.

It starts `llmkit serve`, and answers jobs by its responses. A job's input has `messages` or
`prompt`, or it comes from RunPod's OpenAI-compatible URL.
"""

from llmkit.cli.serve import serve_options
from llmkit.deploy.runpod_worker import start_worker

MODEL = {python_text(model)}
NAME = {python_text(worker.name)}  # the model's name in the API
# Options of `llmkit serve`.
OPTIONS = {python_list(worker.words)}
CONCURRENCY = {worker.concurrency}  # jobs that a worker runs at the same time

if __name__ == "__main__":
    start_worker(serve_options(MODEL, NAME, OPTIONS, None), CONCURRENCY)
'''


def next_steps(worker: RunpodWorker, folder: Path, model: str) -> list[str]:
    """What makes an endpoint of the folder. model: as the user named it."""
    name = image_name(folder)
    weights = f"set the endpoint's Model to {model}: RunPod caches it on its hosts"
    if not worker.is_hub_id:
        weights = (
            f"make a network volume, copy the model to it (`aws s3 cp --recursive {model} "
            f"s3://VOLUME/{worker.model} --endpoint-url https://s3api-DATACENTER.runpod.io`) and "
            "attach it to the endpoint"
        )
    return [
        f"docker build --platform linux/amd64 -t $REGISTRY/{name} {shlex.quote(str(folder))}",
        f"docker push $REGISTRY/{name}",
        "in RunPod's console, make a queue-based serverless endpoint from the image, with 0 active "
        "workers",
        weights,
        "keys are RunPod's: base_url https://api.runpod.ai/v2/ENDPOINT/openai/v1, api_key "
        "$RUNPOD_API_KEY; for a gated model, add the secret HF_TOKEN to the endpoint's environment",
    ]


def _dockerfile(worker: RunpodWorker, folder: Path) -> str:
    place = shlex.quote(str(folder))
    packages = " ".join(worker.package.system_packages("gcc", "libc6-dev", "libgomp1"))
    return f"""\
# Written by `llmkit deploy runpod`. Build it where Docker runs:
#   docker build --platform linux/amd64 -t REGISTRY/{image_name(folder)} {place}

FROM python:3.12-slim
# Kernels are compiled, some of them at run time.
RUN apt-get update && apt-get install -y --no-install-recommends {packages} \\
    && rm -rf /var/lib/apt/lists/*
{worker.package.copy_line()}\
RUN pip install --no-cache-dir "{worker.package.in_image()}" nvidia-ml-py runpod
# Weights are in a volume: models that RunPod caches, and those that are downloaded.
ENV HF_HUB_CACHE={_MOUNT}/huggingface-cache/hub
WORKDIR /worker
COPY handler.py test_input.json ./
CMD ["python", "-u", "handler.py"]
"""
