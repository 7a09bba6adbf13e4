"""The keys that a server accepts now: the key file is read again when it has changed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import overload

from llmkit.common.errors import InputError
from llmkit.runtime.server.http.api_keys import Client, load_api_keys
from llmkit.runtime.server.http.key_usage import UsageFile
from llmkit.runtime.server.serve_options import ServeOptions

CHECK_S = 1.0  # between two looks at the file

_Stamp = tuple[int, int, int] | None


class KeyRing(Sequence[Client]):
    """The clients of the key file, as it was when it was last read without an error.

    A key that is still there keeps what it has used of its limits and its running requests, also
    when its limits change. A key that is gone is refused at once; its running requests continue.
    """

    def __init__(self, options: ServeOptions, log: Callable[[str], None]) -> None:
        """Read the keys. Raises InputError for a wrong file."""
        self._options = options
        self._log = log
        self._usage_file: UsageFile | None = None
        if options.usage_file is not None:
            self._usage_file = UsageFile(Path(options.usage_file))
        self._stamp = self._file_stamp()
        self._clients: tuple[Client, ...] = ()
        self._gone: dict[bytes, Client] = {}  # removed, and not idle yet
        self._replace(load_api_keys(options))

    @overload
    def __getitem__(self, index: int) -> Client: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Client]: ...
    def __getitem__(self, index: int | slice) -> Client | Sequence[Client]:
        return self._clients[index]

    def __len__(self) -> int:
        return len(self._clients)

    def refresh(self, is_forced: bool = False) -> bool:
        """Read the file again if it has changed; return whether other keys count now.

        A wrong file is logged, and the keys from before stay. is_forced: read it anyway.
        """
        stamp = self._file_stamp()
        if stamp == self._stamp and not is_forced:
            return False
        self._stamp = stamp
        if self._options.api_key_file is None:
            return False
        try:
            clients = load_api_keys(self._options)
        except InputError as error:
            self._log(f"the API keys stay as they were: {error}")
            return False
        num_before = len(self._clients)
        added, removed = self._replace(clients)
        self._log(
            f"the API key file was read again: {added} keys added, {removed} removed, "
            f"{num_before + added - removed} now"
        )
        return True

    async def watch(self) -> None:
        """Read the file again when it has changed or with SIGHUP, until cancelled."""
        with self._reading_at_sighup():
            while True:
                await asyncio.sleep(CHECK_S)
                self.refresh()
                for client in self._clients:
                    client.charge()  # other processes see what long answers use

    def close(self) -> None:
        """Close the file of the limits."""
        if self._usage_file is not None:
            self._usage_file.close()

    @contextlib.contextmanager
    def _reading_at_sighup(self) -> Iterator[None]:
        if self._options.api_key_file is None:
            yield
            return
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.refresh, True)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGHUP)

    def _replace(self, clients: Sequence[Client]) -> tuple[int, int]:
        """Accept these keys only; return how many are new and how many are gone."""
        before = {client.digest: client for client in self._clients}
        known = self._gone | before
        kept = []
        for client in clients:
            old = known.get(client.digest)
            if old is None:
                if self._usage_file is not None and client.has_limits:
                    client.usage = self._usage_file.usage(client.digest)
                client.is_behind_router = self._options.behind_router
                kept.append(client)
                continue
            old.take_settings(client)
            if self._usage_file is not None and old.has_limits:
                old.usage = self._usage_file.usage(old.digest)
            kept.append(old)
        self._clients = tuple(kept)
        digests = {client.digest for client in kept}
        # A file can be written in two steps: a key that comes back has used what it had used.
        self._gone = {
            digest: client
            for digest, client in known.items()
            if digest not in digests and not client.is_idle
        }
        return len(digests - before.keys()), len(before.keys() - digests)

    def _file_stamp(self) -> _Stamp:
        """What differs once the file was changed or replaced; None: there is no file."""
        if self._options.api_key_file is None:
            return None
        try:
            info = Path(self._options.api_key_file).stat()
        except OSError:
            return None
        return info.st_mtime_ns, info.st_ino, info.st_size
