"""`llmkit serve` in a container whose platform forwards a port to it, as Modal does."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus

from llmkit.common.errors import ShortageError

_POLL_S = 0.2


class ServeCommand:
    """The process of `llmkit serve WORDS`. It starts with this object.

    words: MODEL and options; they win. port: of all addresses of the container, so that the server
    needs a key, LLMKIT_API_KEY.
    """

    def __init__(self, words: Sequence[str], port: int) -> None:
        self._ready_url = f"http://127.0.0.1:{port}/ready"
        address = ["--host", "0.0.0.0", "--port", str(port)]  # noqa: S104 the server needs a key
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "llmkit", "serve", *address, *words]
        )

    def wait_ready(self) -> None:
        """Wait until the server accepts requests. Raises ShortageError when it ends before."""
        while not self._is_ready():
            code = self._process.poll()
            if code is not None:
                raise ShortageError(
                    f"llmkit serve ended with exit code {code} before it was ready",
                    todo="Its error is above",
                )
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End the server; running requests finish first, within --drain-timeout."""
        self._process.terminate()
        self._process.wait()

    def _is_ready(self) -> bool:
        with (
            suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(self._ready_url, timeout=5) as response,  # noqa: S310
        ):
            return bool(response.status == HTTPStatus.OK)
        return False
