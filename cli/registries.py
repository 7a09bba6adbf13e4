"""`llmkit pull`, `push`, `sign` and `verify`: copies checkpoints between registries, signs them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmkit.cli.command import OUTPUT_DIRECTORY
from llmkit.cli.output import Output
from llmkit.cli.shard import show_problems
from llmkit.common.formatting import bytes_text, count_text
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
    update: Annotated[
        bool,
        Option(
            "Accept edited chat templates, generation configs, licences and READMEs: record them "
            "in the manifest as they are.",
            in_recipes=False,
        ),
    ] = False


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
    target. One that is already there is only compared. After an interruption the same command
    continues.
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
    from llmkit.checkpoint.hub import SIGNATURE
    from llmkit.checkpoint.manifest import (
        accept_edits,
        differences_error,
        find_differences,
        load_manifest,
    )
    from llmkit.checkpoint.open_model_files import open_model_files
    from llmkit.checkpoint.registry import signing
    from llmkit.checkpoint.tokenizer import check_chat_templates

    path = Path(arguments.directory).expanduser()
    if (load_manifest(path) or {}).get("layout") is not None:
        from llmkit.shard.verify import verify as verify_layout

        differences = verify_layout(path).differences
    else:
        differences = find_differences(path)
    accepted: list[str] = []
    if arguments.update:
        if differences and all(difference.is_edit for difference in differences):
            check_chat_templates(open_model_files(path))
        accepted = accept_edits(path, differences)
        if accepted and (path / SIGNATURE).is_file():
            output.message(
                f"llmkit verify: warning: {SIGNATURE} is of the files before the edit; "
                "`llmkit sign` makes a new one"
            )
    elif differences:
        problems = [difference.text for difference in differences]
        edited = sorted({difference.file for difference in differences if difference.is_edit})
        output.result(
            {"ok": False, "signature": "not checked", "problems": problems, "edited": edited},
            lambda console: show_problems(console, differences),
        )
        raise differences_error(path, differences)
    signature = "not checked"
    if arguments.public_key:
        signing.verify(path, Path(arguments.public_key).expanduser())
        signature = "valid"
    updated = f"; updated: {', '.join(accepted)}" if accepted else ""
    output.result(
        {"ok": True, "signature": signature, "problems": [], "updated": accepted},
        lambda console: console.print(
            f"{arguments.directory} verifies; signature: {signature}{updated}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        ),
    )


def _show(output: Output, moved: TransferResult, further: dict[str, Any]) -> None:
    if moved.left_out:
        output.message(f"left out, not in the manifest: {', '.join(moved.left_out[:10])}")
    signature = f", signature {further['signature']}" if "signature" in further else ""
    state = "already there, " if moved.already_there else ""
    text = (
        f"{moved.source} -> {moved.target}: {state}{count_text(moved.files, 'files')}, "
        f"{bytes_text(moved.bytes)}, all compared{signature}"
    )
    output.result(
        dataclasses.asdict(moved) | further,
        lambda console: console.print(text, markup=False, highlight=False, soft_wrap=True),
    )
