"""Reads calibration text, and divides and selects its tokens.

Text comes from CPython's own reference, a file, a dataset of the hub or a folder of files.
"""

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

from llmkit.common.errors import InputError, ShortageError

BUILTIN = "builtin"
SELF = "self"  # text that the model generates
# Of every SEGMENT tokens of the builtin text, the last HELD_OUT are for evaluation only.
SEGMENT = 4096
HELD_OUT = 1024
# The columns of a parquet file that are read.
_COLUMNS = ("text", "messages", "conversations", "prompt", "output", "completion")
_KINDS = "a .txt, .jsonl or .parquet file, the id of a dataset on the hub, or 'builtin'"

# Turns chat messages into text.
RenderChat = Callable[[list[dict[str, Any]]], str]
# The place of a record ("line 3 of x.jsonl"), for messages, and its fields.
Record = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class CalibrationText:
    """The documents of a calibration text, in order."""

    name: str
    sha256: str  # of the documents, each followed by a zero byte
    documents: list[str]
    truncated: bool = False  # whether reading stopped at the limit


def load_text(
    source: str, render: RenderChat | None = None, limit: int | None = None
) -> CalibrationText:
    """Read a calibration text.

    source: "builtin", a .txt, .jsonl or .parquet file, or a dataset (`id` or `id:config`).
    render: the model's chat template. A record has a field `text`, or `messages` that are rendered.
    limit: reading stops after this many characters, at the end of a document.

    Raises InputError for an unusable source and ShortageError when a download fails.
    """
    if source == BUILTIN:
        name = f"pydoc_data.topics of Python {platform.python_version()}"
        documents = iter([builtin_text()])
    else:
        name = source
        documents = _documents(records(source), render)
    texts, truncated = _read_documents(documents, limit)
    if not any(text.strip() for text in texts):
        raise InputError(
            f"calibration text {source} is empty", f"Expected {_KINDS} with text in it"
        )
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return CalibrationText(name, digest.hexdigest(), texts, truncated)


def builtin_text() -> str:
    """CPython's language reference (`pydoc_data.topics`), which is always available."""
    # 700 KB that most runs do not need.
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def split_builtin(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide the builtin text's tokens [n] into calibration tokens and held-out tokens.

    The division does not depend on the window length, so the two never overlap.
    """
    held_out = torch.arange(len(tokens)) % SEGMENT >= SEGMENT - HELD_OUT
    return tokens[~held_out], tokens[held_out]


def select_windows(tokens: torch.Tensor, count: int, length: int, seed: int) -> torch.Tensor:
    """Select full windows [min(count, n // length), length] of tokens [n], in the text's order.

    `seed` chooses the windows.
    """
    full = tokens[: len(tokens) // length * length].view(-1, length)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(full), generator=generator)[:count]
    return full[chosen.sort().values]


def windows_sha256(windows: torch.Tensor) -> str:
    """The SHA-256 of token windows, as little-endian int64."""
    return hashlib.sha256(windows.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def _read_documents(documents: Iterable[str], limit: int | None) -> tuple[list[str], bool]:
    """Documents of up to about `limit` characters, and whether there are more."""
    texts: list[str] = []
    characters = 0
    for document in documents:
        if limit is not None and characters >= limit:
            return texts, True
        # JSON may hold half of a surrogate pair, which cannot be encoded.
        texts.append(document.encode("utf-8", "replace").decode())
        characters += len(document)
    return texts, False


def records(source: str) -> Iterator[Record]:
    """The records of a .txt, .jsonl or .parquet file, or of a dataset (an id or a folder of files).

    Raises what `load_text` raises.
    """
    path = Path(source)
    if path.is_dir():
        return _dataset_records(source)
    if path.suffix in _READERS or path.exists():
        return _file_records(path)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source):
        return _dataset_records(source)
    raise InputError(f"calibration source {source} was not found", f"Expected {_KINDS}")


def _documents(records: Iterable[Record], render: RenderChat | None) -> Iterator[str]:
    for place, record in records:
        text = record.get("text")
        messages = record.get("messages")
        if isinstance(text, str):
            yield text
        elif isinstance(messages, list):
            yield _render_chat(place, messages, render)
        else:
            keys = ", ".join(record) or "none"
            raise InputError(
                f"{place} has no field 'text' that is a string (keys seen: {keys})",
                "Expected `text`, or `messages` with a list of chat messages",
            )


def _render_chat(place: str, messages: list[dict[str, Any]], render: RenderChat | None) -> str:
    if render is None:
        raise InputError(
            f"{place} holds chat messages, and there is no chat template for them",
            todo="Use `text` records",
        )
    try:
        return render(messages)
    except ValueError as error:
        raise InputError(f"{place} does not fit the model's chat template: {error}") from error


def _file_records(path: Path) -> Iterator[Record]:
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
            f"{path} is not UTF-8 (byte {start + error.start} is 0x{data[error.start]:02x})",
            "Expected UTF-8 text",
        ) from error


def _text_file(path: Path) -> Iterator[Record]:
    yield str(path), {"text": _decode(path, path.read_bytes())}


def _jsonl_file(path: Path) -> Iterator[Record]:
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
                raise InputError(
                    f"{place} is not JSON ({error})", "Expected one JSON object a line"
                ) from error
            if not isinstance(record, dict):
                raise InputError(f"{place} is not a JSON object", "Expected one JSON object a line")
            yield place, record


def _parquet_file(path: Path) -> Iterator[Record]:
    # Imported here: other calibration texts do not need Arrow.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in _COLUMNS if name in file.schema_arrow.names]
            if not names:
                keys = ", ".join(file.schema_arrow.names) or "none"
                raise InputError(
                    f"{path} has no column 'text' (keys seen: {keys})",
                    "Expected a column `text` or `messages`",
                )
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=names):
                for record in batch.to_pylist():
                    row += 1
                    yield f"row {row} of {path}", record
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file ({error})") from error


def _dataset_records(source: str) -> Iterator[Record]:
    # Imported here: other calibration texts do not need this library, which is slow to import.
    import datasets

    name = source
    config = ""
    if not Path(source).is_dir():
        name, _, config = source.partition(":")
    todo = "Use a local file or --calibration builtin"
    try:
        stream = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for number, record in enumerate(stream, 1):
            yield f"record {number} of dataset {source}", record
    except (ConnectionError, TimeoutError) as error:
        raise ShortageError(
            f"dataset {source} cannot be downloaded: {error}", "Expected a network", todo
        ) from error
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError) as error:
        raise InputError(
            f"dataset {source} cannot be read: {error}", f"Expected {_KINDS}", todo
        ) from error


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".txt": _text_file,
    ".jsonl": _jsonl_file,
    ".parquet": _parquet_file,
}
