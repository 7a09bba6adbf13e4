"""`llmkit batch`: a file of requests in OpenAI's batch format in, a file of results out."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from llmkit.cli.error_report import Stopped
from llmkit.cli.output import Output, seconds_text
from llmkit.cli.servers import own_server, own_server_options, running_server
from llmkit.common.errors import InputError, UsageError
from llmkit.common.option_values import within
from llmkit.common.options import Argument, Option

if TYPE_CHECKING:
    from rich.console import Console

    from llmkit.runtime.batch_lines import Tally
    from llmkit.runtime.server_client import Server


_MAX_FIELDS_SHOWN = 10  # that were ignored; --json has them all


@dataclass(frozen=True, kw_only=True)
class BatchArguments:
    """What `llmkit batch` takes."""

    file: Annotated[
        str,
        Argument(
            "Requests, one JSON object a line, in OpenAI's batch format; - is stdin.",
            metavar="FILE",
        ),
    ]
    serve_words: Annotated[
        tuple[str, ...],
        Argument(
            "After --: options of `llmkit serve` for the server that is started.",
            metavar="-- OPTIONS",
        ),
    ] = ()
    output: Annotated[
        str,
        Option(
            "File for the results, which must not exist; - is stdout.",
            flags=("--output", "-o"),
            metavar="FILE",
        ),
    ]
    model: Annotated[
        str | None,
        Option(
            "A checkpoint to serve for this; with --url the name of the model for requests that "
            "name none.",
            metavar="MODEL",
            unset="with --url its first",
            is_model=True,
        ),
    ] = None
    url: Annotated[
        str | None,
        Option(
            "A running server to use instead of starting one; its key is LLMKIT_API_KEY.",
            metavar="URL",
            unset="none",
        ),
    ] = None
    concurrency: Annotated[
        int,
        Option("Maximum requests in flight.", metavar="N", check=within(1, 100_000)),
    ] = 512


def batch(output: Output, arguments: BatchArguments) -> None:
    """Answer a file of requests, in order, with the same server as `llmkit serve`.

    A wrong line gets an error as its result. A stopped run continues when it is
    run again.
    """
    from llmkit.runtime.run_batch import STREAM, Batch, run_batch

    if arguments.model is None and arguments.url is None:
        raise UsageError(
            "neither --model nor --url is given", "A checkpoint or a server was expected"
        )
    if arguments.url is not None and arguments.serve_words:
        raise UsageError(
            "options of `llmkit serve` are given with --url",
            "They configure the server that this command starts without --url",
        )
    if arguments.output == STREAM and output.as_json:
        raise UsageError("-o - and --json both want stdout", todo="Write the results to a file")
    started_at = time.perf_counter()
    if arguments.url is not None:
        name, server = running_server(arguments.url, arguments.model)

        def start_server() -> Server:
            return server

    else:
        assert arguments.model is not None
        name, options = own_server_options(arguments.model, arguments.serve_words)
        # --concurrency already limits the waiting requests.
        options = replace(
            options,
            max_waiting=options.max_waiting + arguments.concurrency,
            max_waiting_tokens=0,
        )

        def start_server() -> Server:
            return own_server(options, output.message)

    # A run continues only with the same model and options.
    identity = {
        "model": arguments.model,
        "url": arguments.url,
        "options": list(arguments.serve_words),
    }
    tally, stopped = run_batch(
        Batch(arguments.file, arguments.output, name, arguments.concurrency, identity),
        start_server,
        output.progress(),
    )
    if stopped:
        raise Stopped(128 + stopped)
    document = _document(tally, arguments, name, time.perf_counter() - started_at)
    if arguments.output == STREAM:
        if not output.quiet:
            _show(output.notes, document)
    else:
        output.result(document, lambda console: _show(console, document))
    if not tally.succeeded:
        codes = ", ".join(f"{count} {code}" for code, count in tally.errors.most_common(5))
        raise InputError(
            f"none of the {tally.requests} requests of {arguments.file} succeeded ({codes})"
        )


def _document(
    tally: Tally, arguments: BatchArguments, model: str, seconds: float
) -> dict[str, Any]:
    return {
        "input": arguments.file,
        "output": arguments.output,
        "model": model,
        "requests": tally.requests,
        "resumed": tally.resumed,
        "succeeded": tally.succeeded,
        "failed": tally.failed,
        "errors": dict(tally.errors.most_common()),
        "ignored_fields": dict(tally.ignored_fields.most_common()),
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
    ignored = list(document["ignored_fields"].items())  # the most frequent first
    rows |= {f"ignored: {name}": f"{count:,}" for name, count in ignored[:_MAX_FIELDS_SHOWN]}
    if document["resumed"]:
        rows["of an earlier run"] = f"{document['resumed']:,}"
    rows |= {
        f"{kind} tokens": f"{document[f'{kind}_tokens']:,}" for kind in ("prompt", "completion")
    }
    for name, value in (rows | {"time": seconds_text(document["seconds"])}).items():
        table.add_row(name, value)
    console.print(table)
