"""`llmkit deploy lambda`: a folder from which `docker build` makes a Lambda function's image."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError, ShortageError
from llmkit.common.formatting import bytes_text
from llmkit.deploy.function_files import (
    Package,
    image_name,
    model_bytes,
    python_list,
    python_text,
    write_files,
)
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine_plan import plan_engine

# Lambda's quotas; its MB are binary.
MAX_MEMORY_MB = 10_240
MAX_IMAGE_BYTES = 10 << 30
VCPU_MB = 1_769  # memory at which a function has the time of one vCPU
# Python, CPU torch and the other packages, unpacked.
IMAGE_BASE_BYTES = 1_600 << 20
# The function, the API process and the engine before it loads weights.
PROCESS_BYTES = 700 << 20
TORCH = "torch>=2.11,<2.14"
_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# A container gets one event at a time. More sequences are for a request with several choices.
DEFAULT_WORDS = ("--device", "cpu", "--max-num-seqs", "4")


@dataclass(frozen=True)
class LambdaImage:
    """The image of a function.

    words: options of `llmkit serve`. memory_mb: of the function. streaming: responses are streamed
    to the function's URL; False: whole responses, by AWS's own runtime.
    """

    model: Path
    name: str
    words: tuple[str, ...]
    package: Package
    memory_mb: int
    streaming: bool


def choose_memory(
    model: Path, engine: EngineOptions, memory_mb: int | None = None
) -> tuple[int, int]:
    """The memory of a function in MB, and the longest request in tokens.

    memory_mb: the memory to check; None: the fewest whole vCPUs whose memory is enough. Raises
    InputError, with the figures, for a model that Lambda cannot hold.
    """
    packed = model_bytes(model)
    if packed + IMAGE_BASE_BYTES > MAX_IMAGE_BYTES:
        raise InputError(
            f"{model} has {bytes_text(packed)}, which is too much for a Lambda image",
            f"At most {bytes_text(MAX_IMAGE_BYTES)} with the {bytes_text(IMAGE_BASE_BYTES)} of "
            "Python and its packages",
            "Quantize it with `llmkit quantize --bits 4`, or choose a smaller model",
        )
    checkpoint = open_checkpoint(str(model))
    # A plan for another machine: what is free on this one does not matter.
    engine = replace(engine, device="cpu")
    steps = [*range(VCPU_MB, MAX_MEMORY_MB, VCPU_MB), MAX_MEMORY_MB]
    error = ShortageError("")
    for memory in [memory_mb] if memory_mb else steps:
        free = (memory << 20) - PROCESS_BYTES
        try:
            plan = plan_engine(checkpoint, engine, max(0, free))
        except ShortageError as shortage:
            error = shortage
        else:
            return memory, plan.memory.max_model_len
    largest = memory_mb or MAX_MEMORY_MB
    raise InputError(
        f"{model} does not fit into a Lambda function of {largest:,} MB: {error.what}",
        f"{bytes_text(PROCESS_BYTES)} of it are for Python's processes",
        _way_out(largest, error),
    ) from None


def _way_out(memory_mb: int, error: ShortageError) -> str:
    if memory_mb < MAX_MEMORY_MB:
        return f"Use a larger --memory (at most {MAX_MEMORY_MB}), or leave it out"
    quantize = "Quantize it with `llmkit quantize --bits 4`, or choose a smaller model"
    return quantize if "weights" in error.what else error.todo


def write_image(folder: Path, image: LambdaImage) -> list[str]:
    """Write the folder and return its files. Raises what `write_files` raises."""
    texts = {"Dockerfile": dockerfile(image, folder), "handler.py": handler(image)}
    model_name = _model_name(image.model)
    copies = {model_name: image.model}
    if image.package.file:
        copies[image.package.requirement] = image.package.file
    return write_files(folder, texts, copies)


def handler(image: LambdaImage) -> str:
    """The function's code."""
    path = f"/opt/{_model_name(image.model)}"
    return f'''\
"""Answers the events of an AWS Lambda function. Written by `llmkit deploy lambda`.

The server starts when Lambda imports this file, before the first event.
"""

from llmkit.cli.serve import serve_options
from llmkit.deploy.lambda_function import LambdaFunction

MODEL = {python_text(path)}
NAME = {python_text(image.name)}  # the model's name in the API
# Options of `llmkit serve`.
OPTIONS = {python_list(image.words)}

handler = LambdaFunction(serve_options(MODEL, NAME, OPTIONS, None))
'''


def dockerfile(image: LambdaImage, folder: Path) -> str:
    """The Dockerfile of a folder."""
    model_name = _model_name(image.model)
    runtime = "llmkit.deploy.lambda_streaming" if image.streaming else "awslambdaric"
    place = shlex.quote(str(folder))
    packages = " ".join(image.package.system_packages("gcc", "libc6-dev"))
    sends = "sends responses as they arrive" if image.streaming else "sends whole responses"
    return f"""\
# Written by `llmkit deploy lambda`. Build it where Docker runs:
#   docker build --platform linux/amd64 --provenance=false -t {image_name(folder)} {place}

FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends {packages}
RUN python -m venv /opt/llmkit
ENV PATH=/opt/llmkit/bin:$PATH
RUN pip install --no-cache-dir "{TORCH}" --index-url {_TORCH_INDEX}
{image.package.copy_line()}\
RUN pip install --no-cache-dir "{image.package.in_image()}" awslambdaric

FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 \\
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/llmkit /opt/llmkit
COPY {model_name} /opt/{model_name}
COPY handler.py /var/task/
WORKDIR /var/task
# Only /tmp can be written to in a function.
ENV PATH=/opt/llmkit/bin:$PATH HOME=/tmp HF_HUB_OFFLINE=1
# The runtime: it takes events, calls the handler and {sends}.
ENTRYPOINT ["python", "-m", "{runtime}"]
CMD ["handler.handler"]
"""


def next_steps(image: LambdaImage, folder: Path) -> list[str]:
    """The commands that make a function of the folder."""
    name = image_name(folder)
    repository = "$ACCOUNT.dkr.ecr.$AWS_REGION.amazonaws.com"
    mode = "RESPONSE_STREAM" if image.streaming else "BUFFERED"
    return [
        'export ACCOUNT=… AWS_REGION=… ROLE=… KEY="$(openssl rand -hex 32)"    # KEY: for clients',
        f"docker build --platform linux/amd64 --provenance=false -t {repository}/{name} "
        f"{shlex.quote(str(folder))}",
        f"aws ecr create-repository --repository-name {name}",
        f"aws ecr get-login-password | docker login --username AWS --password-stdin {repository}",
        f"docker push {repository}/{name}",
        f"aws lambda create-function --function-name {name} --package-type Image --code "
        f"ImageUri={repository}/{name}:latest --role $ROLE --timeout 900 "
        f"--memory-size {image.memory_mb} --environment Variables={{LLMKIT_API_KEY=$KEY}}",
        f"aws lambda create-function-url-config --function-name {name} --auth-type NONE "
        f"--invoke-mode {mode}",
        f"aws lambda add-permission --function-name {name} --statement-id url --principal '*' "
        "--action lambda:InvokeFunctionUrl --function-url-auth-type NONE",
        f"aws lambda add-permission --function-name {name} --statement-id invoke --principal '*' "
        "--action lambda:InvokeFunction --invoked-via-function-url",
    ]


def _model_name(model: Path) -> str:
    """The model's name in the image: `.gguf` files keep their suffix."""
    return "model.gguf" if model.suffix == ".gguf" else "model"


def serve_words(words: Sequence[str]) -> tuple[str, ...]:
    """The options of the server: what suits a function, then the user's, which win."""
    return (*DEFAULT_WORDS, *words)
