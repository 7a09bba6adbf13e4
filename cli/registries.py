"""`llmkit pull`, `push`, `sign` and `verify`: copies checkpoints between registries, signs them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmkit.cli.command import OUTPUT_DIRECTORY
from llmkit.cli.output import Output
from llmkit.common.errors import InputError
from llmkit.common.formatting import bytes_text
from llmkit.common.options import Argument, Option

if TYPE_CHECKING:
    from llmkit.checkpoint.registry.transfer import TransferResult

DIRECTORY = Argument("A checkpoint's folder.", metavar="DIR")
PUBLIC_KEY = Option(
    "Also check that model.sig was made with the private part of this key (PEM).",
    metavar="FILE",
    unset="none",
)


@dataclass(frozen=True, kw_only=True)
class PullArguments:
    """What `llmkit pull` takes."""

    reference: Annotated[
        str,
        Argument(
            "A directory, a hub id, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, models:/NAME/VERSION, "
            "models:/NAME@ALIAS or runs:/RUN/PATH.",
            metavar="REF",
        ),
    ]
    output: Annotated[str, OUTPUT_DIRECTORY]
    public_key: Annotated[str | None, PUBLIC_KEY] = None


@dataclass(frozen=True, kw_only=True)
class PushArguments:
    """What `llmkit push` takes."""

    directory: Annotated[str, DIRECTORY]
    target: Annotated[
        str,
        Argument(
            "Where to: a directory, hf://ORGANIZATION/NAME, s3://BUCKET/PREFIX, "
            "gs://BUCKET/PREFIX, models:/NAME or models:/NAME@ALIAS.",
            metavar="REF",
        ),
    ]
    force: Annotated[bool, Option("Replace another checkpoint that is there.")] = False


@dataclass(frozen=True, kw_only=True)
class SignArguments:
    """What `llmkit sign` takes."""

    directory: Annotated[str, DIRECTORY]
    key: Annotated[
        str,
        Option(
            "An elliptic private key (PEM); LLMKIT_KEY_PASSWORD has its password, if it has one.",
            metavar="FILE",
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """What `llmkit verify` takes."""

    directory: Annotated[str, DIRECTORY]
    public_key: Annotated[str | None, PUBLIC_KEY] = None


def pull(output: Output, arguments: PullArguments) -> None:
    """Download a checkpoint: the files that its manifest names, each compared with the manifest.

    After an interruption the same command continues.
    """
    from llmkit.checkpoint.registry import signing, transfer

    check = None
    if arguments.public_key:
        check = partial(signing.verify, key=Path(arguments.public_key).expanduser())
    target = Path(arguments.output).expanduser().absolute()
    moved = transfer.pull(arguments.reference, target, output.progress(), check)
    if arguments.public_key:
        signature = "valid"
    elif moved.signed:
        signature = "not checked"
    else:
        signature = "none"
    _show(output, moved, {"signature": signature})


def push(output: Output, arguments: PushArguments) -> None:
    """Upload a checkpoint, its manifest last, and compare what has arrived.

    The checkpoint is compared with its manifest first; one without a manifest gets one at the
    target. After an interruption the same command continues.
    """
    from llmkit.checkpoint.open_model_files import resolve_model
    from llmkit.checkpoint.registry import transfer

    source = resolve_model(Path(arguments.directory))
    moved = transfer.push(source, arguments.target, output.progress(), arguments.force)
    _show(output, moved, {})


def sign(output: Output, arguments: SignArguments) -> None:
    """Sign a checkpoint with a key: writes model.sig, which any OpenSSF model-signing tool can
    verify.
    """
    from llmkit.checkpoint.registry import signing

    directory = Path(arguments.directory).expanduser()
    path = str(signing.sign(directory, Path(arguments.key).expanduser()))
    output.result(
        {"signature": path}, lambda console: console.print(path, markup=False, highlight=False)
    )


def verify(output: Output, arguments: VerifyArguments) -> None:
    """Compare every file and tensor of a checkpoint with its manifest; of a layout, what `shard
    verify` does.
    """
    from llmkit.checkpoint.manifest import load_manifest, verify_manifest
    from llmkit.checkpoint.registry import signing

    path = Path(arguments.directory).expanduser()
    if (load_manifest(path) or {}).get("layout") is not None:
        from llmkit.shard.verify import verify as verify_layout

        problems = verify_layout(path).problems
    else:
        problems = verify_manifest(path)
    if problems:
        raise InputError(
            f"{arguments.directory} does not verify ({len(problems)} wrong, the first: "
            f"{problems[0]})"
        )
    signature = "not checked"
    if arguments.public_key:
        signing.verify(path, Path(arguments.public_key).expanduser())
        signature = "valid"
    output.result(
        {"ok": True, "signature": signature},
        lambda console: console.print(
            f"{arguments.directory} verifies; signature: {signature}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        ),
    )


def _show(output: Output, moved: TransferResult, further: dict[str, Any]) -> None:
    if moved.left_out:
        output.message(f"left out, not in the manifest: {', '.join(moved.left_out[:10])}")
    signature = f", signature {further['signature']}" if "signature" in further else ""
    text = (
        f"{moved.source} -> {moved.target}: {moved.files} files, {bytes_text(moved.bytes)}, "
        f"all compared{signature}"
    )
    output.result(
        dataclasses.asdict(moved) | further,
        lambda console: console.print(text, markup=False, highlight=False, soft_wrap=True),
    )
