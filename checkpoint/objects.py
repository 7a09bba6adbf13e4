"""Checkpoints in object stores, by fsspec: s3:// (s3fs) and gs:// (gcsfs).

Downloads are 8 ranges of 16 MiB at a time, uploads to S3 8 parts of that size, uploads to Google Cloud Storage 8 files
at a time. The libraries repeat what fails on the way. What has been uploaded is compared: by the SHA-256 of all parts
that S3 keeps of large objects, and by reading back where there is none.
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

from llmkit.checkpoint.errors import InputError, OutputError
from llmkit.checkpoint.hub import SIGNATURE
from llmkit.checkpoint.manifest import MANIFEST, mismatch
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.remote import Advance, damaged, hashed, missing

STREAMS = 8
PIECE_BYTES = 16 * 2**20
MAX_PARTS = 10_000  # of an object, says S3


@contextmanager
def open_objects(reference: str) -> Iterator[ObjectStore]:
    """See `open_store`."""
    import fsspec

    scheme = reference.partition(":")[0]
    try:
        files = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        raise missing({"s3": "s3fs", "gs": "gcsfs"}[scheme], scheme) from error
    with ThreadPoolExecutor(STREAMS, thread_name_prefix="transfer") as pool:
        yield (S3Store if scheme == "s3" else ObjectStore)(reference.rstrip("/"), files, pool)


class ObjectStore:
    """The objects right below a prefix. See `Store`."""

    def __init__(self, reference: str, files: Any, pool: ThreadPoolExecutor) -> None:
        self.reference = reference
        self._files, self._pool = files, pool

    def sizes(self) -> dict[str, int]:
        """See `Store.sizes`."""
        entries = self._files.ls(self.reference, detail=True)
        return {e["name"].rpartition("/")[2]: int(e["size"]) for e in entries if e["type"] == "file"}

    def small(self, name: str, size: int) -> bytes:
        """See `Store.small`."""
        return b"".join(self._pieces(name, 0, size))

    def fetch(self, name: str, size: int, path: Path, advance: Advance) -> str:
        """See `Store.fetch`."""
        digest, done = hashed(path, size)
        advance(done)
        with path.open("ab") as file:
            for data in self._pieces(name, done, size):
                digest.update(data)
                file.write(data)
                advance(len(data))
        return str(digest.hexdigest())

    def publish(
        self, folder: Path, files: Mapping[str, Mapping[str, Any]], manifest: bytes, force: bool, progress: Progress
    ) -> str:
        """See `Store.publish`. Files that are there already, from an interrupted run, are not sent again."""
        try:
            there = self.sizes()
        except FileNotFoundError:
            there = {}
        same = (
            MANIFEST in there and there[MANIFEST] == len(manifest) and self.small(MANIFEST, len(manifest)) == manifest
        )
        if MANIFEST in there and not same and not force:
            raise OutputError(f"{self.reference} holds another checkpoint", todo="Choose another place or pass --force")
        progress.start("compare", sum(files[name]["bytes"] for name in files if name in there), "bytes")
        wrong = []
        for name in files:
            if name not in there:
                wrong.append(name)
            elif there[name] != files[name]["bytes"] or not self._arrived(folder / name, name, files[name]["sha256"]):
                if not force and not same:
                    raise OutputError(
                        f"{self.reference}/{name} is another file than {folder / name}",
                        todo="Choose another place or pass --force",
                    )
                wrong.append(name)
            if name in there:
                progress.advance(files[name]["bytes"], name)
        if same and not wrong:
            return self.reference
        if MANIFEST in there:  # whoever reads from now on sees that it is not complete
            stale = {MANIFEST} | (self._named() | {SIGNATURE}) - files.keys() & there.keys()
            for name in stale:
                self._files.rm_file(self._at(name))
        progress.start("send", sum(files[name]["bytes"] for name in wrong), "bytes")
        self._send(folder, {name: files[name]["sha256"] for name in wrong}, progress.advance)
        self._files.pipe_file(self._at(MANIFEST), manifest)
        if self.small(MANIFEST, len(manifest)) != manifest:
            raise damaged(self.reference, MANIFEST)
        return self.reference

    def _send(self, folder: Path, names: Mapping[str, str], advance: Advance) -> None:
        """Upload files and compare what has arrived. names: their SHA-256."""

        def put(name: str) -> None:
            self._files.put_file(str(folder / name), self._at(name), chunksize=PIECE_BYTES)
            advance((folder / name).stat().st_size)

        list(self._pool.map(put, names))
        for name, digest in names.items():
            if not self._arrived(folder / name, name, digest):
                raise damaged(self.reference, name)

    def _arrived(self, path: Path, name: str, sha256: str) -> bool:
        """Whether the object is the file, whose SHA-256 is given: by reading it back."""
        digest = hashlib.sha256()
        for data in self._pieces(name, 0, path.stat().st_size):
            digest.update(data)
        return digest.hexdigest() == sha256

    def _named(self) -> set[str]:
        """The files of the checkpoint that is there; none if its manifest cannot be read."""
        try:
            return set(json.loads(self.small(MANIFEST, self.sizes()[MANIFEST]))["files"])
        except (ValueError, KeyError, TypeError):
            return set()

    def _at(self, name: str) -> str:
        return f"{self.reference}/{name}"

    def _pieces(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) of an object in order, STREAMS ranges of them in memory or on the way."""
        flying: deque[Future[bytes]] = deque()
        try:
            for first in range(start, stop, PIECE_BYTES):
                flying.append(self._pool.submit(self._range, name, first, min(first + PIECE_BYTES, stop)))
                if len(flying) == STREAMS:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for future in flying:
                future.cancel()

    def _range(self, name: str, start: int, stop: int) -> bytes:
        data: bytes = self._files.cat_file(self._at(name), start=start, end=stop)
        if len(data) != stop - start:
            raise InputError(f"{self._at(name)} ends at byte {start + len(data)}, but at least {stop} were expected")
        return data


class S3Store(ObjectStore):
    """S3, which takes parts of an object side by side, each with its SHA-256, and refuses a part that differs."""

    def _send(self, folder: Path, names: Mapping[str, str], advance: Advance) -> None:
        large = {name: digest for name, digest in names.items() if (folder / name).stat().st_size > PIECE_BYTES}
        super()._send(folder, {name: names[name] for name in names.keys() - large.keys()}, advance)
        for name, digest in large.items():
            self._send_parts(folder / name, name, digest, advance)

    def _send_parts(self, path: Path, name: str, sha256: str, advance: Advance) -> None:
        """Upload a large file by parts. Raises InputError, and leaves nothing, when it is no longer what it was."""
        upload = self._call("create_multipart_upload", name, ChecksumAlgorithm="SHA256")["UploadId"]
        whole, digests = hashlib.sha256(), list[bytes]()
        flying: deque[Future[Any]] = deque()
        parts: list[dict[str, Any]] = []

        def send(number: int, data: bytes, digest: str) -> dict[str, Any]:
            got = self._call("upload_part", name, UploadId=upload, PartNumber=number, Body=data, ChecksumSHA256=digest)
            advance(len(data))
            return {"PartNumber": number, "ETag": got["ETag"], "ChecksumSHA256": digest}

        try:
            for data in _parts(path):
                whole.update(data)
                digests.append(hashlib.sha256(data).digest())
                if len(flying) == STREAMS:
                    parts.append(flying.popleft().result())
                flying.append(self._pool.submit(send, len(digests), data, _base64(digests[-1])))
            parts += [future.result() for future in flying]
            if whole.hexdigest() != sha256:
                raise mismatch(f"{path} has SHA-256 {whole.hexdigest()}, {MANIFEST} says {sha256}")
            self._call("complete_multipart_upload", name, UploadId=upload, MultipartUpload={"Parts": parts})
        except BaseException:
            for future in flying:
                future.cancel()
            self._call("abort_multipart_upload", name, UploadId=upload)
            raise
        if not self._has(name, digests) and not super()._arrived(path, name, sha256):
            raise damaged(self.reference, name)

    def _arrived(self, path: Path, name: str, sha256: str) -> bool:
        if path.stat().st_size > PIECE_BYTES and self._has(
            name, [hashlib.sha256(data).digest() for data in _parts(path)]
        ):
            return True
        return super()._arrived(path, name, sha256)

    def _has(self, name: str, digests: list[bytes]) -> bool:
        """Whether S3 says that the object has parts of these digests; False too when it does not say."""
        said = self._call("head_object", name, ChecksumMode="ENABLED").get("ChecksumSHA256", "")
        return bool(said.partition("-")[0] == _base64(hashlib.sha256(b"".join(digests)).digest()))

    def _call(self, method: str, name: str, **arguments: Any) -> dict[str, Any]:
        bucket, key, _ = self._files.split_path(self._at(name))
        answer: dict[str, Any] = self._files.call_s3(method, Bucket=bucket, Key=key, **arguments)
        return answer


def _parts(path: Path) -> Iterator[bytes]:
    step = max(PIECE_BYTES, -(-path.stat().st_size // MAX_PARTS))
    with path.open("rb") as file:
        while data := file.read(step):
            yield data


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
