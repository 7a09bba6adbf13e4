"""A sandbox process: `python -m llmkit.runtime.server.sandbox_process --fd N`.

The API process starts it for jobs that may use any amount of time or memory: it renders chat
templates, which are programs inside a checkpoint, and compiles clients' grammars. It runs one job
at a time. A job that exceeds a limit ends this process and not the server. The process cannot open
or write files, and ends when its socket closes.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from llmkit.common.errors import ShortageError
from llmkit.runtime.process_channel import Channel, parent_socket


class SandboxSetup(msgspec.Struct, tag=True):
    """The first message: the limits, and the model whose grammars are compiled."""

    cpu_s: float  # processor time of a job
    memory_bytes: int  # beyond what the process uses before its first job
    max_prompt_chars: int
    model: str = ""  # empty: the sandbox renders templates
    vocab_size: int = 0  # rows of the model's output projection


class RenderTemplate(msgspec.Struct, tag=True):
    """A job: render `template` with `variables` to a prompt."""

    template: str
    variables: dict[str, Any]


class CheckTemplate(msgspec.Struct, tag=True):
    """A job: check that `template` compiles."""

    template: str


class CompileGrammar(msgspec.Struct, tag=True):
    """A job: check that `grammar` compiles."""

    grammar: str


class JobDone(msgspec.Struct, tag=True):
    """The job is done. `text` is the prompt, or empty."""

    text: str = ""


class JobFailed(msgspec.Struct, tag=True):
    """The job cannot be done. `message` comes from the template or from llguidance."""

    message: str


SandboxMessage = SandboxSetup | RenderTemplate | CheckTemplate | CompileGrammar
SandboxReply = JobDone | JobFailed

_job_decoder = msgspec.msgpack.Decoder(SandboxMessage)
reply_decoder = msgspec.msgpack.Decoder(SandboxReply)


def _prepare(setup: SandboxSetup) -> Callable[[SandboxMessage], JobDone]:
    """Import what the jobs need, then limit the process.

    Returns the function that does a job. It raises any exception for a job that cannot be done.
    """
    # Each kind of sandbox imports its own heavy dependencies only.
    if setup.model:
        from llmkit.checkpoint.open_model_files import open_model_files
        from llmkit.checkpoint.tokenizer import load_tokenizer
        from llmkit.runtime.grammar_compiler import compile_grammar, grammar_tokenizer

        text = load_tokenizer(open_model_files(setup.model))
        tokenizer = grammar_tokenizer(text.to_json(), setup.vocab_size, text.eos_token_ids)
    else:
        # Jinja imports these two when a template fails; by then this process cannot open files.
        import pprint  # noqa: F401

        import jinja2.debug  # noqa: F401

        from llmkit.common.chat_template import check_chat_template, render_chat_template

        # This makes Python read the files of the codec and of the time zone before the limits.
        render_chat_template(r"{{ '\n' ~ strftime_now('%Y') }}", [])

    def do_job(job: SandboxMessage) -> JobDone:
        if isinstance(job, CompileGrammar):
            compile_grammar(tokenizer, job.grammar).compute_bitmask()
            return JobDone()
        if isinstance(job, CheckTemplate):
            check_chat_template(job.template)
            return JobDone()
        assert isinstance(job, RenderTemplate)
        prompt = render_chat_template(job.template, **job.variables)
        if len(prompt) > setup.max_prompt_chars:
            raise ValueError(
                f"the prompt would have {len(prompt)} characters; "
                f"{setup.max_prompt_chars} are possible"
            )
        return JobDone(prompt)

    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    used_bytes = num_pages * resource.getpagesize()
    for limit, value in (
        (resource.RLIMIT_AS, used_bytes + setup.memory_bytes),
        (resource.RLIMIT_NOFILE, 3),  # the standard streams use them already
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    return do_job


def main() -> int:
    """Run the process and return its exit code."""
    channel = Channel(parent_socket(), _job_decoder)
    try:
        setup, *jobs = channel.receive(wait=True)
        assert isinstance(setup, SandboxSetup)
        do_job = _prepare(setup)
        while True:
            for job in jobs:
                # SIGPROF ends the process, even inside a library.
                signal.setitimer(signal.ITIMER_PROF, setup.cpu_s)
                try:
                    reply: SandboxReply = do_job(job)
                except MemoryError:
                    return ShortageError.exit_code
                except Exception as error:
                    reply = JobFailed(str(error)[:1000] or type(error).__name__)
                signal.setitimer(signal.ITIMER_PROF, 0)
                channel.send(reply)
            jobs = channel.receive(wait=True)
    except (EOFError, OSError):
        return 0


if __name__ == "__main__":
    os._exit(main())  # a normal exit of the interpreter opens files
