"""A server as a child process: `python -m llmkit.runtime.server.serve_process --fd N`.

Only `ServerProcess` starts it. It ends at once when its parent ends. SIGTERM stops it gracefully.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import traceback

import msgspec

from llmkit.common.errors import LlmkitError
from llmkit.runtime.process_channel import Channel, Failed, parent_socket
from llmkit.runtime.server.run_server import run_server
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server_process import ServerReady, StartServer, UserMessage


def main() -> int:
    """Run the process and return its exit code. A Failed message tells the parent of an error."""
    channel = Channel(parent_socket(with_thread=False), msgspec.msgpack.Decoder(StartServer))
    try:
        (start,) = channel.receive(wait=True)
    except EOFError:  # the parent has ended before it sent the options
        return 0
    options = ServeOptions.from_dict(start.options)
    try:
        listener = None
        if start.socket_path is not None:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(start.socket_path)
            listener.listen(socket.SOMAXCONN)
        return run_server(
            options,
            lambda text: channel.send(UserMessage(text)),
            lambda info: channel.send(ServerReady(dict(info))),
            listener=listener,
        )
    except Exception as error:
        if options.debug or not isinstance(error, LlmkitError):
            traceback.print_exc()
        failed = Failed.of(error)
        with contextlib.suppress(OSError):  # the parent has ended
            channel.send(failed)
        return failed.exit_code


if __name__ == "__main__":
    sys.exit(main())
