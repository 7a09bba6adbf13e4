"""`llmkit deploy replicate`: a folder from which `cog push` makes a model on Replicate."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

from llmkit.deploy.function_files import Package, python_list, python_text, write_files

_WEIGHTS = "weights"


@dataclass(frozen=True)
class _Method:
    """What differs in run.py where predictions run at the same time."""

    imports: str
    decorator: str  # "": none
    keyword: str
    returns: str
    answer: str


# cog sends what a plain function yields at once. It runs only async functions at the same time, and
# collects what these yield until their end.
_STREAMED = _Method(
    imports="BaseRunner, ConcatenateIterator, Input, streaming",
    decorator="",
    keyword="def",
    returns="ConcatenateIterator[str]",
    answer="        yield from self.server.iter_texts(request)",
)
_BATCHED = _Method(
    imports="AsyncConcatenateIterator, BaseRunner, Input, concurrent, streaming",
    decorator="    @concurrent(max={})\n",
    keyword="async def",
    returns="AsyncConcatenateIterator[str]",
    answer="        async for text in self.server.texts(request):\n            yield text",
)


@dataclass(frozen=True)
class ReplicateModel:
    """A model. path: of a checkpoint that goes into the image; None: `model` is a hub id."""

    model: str
    path: Path | None
    name: str
    words: tuple[str, ...]
    package: Package
    gpu: bool
    concurrency: int

    @property
    def weights(self) -> str:
        """The checkpoint's name in the folder."""
        suffix = ".gguf" if self.path is not None and self.path.suffix == ".gguf" else ""
        return _WEIGHTS + suffix


def write_model(folder: Path, model: ReplicateModel) -> list[str]:
    """Write the folder and return its files. Raises what `write_files` raises."""
    package = model.package
    requirement = f"./{package.requirement}" if package.file else package.requirement
    texts = {
        "cog.yaml": _cog_yaml(model),
        "run.py": runner(model),
        "requirements.txt": f"{requirement}\nnvidia-ml-py\n",
    }
    copies = {model.weights: model.path, package.requirement: package.file}
    return write_files(folder, texts, copies)


def runner(model: ReplicateModel) -> str:
    """The code that cog runs: the inputs of the model, and how a prediction is made."""
    reference = model.weights if model.path else model.model
    method = _BATCHED if model.concurrency > 1 else _STREAMED
    return f'''\
"""{model.name} on Replicate. Written by `llmkit deploy replicate`.

`setup` starts `llmkit serve`, and `run` answers a prediction by a chat.
"""

from cog import {method.imports}
from llmkit.cli.serve import serve_options
from llmkit.deploy.local_request import chat_request
from llmkit.deploy.local_server import LocalServer

MODEL = {python_text(reference)}
NAME = {python_text(model.name)}
# Options of `llmkit serve`.
OPTIONS = {python_list(model.words)}


class Runner(BaseRunner):
    def setup(self) -> None:
        self.server = LocalServer(serve_options(MODEL, NAME, OPTIONS, None))
        self.server.wait_ready()

    @streaming
{method.decorator.format(model.concurrency)}\
    {method.keyword} run(
        self,
        prompt: str = Input(description="The user's message.", default=""),
        system_prompt: str = Input(description="Instructions for the model.", default=""),
        messages: str = Input(description="JSON of chat messages, in place of both.", default=""),
        max_tokens: int = Input(description="Most tokens of the answer.", default=512, ge=1),
        temperature: float = Input(description="0: always the same.", default=0.7, ge=0, le=2),
        top_p: float = Input(description="Share of likely tokens.", default=1.0, ge=0, le=1),
        seed: int = Input(description="For the same answer again; -1: none.", default=-1, ge=-1),
    ) -> {method.returns}:
        request = chat_request(
            prompt,
            system_prompt,
            messages,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=None if seed < 0 else seed,
        )
{method.answer}
'''


def next_steps(model: ReplicateModel, folder: Path) -> list[str]:
    """The commands that make a model of the folder."""
    steps = [
        f"cd {shlex.quote(str(folder))}",
        "cog run -i prompt='Say hello.'    # with Docker, here",
        "cog login",
        "cog push r8.im/$OWNER/$MODEL      # make the model on replicate.com first",
        "keys are Replicate's: clients send REPLICATE_API_TOKEN",
    ]
    if model.path is None:
        steps.append(
            "each new container downloads the weights: `hf download` them, and give the folder in "
            "place of the hub id to have them in the image"
        )
    return steps


def _cog_yaml(model: ReplicateModel) -> str:
    document = {
        "build": {
            "gpu": model.gpu,
            "python_version": "3.12",
            "system_packages": model.package.system_packages("gcc", "libc6-dev", "libgomp1"),
            "python_requirements": "requirements.txt",
        },
        "run": "run.py:Runner",
    }
    head = "# Written by `llmkit deploy replicate`. Next: `cog run -i prompt=…`, then `cog push`.\n"
    return head + yaml.safe_dump(document, sort_keys=False)
