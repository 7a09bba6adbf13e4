"""The responses that clients may ask for again, in memory or in a SQLite file.

Both are SQLite databases, used by one thread: memory is SQLite's own `:memory:`. An owner, the salt
of an API key, sees only its own responses. A response goes when it is older than the time to live,
or when the store is full: the one that was used least recently first.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from llmkit.common.errors import InputError

RUNNING = ("queued", "in_progress")
MAX_CHAIN = 2048  # responses that one response continues
_ROW_BYTES = 512  # estimated size of a row besides its JSON
_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    created REAL NOT NULL,
    used INTEGER NOT NULL,
    status TEXT NOT NULL,
    previous TEXT,
    size INTEGER NOT NULL,
    response BLOB NOT NULL,
    input BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS responses_used ON responses (used);
CREATE INDEX IF NOT EXISTS responses_created ON responses (created);
"""
_ID_HASH_CHARS = 8

Result = TypeVar("Result")


@dataclass(frozen=True)
class StoredResponse:
    """A response and the items of its own input."""

    owner: str
    response: dict[str, Any]  # the document that clients get
    input_items: list[dict[str, Any]]  # each has an id

    @property
    def id(self) -> str:
        """The response's id."""
        response_id: str = self.response["id"]
        return response_id

    @property
    def status(self) -> str:
        """The response's status."""
        status: str = self.response["status"]
        return status


class MissingResponseError(Exception):
    """A response, or one that it continues, is not stored or is not complete."""

    def __init__(self, response_id: str, reason: str) -> None:
        self.response_id = response_id
        super().__init__(reason)


def new_response_id(model_name: str) -> str:
    """Return a new id. It has a hash of the model's name, by which a router finds the server."""
    return f"resp_{model_hash(model_name)}{uuid.uuid4().hex}"


def model_hash(model_name: str) -> str:
    """Return what ids of a model's responses have behind `resp_`."""
    return hashlib.sha256(model_name.encode()).hexdigest()[:_ID_HASH_CHARS]


def model_hash_in(response_id: str) -> str:
    """Return the model's hash in an id."""
    return response_id.removeprefix("resp_")[:_ID_HASH_CHARS]


def store_path(folder: Path, model_name: str) -> Path:
    """Return the file of a model's responses in a folder that servers share."""
    return folder / f"responses-{hashlib.sha256(model_name.encode()).hexdigest()[:16]}.sqlite"


class ResponseStore:
    """Keeps responses up to `max_bytes` in total, each for `ttl_s` seconds."""

    def __init__(self, path: Path | None, max_bytes: int, ttl_s: float) -> None:
        """Open the store at `path`; None: in memory. Responses that ran at a crash become failed.

        Raises InputError when the file is no such store or when another server uses it.
        """
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._last_usage = (0, 0)
        self._clock = 0  # counts uses, so that their order is exact
        # One thread: every read sees the writes before it, and the event loop never waits.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="response-store")
        try:
            self._database = self._thread.submit(self._open, path).result()
        except (sqlite3.Error, OSError) as error:
            self._thread.shutdown()
            raise InputError(
                f"the store of responses cannot be opened ({path}: {error})",
                "A file that llmkit serve wrote, used by one server at a time, was expected",
                "Stop the other server, or give another folder with --response-store",
            ) from None

    def put(self, stored: StoredResponse) -> None:
        """Store a response, or replace it, unless it is larger than the whole store.

        Reads that begin later see it.
        """
        future = self._thread.submit(self._put, stored)
        future.add_done_callback(_log_failure)

    async def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """Return a response of `owner`."""
        return await self._run(lambda: self._get(owner, response_id))

    async def delete(self, owner: str, response_id: str) -> bool:
        """Delete a response of `owner`. Returns whether there was one."""
        return await self._run(lambda: self._delete(owner, response_id))

    async def history(self, owner: str, response_id: str) -> list[dict[str, Any]]:
        """Return the items of a conversation, up to and with the output of a response.

        Raises MissingResponseError.
        """
        return await self._run(lambda: self._history(owner, response_id))

    @property
    def usage(self) -> tuple[int, int]:
        """The number of stored responses and their bytes, after the last change."""
        return self._last_usage

    def close(self) -> None:
        """Write what is left and close the file."""
        self._thread.submit(self._database.close).result()
        self._thread.shutdown()

    async def _run(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    # In the thread

    def _open(self, path: Path | None) -> sqlite3.Connection:
        if path is not None:
            # SQLite gives the mode of this file to those that it puts beside it.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600))
        database = sqlite3.connect(path or ":memory:", timeout=1, isolation_level=None)
        try:
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.executescript(_SCHEMA)
            (last,) = database.execute("SELECT COALESCE(MAX(used), 0) FROM responses").fetchone()
            self._clock = last
            self._fail_interrupted(database)
            self._last_usage = _usage(database)
        except BaseException:
            database.close()
            raise
        return database

    def _fail_interrupted(self, database: sqlite3.Connection) -> None:
        """Mark the background responses that a crash has ended."""
        rows = database.execute(
            "SELECT id, response FROM responses WHERE status IN (?, ?)", RUNNING
        ).fetchall()
        for response_id, data in rows:
            response = msgspec.json.decode(data)
            response["status"] = "failed"
            response["error"] = {
                "code": "server_error",
                "message": "The server ended while it computed the response.",
            }
            database.execute(
                "UPDATE responses SET status = 'failed', response = ? WHERE id = ?",
                (msgspec.json.encode(response), response_id),
            )

    def _put(self, stored: StoredResponse) -> None:
        response = msgspec.json.encode(stored.response)
        items = msgspec.json.encode(stored.input_items)
        size = len(response) + len(items) + _ROW_BYTES
        if size > self._max_bytes:  # it would drop all others, and then itself
            self._delete(stored.owner, stored.id)
            return
        with self._database:
            self._database.execute(
                "INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    stored.id,
                    stored.owner,
                    time.time(),
                    self._next_use(),
                    stored.status,
                    stored.response["previous_response_id"],
                    size,
                    response,
                    items,
                ),
            )
        self._evict()

    def _evict(self) -> None:
        """Delete what has expired, then the least recently used until the size fits."""
        self._database.execute(
            "DELETE FROM responses WHERE created < ?", (time.time() - self._ttl_s,)
        )
        _, size = _usage(self._database)
        excess = size - self._max_bytes
        while excess > 0:
            response_id, size = self._database.execute(
                "SELECT id, size FROM responses ORDER BY used LIMIT 1"
            ).fetchone()
            self._database.execute("DELETE FROM responses WHERE id = ?", (response_id,))
            excess -= size
        self._last_usage = _usage(self._database)

    def _get(self, owner: str, response_id: str) -> StoredResponse | None:
        row = self._database.execute(
            "SELECT response, input FROM responses WHERE id = ? AND owner = ? AND created >= ?",
            (response_id, owner, time.time() - self._ttl_s),
        ).fetchone()
        if row is None:
            return None
        self._database.execute(
            "UPDATE responses SET used = ? WHERE id = ?", (self._next_use(), response_id)
        )
        response, items = map(msgspec.json.decode, row)
        return StoredResponse(owner, response, items)

    def _delete(self, owner: str, response_id: str) -> bool:
        cursor = self._database.execute(
            "DELETE FROM responses WHERE id = ? AND owner = ?", (response_id, owner)
        )
        self._last_usage = _usage(self._database)
        return cursor.rowcount > 0

    def _history(self, owner: str, response_id: str) -> list[dict[str, Any]]:
        turns: list[list[dict[str, Any]]] = []  # the newest first
        current: str | None = response_id
        while current is not None:
            stored = self._get(owner, current) if len(turns) < MAX_CHAIN else None
            if stored is None:
                raise MissingResponseError(current, "is not stored")
            if stored.status not in ("completed", "incomplete"):
                raise MissingResponseError(current, f"is {stored.status}")
            turns.append([*stored.input_items, *stored.response["output"]])
            current = stored.response["previous_response_id"]
        return [item for turn in reversed(turns) for item in turn]

    def _next_use(self) -> int:
        self._clock += 1
        return self._clock


def _usage(database: sqlite3.Connection) -> tuple[int, int]:
    """The number of responses and their bytes."""
    count, size = database.execute(
        "SELECT COUNT(*), COALESCE(SUM(size), 0) FROM responses"
    ).fetchone()
    return count, size


def _log_failure(future: Future[None]) -> None:
    error = future.exception()
    if error is not None:
        sys.stderr.write(f"llmkit serve: a response could not be stored: {error}\n")
        sys.stderr.flush()
