"""Checkpoints in object stores, through fsspec: s3:// (s3fs) and gs:// (gcsfs).

Downloads use 8 ranges of 16 MiB at a time, uploads to S3 8 parts of that size, uploads to Google
Cloud Storage 8 files at a time. The client libraries retry failed requests. Uploaded objects are
compared with the local files: by the SHA-256 of the parts where S3 stores it, otherwise by
downloading them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmkit.checkpoint.hub import SIGNATURE
from llmkit.checkpoint.manifest import MANIFEST, manifest_mismatch
from llmkit.checkpoint.registry.store_interface import (
    AdvanceProgress,
    Published,
    damaged_upload,
    hash_partial_file,
    missing_library,
)
from llmkit.common.errors import InputError, OutputError
from llmkit.common.progress import Progress

NUM_STREAMS = 8  # requests at the same time
PART_BYTES = 16 * 2**20
MAX_PARTS = 10_000  # of one object, a limit of S3


@contextmanager
def open_object_store(reference: str) -> Iterator[ObjectStore]:
    """See `open_store`."""
    import fsspec  # only needed for object stores

    scheme = reference.partition(":")[0]
    try:
        file_system = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        raise missing_library({"s3": "s3fs", "gs": "gcsfs"}[scheme], scheme) from error
    store_class = S3Store if scheme == "s3" else ObjectStore
    with ThreadPoolExecutor(NUM_STREAMS, thread_name_prefix="transfer") as pool:
        yield store_class(reference.rstrip("/"), file_system, pool)


class ObjectStore:
    """The objects directly below a prefix. See `Store`."""

    def __init__(self, reference: str, file_system: Any, pool: ThreadPoolExecutor) -> None:
        self.reference = reference
        self._file_system = file_system
        self._pool = pool

    def sizes(self) -> dict[str, int]:
        """See `ReadableStore.sizes`."""
        entries = self._file_system.ls(self.reference, detail=True)
        return {
            entry["name"].rpartition("/")[2]: int(entry["size"])
            for entry in entries
            if entry["type"] == "file"
        }

    def read_small_file(self, name: str, size: int) -> bytes:
        """See `ReadableStore.read_small_file`."""
        return b"".join(self._read_ranges(name, 0, size))

    def download(self, name: str, size: int, path: Path, advance: AdvanceProgress) -> str:
        """See `ReadableStore.download`."""
        digest, length = hash_partial_file(path, size)
        advance(length)
        with path.open("ab") as file:
            for data in self._read_ranges(name, length, size):
                digest.update(data)
                file.write(data)
                advance(len(data))
        return str(digest.hexdigest())

    def publish(
        self,
        folder: Path,
        files: Mapping[str, Mapping[str, Any]],
        manifest: bytes,
        force: bool,
        progress: Progress,
    ) -> Published:
        """See `WritableStore.publish`.

        Files that an interrupted run uploaded are not sent again.
        """
        try:
            existing = self.sizes()
        except FileNotFoundError:
            existing = {}
        is_same_checkpoint = (
            MANIFEST in existing
            and existing[MANIFEST] == len(manifest)
            and self.read_small_file(MANIFEST, len(manifest)) == manifest
        )
        if MANIFEST in existing and not is_same_checkpoint and not force:
            raise OutputError(
                f"{self.reference} holds another checkpoint",
                todo="Choose another place or pass --force",
            )
        progress.start(
            "compare", sum(files[name]["bytes"] for name in files if name in existing), "bytes"
        )
        to_send = []
        for name, entry in files.items():
            if name not in existing:
                to_send.append(name)
                continue
            is_same_file = existing[name] == entry["bytes"] and self._is_uploaded(
                folder / name, name, entry["sha256"]
            )
            if not is_same_file:
                if not force and not is_same_checkpoint:
                    raise OutputError(
                        f"{self.reference}/{name} is another file than {folder / name}",
                        todo="Choose another place or pass --force",
                    )
                to_send.append(name)
            progress.advance(entry["bytes"], name)
        if is_same_checkpoint and not to_send:
            return Published(self.reference, already_there=True)
        if MANIFEST in existing:
            # The manifest is removed first: readers then see that the checkpoint is incomplete.
            old_files = self._files_in_manifest() | {SIGNATURE}
            stale = {MANIFEST} | ((old_files - files.keys()) & existing.keys())
            for name in stale:
                self._file_system.rm_file(self._url(name))
        progress.start("send", sum(files[name]["bytes"] for name in to_send), "bytes")
        self._send(folder, {name: files[name]["sha256"] for name in to_send}, progress.advance)
        self._file_system.pipe_file(self._url(MANIFEST), manifest)
        if self.read_small_file(MANIFEST, len(manifest)) != manifest:
            raise damaged_upload(self.reference, MANIFEST)
        return Published(self.reference)

    def _send(self, folder: Path, digests: Mapping[str, str], advance: AdvanceProgress) -> None:
        """Upload files and compare the result. digests: the SHA-256 of each file by name."""

        def upload(name: str) -> None:
            self._file_system.put_file(str(folder / name), self._url(name), chunksize=PART_BYTES)
            advance((folder / name).stat().st_size)

        list(self._pool.map(upload, digests))
        for name, digest in digests.items():
            if not self._is_uploaded(folder / name, name, digest):
                raise damaged_upload(self.reference, name)

    def _is_uploaded(self, path: Path, name: str, sha256: str) -> bool:
        """Whether the object has this SHA-256, that of the file `path`. Downloads the object."""
        digest = hashlib.sha256()
        for data in self._read_ranges(name, 0, path.stat().st_size):
            digest.update(data)
        return digest.hexdigest() == sha256

    def _files_in_manifest(self) -> set[str]:
        """The files that the stored manifest names; none when it cannot be parsed."""
        try:
            text = self.read_small_file(MANIFEST, self.sizes()[MANIFEST])
            return set(json.loads(text)["files"])
        except (ValueError, KeyError, TypeError):
            return set()

    def _url(self, name: str) -> str:
        return f"{self.reference}/{name}"

    def _read_ranges(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) of an object in order. At most NUM_STREAMS ranges are in memory."""
        pending: deque[Future[bytes]] = deque()
        try:
            for first in range(start, stop, PART_BYTES):
                end = min(first + PART_BYTES, stop)
                pending.append(self._pool.submit(self._read_range, name, first, end))
                if len(pending) == NUM_STREAMS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _read_range(self, name: str, start: int, stop: int) -> bytes:
        data: bytes = self._file_system.cat_file(self._url(name), start=start, end=stop)
        if len(data) != stop - start:
            raise InputError(
                f"{self._url(name)} ends at byte {start + len(data)},"
                f" but at least {stop} were expected"
            )
        return data


class S3Store(ObjectStore):
    """S3 takes several parts of an object at the same time.

    Each part is sent with its SHA-256, and S3 refuses a part that differs.
    """

    def _send(self, folder: Path, digests: Mapping[str, str], advance: AdvanceProgress) -> None:
        large = {
            name: digest
            for name, digest in digests.items()
            if (folder / name).stat().st_size > PART_BYTES
        }
        small = {name: digests[name] for name in digests.keys() - large.keys()}
        super()._send(folder, small, advance)
        for name, digest in large.items():
            self._send_parts(folder / name, name, digest, advance)

    def _send_parts(self, path: Path, name: str, sha256: str, advance: AdvanceProgress) -> None:
        """Upload a large file by parts.

        Raises InputError, and removes the parts, when the file no longer has this SHA-256.
        """
        upload_id = self._call_s3("create_multipart_upload", name, ChecksumAlgorithm="SHA256")[
            "UploadId"
        ]
        file_digest = hashlib.sha256()
        part_digests: list[bytes] = []
        pending: deque[Future[Any]] = deque()
        parts: list[dict[str, Any]] = []

        def send(number: int, data: bytes, digest: str) -> dict[str, Any]:
            response = self._call_s3(
                "upload_part",
                name,
                UploadId=upload_id,
                PartNumber=number,
                Body=data,
                ChecksumSHA256=digest,
            )
            advance(len(data))
            return {"PartNumber": number, "ETag": response["ETag"], "ChecksumSHA256": digest}

        try:
            for data in _read_parts(path):
                file_digest.update(data)
                part_digests.append(hashlib.sha256(data).digest())
                if len(pending) == NUM_STREAMS:
                    parts.append(pending.popleft().result())
                number = len(part_digests)
                pending.append(self._pool.submit(send, number, data, _base64(part_digests[-1])))
            parts += [future.result() for future in pending]
            if file_digest.hexdigest() != sha256:
                raise manifest_mismatch(
                    f"{path} has SHA-256 {file_digest.hexdigest()}, {MANIFEST} says {sha256}"
                )
            self._call_s3(
                "complete_multipart_upload",
                name,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
            )
        except BaseException:
            for future in pending:
                future.cancel()
            self._call_s3("abort_multipart_upload", name, UploadId=upload_id)
            raise
        if not self._has_parts(name, part_digests) and not super()._is_uploaded(path, name, sha256):
            raise damaged_upload(self.reference, name)

    def _is_uploaded(self, path: Path, name: str, sha256: str) -> bool:
        if path.stat().st_size > PART_BYTES:
            part_digests = [hashlib.sha256(data).digest() for data in _read_parts(path)]
            if self._has_parts(name, part_digests):
                return True
        return super()._is_uploaded(path, name, sha256)

    def _has_parts(self, name: str, digests: list[bytes]) -> bool:
        """Whether S3 reports a checksum that matches these part digests. False without one."""
        checksum = self._call_s3("head_object", name, ChecksumMode="ENABLED").get(
            "ChecksumSHA256", ""
        )
        expected = _base64(hashlib.sha256(b"".join(digests)).digest())
        return bool(checksum.partition("-")[0] == expected)

    def _call_s3(self, method: str, name: str, **arguments: Any) -> dict[str, Any]:
        bucket, key, _ = self._file_system.split_path(self._url(name))
        response: dict[str, Any] = self._file_system.call_s3(
            method, Bucket=bucket, Key=key, **arguments
        )
        return response


def _read_parts(path: Path) -> Iterator[bytes]:
    part_bytes = max(PART_BYTES, -(-path.stat().st_size // MAX_PARTS))
    with path.open("rb") as file:
        while data := file.read(part_bytes):
            yield data


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
