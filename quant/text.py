"""Calibration text: where it comes from, and the token windows that are cut from it."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkit.checkpoint.errors import InputError, ShortageError

BUILTIN = "builtin"
SELF = "self"  # text that the model writes
SEGMENT = 4096  # tokens: of every segment of the builtin text the last HELD_OUT are for evaluation only
HELD_OUT = 1024
_COLUMNS = ("text", "messages", "conversations", "prompt", "output", "completion")  # of a parquet file that are read
_KINDS = "a .txt, .jsonl or .parquet file, the id of a dataset on the hub, or 'builtin'"

Render = Callable[[list[dict[str, Any]]], str]


@dataclass(frozen=True)
class CalibrationText:
    """Documents in their order."""

    name: str
    sha256: str  # of the documents, each followed by a zero byte
    documents: list[str]
    truncated: bool = False  # reading stopped at the limit, before the source's end


def load_text(source: str, render: Render | None = None, limit: int | None = None) -> CalibrationText:
    """Read calibration text from "builtin", a .txt, .jsonl or .parquet file, or a `datasets` id (`id` or `id:config`).

    A record has a field `text`, or `messages`, which `render` (the model's chat template) turns into text. Reading
    stops after `limit` characters, at a document's end. Raises InputError for an unusable source and ShortageError
    for a dataset that cannot be downloaded.
    """
    if source == BUILTIN:
        name, documents = f"pydoc_data.topics of Python {platform.python_version()}", iter([builtin_text()])
    else:
        name, documents = source, _documents(records(source), render)
    kept, truncated = _take(documents, limit)
    if not any(document.strip() for document in kept):
        raise InputError(f"calibration text {source} is empty", f"Expected {_KINDS} with text in it")
    digest = hashlib.sha256()
    for document in kept:
        digest.update(document.encode() + b"\0")
    return CalibrationText(name, digest.hexdigest(), kept, truncated)


def builtin_text() -> str:
    """CPython's own language reference (`pydoc_data.topics`), the text that is always at hand."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def split_builtin(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide the builtin text's tokens [n] into those to calibrate with and those held out for evaluation.

    The division depends on the tokens alone, so the two never overlap whatever length windows are cut to.
    """
    held = torch.arange(len(tokens)) % SEGMENT >= SEGMENT - HELD_OUT
    return tokens[~held], tokens[held]


def windows(tokens: torch.Tensor, count: int, length: int, seed: int) -> torch.Tensor:
    """Cut tokens [n] into full windows [min(count, n // length), length], chosen by `seed`, in the text's order."""
    full = tokens[: len(tokens) // length * length].view(-1, length)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(full), generator=generator)[:count]
    return full[chosen.sort().values]


def windows_sha256(chosen: torch.Tensor) -> str:
    """SHA-256 of token windows, as little-endian int64."""
    return hashlib.sha256(chosen.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


Record = tuple[str, dict[str, Any]]  # where it stands ("line 3 of x.jsonl") and its fields


def _take(documents: Iterable[str], limit: int | None) -> tuple[list[str], bool]:
    kept: list[str] = []
    characters = 0
    for document in documents:
        if limit is not None and characters >= limit:
            return kept, True
        kept.append(document.encode("utf-8", "replace").decode())  # JSON may hold half of a surrogate pair
        characters += len(document)
    return kept, False


def records(source: str) -> Iterator[Record]:
    """The records of a .txt, .jsonl or .parquet file or a data set (an id, or a folder of such files), as they are.

    Raises as `load_text` does.
    """
    path = Path(source)
    if path.is_dir():
        return _dataset(source)
    if path.suffix in _READERS or path.exists():
        return _open(path)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source):
        return _dataset(source)
    raise InputError(f"calibration source {source} was not found", f"Expected {_KINDS}")


def _documents(records: Iterable[Record], render: Render | None) -> Iterator[str]:
    for place, record in records:
        text, messages = record.get("text"), record.get("messages")
        if isinstance(text, str):
            yield text
        elif isinstance(messages, list):
            yield _chat(place, messages, render)
        else:
            keys = ", ".join(record) or "none"
            raise InputError(
                f"{place} has no field 'text' that is a string (keys seen: {keys})",
                "Expected `text`, or `messages` with a list of chat messages",
            )


def _chat(place: str, messages: list[dict[str, Any]], render: Render | None) -> str:
    if render is None:
        raise InputError(
            f"{place} holds chat messages, and there is no chat template for them", todo="Use `text` records"
        )
    try:
        return render(messages)
    except ValueError as error:
        raise InputError(f"{place} does not fit the model's chat template: {error}") from error


def _open(path: Path) -> Iterator[Record]:
    if not path.exists():
        raise InputError(f"calibration file {path} was not found", f"Expected {_KINDS}")
    reader = _READERS.get(path.suffix)
    if reader is None or not path.is_file():
        raise InputError(f"calibration file {path} is of no known kind", f"Expected {_KINDS}")
    return reader(path)


def _decode(path: Path, data: bytes, start: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 (byte {start + error.start} is 0x{data[error.start]:02x})", "Expected UTF-8 text"
        ) from error


def _plain(path: Path) -> Iterator[Record]:
    yield str(path), {"text": _decode(path, path.read_bytes())}


def _json_lines(path: Path) -> Iterator[Record]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = _decode(path, line, offset)
            offset += len(line)
            if not text.strip():
                continue
            place = f"line {number} of {path}"
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place} is not JSON ({error})", "Expected one JSON object a line") from error
            if not isinstance(record, dict):
                raise InputError(f"{place} is not a JSON object", "Expected one JSON object a line")
            yield place, record


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in _COLUMNS if name in file.schema_arrow.names]
            if not names:
                keys = ", ".join(file.schema_arrow.names) or "none"
                raise InputError(
                    f"{path} has no column 'text' (keys seen: {keys})", "Expected a column `text` or `messages`"
                )
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=names):
                for record in batch.to_pylist():
                    row += 1
                    yield f"row {row} of {path}", record
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file ({error})") from error


def _dataset(source: str) -> Iterator[Record]:
    import datasets

    name, _, config = (source, "", "") if Path(source).is_dir() else source.partition(":")
    todo = "Use a local file or --calibration builtin"
    try:
        stream = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for number, record in enumerate(stream, 1):
            yield f"record {number} of dataset {source}", record
    except (ConnectionError, TimeoutError) as error:
        raise ShortageError(f"dataset {source} cannot be downloaded: {error}", "Expected a network", todo) from error
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError) as error:
        raise InputError(f"dataset {source} cannot be read: {error}", f"Expected {_KINDS}", todo) from error


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".txt": _plain,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
