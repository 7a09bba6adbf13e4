"""Checkpoints from one place to another, compared with their manifest at both ends.

The manifest is the last file to arrive anywhere, so that nobody reads half a checkpoint, and the list of what is taken:
what it does not name stays where it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.files import CONFIG, locate, parse_json
from llmkit.checkpoint.hub import SIGNATURE, is_wanted, looks_remote
from llmkit.checkpoint.manifest import (
    MANIFEST,
    check_manifest,
    describe,
    manifest_digest,
    mismatch,
    verify_manifest,
)
from llmkit.checkpoint.output import check_output, locked, partial_path, sibling, sync_directory, write_synced, writing
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.reading import DIGEST_BYTES, sha256_file
from llmkit.checkpoint.remote import HUB, Advance, Source, hashed, open_store, open_target, told

MOST_MANIFEST_BYTES = 256 * 2**20  # a manifest has some 250 bytes for each tensor
MOST_SIGNATURE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Offer:
    """What a source has: its manifest, as it is and parsed, and each file's size."""

    text: bytes
    manifest: dict[str, Any]
    sizes: Mapping[str, int]

    @property
    def files(self) -> dict[str, int]:
        """What is taken beside the manifest: the bytes of each file."""
        files = {name: int(entry["bytes"]) for name, entry in self.manifest["files"].items()}
        return files | {name: size for name, size in self.sizes.items() if name == SIGNATURE}


@dataclass(frozen=True)
class Moved:
    """What a push or a pull did."""

    source: str
    target: str
    files: int  # the manifest included
    bytes: int
    manifest_sha256: str
    signed: bool  # there is a signature among the files
    left_out: list[str] = field(default_factory=list)  # files that the manifest does not name


def pull(reference: str, out: Path, progress: Progress, check: Callable[[Path], None] | None = None) -> Moved:
    """Bring a checkpoint into the new folder `out`, all or nothing; an interrupted run is continued.

    check: called with the complete folder before it gets its name; when it raises, nothing is left of it.
    Raises InputError for what is no checkpoint, is incomplete or is not what its manifest says, OutputError when
    `out` is in the way, ShortageError when a store cannot be reached or the disk is too small.
    """
    with _opened(reference) as source:
        offer = read_offer(source)
        with locked(out):
            receive(source, offer, out, progress, check)
    return _moved(reference, str(out), offer)


def push(folder: Path, target: str, progress: Progress, force: bool = False) -> Moved:
    """Send a checkpoint to a URL or into a new folder. One without a manifest gets one there; `folder` is not touched.

    force: over another checkpoint at that URL. Raises as `pull` does, and InputError when `folder` is not what its
    manifest says.
    """
    if problems := verify_manifest(folder) if (folder / MANIFEST).exists() else []:
        raise mismatch(problems[0])
    if not looks_remote(target):
        return pull(str(folder), Path(target).expanduser(), progress)
    offer = read_offer(FolderSource(folder))
    files = dict(offer.manifest["files"])
    if SIGNATURE in offer.sizes:
        files[SIGNATURE] = {"bytes": offer.sizes[SIGNATURE], "sha256": sha256_file(folder / SIGNATURE)}
    with open_target(target) as store, told(target):
        return _moved(str(folder), store.publish(folder, files, offer.text, force, progress), offer)


def read_offer(source: Source) -> Offer:
    """The manifest of a checkpoint, and whether all that it names is there and may be taken.

    Raises InputError, naming the file, when not.
    """
    with told(source.reference):
        sizes = source.sizes()
        if MANIFEST not in sizes:
            held = ", ".join(sorted(sizes)[:5]) or "nothing"
            raise InputError(
                f"{source.reference} has no {MANIFEST}; it holds {held}",
                "A checkpoint that `llmkit push` has completed was expected",
            )
        where = f"{source.reference}/{MANIFEST}"
        _bounded(where, sizes[MANIFEST], MOST_MANIFEST_BYTES)
        text = source.small(MANIFEST, sizes[MANIFEST])
    manifest = check_manifest(parse_json(text, where), where)
    if "sha256" in manifest and manifest["sha256"] != (found := manifest_digest(manifest)):
        raise mismatch(f"{where} says that its SHA-256 is {manifest['sha256']}, and it is {found}")
    if CONFIG not in manifest["files"]:
        raise InputError(f"{where} names no {CONFIG}", "The manifest of a whole checkpoint was expected")
    for name, entry in manifest["files"].items():
        if not is_wanted(name) or name in (MANIFEST, SIGNATURE):
            raise InputError(
                f"{where} names the file {name}", "Safetensors, JSON and tokenizer files only, no code and no pickle"
            )
        if (size := sizes.get(name)) != entry["bytes"]:
            found = "is absent" if size is None else f"has {size} bytes"
            raise mismatch(f"{source.reference}/{name} {found}, {MANIFEST} says {entry['bytes']} bytes")
    if SIGNATURE in sizes:
        _bounded(f"{source.reference}/{SIGNATURE}", sizes[SIGNATURE], MOST_SIGNATURE_BYTES)
    return Offer(text, manifest, sizes)


def receive(
    source: Source, offer: Offer, out: Path, progress: Progress, check: Callable[[Path], None] | None = None
) -> None:
    """Bring what is offered into `out`, whose lock is held. See `pull`."""
    check_output(out, None, sum(offer.files.values()))
    partial = partial_path(out)
    with writing(partial):
        if not (partial / MANIFEST).is_file() or (partial / MANIFEST).read_bytes() != offer.text:
            if partial.exists():  # of another checkpoint
                shutil.rmtree(partial)
            sibling(out, ".partial.journal").unlink(missing_ok=True)
            partial.mkdir(parents=True)
            write_synced(partial / MANIFEST, offer.text)
    progress.start("fetch", sum(offer.files.values()), "bytes")
    for name, size in offer.files.items():
        path = partial / name
        with told(source.reference), writing(path):
            found = source.fetch(name, size, path, progress.advance)
        told_sha = offer.manifest["files"].get(name, {"sha256": found})["sha256"]
        if path.stat().st_size != size or found != told_sha:
            path.unlink()
            raise mismatch(f"{source.reference}/{name} has SHA-256 {found}, {MANIFEST} says {told_sha}")
    progress.finish()
    if check is not None:
        try:
            check(partial)
        except InputError:
            shutil.rmtree(partial)
            raise
    with writing(partial):
        for path in partial.iterdir():
            if path.name not in {MANIFEST, *offer.files}:  # a signature that has gone since an earlier attempt
                path.unlink()
                continue
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(partial)
        partial.rename(out)
        sync_directory(out.parent)


class FolderSource:
    """A checkpoint here, whose manifest is made where there is none. See `Source`."""

    def __init__(self, folder: Path) -> None:
        self.reference, self._folder = str(folder), folder
        self._manifest = (folder / MANIFEST).read_bytes() if (folder / MANIFEST).exists() else _text(describe(folder))

    def sizes(self) -> dict[str, int]:
        """See `Source.sizes`."""
        sizes = {path.name: path.stat().st_size for path in self._folder.iterdir() if path.is_file()}
        return sizes | {MANIFEST: len(self._manifest)}

    def small(self, name: str, size: int) -> bytes:
        """See `Source.small`."""
        return self._manifest if name == MANIFEST else (self._folder / name).read_bytes()

    def fetch(self, name: str, size: int, path: Path, advance: Advance) -> str:
        """See `Source.fetch`."""
        digest, done = hashed(path, size)
        advance(done)
        with (self._folder / name).open("rb") as source, path.open("ab") as file:
            source.seek(done)
            while data := source.read(DIGEST_BYTES):
                digest.update(data)
                file.write(data)
                advance(len(data))
        return str(digest.hexdigest())


def _opened(reference: str) -> AbstractContextManager[Source]:
    if looks_remote(reference) and not reference.startswith(HUB):
        return open_store(reference)
    folder = locate(reference)
    if folder.is_file():
        raise InputError(
            f"{reference} is a file", "A checkpoint's folder was expected", "llmkit quantize --method bf16 makes one"
        )
    return nullcontext(FolderSource(folder))


def _moved(source: str, target: str, offer: Offer) -> Moved:
    files = {**offer.files, MANIFEST: len(offer.text)}
    return Moved(
        source=source,
        target=target,
        files=len(files),
        bytes=sum(files.values()),
        manifest_sha256=hashlib.sha256(offer.text).hexdigest(),
        signed=SIGNATURE in files,
        left_out=sorted(offer.sizes.keys() - files.keys()),
    )


def _text(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()


def _bounded(where: str, size: int, most: int) -> None:
    if size > most:
        raise InputError(f"{where} has {size} bytes", f"At most {most} were expected")
