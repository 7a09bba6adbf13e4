"""What a key has used of its limits: in one process, or in all processes of one server.

Behind one port there can be several API processes: a router, and the server of each model. They
count in one file, which the router creates and all of them map. The file holds, for each key with
limits, its token bucket, and for each process the answers that run there. A file lock is held for
the few microseconds of a check and a change. The counts of a process that has ended do not count.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

MAX_PROCESSES = 64
MAX_KEYS = 4096  # with limits; later ones are counted in each process alone
_HEADER = struct.Struct(f"<q{MAX_PROCESSES}i")  # the number of keys, and the process of each slot
_PID = struct.Struct("<i")
_PIDS_AT = 8
_DIGEST_BYTES = 32
_BUCKET = struct.Struct("<dd")  # charged tokens, and when they were counted (monotonic seconds)
_RUNNING = struct.Struct("<i")  # running answers of a process
_ENTRY_BYTES = _DIGEST_BYTES + _BUCKET.size + MAX_PROCESSES * _RUNNING.size
_FILE_BYTES = _HEADER.size + MAX_KEYS * _ENTRY_BYTES


class KeyUsage:
    """A token bucket: the tokens used, minus those that were refilled. Of this process only."""

    def __init__(self) -> None:
        self._charged_tokens = 0.0
        self._charge_time = 0.0

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """No other process changes the counts inside the `with` block."""
        yield

    def charge(self, num_tokens: int, tokens_per_minute: int) -> float:
        """Add used tokens, subtract those refilled since the last call, and return the rest."""
        now = time.monotonic()
        self._charged_tokens, self._charge_time = _refilled(
            self._charged_tokens + num_tokens, self._charge_time, now, tokens_per_minute
        )
        return self._charged_tokens

    def set_running(self, num_answers: int) -> None:
        """Say how many answers of the key run in this process."""

    def running_elsewhere(self) -> int:
        """How many answers of the key run in other processes of the server."""
        return 0


class UsageFile:
    """The counts of all keys, in a file that the processes of one server share."""

    def __init__(self, path: Path) -> None:
        """Open the file, or create it, readable by this user only."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, _FILE_BYTES)
        self._map = mmap.mmap(self._file, _FILE_BYTES)
        self._index_of_digest: dict[bytes, int] = {}
        with self.locked():
            self._slot = self._claim_slot()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """No other process reads or writes the file inside the `with` block."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def usage(self, digest: bytes) -> KeyUsage:
        """The counts of the key with this SHA-256."""
        with self.locked():
            index = self._index(digest)
        return KeyUsage() if index is None or self._slot is None else _SharedUsage(self, index)

    def charge(self, index: int, num_tokens: int, tokens_per_minute: int) -> float:
        """See `KeyUsage.charge`."""
        at = _HEADER.size + index * _ENTRY_BYTES + _DIGEST_BYTES
        tokens, charge_time = _BUCKET.unpack_from(self._map, at)
        now = time.monotonic()  # one clock for all processes of a machine
        bucket = _refilled(tokens + num_tokens, charge_time, now, tokens_per_minute)
        _BUCKET.pack_into(self._map, at, *bucket)
        return bucket[0]

    def set_running(self, index: int, num_answers: int) -> None:
        """See `KeyUsage.set_running`."""
        assert self._slot is not None
        _RUNNING.pack_into(self._map, self._running_at(index, self._slot), num_answers)

    def running_elsewhere(self, index: int) -> int:
        """See `KeyUsage.running_elsewhere`."""
        total = 0
        for slot, pid in enumerate(self._pids()):
            if slot == self._slot or not pid:
                continue
            (count,) = _RUNNING.unpack_from(self._map, self._running_at(index, slot))
            if count and _is_alive(pid):
                total += count
        return total

    def close(self) -> None:
        """Close the file; its counts of this process are zero."""
        if self._slot is not None:
            with self.locked():
                self._clear_slot(self._slot, pid=0)
        self._map.close()
        os.close(self._file)

    def _claim_slot(self) -> int | None:
        """A slot for this process; None when all belong to running ones."""
        for slot, pid in enumerate(self._pids()):
            if not pid or not _is_alive(pid):
                self._clear_slot(slot, os.getpid())
                return slot
        return None

    def _clear_slot(self, slot: int, pid: int) -> None:
        for index in range(self._num_keys()):
            _RUNNING.pack_into(self._map, self._running_at(index, slot), 0)
        _PID.pack_into(self._map, _PIDS_AT + slot * _PID.size, pid)

    def _pids(self) -> tuple[int, ...]:
        return _HEADER.unpack_from(self._map)[1:]

    def _num_keys(self) -> int:
        return int(_HEADER.unpack_from(self._map)[0])

    def _index(self, digest: bytes) -> int | None:
        num_keys = self._num_keys()
        for index in range(len(self._index_of_digest), num_keys):  # keys that others have added
            at = _HEADER.size + index * _ENTRY_BYTES
            self._index_of_digest[self._map[at : at + _DIGEST_BYTES]] = index
        if digest in self._index_of_digest:
            return self._index_of_digest[digest]
        if num_keys == MAX_KEYS:
            return None
        at = _HEADER.size + num_keys * _ENTRY_BYTES
        self._map[at : at + _DIGEST_BYTES] = digest
        struct.pack_into("<q", self._map, 0, num_keys + 1)
        self._index_of_digest[digest] = num_keys
        return num_keys

    @staticmethod
    def _running_at(index: int, slot: int) -> int:
        entry = _HEADER.size + index * _ENTRY_BYTES
        return entry + _DIGEST_BYTES + _BUCKET.size + slot * _RUNNING.size


class _SharedUsage(KeyUsage):
    """The counts of one key in a `UsageFile`."""

    def __init__(self, file: UsageFile, index: int) -> None:
        super().__init__()
        self._file = file
        self._index = index

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with self._file.locked():
            yield

    def charge(self, num_tokens: int, tokens_per_minute: int) -> float:
        return self._file.charge(self._index, num_tokens, tokens_per_minute)

    def set_running(self, num_answers: int) -> None:
        self._file.set_running(self._index, num_answers)

    def running_elsewhere(self) -> int:
        return self._file.running_elsewhere(self._index)


def _refilled(
    tokens: float, charge_time: float, now: float, tokens_per_minute: int
) -> tuple[float, float]:
    """The bucket at the time `now`."""
    given_back = (now - charge_time) * tokens_per_minute / 60
    return max(0.0, tokens - given_back), now


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's: the number was given away again
        return False
    return True
