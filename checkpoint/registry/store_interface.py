"""The interface of a store that holds checkpoints, and the helpers that all stores share."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from llmkit.checkpoint.tensor_reader import DIGEST_BYTES
from llmkit.common.errors import InputError, LlmkitError, ShortageError
from llmkit.common.formatting import shortened
from llmkit.common.progress import Progress

URL_FORMS = (
    "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, models:/NAME/VERSION, runs:/RUN/PATH"
    " or hf://ORGANIZATION/NAME"
)
# Where the client library of each kind of store looks for credentials. llmkit never sees them.
CREDENTIALS = {
    "s3": "AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "models": "MLFLOW_TRACKING_URI",
    "runs": "MLFLOW_TRACKING_URI",
    "hf": "HF_TOKEN and HF_ENDPOINT",
}
AdvanceProgress = Callable[[int], None]  # called with the number of bytes that were transferred


class Published(NamedTuple):
    """The result of a push to a store."""

    reference: str  # names what was pushed; for MLflow with the new version's number
    already_there: bool = False  # the same checkpoint was complete; nothing was sent


class ReadableStore(Protocol):
    """A folder of files.

    A remote one raises its library's errors: call it within `store_errors`.
    """

    reference: str

    def sizes(self) -> dict[str, int]:
        """The size in bytes of each file of the folder, without subfolders.

        Raises FileNotFoundError.
        """

    def read_small_file(self, name: str, size: int) -> bytes:
        """A whole file of `size` bytes."""

    def download(self, name: str, size: int, path: Path, advance: AdvanceProgress) -> str:
        """Download a file of `size` bytes, or the rest of it, to `path`. Returns its SHA-256."""


class WritableStore(Protocol):
    """A remote place for one checkpoint. Call it within `store_errors`."""

    def publish(
        self,
        folder: Path,
        files: Mapping[str, Mapping[str, Any]],
        manifest: bytes,
        force: bool,
        progress: Progress,
    ) -> Published:
        """Upload a checkpoint, its manifest last, and check the upload.

        The same checkpoint that is already there is compared, and not sent again.

        files: `bytes` and `sha256` of each file in `folder` by name, without the manifest.
        Raises OutputError when the store holds another checkpoint and `force` is off, ShortageError
        when the uploaded files differ from `folder`.
        """


class Store(ReadableStore, WritableStore, Protocol):
    """A store that can be read and written."""


def missing_library(package: str, extra: str) -> ShortageError:
    """The error for a client library that is not installed."""
    return ShortageError(
        f"{package} is not installed", todo=f"Install it: pip install 'llmkit[{extra}]'"
    )


def damaged_upload(reference: str, name: str) -> ShortageError:
    """The error for an uploaded file that differs from the local one."""
    return ShortageError(
        f"{reference}/{name} is not what was sent",
        "Its size and SHA-256 were compared",
        "Run the command again",
    )


@contextmanager
def store_errors(reference: str) -> Iterator[None]:
    """Within the block, turn the errors of a store's library into llmkit's.

    Passwords are removed.
    """
    try:
        yield
    except LlmkitError:
        raise
    except FileNotFoundError as error:
        raise InputError(
            f"{reference} does not exist", f"A checkpoint at {URL_FORMS} was expected"
        ) from error
    # Each library raises its own errors, those of its HTTP client and OSError.
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # a local file
        reason = shortened(re.sub(r"//[^/@\s]+@", "//", str(error)), 200)
        credentials = CREDENTIALS.get(reference.partition(":")[0], "")
        raise ShortageError(
            f"{reference} could not be reached ({reason or type(error).__name__})",
            todo=f"Check the address, the network and {credentials}",
        ) from error


def hash_partial_file(path: Path, size: int) -> tuple[Any, int]:
    """The SHA-256 object and the length of a partly downloaded file. It is created if missing.

    size: the size of the complete file. A longer file is truncated to 0 bytes.
    """
    digest = hashlib.sha256()
    length = 0
    with path.open("ab+") as file:
        if file.tell() > size:
            file.truncate(0)
        file.seek(0)
        while data := file.read(DIGEST_BYTES):
            digest.update(data)
            length += len(data)
    return digest, length
