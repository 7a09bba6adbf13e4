"""`llmkit batch`: a file of requests in OpenAI's batch format in, a file of answers out."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.checkpoint.errors import InputError, UsageError
from llmkit.cli.errors import Stopped
from llmkit.cli.output import Output, seconds_text
from llmkit.cli.serve import serve_options
from llmkit.cli.sizes import in_range

if TYPE_CHECKING:
    from rich.console import Console

    from llmkit.runtime.batch import Server
    from llmkit.runtime.batch_lines import Tally


def batch(
    output: Output,
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="Requests, one JSON object a line, in OpenAI's batch format; - is stdin."),
    ],
    out: Annotated[
        str,
        typer.Option("--output", "-o", metavar="FILE", help="Where results go, which must not exist; - is stdout."),
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- OPTIONS", help="After --: options of `llmkit serve` for a server of our own."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A checkpoint to serve for this; with --url the name of the model for requests that name none.",
            show_default="with --url its first",
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="A server that runs, in place of one of our own; its key is LLMKIT_API_KEY.",
            show_default="none",
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(metavar="N", help="Most requests under way at a time.")] = 512,
) -> None:  # fmt: skip
    """Answer a file of requests, in its order, with the very server that `llmkit serve` is.

    A line that is wrong is a result that says so. A run that was stopped goes on where it was when it is run again.
    """
    from llmkit.runtime.batch import STREAM, Batch, Server, run_batch
    from llmkit.runtime.child import Child

    in_range("--concurrency", concurrency, 1, 100_000)
    if (model is None) == (url is None) and model is None:
        raise UsageError("neither --model nor --url is given", "A checkpoint or a server was expected")
    if url is not None and options:
        raise UsageError("options of `llmkit serve` are given with --url", "They are for a server of our own")
    if out == STREAM and output.as_json:
        raise UsageError("-o - and --json both want stdout", todo="Write the results to a file")
    began = time.perf_counter()
    if url is not None:
        from llmkit.bench.load import find_server
        from llmkit.bench.targets import is_url
        from llmkit.runtime.channel import API_KEY_VARIABLE

        if not is_url(url):
            raise UsageError(f"--url {url} is no address", "Addresses begin with http:// or https://")
        found = find_server(url, model)
        name, server = found.model, Server(found.url, os.environ.get(API_KEY_VARIABLE, ""))

        def serve() -> Server:
            return server
    else:
        from llmkit.runtime.server.options import default_name

        assert model is not None
        name = default_name(model)
        # What waits there is bounded by --concurrency already, and a crash need not be the end of a long run.
        options_ = serve_options(model, name, options or [], None)
        served = replace(options_, max_waiting=options_.max_waiting + concurrency, max_waiting_tokens=0, restart=3)

        def serve() -> Server:
            return Server(child=Child(served, secrets.token_urlsafe(32), output.message))

    identity = {"model": model, "url": url, "options": options or []}
    tally, stopped = run_batch(Batch(file, out, name, concurrency, identity), serve, output.progress())
    if stopped:
        raise Stopped(128 + stopped)
    document = _document(tally, file, out, name, time.perf_counter() - began)
    if out == STREAM:
        if not output.quiet:
            _show(output.notes, document)
    else:
        output.result(document, lambda console: _show(console, document))
    if not tally.succeeded:
        codes = ", ".join(f"{count} {code}" for code, count in tally.errors.most_common(5))
        raise InputError(f"none of the {tally.requests} requests of {file} succeeded ({codes})")


def _document(tally: Tally, file: str, out: str, model: str, seconds: float) -> dict[str, Any]:
    return {
        "input": file,
        "output": out,
        "model": model,
        "requests": tally.requests,
        "resumed": tally.resumed,
        "succeeded": tally.succeeded,
        "failed": tally.failed,
        "errors": dict(tally.errors.most_common()),
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
        "seconds": round(seconds, 3),
    }


def _show(console: Console, document: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("batch", "", title=document["output"], title_justify="left")
    table.columns[1].justify = "right"
    rows = {name: f"{document[name]:,}" for name in ("requests", "succeeded", "failed")}
    rows |= {f"  {code}": f"{count:,}" for code, count in document["errors"].items()}
    if document["resumed"]:
        rows["of an earlier run"] = f"{document['resumed']:,}"
    rows |= {f"{kind} tokens": f"{document[f'{kind}_tokens']:,}" for kind in ("prompt", "completion")}
    for name, value in (rows | {"time": seconds_text(document["seconds"])}).items():
        table.add_row(name, value)
    console.print(table)
