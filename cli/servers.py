"""The server of a command that sends requests: one that runs already, or one that it starts."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llmkit.cli.serve import serve_options
from llmkit.common.errors import UsageError

if TYPE_CHECKING:
    from llmkit.runtime.server.serve_options import ServeOptions
    from llmkit.runtime.server_client import Server

# Restarts of a dead engine within an hour, so that one crash does not end a long run.
MAX_RESTARTS = 3


def running_server(url: str, model: str | None, key: str | None = None) -> tuple[str, Server]:
    """The model's name on a running server, and the server.

    model: None is the first that it lists. key: None is that of the environment.
    """
    from llmkit.bench.backends import is_url
    from llmkit.bench.load_client import query_server
    from llmkit.runtime.process_channel import API_KEY_VARIABLE
    from llmkit.runtime.server_client import Server

    if not is_url(url):
        raise UsageError(f"--url {url} is not a URL", "Addresses begin with http:// or https://")
    found = query_server(url, model, key)
    return found.model, Server(found.url, key or os.environ.get(API_KEY_VARIABLE, ""))


def own_server_options(model: str, words: Sequence[str]) -> tuple[str, ServeOptions]:
    """The model's name, and the options of its server. words: options of `llmkit serve`."""
    from llmkit.runtime.server.serve_options import default_name

    name = default_name(model)
    options = serve_options(model, name, list(words), None)
    return name, replace(options, restart=MAX_RESTARTS)


def own_server(options: ServeOptions, message: Callable[[str], None]) -> Server:
    """Start a server on a Unix socket, with a key that only this command has."""
    from llmkit.runtime.server_client import Server
    from llmkit.runtime.server_process import ServerProcess

    return Server(process=ServerProcess(options, secrets.token_urlsafe(32), message))
