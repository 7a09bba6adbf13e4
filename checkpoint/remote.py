"""Checkpoints elsewhere: what a URL names, and the local copy of it that every command works on.

    s3://bucket/prefix  gs://bucket/prefix         objects (objects.py)
    models:/NAME/VERSION  models:/NAME@ALIAS  runs:/RUN/PATH   MLflow (mlflow_store.py)
    hf://organization/name                         the Hugging Face hub (hub.py, hub_target.py)

Only what a user names is fetched: nothing here is called with text from a request.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from llmkit.checkpoint.errors import InputError, LlmkitError, ShortageError, UsageError
from llmkit.checkpoint.hub import fetch, looks_like_hub_id
from llmkit.checkpoint.output import locked
from llmkit.checkpoint.progress import Progress, SilentProgress
from llmkit.checkpoint.reading import DIGEST_BYTES

HUB = "hf://"
FORMS = "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, models:/NAME/VERSION, runs:/RUN/PATH or hf://ORGANIZATION/NAME"
CREDENTIALS = {  # where each kind of store looks for its own; llmkit never sees them
    "s3": "AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "models": "MLFLOW_TRACKING_URI",
    "runs": "MLFLOW_TRACKING_URI",
    "hf": "HF_TOKEN and HF_ENDPOINT",
}
Advance = Callable[[int], None]  # told of bytes that are done
_cached: dict[str, Path] = {}  # by reference: within a process a reference stays what it was


class Source(Protocol):
    """A folder of files. The errors of one elsewhere are those of its library: call it within `told`."""

    reference: str

    def sizes(self) -> dict[str, int]:
        """The bytes of each file in the folder, those of subfolders left out. Raises FileNotFoundError."""

    def small(self, name: str, size: int) -> bytes:
        """A whole file of `size` bytes."""

    def fetch(self, name: str, size: int, path: Path, advance: Advance) -> str:
        """Bring a file of `size` bytes to `path`, continuing what is there of it; the SHA-256 of what is there then."""


class Target(Protocol):
    """A place for a checkpoint elsewhere. Call it within `told`."""

    def publish(
        self, folder: Path, files: Mapping[str, Mapping[str, Any]], manifest: bytes, force: bool, progress: Progress
    ) -> str:
        """Put a checkpoint there, its manifest last, and compare what has arrived; a reference to it.

        files: by name, bytes and sha256, of what lies in `folder`, the manifest left out. Raises OutputError when
        another checkpoint is there and not `force`, ShortageError when what has arrived is not what was sent.
        """


class Store(Source, Target, Protocol):
    """Both."""


def open_store(reference: str) -> AbstractContextManager[Store]:
    """The store that a URL names, not yet asked for anything; it is closed at the end of the block.

    Raises UsageError for other URLs, ShortageError, naming the extra, when its library is not installed.
    """
    scheme, _, rest = reference.partition(":/")
    if scheme in ("s3", "gs") and re.fullmatch(r"/[a-z0-9][a-z0-9._-]*(/[^/?#\\\0]+)*/?", rest) and _plain(rest):
        from llmkit.checkpoint.objects import open_objects

        return open_objects(reference)
    if scheme in ("models", "runs") and re.fullmatch(r"[^/?#\\\0]+(/[^/?#\\\0]+)*", rest) and _plain(rest):
        from llmkit.checkpoint.mlflow_store import open_mlflow

        return open_mlflow(reference)
    # An address may carry a key, as presigned ones do: nothing but the scheme is repeated.
    raise UsageError(f"{scheme}:/... is no address of a checkpoint", f"{FORMS} was expected")


def open_target(reference: str) -> AbstractContextManager[Target]:
    """Where a URL says that a checkpoint is to go. Raises as `open_store` does."""
    if reference.startswith(HUB) and looks_like_hub_id(reference.removeprefix(HUB)):
        from llmkit.checkpoint.hub_target import HubTarget

        return nullcontext(HubTarget(reference.removeprefix(HUB)))
    return open_store(reference)


def cached(reference: str, progress: Progress | None = None) -> Path:
    """The local copy of what a URL names, made when there is none, under the digest of its manifest.

    Raises as `open_store` does; InputError when what is there is no complete checkpoint.
    """
    if reference in _cached:
        return _cached[reference]
    if reference.startswith(HUB) and looks_like_hub_id(reference.removeprefix(HUB)):
        return _cached.setdefault(reference, fetch(reference.removeprefix(HUB)))
    from llmkit.checkpoint.transfer import read_offer, receive

    with open_store(reference) as store:
        offer = read_offer(store)
        out = cache_folder() / hashlib.sha256(offer.text).hexdigest()
        with locked(out, wait=True):
            if not out.is_dir():
                receive(store, offer, out, progress or SilentProgress())
    return _cached.setdefault(reference, out)


def cache_folder() -> Path:
    """Where local copies are: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmkit" / "checkpoints"


def missing(package: str, extra: str) -> ShortageError:
    """The error for a library that is not installed."""
    return ShortageError(f"{package} is not installed", todo=f"Install it: pip install 'llmkit[{extra}]'")


@contextmanager
def told(reference: str) -> Iterator[None]:
    """Turn the errors of a store's library into ours; what may be a password in one is left out."""
    try:
        yield
    except LlmkitError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{reference} does not exist", f"A checkpoint at {FORMS} was expected") from error
    except Exception as error:  # each library raises errors of its own, of its HTTP client and OSError
        if isinstance(error, OSError) and error.filename is not None:
            raise  # a file of ours
        reason = re.sub(r"//[^/@\s]+@", "//", " ".join(str(error).split()))[:200] or type(error).__name__
        places = CREDENTIALS.get(reference.partition(":")[0], "")
        raise ShortageError(
            f"{reference} could not be reached ({reason})", todo=f"Check the address, the network and {places}"
        ) from error


def damaged(reference: str, name: str) -> ShortageError:
    """The error for a file that has not arrived as it was sent."""
    return ShortageError(
        f"{reference}/{name} is not what was sent", "Its size and SHA-256 were compared", "Run the command again"
    )


def hashed(path: Path, size: int) -> tuple[Any, int]:
    """The SHA-256 so far of a file that is to have `size` bytes, and how many it has; it is emptied when too long."""
    digest, done = hashlib.sha256(), 0
    with path.open("ab+") as file:
        if file.tell() > size:
            file.truncate(0)
        file.seek(0)
        while data := file.read(DIGEST_BYTES):
            digest.update(data)
            done += len(data)
    return digest, done


def _plain(path: str) -> bool:
    """Whether no part of a path is `.` or `..`."""
    return not {".", ".."} & set(path.split("/"))
