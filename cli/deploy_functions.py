"""`llmkit deploy lambda | modal | runpod | replicate`: what starts llmkit on these platforms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmkit.checkpoint.output_directory import write_new_file
from llmkit.cli.command import OUTPUT_DIRECTORY
from llmkit.cli.deploy import NAME, SERVE_WORDS, container_options
from llmkit.cli.output import Output
from llmkit.common.options import Argument, Option
from llmkit.runtime.server.serve_options import default_name

if TYPE_CHECKING:
    from rich.console import Console

MODEL = Argument("A checkpoint's path, or a hub id.", metavar="MODEL", completes_models=True)
PACKAGE = Option(
    "llmkit for the container: a wheel, a source archive (`python -m build --sdist`), or what pip "
    "takes.",
    metavar="FILE",
)
CONCURRENCY = Option("Requests that a container runs at the same time.", metavar="N", min=1)


@dataclass(frozen=True, kw_only=True)
class LambdaArguments:
    """What `llmkit deploy lambda` takes."""

    model: Annotated[
        str,
        Argument(
            "A quantized checkpoint's path, or a hub id; it is copied.",
            metavar="MODEL",
            is_model=True,
        ),
    ]
    serve_words: Annotated[tuple[str, ...], SERVE_WORDS] = ()
    output: Annotated[str, OUTPUT_DIRECTORY]
    package: Annotated[str, PACKAGE]
    memory: Annotated[
        int | None,
        Option(
            "Memory of the function; CPU time grows with it, 1,769 MB for a vCPU.",
            metavar="MB",
            min=128,
            max=10_240,
            unset="the fewest vCPUs whose memory is enough",
        ),
    ] = None
    stream: Annotated[
        bool,
        Option(
            "Stream responses to the function's URL (RESPONSE_STREAM) by a runtime of llmkit; "
            "AWS's for Python sends whole responses."
        ),
    ] = False
    name: Annotated[str | None, NAME] = None


@dataclass(frozen=True, kw_only=True)
class ModalArguments:
    """What `llmkit deploy modal` takes."""

    model: Annotated[str, MODEL]
    serve_words: Annotated[tuple[str, ...], SERVE_WORDS] = ()
    output: Annotated[
        str,
        Option(
            "The Python file to write; it must be absent.",
            flags=("--output", "-o"),
            metavar="FILE",
        ),
    ]
    package: Annotated[str, PACKAGE]
    gpu: Annotated[
        str | None,
        Option(
            "Modal's name of the GPU: T4, L4, A100-80GB, H100, H200:2 ...",
            metavar="NAME",
            unset="none",
        ),
    ] = None
    concurrency: Annotated[int, CONCURRENCY] = 32
    scaledown_window: Annotated[
        int,
        Option("How long a container without a request stays.", metavar="SECONDS", min=2, max=1200),
    ] = 300
    max_containers: Annotated[
        int | None,
        Option("Most containers at the same time.", metavar="N", min=1, unset="Modal's limit"),
    ] = None
    name: Annotated[str | None, NAME] = None


@dataclass(frozen=True, kw_only=True)
class RunpodArguments:
    """What `llmkit deploy runpod` takes."""

    model: Annotated[str, MODEL]
    serve_words: Annotated[tuple[str, ...], SERVE_WORDS] = ()
    output: Annotated[str, OUTPUT_DIRECTORY]
    package: Annotated[str, PACKAGE]
    concurrency: Annotated[int, CONCURRENCY] = 32
    name: Annotated[str | None, NAME] = None


@dataclass(frozen=True, kw_only=True)
class ReplicateArguments:
    """What `llmkit deploy replicate` takes."""

    model: Annotated[
        str,
        Argument(
            "A checkpoint's path, which goes into the image, or a hub id, which each start loads.",
            metavar="MODEL",
            completes_models=True,
        ),
    ]
    serve_words: Annotated[tuple[str, ...], SERVE_WORDS] = ()
    output: Annotated[str, OUTPUT_DIRECTORY]
    package: Annotated[str, PACKAGE]
    gpu: Annotated[bool, Option("Run on a GPU.", flags=("--gpu/--no-gpu",))] = True
    concurrency: Annotated[
        int,
        Option(
            "Predictions that a container runs at the same time; cog streams with 1 only.",
            metavar="N",
            min=1,
        ),
    ] = 1
    name: Annotated[str | None, NAME] = None


def aws_lambda(output: Output, arguments: LambdaArguments) -> None:
    """Write the image of an AWS Lambda function that answers with a small model on a CPU.

    Refuses a model that Lambda cannot hold, with the figures. Quantize first: `llmkit quantize`.
    """
    from llmkit.checkpoint.open_checkpoint import open_checkpoint
    from llmkit.deploy import aws_lambda as writer
    from llmkit.deploy.function_files import find_package

    words = writer.serve_words(arguments.serve_words)
    name = arguments.name or default_name(arguments.model)
    options = container_options(arguments.model, name, words)
    checkpoint = open_checkpoint(arguments.model)  # a hub id is downloaded
    memory_mb, max_tokens = writer.choose_memory(checkpoint.path, options.engine, arguments.memory)
    if checkpoint.quantization is None:
        output.message(
            f"{arguments.model} is not quantized: `llmkit quantize {arguments.model} --method gptq "
            "--bits 4` makes it smaller, so that it starts faster and needs less memory"
        )
    image = writer.LambdaImage(
        model=checkpoint.path,
        name=name,
        words=words,
        package=find_package(arguments.package),
        memory_mb=memory_mb,
        streaming=arguments.stream,
    )
    folder = Path(arguments.output)
    files = writer.write_image(folder, image)
    output.message(f"{memory_mb:,} MB; requests of up to {max_tokens:,} tokens")
    facts = {"memory_mb": memory_mb, "max_model_len": max_tokens}
    _show(output, name, files, writer.next_steps(image, folder), facts)


def modal(output: Output, arguments: ModalArguments) -> None:
    """Write a Modal app: one file that serves a model, keeps it in a volume and scales to zero."""
    from llmkit.deploy import modal_app as writer
    from llmkit.deploy.function_files import find_package

    reference = _reference(arguments.model, arguments.name, arguments.serve_words)
    app = writer.ModalApp(
        model=reference.in_volume,
        is_hub_id=reference.path is None,
        name=reference.name,
        words=arguments.serve_words,
        package=find_package(arguments.package),
        gpu=arguments.gpu,
        concurrency=arguments.concurrency,
        scaledown_window_s=arguments.scaledown_window,
        max_containers=arguments.max_containers,
    )
    write_new_file(Path(arguments.output), writer.render_app(app, arguments.output))
    _show(output, app.name, [arguments.output], writer.next_steps(app, arguments.output))


def runpod(output: Output, arguments: RunpodArguments) -> None:
    """Write a worker of RunPod serverless: a queue of jobs, or the OpenAI API, on a GPU."""
    from llmkit.deploy import runpod_files as writer
    from llmkit.deploy.function_files import find_package

    reference = _reference(arguments.model, arguments.name, arguments.serve_words)
    worker = writer.RunpodWorker(
        model=reference.in_volume,
        is_hub_id=reference.path is None,
        name=reference.name,
        words=arguments.serve_words,
        package=find_package(arguments.package),
        concurrency=arguments.concurrency,
    )
    folder = Path(arguments.output)
    files = writer.write_worker(folder, worker)
    _show(output, worker.name, files, writer.next_steps(worker, folder, arguments.model))


def replicate(output: Output, arguments: ReplicateArguments) -> None:
    """Write a model for Replicate: what `cog push` needs, with streamed answers."""
    from llmkit.deploy import replicate_files as writer
    from llmkit.deploy.function_files import find_package

    reference = _reference(arguments.model, arguments.name, arguments.serve_words)
    model = writer.ReplicateModel(
        model=arguments.model,
        path=reference.path,
        name=reference.name,
        words=arguments.serve_words,
        package=find_package(arguments.package),
        gpu=arguments.gpu,
        concurrency=arguments.concurrency,
    )
    folder = Path(arguments.output)
    files = writer.write_model(folder, model)
    _show(output, model.name, files, writer.next_steps(model, folder))


@dataclass(frozen=True)
class _Reference:
    """A model as a container finds it. path: on this machine; None: `in_volume` is a hub id."""

    name: str
    path: Path | None
    in_volume: str


def _reference(model: str, name: str | None, words: Sequence[str]) -> _Reference:
    """Raises InputError for a model that does not exist, UsageError for a wrong option."""
    from llmkit.deploy.function_files import local_model

    name = name or default_name(model)
    path = local_model(model)
    container_options(model, name, words)
    return _Reference(name, path, model if path is None else path.name)


def _show(
    output: Output,
    name: str,
    files: list[str],
    steps: list[str],
    facts: dict[str, Any] | None = None,
) -> None:
    document = {"name": name, "files": files, "next": steps} | (facts or {})

    def show(console: Console) -> None:
        lines = [*files, "", "Next:", *(f"  {step}" for step in steps)]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)

    output.result(document, show)
