"""Signs checkpoints with the OpenSSF model-signing library, in one file, model.sig.

A signature covers the manifest and the files that it names. The library's own
`model_signing verify` accepts it, too. Keys are elliptic (P-256, P-384 or P-521), in PEM files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llmkit.checkpoint.hub import SIGNATURE
from llmkit.checkpoint.manifest import (
    MANIFEST,
    differences_error,
    find_differences,
    load_manifest,
)
from llmkit.checkpoint.output_directory import write_errors
from llmkit.checkpoint.registry.store_interface import missing_library
from llmkit.common.errors import InputError

PASSWORD = "LLMKIT_KEY_PASSWORD"  # noqa: S105


def sign(folder: Path, key: Path) -> Path:
    """Sign a checkpoint with the private key in the file `key`. Returns the signature's path.

    LLMKIT_KEY_PASSWORD decrypts an encrypted key. Raises InputError when the checkpoint differs
    from its manifest or has none, and when `key` holds no elliptic private key.
    """
    differences = find_differences(folder)
    if differences:
        raise differences_error(folder, differences)
    signing = _import_library("signing").Config()
    try:
        # The library's signature says str, but the function that it calls needs bytes.
        password: Any = os.environ[PASSWORD].encode() if os.environ.get(PASSWORD) else None
        signing.use_elliptic_key_signer(private_key=key, password=password)
    # The library raises its own errors, those of the cryptography package, and OSError.
    except Exception as error:
        raise _key_error(key, "private") from error
    path = folder / SIGNATURE
    with write_errors(path):
        path.unlink(missing_ok=True)
        signing.set_hashing_config(_hashing_config(folder)).sign(folder, path)
    return path


def verify(folder: Path, key: Path) -> None:
    """Check the signature of a checkpoint with a public key: the manifest and all files it names.

    Raises InputError when the checkpoint is not signed, signed with another key, or changed since.
    """
    verifying = _import_library("verifying").Config()
    try:
        verifying.use_elliptic_key_verifier(public_key=key)
    except Exception as error:
        raise _key_error(key, "public") from error
    if not (folder / SIGNATURE).is_file():
        raise InputError(
            f"{folder} has no {SIGNATURE}",
            "A signed checkpoint was expected",
            "llmkit sign makes one",
        )
    try:
        # The ignored files come from the manifest, not from the list inside the signature.
        verifying.set_hashing_config(_hashing_config(folder)).verify(folder, folder / SIGNATURE)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder} is not what the owner of {key} signed ({reason})",
            todo="Get the checkpoint, or the public key, again from where you trust it",
        ) from error


def _hashing_config(folder: Path) -> Any:
    signed = {MANIFEST}
    manifest = load_manifest(folder)
    if manifest is not None:
        signed |= manifest["files"].keys()
    ignored = [path.name for path in folder.iterdir() if path.name not in signed]
    return _import_library("hashing").Config().set_ignored_paths(paths=[SIGNATURE, *ignored])


def _import_library(module: str) -> Any:
    try:
        import model_signing  # an optional dependency
    except ImportError as error:
        raise missing_library("model-signing", "signing") from error
    return getattr(model_signing, module)


def _key_error(key: Path, kind: str) -> InputError:
    return InputError(
        f"{key} is not a readable {kind} key",
        "An elliptic key (P-256, P-384 or P-521) in a PEM file was expected",
        f"An encrypted one needs {PASSWORD}" if kind == "private" else "",
    )
