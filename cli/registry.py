"""`llmkit pull`, `push`, `sign` and `verify`: checkpoints to and from other places, unchanged."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.checkpoint.hub import looks_remote
from llmkit.checkpoint.text import bytes_text
from llmkit.cli.output import Output

if TYPE_CHECKING:
    from llmkit.checkpoint.transfer import Moved

ReferenceArgument = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="A directory, a hub id, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, models:/NAME/VERSION, models:/NAME@ALIAS "
        "or runs:/RUN/PATH.",
    ),
]
FolderArgument = Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint's folder.")]
OutOption = Annotated[
    str, typer.Option("--output", "-o", metavar="DIR", help="The folder to write; it must be absent or empty.")
]
PublicKeyOption = Annotated[
    str | None,
    typer.Option(
        "--public-key",
        metavar="FILE",
        show_default="none",
        help="Also check that model.sig was made with the private part of this key (PEM).",
    ),
]


def pull(output: Output, reference: ReferenceArgument, out: OutOption, public_key: PublicKeyOption = None) -> None:
    """Bring a checkpoint here: what its manifest names, every file compared with it on the way.

    Interrupted, it is continued by the same command.
    """
    from llmkit.checkpoint.signing import verify as verify_signature
    from llmkit.checkpoint.transfer import pull as run

    check = partial(verify_signature, key=Path(public_key).expanduser()) if public_key else None
    made = run(reference, Path(out).expanduser().absolute(), output.progress(), check)
    _show(output, made, {"signature": "valid" if public_key else "not checked" if made.signed else "none"})


def push(
    output: Output,
    folder: FolderArgument,
    target: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="Where to: a directory, hf://ORGANIZATION/NAME, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, models:/NAME "
            "or models:/NAME@ALIAS.",
        ),
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace another checkpoint that is there.")] = False,
) -> None:
    """Send a checkpoint elsewhere, its manifest last, and compare what has arrived.

    It is compared with its manifest first; one without a manifest gets one there. Interrupted, it is continued by the
    same command.
    """
    from llmkit.checkpoint.files import locate
    from llmkit.checkpoint.transfer import push as run

    made = run(locate(Path(folder)), target, output.progress(), force)
    _show(output, made, {})


def sign(
    output: Output,
    folder: FolderArgument,
    key: Annotated[
        str,
        typer.Option(
            "--key",
            metavar="FILE",
            help="An elliptic private key (PEM); LLMKIT_KEY_PASSWORD has its password, if it has one.",
        ),
    ],
) -> None:
    """Sign a checkpoint with a key: writes model.sig, which any OpenSSF model-signing tool can verify."""
    from llmkit.checkpoint.signing import sign as run

    path = str(run(Path(folder).expanduser(), Path(key).expanduser()))
    output.result({"signature": path}, lambda console: console.print(path, markup=False, highlight=False))


def verify(output: Output, folder: FolderArgument, public_key: PublicKeyOption = None) -> None:
    """Compare every file and tensor of a checkpoint with its manifest; of a layout, what `shard verify` does."""
    from llmkit.checkpoint.errors import InputError
    from llmkit.checkpoint.manifest import load_manifest, verify_manifest
    from llmkit.checkpoint.signing import verify as verify_signature

    path = Path(folder).expanduser()
    if (load_manifest(path) or {}).get("layout") is not None:
        from llmkit.shard.verify import verify as verify_layout

        problems = verify_layout(path).problems
    else:
        problems = verify_manifest(path)
    if problems:
        raise InputError(f"{folder} does not verify ({len(problems)} wrong, the first: {problems[0]})")
    if public_key:
        verify_signature(path, Path(public_key).expanduser())
    signature = "valid" if public_key else "not checked"
    output.result(
        {"ok": True, "signature": signature},
        lambda console: console.print(
            f"{folder} verifies; signature: {signature}", markup=False, highlight=False, soft_wrap=True
        ),
    )


def local_copies(
    output: Output, model: str, more: list[str] | None, names: list[str] | None
) -> tuple[str, list[str] | None, list[str] | None]:
    """`serve`'s models, URLs replaced by their local copies, so that all its processes load the same, and its names."""

    def local(one: str) -> str:
        name, equals, reference = one.partition("=")
        if equals and looks_remote(reference):
            return f"{name}={fetched(output, reference)}"
        return f"{_short(one)}={fetched(output, one)}" if looks_remote(one) else one

    if more:
        return local(model), [local(one) for one in more], names
    if looks_remote(model):
        return fetched(output, model), more, names or [_short(model)]
    return local(model), more, names


def fetched(output: Output, reference: str) -> str:
    """The local copy of what a URL names, with a bar while it is made."""
    from llmkit.checkpoint.remote import cached

    return str(cached(reference, output.progress()))


def _short(reference: str) -> str:
    """What a model at a URL is called in the API: no bucket, no registry."""
    scheme, _, path = reference.rstrip("/").partition(":/")
    return path.strip("/") if scheme in ("models", "hf") else path.rpartition("/")[2]


def _show(output: Output, made: Moved, further: dict[str, Any]) -> None:
    if made.left_out:
        output.message(f"left out, not in the manifest: {', '.join(made.left_out[:10])}")
    signature = f", signature {further['signature']}" if "signature" in further else ""
    text = f"{made.source} -> {made.target}: {made.files} files, {bytes_text(made.bytes)}, all compared{signature}"
    output.result(
        dataclasses.asdict(made) | further,
        lambda console: console.print(text, markup=False, highlight=False, soft_wrap=True),
    )
