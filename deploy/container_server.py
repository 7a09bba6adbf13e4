"""A server in a container that a platform starts and ends, such as Modal's and RunPod's."""

from __future__ import annotations

import atexit
import os

from llmkit.common.errors import LlmkitError
from llmkit.deploy.local_request import log_line
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server_process import ServerProcess


class ContainerServer:
    """A server process that starts with this object and ends with this process.

    tcp: listen on the host and port of the options; False: on a Unix socket. key: the only API key
    that it accepts; None: LLMKIT_API_KEY, without which it refuses to listen to other machines.
    """

    def __init__(self, options: ServeOptions, key: str | None = None, tcp: bool = True) -> None:
        self._process = ServerProcess(options, key=key, message=log_line, tcp=tcp)
        self._drain_s = options.drain_timeout
        self._stopping = False
        self.model = ""  # the model's name in the API, known once the server is ready
        atexit.register(self.stop)

    def wait_ready(self) -> None:
        """Wait until the server accepts requests. Raises the LlmkitError of a failed start.

        From then on, the end of the server ends this process too: in a container without a server
        all requests would fail, and the platform starts another one.
        """
        self.model = str(self._process.ready.result()["model"])
        self._process.ended.add_done_callback(lambda ended: self._exit(ended.result()))

    def stop(self) -> None:
        """End the server. Running requests finish first, within --drain-timeout."""
        self._stopping = True
        self._process.stop(self._drain_s)

    def _exit(self, reason: LlmkitError) -> None:
        if not self._stopping:
            log_line(f"{reason} The container ends.")
            os._exit(1)
