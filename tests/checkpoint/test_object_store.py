"""Object stores without a server: which ranges are read, what is sent again, what is refused.

Real servers: checkpoint/test_registries_servers.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from llmkit.checkpoint.registry import object_store as objects
from llmkit.checkpoint.registry.object_store import ObjectStore, S3Store, open_object_store
from llmkit.checkpoint.registry.store_interface import Published
from llmkit.common.errors import InputError, OutputError, ShortageError
from llmkit.common.progress import SilentProgress

URL = "memory://models/there"
PART = 16
STREAMS = 3
LIMITS = (objects.PART_BYTES, objects.MAX_PARTS)
CONTENTS = {"config.json": b"{}", "exact.json": bytes(range(PART)), "long.json": bytes(range(50))}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", PART)
    monkeypatch.setattr(objects, "NUM_STREAMS", STREAMS)


class Bucket(MemoryFileSystem):
    """A bucket in memory that notes every request; the part of S3 that uploads need.

    `damage` may change what is stored.
    """

    cachable = False

    def __init__(self, damage: Callable[[str, bytes], bytes] | None = None) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}  # of its own, by path
        self.pseudo_dirs = [""]
        self.requests: list[tuple[Any, ...]] = []
        self.parts: dict[int, bytes] = {}
        self.checksums: dict[str, str] = {}
        self.reports_checksums = True
        self.fails_at_part = 0
        self._damage = damage or (lambda name, data: data)

    def cat_file(self, path: str, start: int = 0, end: int = 0, **_: Any) -> bytes:
        self.requests.append(("read", path.rpartition("/")[2], start, end))
        data: bytes = super().cat_file(path, start=start, end=end)
        return data

    def put_file(self, lpath: str, rpath: str, chunksize: int = 0, **_: Any) -> None:
        name = rpath.rpartition("/")[2]
        self.requests.append(("put", name, chunksize))
        super().pipe_file(rpath, self._damage(name, Path(lpath).read_bytes()))

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        name = path.rpartition("/")[2]
        self.requests.append(("pipe", name))
        super().pipe_file(path, self._damage(name, value))

    def rm_file(self, path: str) -> None:
        self.requests.append(("remove", path.rpartition("/")[2]))
        super().rm_file(path)

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.removeprefix("memory://").partition("/")
        return bucket, key, None

    def call_s3(
        self,
        method: str,
        Bucket: str,  # noqa: N803
        Key: str,  # noqa: N803
        **given: Any,
    ) -> dict[str, Any]:
        assert Bucket == "models"
        name = Key.removeprefix("there/")
        if method == "create_multipart_upload":
            assert given == {"ChecksumAlgorithm": "SHA256"}
            self.parts = {}
            return {"UploadId": "upload"}
        if method == "head_object":
            assert given == {"ChecksumMode": "ENABLED"}
            self.requests.append(("head", name))
            return {"ChecksumSHA256": self.checksums[name]} if name in self.checksums else {}
        assert given.pop("UploadId") == "upload"
        if method == "upload_part":
            number = given["PartNumber"]
            if number == self.fails_at_part:
                raise ConnectionError("the line is cut")
            assert given["ChecksumSHA256"] == encoded(given["Body"])
            self.parts[number] = given["Body"]
            return {"ETag": f"tag {number}"}
        self.requests.append((method.removesuffix("_multipart_upload"), name))
        if method == "complete_multipart_upload":
            numbers = sorted(self.parts)
            assert given["MultipartUpload"]["Parts"] == [
                {"PartNumber": n, "ETag": f"tag {n}", "ChecksumSHA256": encoded(self.parts[n])}
                for n in numbers
            ]
            stored = [self.parts[number] for number in numbers]
            super().pipe_file(f"{URL}/{name}", self._damage(name, b"".join(stored)))
            if self.reports_checksums:
                digests = b"".join(hashlib.sha256(part).digest() for part in stored)
                self.checksums[name] = f"{encoded(digests)}-{len(numbers)}"
        return {}


def encoded(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


class Pool:
    """Runs each task at once, so that the order of all requests is known."""

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(task(*arguments))
        except ConnectionError as error:
            future.set_exception(error)
        return future

    map = map


def store(bucket: Bucket, kind: type[ObjectStore] = ObjectStore) -> ObjectStore:
    return kind(URL, bucket, Pool())  # type: ignore[arg-type]


class Stages(SilentProgress):
    """Notes each stage, with its total and the bytes that were done."""

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []

    def start(self, stage: str, total: int, unit: str) -> None:
        assert unit == "bytes"
        self.seen.append([stage, total, 0])

    def advance(self, n: int = 1, note: str = "") -> None:
        self.seen[-1][2] += n


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in CONTENTS.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def entries(contents: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }


MANIFEST = json.dumps({"files": entries(CONTENTS)}).encode()


def publish(
    bucket: Bucket,
    folder: Path,
    kind: type[ObjectStore] = ObjectStore,
    manifest: bytes = MANIFEST,
    force: bool = False,
) -> tuple[Published, list[list[Any]]]:
    """The result of a push, and the stages that its progress showed."""
    stages = Stages()
    files = entries({name: (folder / name).read_bytes() for name in CONTENTS})
    result = store(bucket, kind).publish(folder, files, manifest, force, stages)
    return result, stages.seen


def stored(bucket: Bucket) -> dict[str, bytes]:
    return {path.rpartition("/")[2]: file.getvalue() for path, file in bucket.store.items()}


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 5 * PART, 5 * PART + 1])
def test_object_is_read_in_ranges(size: int, tmp_path: Path) -> None:
    bucket = Bucket()
    data = bytes(number % 251 for number in range(size))
    bucket.pipe_file(f"{URL}/x", data)
    bucket.pipe_file(f"{URL}/below/x", b"of a subfolder")
    assert store(bucket).sizes() == {"x": size}
    bucket.requests.clear()
    assert store(bucket).read_small_file("x", size) == data
    ranges = [("read", "x", s, min(s + PART, size)) for s in range(0, size, PART)]
    assert bucket.requests == ranges

    bucket.requests.clear()
    steps: list[tuple[int, int]] = []  # bytes, and the requests until then
    digest = store(bucket).download(
        "x", size, tmp_path / "x", lambda n: steps.append((n, len(bucket.requests)))
    )
    assert (tmp_path / "x").read_bytes() == data
    assert digest == hashlib.sha256(data).hexdigest()
    assert steps == [
        (0, 0),
        *(
            (stop - start, min(index + STREAMS, len(ranges)))
            for index, (_, _, start, stop) in enumerate(ranges)
        ),
    ]


@pytest.mark.parametrize("length", [1, PART, 49, 50, 51])
def test_object_download_continues_a_file(length: int, tmp_path: Path) -> None:
    """A file that is too long is downloaded again."""
    bucket = Bucket()
    data = CONTENTS["long.json"]
    bucket.pipe_file(f"{URL}/x", data)
    (tmp_path / "x").write_bytes((data + b"!")[:length])
    kept = length if length <= len(data) else 0
    steps: list[int] = []
    digest = store(bucket).download("x", len(data), tmp_path / "x", steps.append)
    assert (tmp_path / "x").read_bytes() == data
    assert digest == hashlib.sha256(data).hexdigest()
    assert (steps[0], sum(steps)) == (kept, len(data))
    assert [request[2] for request in bucket.requests[1:]] == list(range(kept, len(data), PART))


def test_object_that_is_cut_short_is_an_input_error() -> None:
    bucket = Bucket()
    bucket.pipe_file(f"{URL}/x", bytes(PART + 3))
    with pytest.raises(
        InputError, match=rf"^{URL}/x ends at byte 19, but at least 30 were expected"
    ):
        store(bucket).read_small_file("x", 30)


@pytest.mark.parametrize("kind", [ObjectStore, S3Store])
def test_push_sends_everything_once(kind: type[ObjectStore], folder: Path) -> None:
    """The manifest is the last; S3 gets a file of more than one part by parts."""
    bucket = Bucket()
    sizes = sum(map(len, CONTENTS.values()))
    result, stages = publish(bucket, folder, kind)
    assert result == Published(URL)
    assert stages == [["compare", 0, 0], ["send", sizes, sizes]]
    writes = [request for request in bucket.requests if request[0] not in ("read", "head")]
    puts = [("put", "config.json", PART), ("put", "exact.json", PART)]
    long = ("put", "long.json", PART) if kind is ObjectStore else ("complete", "long.json")
    assert sorted(writes[:2]) == puts
    assert writes[2:] == [long, ("pipe", "llmkit.json")]
    assert bucket.parts.keys() == (set() if kind is ObjectStore else {1, 2, 3, 4})
    assert stored(bucket) == CONTENTS | {"llmkit.json": MANIFEST}

    bucket.requests.clear()
    result, stages = publish(bucket, folder, kind)
    assert result == Published(URL, already_there=True)
    assert stages == [["compare", sizes, sizes]]
    assert {request[0] for request in bucket.requests} <= {"read", "head"}
    # S3's own checksum stands for the content of a large file.
    assert ("read", "long.json", 0, PART) in bucket.requests or kind is S3Store
    assert ("read", "exact.json", 0, PART) in bucket.requests
    assert [request[1] for request in bucket.requests if request[0] == "head"] == (
        [] if kind is ObjectStore else ["long.json"]
    )


def test_push_continues_an_interrupted_one(folder: Path) -> None:
    bucket = Bucket()
    bucket.pipe_file(f"{URL}/exact.json", CONTENTS["exact.json"])
    bucket.pipe_file(f"{URL}/notes.txt", b"somebody's")
    _, stages = publish(bucket, folder)
    assert stages == [["compare", PART, PART], ["send", 52, 52]]
    assert stored(bucket) == CONTENTS | {"llmkit.json": MANIFEST, "notes.txt": b"somebody's"}
    assert not [request for request in bucket.requests if request[0] == "remove"]


@pytest.mark.parametrize("found", [bytes(PART), b"shorter"], ids=["content", "size"])
def test_push_repairs_only_its_own_checkpoint(found: bytes, folder: Path) -> None:
    """Another file of that name is somebody's, unless the same manifest or --force says no."""
    bucket = Bucket()
    bucket.pipe_file(f"{URL}/exact.json", found)
    with pytest.raises(
        OutputError, match=rf"^{URL}/exact.json is another file than {folder}/exact.json"
    ):
        publish(bucket, folder)
    assert stored(bucket) == {"exact.json": found}
    publish(bucket, folder, force=True)
    bucket.pipe_file(f"{URL}/exact.json", found)
    bucket.requests.clear()
    result, stages = publish(bucket, folder)
    assert not result.already_there
    assert stages[1:] == [["send", PART, PART]]
    writes = [request[:2] for request in bucket.requests if request[0] != "read"]
    assert writes == [("remove", "llmkit.json"), ("put", "exact.json"), ("pipe", "llmkit.json")]
    assert stored(bucket) == CONTENTS | {"llmkit.json": MANIFEST}


@pytest.mark.parametrize(
    ("old", "kept"),
    [
        (json.dumps({"files": {"old.json": {}, "gone.json": {}}}).encode(), {"notes.txt"}),
        (b"{" + bytes(len(MANIFEST) - 1), {"notes.txt", "old.json"}),
        (b"[]", {"notes.txt", "old.json"}),
    ],
    ids=["whole", "no JSON", "no files"],
)
def test_push_with_force_removes_the_files_of_the_old_checkpoint(
    old: bytes, kept: set[str], folder: Path
) -> None:
    """The old manifest first; where it cannot be read, the old signature is all that is known."""
    bucket = Bucket()
    for name in ("notes.txt", "old.json", "model.sig", "config.json"):
        bucket.pipe_file(f"{URL}/{name}", b"{}")
    bucket.pipe_file(f"{URL}/llmkit.json", old)
    with pytest.raises(OutputError, match=rf"^{URL} holds another checkpoint.*--force"):
        publish(bucket, folder)
    bucket.requests.clear()
    _, stages = publish(bucket, folder, force=True)
    assert stages == [["compare", 2, 2], ["send", 66, 66]]
    assert stored(bucket).keys() == CONTENTS.keys() | kept | {"llmkit.json"}
    removed = [index for index, request in enumerate(bucket.requests) if request[0] == "remove"]
    sent = [index for index, request in enumerate(bucket.requests) if request[0] == "put"]
    assert max(removed) < min(sent)


@pytest.mark.parametrize("kind", [ObjectStore, S3Store])
@pytest.mark.parametrize("name", [*CONTENTS, "llmkit.json"])
@pytest.mark.parametrize("reports_checksums", [True, False])
def test_push_finds_what_was_stored_wrong(
    kind: type[ObjectStore], name: str, reports_checksums: bool, folder: Path
) -> None:
    bucket = Bucket(lambda stored, data: data[:-1] + b"?" if stored == name else data)
    bucket.reports_checksums = reports_checksums
    if kind is S3Store and name == "long.json" and reports_checksums:
        publish(bucket, folder, kind)  # S3 has checked the parts
        return
    with pytest.raises(ShortageError, match=rf"^{URL}/{name} is not what was sent"):
        publish(bucket, folder, kind)


def test_push_of_parts_is_compared_by_content_without_a_checksum(folder: Path) -> None:
    bucket = Bucket()
    bucket.reports_checksums = False
    publish(bucket, folder, S3Store)
    assert publish(bucket, folder, S3Store)[0].already_there


@pytest.mark.parametrize("reason", ["refused part", "changed file"])
def test_push_of_parts_leaves_none_after_an_error(reason: str, folder: Path) -> None:
    """Parts without an end are paid for."""
    bucket = Bucket()
    files = entries(CONTENTS)
    error: type[Exception] = ConnectionError
    if reason == "refused part":
        bucket.fails_at_part = 2
    else:
        files["long.json"]["sha256"] = "0" * 64
        error = InputError
    with pytest.raises(error, match=r"line is cut|long.json has SHA-256 \w{64}, .* says 0{64}"):
        store(bucket, S3Store).publish(folder, files, MANIFEST, False, SilentProgress())
    assert [request for request in bucket.requests if request[0] in ("abort", "complete")] == [
        ("abort", "long.json")
    ]


def test_push_of_parts_stays_within_the_limits_of_s3() -> None:
    """10,000 parts of at least 5 MiB; the parts of this size are documented."""
    assert LIMITS == (16 * 2**20, 10_000)


@pytest.mark.parametrize(
    ("size", "sizes"),
    [(48, [16, 16, 16]), (49, [17, 17, 15]), (51, [17, 17, 17]), (52, [18, 18, 16])],
)
def test_push_of_parts_grows_them_to_the_greatest_number(
    size: int, sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "MAX_PARTS", 3)
    data = bytes(size)
    (tmp_path / "x").write_bytes(data)
    bucket = Bucket()
    store(bucket, S3Store).publish(tmp_path, entries({"x": data}), b"{}", False, SilentProgress())
    assert [len(bucket.parts[number]) for number in sorted(bucket.parts)] == sizes


def test_push_of_parts_holds_few_of_them_in_memory(tmp_path: Path) -> None:
    waiting: list[int] = []
    most: list[int] = []

    class Part(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            waiting.pop()
            return super().result(timeout)

    class CountingPool(Pool):
        def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
            waiting.append(1)
            most.append(len(waiting))
            future = Part()
            future.set_result(task(*arguments))
            return future

    data = bytes(10 * PART)
    (tmp_path / "x").write_bytes(data)
    pool: Any = CountingPool()
    stages = Stages()
    S3Store(URL, Bucket(), pool).publish(tmp_path, entries({"x": data}), b"{}", False, stages)
    assert most[:10] == [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    assert stages.seen[1] == ["send", 160, 160]


class LazyPool(Pool):
    """Its first task ends as `error` says; the others never begin."""

    def __init__(self, error: Exception | None) -> None:
        self.futures: list[Future[Any]] = []
        self._error = error

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if not self.futures and self._error is not None:
            future.set_exception(self._error)
        elif not self.futures:
            future.set_result(task(*arguments))
        self.futures.append(future)
        return future


def test_transfers_that_stop_cancel_their_other_requests(folder: Path) -> None:
    bucket = Bucket()
    bucket.pipe_file(f"{URL}/x", bytes(10 * PART))
    pool: Any = LazyPool(None)
    ranges = ObjectStore(URL, bucket, pool)._read_ranges("x", 0, 10 * PART)
    assert next(ranges) == bytes(PART)
    ranges.close()  # type: ignore[attr-defined]
    assert [future.cancelled() for future in pool.futures] == [False, True, True]

    (folder / "long.json").write_bytes(bytes(10 * PART))
    files = entries({"long.json": bytes(10 * PART)})
    pool = LazyPool(ConnectionError("the line is cut"))
    with pytest.raises(ConnectionError, match="line is cut"):
        S3Store(URL, bucket, pool).publish(folder, files, MANIFEST, False, SilentProgress())
    assert [future.cancelled() for future in pool.futures] == [False, True, True]
    assert bucket.requests[-1] == ("abort", "long.json")


@pytest.mark.parametrize(("scheme", "kind"), [("s3", S3Store), ("gs", ObjectStore)])
def test_open_object_store_makes_the_client_of_the_scheme(
    scheme: str, kind: type[ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cache of listings, which would hide what others write."""
    import fsspec

    made: list[Any] = []

    def filesystem(name: str, **options: Any) -> Bucket:
        made.append((name, options))
        return Bucket()

    monkeypatch.setattr(fsspec, "filesystem", filesystem)
    with open_object_store(f"{scheme}://models/there/") as opened:
        assert type(opened) is kind
        assert opened.reference == f"{scheme}://models/there"
        assert isinstance(opened._pool, ThreadPoolExecutor)
        assert opened._pool._max_workers == STREAMS
    assert made == [(scheme, {"skip_instance_cache": True, "use_listings_cache": False})]
    assert "s3fs" not in sys.modules
