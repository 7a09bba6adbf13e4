"""A server as a child process: `python -m llmkit.runtime.server.serve_process --fd N`, started by `Child` only.

It ends with its parent, at once; SIGTERM stops it gracefully, as any server of ours.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import traceback

import msgspec

from llmkit.checkpoint.errors import LlmkitError
from llmkit.runtime.channel import Channel, Failed, parent_socket
from llmkit.runtime.child import Said, Serve, Up
from llmkit.runtime.server.options import ServeOptions
from llmkit.runtime.server.serve import run_server


def main() -> int:
    """Run the process. The parent learns of a failure from the Failed message; the exit code says it again."""
    channel = Channel(parent_socket(with_thread=False), msgspec.msgpack.Decoder(Serve))
    try:
        (start,) = channel.receive(wait=True)
    except EOFError:  # the parent ended before it said what to serve
        return 0
    options = ServeOptions.of_document(start.options)
    try:
        listener = None
        if start.unix is not None:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(start.unix)
            listener.listen(socket.SOMAXCONN)
        return run_server(
            options,
            lambda text: channel.send(Said(text)),
            lambda facts: channel.send(Up(dict(facts))),
            listener=listener,
        )
    except Exception as error:
        if options.debug or not isinstance(error, LlmkitError):
            traceback.print_exc()
        failed = Failed.of(error)
        with contextlib.suppress(OSError):  # the parent has gone
            channel.send(failed)
        return failed.exit_code


if __name__ == "__main__":
    sys.exit(main())
