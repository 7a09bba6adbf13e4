"""`llmkit deploy`: a checkpoint on engines that exist, for more than one machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmkit.checkpoint.errors import UsageError
from llmkit.checkpoint.output import writing
from llmkit.cli.output import Output
from llmkit.cli.serve import serve_options
from llmkit.cli.sizes import in_range, parse_range, parse_share

if TYPE_CHECKING:
    from rich.console import Console

    from llmkit.deploy.table import Table

RestArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- OPTIONS", help="After --: options of `llmkit serve` for each replica."),
]


def ray(
    output: Output,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A checkpoint: a directory that every node has, or a hub id."),
    ] = None,
    options: RestArgument = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name in the API.", show_default="MODEL's last part")
    ] = None,
    replicas: Annotated[int, typer.Option(metavar="N", help="Replicas, where none are added by load.")] = 1,
    autoscale: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="Add and remove replicas by the requests in flight.", show_default="off"),
    ] = None,
    downscale_delay: Annotated[
        float, typer.Option(metavar="SECONDS", help="Of --autoscale: how long load must be less before a replica goes.")
    ] = 600.0,
    cpus: Annotated[float, typer.Option(metavar="N", help="CPU cores of a replica.")] = 1.0,
    gpus: Annotated[float, typer.Option(metavar="N", help="GPUs of a replica: as many as its --tp times --pp.")] = 0.0,
    share: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT",
            help="Of the model's traffic for this new checkpoint beside the old one; without MODEL, another share.",
            show_default="all",
        ),
    ] = None,
    promote: Annotated[bool, typer.Option("--promote", help="All traffic of --name to its new checkpoint.")] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="All traffic of --name to its old checkpoint.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Take the model --name away.")] = False,
    address: Annotated[
        str, typer.Option(metavar="ADDRESS", help="The Ray cluster; auto: the one of this node.")
    ] = "auto",
    host: Annotated[
        str, typer.Option(metavar="HOST", help="What each node's HTTP proxy listens on; beyond loopback needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="Port of the HTTP proxies.")] = 8000,
    api_key_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A file of keys, on every node; see `llmkit serve`.", show_default="none"),
    ] = None,
) -> None:
    """Serve a model on a Ray cluster: replicas by load, prefix-aware routing, blue/green. Without MODEL, show what is.

    Needs llmkit[ray] here and on every node.
    """
    from llmkit.deploy.ray_serve import Cluster, Place, Size
    from llmkit.runtime.server.http.hosts import is_loopback

    in_range("--replicas", replicas, 1)
    changes = [
        option for option, given in (("--promote", promote), ("--rollback", rollback), ("--remove", remove)) if given
    ]
    if len(changes) + (model is not None) > 1 or (changes and share):
        raise UsageError("one of MODEL, --promote, --rollback and --remove can be given at a time")
    if name is None and (changes or (share and model is None)):
        raise UsageError("--name is missing", "It says which model is meant")
    if not is_loopback(host) and not api_key_file:
        raise UsageError(f"--host {host} can be reached from elsewhere", "An --api-key-file is needed there")
    least, most = _bounds(autoscale) if autoscale else (replicas, None)
    portion = parse_share("--share", share) if share else None
    chosen = name or (re.split(r"[/\\]", model.rstrip("/"))[-1] if model else "")
    cluster = Cluster(Place(address, host, port, api_key_file))
    if model is not None:
        served = serve_options(model, chosen, options or [], api_key_file)
        output.message(f"starting {chosen} from {model}: {least} replica{'s' if least > 1 else ''}")
        table = cluster.deploy(chosen, served, Size(least, most, cpus, gpus, downscale_delay), portion)
    elif portion is not None:
        table = cluster.set_share(chosen, portion)
    elif promote:
        table = cluster.promote(chosen)
    elif rollback:
        table = cluster.rollback(chosen)
    elif remove:
        table = cluster.remove(chosen)
    else:
        table = cluster.table()
    _tell(output, table, f"http://{host}:{port}")


def triton(
    output: Output,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint, at a path that Triton's machine has, or a hub id.")
    ],
    out: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The model repository; may hold others.")],
    options: RestArgument = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name in Triton.", show_default="MODEL's last part")
    ] = None,
) -> None:
    """Write a model repository for Triton: its Python backend starts the server and streams what it answers.

    Triton's Python needs llmkit; inputs and outputs are those of Triton's vLLM backend.
    """
    from llmkit.deploy.triton import write_repository
    from llmkit.runtime.server.options import default_name

    path = Path(model)
    chosen = name or default_name(model)
    served = serve_options(str(path.resolve()) if path.exists() else model, chosen, options or [], None)
    files = [str(file) for file in write_repository(Path(out), chosen, served)]
    document = {"name": chosen, "repository": out, "files": files}
    output.result(document, lambda console: console.print("\n".join(files), markup=False, highlight=False))


def vllm(
    output: Output,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint, at a path that every node has, or a hub id.")
    ],
    gpu: Annotated[str, typer.Option(metavar="NAME", help="Each node's GPUs: h100-80, h200 ..., or a size as 48GiB.")],
    gpus_per_node: Annotated[int, typer.Option(min=1, metavar="N", help="GPUs of a node.")] = 8,
    form: Annotated[
        Literal["command", "ray", "lws", "kserve"],
        typer.Option(
            metavar="FORM",
            help="command: a shell script; ray: a config for Ray Serve LLM; lws: a LeaderWorkerSet; "
            "kserve: an LLMInferenceService.",
        ),
    ] = "command",
    out: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there.", show_default="none")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name in the API.", show_default="MODEL's last part")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Of keys and values that have to fit beside the weights.")
    ] = 65_536,
    max_model_len: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens of a request.", show_default="--tokens, or the model's")
    ] = None,
    uri: Annotated[
        str | None,
        typer.Option(metavar="URI", help="For kserve: hf://…, s3://… or pvc://….", show_default="hf://MODEL"),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, metavar="N", help="Replicas of the whole layout.")] = 1,
    port: Annotated[int, typer.Option(metavar="N", help="Port of the server.")] = 8000,
) -> None:
    """Hand a model that does not fit on one node over to vLLM: the fewest nodes that hold it, and what starts it there.

    Quantize with `llmkit quantize` first: vLLM reads its formats.
    """
    from llmkit.cli.shard import gpu_memory
    from llmkit.deploy.vllm import HandOver, written
    from llmkit.runtime.server.options import default_name
    from llmkit.shard.capacity import smallest_layout
    from llmkit.shard.shard import checked_spec, open_source

    source = open_source(model)
    tp, pp = smallest_layout(source, gpu_memory(gpu), gpus_per_node, tokens)
    longest = max_model_len or min(tokens, checked_spec(source).max_positions)
    path = Path(model)
    made = HandOver(
        _object_name(name or default_name(model)),
        str(path.resolve()) if path.exists() else model,
        *(tp, pp, longest, gpus_per_node, replicas, port, uri),
    )
    text = written(made, form)
    if made.nodes == 1:
        output.message(f"it fits on one node with --tp {tp}: `llmkit serve {model} --tp {tp}` needs no other engine")
    if out is not None:
        with writing(Path(out)):
            Path(out).write_text(text, encoding="utf-8")
    document = {"tp": tp, "pp": pp, "nodes": made.nodes, "max_model_len": longest, "form": form, "output": out}

    def show(console: Console) -> None:
        if out is None:
            console.print(text, markup=False, highlight=False, soft_wrap=True, end="")
        else:
            console.print(f"{out}: TP {tp}, PP {pp} on {made.nodes} nodes of {gpus_per_node} {gpu}", highlight=False)

    output.result(document | {"text": text}, show)


def _object_name(text: str) -> str:
    """A name that Kubernetes takes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63] or "model"


def _tell(output: Output, table: Table, url: str) -> None:
    models = {
        name: [{"application": one.app, "checkpoint": one.checkpoint, "share": one.share} for one in versions]
        for name, versions in table.items()
    }

    def show(console: Console) -> None:
        from rich.table import Table as Lines

        lines = Lines(title=f"{url}/v1", title_justify="left")
        for column in ("model", "checkpoint", "application", "traffic"):
            lines.add_column(column, justify="right" if column == "traffic" else "left")
        for name, versions in table.items():
            for one in versions:
                lines.add_row(name, one.checkpoint, one.app, f"{one.share:.1%}")
        if table:
            console.print(lines)
        else:
            console.print("No model is deployed.")

    output.result({"url": f"{url}/v1", "models": models}, show)


def _bounds(text: str) -> tuple[int, int]:
    return parse_range("--autoscale", text.replace(":", "-"))
