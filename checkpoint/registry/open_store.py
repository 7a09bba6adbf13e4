"""Opens the store that a URL names.

    s3://bucket/prefix  gs://bucket/prefix                      object_store.py
    models:/NAME/VERSION  models:/NAME@ALIAS  runs:/RUN/PATH    mlflow_store.py
    hf://organization/name                                      hub_upload.py (download: hub.py)

Only URLs that a user writes reach this module; nothing here is called with text from a request.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext

from llmkit.checkpoint.hub import HUB_SCHEME, is_hub_id, is_hub_url
from llmkit.checkpoint.registry.store_interface import (
    CREDENTIALS,
    URL_FORMS,
    Store,
    WritableStore,
)
from llmkit.common.errors import UsageError


def open_store(reference: str) -> AbstractContextManager[Store]:
    """The store of a URL, as a context manager that closes it. No request is made yet.

    Raises UsageError for other URLs, ShortageError, naming the extra, when its client library is
    not installed.
    """
    scheme, _, rest = reference.partition(":/")
    # Each client library is heavy: it is imported only for its own URLs.
    if (
        scheme in ("s3", "gs")
        and re.fullmatch(r"/[a-z0-9][a-z0-9._-]*(/[^/?#\\\0]+)*/?", rest)
        and _has_no_dot_segments(rest)
    ):
        from llmkit.checkpoint.registry.object_store import open_object_store

        return open_object_store(reference)
    if (
        scheme in ("models", "runs")
        and re.fullmatch(r"[^/?#\\\0]+(/[^/?#\\\0]+)*", rest)
        and _has_no_dot_segments(rest)
    ):
        from llmkit.checkpoint.registry.mlflow_store import open_mlflow_store

        return open_mlflow_store(reference)
    raise _unknown_address(reference, scheme)


def _unknown_address(reference: str, scheme: str) -> UsageError:
    """The error for a URL that is none of URL_FORMS.

    A URL may contain a secret (presigned URLs do), so that the message repeats only the scheme and
    the name of a model on the hub.
    """
    expected = f"{URL_FORMS} was expected"
    if scheme in CREDENTIALS:
        return UsageError(f"the {scheme}: address is not the address of a checkpoint", expected)
    page = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)", reference)
    todo = ""
    if page is not None and is_hub_id(page[1]):
        todo = f"Write {HUB_SCHEME}{page[1]}"
    return UsageError(
        f"an address that begins with {scheme}:// is not the address of a checkpoint",
        expected,
        todo,
    )


def open_writable_store(reference: str) -> AbstractContextManager[WritableStore]:
    """The store that a checkpoint is pushed to. Raises as `open_store` does."""
    if is_hub_url(reference):
        from llmkit.checkpoint.registry.hub_upload import HubStore

        return nullcontext(HubStore(reference.removeprefix(HUB_SCHEME)))
    return open_store(reference)


def _has_no_dot_segments(path: str) -> bool:
    """Whether no segment of a path is `.` or `..`."""
    return not {".", ".."} & set(path.split("/"))
