"""Signatures of checkpoints, by the OpenSSF model-signing library: one file, model.sig, next to the manifest.

They are the library's own, over the files that the manifest names and the manifest itself, so that its `model_signing
verify` takes them too. Keys are elliptic (P-256, P-384 or P-521), in PEM files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.hub import SIGNATURE
from llmkit.checkpoint.manifest import MANIFEST, load_manifest, mismatch, verify_manifest
from llmkit.checkpoint.output import writing
from llmkit.checkpoint.remote import missing

PASSWORD = "LLMKIT_KEY_PASSWORD"  # noqa: S105  (the name of a variable)


def sign(folder: Path, key: Path) -> Path:
    """Sign a checkpoint that is what its manifest says, with the private key in a file; the signature's file.

    A key that is encrypted is read with the password in LLMKIT_KEY_PASSWORD. Raises InputError for a checkpoint that
    differs from its manifest or has none, and for a file that is no such key.
    """
    if problems := verify_manifest(folder):
        raise mismatch(problems[0])
    signing = _library("signing").Config()
    try:
        # Declared as text, and handed on to what takes bytes only.
        password: Any = os.environ[PASSWORD].encode() if os.environ.get(PASSWORD) else None
        signing.use_elliptic_key_signer(private_key=key, password=password)
    except Exception as error:  # of the library, of the cryptography below it and OSError
        raise _no_key(key, "private") from error
    path = folder / SIGNATURE
    with writing(path):
        path.unlink(missing_ok=True)
        signing.set_hashing_config(_hashing(folder)).sign(folder, path)
    return path


def verify(folder: Path, key: Path) -> None:
    """Check that a checkpoint is what the owner of a key signed: every file that the manifest names, and the manifest.

    Raises InputError when it is not signed, signed with another key, or not what was signed.
    """
    verifying = _library("verifying").Config()
    try:
        verifying.use_elliptic_key_verifier(public_key=key)
    except Exception as error:
        raise _no_key(key, "public") from error
    if not (folder / SIGNATURE).is_file():
        raise InputError(f"{folder} has no {SIGNATURE}", "A signed checkpoint was expected", "llmkit sign makes one")
    try:
        # Not what the signature says is to be ignored, but what the manifest leaves out.
        verifying.set_hashing_config(_hashing(folder)).verify(folder, folder / SIGNATURE)
    except Exception as error:
        raise InputError(
            f"{folder} is not what the owner of {key} signed ({' '.join(str(error).split())[:300]})",
            todo="Get the checkpoint, or the public key, again from where you trust it",
        ) from error


def _hashing(folder: Path) -> Any:
    named = {*(load_manifest(folder) or {"files": ()})["files"], MANIFEST}
    others = [path.name for path in folder.iterdir() if path.name not in named]
    return _library("hashing").Config().set_ignored_paths(paths=[SIGNATURE, *others])


def _library(part: str) -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise missing("model-signing", "signing") from error
    return getattr(model_signing, part)


def _no_key(key: Path, kind: str) -> InputError:
    return InputError(
        f"{key} is no {kind} key that can be read",
        "An elliptic key (P-256, P-384 or P-521) in a PEM file was expected",
        f"An encrypted one needs {PASSWORD}" if kind == "private" else "",
    )
