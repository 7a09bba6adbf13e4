"""A sandbox: `python -m llmkit.runtime.server.sandbox_process --fd N`, started by the API process only.

It does one job after another of those that may take for ever or any amount of memory: it renders chat templates, which
are a checkpoint's programs, and compiles clients' grammars. A job that takes too much ends the process, not the server.
It can open no file and write none, and ends with its socket.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from llmkit.checkpoint.errors import ShortageError
from llmkit.runtime.channel import Channel, parent_socket


class Setup(msgspec.Struct, tag=True):
    """The first message: what a job may take, and the model that grammars are compiled for, if they are."""

    cpu_s: float
    memory_bytes: int  # more than before the first job
    chars: int  # of a prompt
    model: str = ""
    vocab: int = 0  # rows of its output projection


class Render(msgspec.Struct, tag=True):
    """The prompt of a conversation is wanted: `template` with `variables`."""

    template: str
    variables: dict[str, Any]


class Compile(msgspec.Struct, tag=True):
    """It is asked whether `grammar` can be followed."""

    grammar: str


class Done(msgspec.Struct, tag=True):
    """The job is done; `text` is the prompt."""

    text: str = ""


class Declined(msgspec.Struct, tag=True):
    """The job cannot be done: in the template's own words, or llguidance's."""

    why: str


ToSandbox = Setup | Render | Compile
FromSandbox = Done | Declined

_decoder = msgspec.msgpack.Decoder(ToSandbox)
from_sandbox_decoder = msgspec.msgpack.Decoder(FromSandbox)


def _ready(setup: Setup) -> Callable[[ToSandbox], Done]:
    """Import what the jobs need, and take away what they do not; what does a job, or raises an error that tells why."""
    if setup.model:
        from llmkit.checkpoint.files import open_files
        from llmkit.checkpoint.tokenizer import load_tokenizer
        from llmkit.runtime.matcher import compile_grammar, grammar_tokenizer

        text = load_tokenizer(open_files(setup.model))
        tokenizer = grammar_tokenizer(text.to_json(), setup.vocab, text.eos_ids)
    else:
        import pprint  # noqa: F401  (these two are imported by jinja2 itself, when a template asks or fails)

        import jinja2.debug  # noqa: F401

        from llmkit.checkpoint.chat import render

        render(r"{{ '\n' ~ strftime_now('%Y') }}", [])  # reads the codec's and the time zone's files

    def work(job: ToSandbox) -> Done:
        if isinstance(job, Compile):
            compile_grammar(tokenizer, job.grammar).compute_bitmask()
            return Done()
        assert isinstance(job, Render)
        prompt = render(job.template, **job.variables)
        if len(prompt) > setup.chars:
            raise ValueError(f"the prompt would have {len(prompt)} characters; {setup.chars} are possible")
        return Done(prompt)

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for limit, most in (
        (resource.RLIMIT_AS, size + setup.memory_bytes),
        (resource.RLIMIT_NOFILE, 3),  # there are three already
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    return work


def main() -> int:
    """Run the process; its exit code."""
    channel = Channel(parent_socket(), _decoder)
    try:
        setup, *jobs = channel.receive(wait=True)
        assert isinstance(setup, Setup)
        work = _ready(setup)
        while True:
            for job in jobs:
                signal.setitimer(signal.ITIMER_PROF, setup.cpu_s)  # SIGPROF ends the process, whatever it is doing
                try:
                    reply: FromSandbox = work(job)
                except MemoryError:
                    return ShortageError.exit_code
                except Exception as error:
                    reply = Declined(str(error)[:1000] or type(error).__name__)
                signal.setitimer(signal.ITIMER_PROF, 0)
                channel.send(reply)
            jobs = channel.receive(wait=True)
    except (EOFError, OSError):
        return 0


if __name__ == "__main__":
    os._exit(main())  # an interpreter that ends in order opens files
