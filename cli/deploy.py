"""`llmkit deploy`: a checkpoint on Ray Serve, Triton, vLLM on several machines, or a Gateway."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from llmkit.checkpoint.output_directory import replace_file, write_new_file
from llmkit.cli.output import Output
from llmkit.cli.serve import ServeArguments, serve_options
from llmkit.cli.typer_options import given_words
from llmkit.common.errors import UsageError
from llmkit.common.option_values import SHARE, parse_range, within
from llmkit.common.options import Argument, Option, ValueFormat
from llmkit.runtime.server.serve_options import ALLOWED_HOSTS, ALLOWED_ORIGINS, default_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from llmkit.deploy.rollout_table import RolloutTable
    from llmkit.runtime.server.serve_options import ServeOptions

SERVE_WORDS = Argument("After --: options of `llmkit serve`.", metavar="-- OPTIONS")
NAME = Option("The model's name in the API.", metavar="NAME", unset="MODEL's last part")
OUTPUT_FILE = Option(
    "File to write; it must be absent.", flags=("--output", "-o"), metavar="FILE", unset="none"
)
KV_CACHE_TOKENS = Option("Tokens of KV cache that must fit beside the weights.", metavar="N", min=1)
MAX_MODEL_LEN = Option(
    "Maximum tokens of a request.", metavar="N", unset="--tokens, or the model's"
)
SERVER_PORT = Option("Port of the server.", metavar="N")
# Options of `llmkit serve` that the platform of a container sets, or that it could not use.
_NOT_IN_CONTAINERS = frozenset(
    {
        "host",
        "port",
        "grpc_port",
        "sagemaker",
        "api_key",
        "api_key_file",
        "ssl_certfile",
        "ssl_keyfile",
        "ssl_ca_certs",
        "plan",
        "served_model_name",
    }
)


def _parse_bounds(option: str, text: str) -> tuple[int, int]:
    try:
        return parse_range(option, text.replace(":", "-"))
    except UsageError:
        raise UsageError(
            f"{option}: {text!r} is not LOW:HIGH",
            "Two numbers were expected, of which the first is at least 1 and not the larger",
            "Write it like 1:8",
        ) from None


# The smallest and largest number of replicas: 1:8.
REPLICA_BOUNDS = ValueFormat(_parse_bounds, lambda bounds: f"{bounds[0]}:{bounds[1]}")


@dataclass(frozen=True, kw_only=True)
class RayArguments:
    """What `llmkit deploy ray` takes."""

    model: Annotated[
        str | None,
        Argument(
            "A checkpoint: a directory that every node has, or a hub id.",
            metavar="MODEL",
            is_model=True,
        ),
    ] = None
    serve_words: Annotated[tuple[str, ...], SERVE_WORDS] = ()
    name: Annotated[str | None, NAME] = None
    replicas: Annotated[
        int,
        Option("Number of replicas without --autoscale.", metavar="N", check=within(1)),
    ] = 1
    autoscale: Annotated[
        tuple[int, int] | None,
        Option(
            "Add and remove replicas by the requests in flight.",
            metavar="LOW:HIGH",
            format=REPLICA_BOUNDS,
            unset="off",
        ),
    ] = None
    downscale_delay: Annotated[
        float,
        Option(
            "With --autoscale: how long the load must be lower before a replica is removed.",
            metavar="SECONDS",
        ),
    ] = 600.0
    cpus: Annotated[float, Option("CPU cores of a replica.", metavar="N")] = 1.0
    gpus: Annotated[
        float, Option("GPUs of a replica: as many as its --tp times --pp.", metavar="N")
    ] = 0.0
    share: Annotated[
        float | None,
        Option(
            "Share of the model's traffic for this new checkpoint beside the old one; without "
            "MODEL, its new share.",
            metavar="PERCENT",
            format=SHARE,
            unset="all",
        ),
    ] = None
    promote: Annotated[bool, Option("Send all traffic of --name to its new checkpoint.")] = False
    rollback: Annotated[bool, Option("Send all traffic of --name to its old checkpoint.")] = False
    remove: Annotated[bool, Option("Delete the model --name.")] = False
    address: Annotated[
        str, Option("The Ray cluster; auto: the one of this node.", metavar="ADDRESS")
    ] = "auto"
    host: Annotated[
        str,
        Option(
            "Address that each node's HTTP proxy listens on; any other than loopback needs a key.",
            metavar="HOST",
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Option("Port of the HTTP proxies.", metavar="N")] = 8000
    api_key_file: Annotated[
        str | None,
        Option("A file of keys, on every node; see `llmkit serve`.", metavar="FILE", unset="none"),
    ] = None
    allowed_hosts: Annotated[
        tuple[str, ...],
        ALLOWED_HOSTS,
    ] = ()
    allowed_origins: Annotated[
        tuple[str, ...],
        ALLOWED_ORIGINS,
    ] = ()


@dataclass(frozen=True, kw_only=True)
class TritonArguments:
    """What `llmkit deploy triton` takes."""

    model: Annotated[
        str,
        Argument(
            "A checkpoint, at a path that Triton's machine has, or a hub id.",
            metavar="MODEL",
            is_model=True,
        ),
    ]
    serve_words: Annotated[tuple[str, ...], SERVE_WORDS] = ()
    output: Annotated[
        str,
        Option("The model repository; may hold others.", flags=("--output", "-o"), metavar="DIR"),
    ]
    name: Annotated[
        str | None,
        Option("The model's name in Triton.", metavar="NAME", unset="MODEL's last part"),
    ] = None
    ensemble: Annotated[
        bool,
        Option("Write a tokenizer, a model from ids to ids, a detokenizer, and their ensemble."),
    ] = False


@dataclass(frozen=True, kw_only=True)
class GatewayArguments:
    """What `llmkit deploy gateway` takes."""

    route: Annotated[str, Argument("The HTTPRoute's name.", metavar="NAME")]
    output: Annotated[
        str,
        Option(
            "The file of the HTTPRoute: changed if it is there, else written.",
            flags=("--output", "-o"),
            metavar="FILE",
        ),
    ]
    next: Annotated[
        str | None,
        Option(
            "The Service of the new version. After --promote, the version after that.",
            metavar="SERVICE",
            unset="the file's, or NAME-next",
        ),
    ] = None
    share: Annotated[
        float | None,
        Option(
            "Share of the traffic for the new version.",
            metavar="PERCENT",
            format=SHARE,
            unset="as it is, or none",
        ),
    ] = None
    promote: Annotated[bool, Option("Send all traffic to the new version.")] = False
    rollback: Annotated[bool, Option("Send all traffic to the old version.")] = False
    gateway: Annotated[
        str,
        Option("In a new file: the Gateway of the route.", metavar="NAME"),
    ] = "llmkit"
    port: Annotated[
        int, Option("In a new file: the port of both Services.", metavar="N", min=1, max=65535)
    ] = 80
    mirror: Annotated[
        int,
        Option(
            "In a new file: percent of the requests that the new version gets as a copy, too; the "
            "Gateway drops its answers.",
            metavar="N",
            min=0,
            max=100,
        ),
    ] = 0


@dataclass(frozen=True, kw_only=True)
class VllmArguments:
    """What `llmkit deploy vllm` takes."""

    model: Annotated[
        str,
        Argument(
            "A checkpoint, at a path that every node has, or a hub id.",
            metavar="MODEL",
            is_model=True,
        ),
    ]
    gpu: Annotated[
        str,
        Option(
            "Each node's GPUs: h100-80, h200 ..., trn2, v6e, gaudi3 ..., or a size like 48GiB "
            "(of a rank).",
            metavar="NAME",
        ),
    ]
    device: Annotated[
        Literal["cuda", "neuron", "tpu", "hpu"] | None,
        Option(
            "vLLM's plugin: neuron for Inferentia and Trainium, tpu, hpu for Gaudi.",
            choices=("cuda", "neuron", "tpu", "hpu"),
            unset="that of --gpu",
        ),
    ] = None
    gpus_per_node: Annotated[
        int, Option("GPUs of a node; of other devices the chips or cards.", metavar="N", min=1)
    ] = 8
    image: Annotated[
        str | None, Option("Container image.", metavar="NAME", unset="the device's")
    ] = None
    form: Annotated[
        Literal["command", "ray", "lws", "kserve"],
        Option(
            "command: a shell script; ray: a config for Ray Serve LLM; lws: a LeaderWorkerSet; "
            "kserve: an LLMInferenceService.",
            metavar="FORM",
        ),
    ] = "command"
    output: Annotated[str | None, OUTPUT_FILE] = None
    name: Annotated[str | None, NAME] = None
    tokens: Annotated[int, KV_CACHE_TOKENS] = 65_536
    max_model_len: Annotated[int | None, MAX_MODEL_LEN] = None
    uri: Annotated[
        str | None,
        Option("For kserve: hf://…, s3://… or pvc://….", metavar="URI", unset="hf://MODEL"),
    ] = None
    replicas: Annotated[int, Option("Replicas of the whole layout.", metavar="N", min=1)] = 1
    port: Annotated[int, SERVER_PORT] = 8000


def ray(output: Output, arguments: RayArguments) -> None:
    """Serve a model on a Ray cluster: replicas by load, prefix-aware routing, blue/green. Without
    MODEL, show the deployed models.

    Needs llmkit[ray] here and on every node.
    """
    from llmkit.deploy.ray_serve import Cluster, ClusterAddress, ReplicaOptions

    _check_ray(arguments)
    model = arguments.model
    lowest, highest = arguments.autoscale or (arguments.replicas, None)
    name = arguments.name or (re.split(r"[/\\]", model.rstrip("/"))[-1] if model else "")
    cluster = Cluster(
        ClusterAddress(
            arguments.address,
            arguments.host,
            arguments.port,
            arguments.api_key_file,
            arguments.allowed_hosts,
            arguments.allowed_origins,
        )
    )
    if model is not None:
        options = serve_options(model, name, list(arguments.serve_words), arguments.api_key_file)
        replicas = ReplicaOptions(
            lowest, highest, arguments.cpus, arguments.gpus, arguments.downscale_delay
        )
        output.message(f"starting {name} from {model}: {lowest} replica{'s' if lowest > 1 else ''}")
        table = cluster.deploy(name, options, replicas, arguments.share)
    elif arguments.share is not None:
        table = cluster.set_share(name, arguments.share)
    elif arguments.promote:
        table = cluster.promote(name)
    elif arguments.rollback:
        table = cluster.rollback(name)
    elif arguments.remove:
        table = cluster.remove(name)
    else:
        table = cluster.table()
    _show_table(output, table, f"http://{arguments.host}:{arguments.port}")


def triton(output: Output, arguments: TritonArguments) -> None:
    """Write a model repository for Triton: its Python backend starts the server and streams its
    responses.

    Triton's Python needs llmkit; inputs and outputs are those of Triton's vLLM backend.
    """
    from llmkit.deploy.triton import write_repository

    name = arguments.name or default_name(arguments.model)
    options = serve_options(
        absolute_model(arguments.model), name, list(arguments.serve_words), None
    )
    written = write_repository(Path(arguments.output), name, options, arguments.ensemble)
    files = [str(file) for file in written]
    document = {"name": name, "repository": arguments.output, "files": files}
    output.result(
        document, lambda console: console.print("\n".join(files), markup=False, highlight=False)
    )


def gateway(output: Output, arguments: GatewayArguments) -> None:
    """Divide a model's traffic on Kubernetes between two versions: write the weights of a Gateway
    API HTTPRoute, for canary releases and blue/green.

    `kubectl apply -f FILE`, or a commit, brings them to the cluster.
    """
    from llmkit.deploy.gateway_route import (
        RouteFile,
        RouteTemplate,
        Traffic,
        check_service,
        new_route,
    )

    if arguments.promote + arguments.rollback + (arguments.share is not None) > 1:
        raise UsageError("one of --share, --promote and --rollback can be given at a time")
    if arguments.next is not None:
        check_service("--next", arguments.next)
    path = Path(arguments.output)
    file = RouteFile(path, arguments.route) if path.exists() else None
    if file is not None:
        if arguments.mirror:
            raise UsageError(
                f"--mirror is for a new file, and {path} exists",
                todo="Change the filter RequestMirror in the file",
            )
        traffic = file.traffic
        if arguments.next is not None:
            traffic = traffic.with_new(arguments.next)
    else:
        check_service("NAME", arguments.route)
        traffic = Traffic(arguments.route, arguments.next or f"{arguments.route}-next", 0.0)
    share = arguments.share
    if arguments.promote or arguments.rollback:
        share = 1.0 if arguments.promote else 0.0
    if share is not None:
        traffic = replace(traffic, share=share)
    if file is not None:
        text = file.with_traffic(traffic)
    else:
        text = new_route(
            RouteTemplate(arguments.route, arguments.gateway, arguments.port, arguments.mirror),
            traffic,
        )
    replace_file(path.resolve(), text.encode())
    shares = {traffic.old: round(1 - traffic.share, 4), traffic.new: round(traffic.share, 4)}
    for service in sorted(file.mirrors if file is not None else ()):
        if shares.get(service):
            output.message(
                f"note: the filter RequestMirror copies requests to {service}, which answers "
                "clients now: take it out of the file"
            )

    def show(console: Console) -> None:
        parts = [f"{service} {part:.2%}" for service, part in shares.items()]
        console.print(f"{path}: {', '.join(parts)}", markup=False, highlight=False)

    output.result(
        {
            "route": arguments.route,
            "output": arguments.output,
            "old": traffic.old,
            "new": traffic.new,
            "shares": shares,
        },
        show,
    )


def vllm(output: Output, arguments: VllmArguments) -> None:
    """Write the files that start vLLM on the fewest nodes that hold a model, for a model that does
    not fit on one node, or for Inferentia, Trainium, TPUs and Gaudi.

    Quantize with `llmkit quantize` first: vLLM reads its formats.
    """
    from llmkit.cli.shard import gpu_memory
    from llmkit.deploy.loadable_checkpoints import check_loads
    from llmkit.deploy.vllm_devices import (
        CUDA,
        GIB,
        accelerator_of,
        require_one_node,
        static_batch,
    )
    from llmkit.deploy.vllm_on_ray import VllmDeployment, render_deployment
    from llmkit.shard.layout_capacity import smallest_layout
    from llmkit.shard.shard_checkpoint import open_source, validated_spec

    model = arguments.model
    device, accelerator = accelerator_of(arguments.gpu, arguments.device)
    source = open_source(model)
    loadable = None if device == CUDA else check_loads(device.engine, model, source.checkpoint)
    cores = accelerator.cores if accelerator else 1
    memory = accelerator.memory_gib * GIB if accelerator else gpu_memory(arguments.gpu)
    ranks_per_node = arguments.gpus_per_node * cores
    tp, pp = smallest_layout(source, memory, ranks_per_node, arguments.tokens)
    require_one_node(device, pp, arguments.tokens)
    max_model_len = arguments.max_model_len
    if not max_model_len:
        max_model_len = min(arguments.tokens, validated_spec(source).max_position_embeddings)
    deployment = VllmDeployment(
        name=object_name(arguments.name or default_name(model)),
        model=absolute_model(model),
        tp=tp,
        pp=pp,
        max_model_len=max_model_len,
        gpus_per_node=arguments.gpus_per_node,
        replicas=arguments.replicas,
        port=arguments.port,
        uri=arguments.uri,
        device=device,
        cores=cores,
        node_selector=accelerator.node_selector(arguments.gpus_per_node) if accelerator else {},
        image=arguments.image,
        format_arguments=loadable.arguments if loadable else (),
        format_environment=loadable.environment if loadable else (),
        max_num_seqs=static_batch(device, arguments.tokens, max_model_len),
    )
    text = render_deployment(deployment, arguments.form)
    if deployment.nodes == 1 and device == CUDA:
        output.message(
            f"it fits on one node with --tp {tp}: `llmkit serve {model} --tp {tp}` needs no other "
            "engine"
        )
    document = {
        "tp": tp,
        "pp": pp,
        "nodes": deployment.nodes,
        "max_model_len": max_model_len,
        "device": device.name,
        "form": arguments.form,
        "output": arguments.output,
        "text": text,
    }

    nodes = f"{deployment.nodes} nodes of {arguments.gpus_per_node} {arguments.gpu}"
    show_file(output, document, f"TP {tp}, PP {pp} on {nodes}")


def show_file(output: Output, document: dict[str, Any], summary: str) -> None:
    """Write `text` of the document to its `output`, or else to stdout.

    summary: of the file that was written. Raises OutputError when it exists, ShortageError when it
    cannot be written.
    """
    path = document["output"]
    if path is not None:
        write_new_file(Path(path), document["text"])

    def show(console: Console) -> None:
        if path is None:
            text = document["text"]
            console.print(text, markup=False, highlight=False, soft_wrap=True, end="")
        else:
            console.print(f"{path}: {summary}", markup=False, highlight=False)

    output.result(document, show)


def _check_ray(arguments: RayArguments) -> None:
    """Raises UsageError for options that do not go together."""
    from llmkit.runtime.server.http.hosts import is_loopback

    changes = arguments.promote + arguments.rollback + arguments.remove
    with_model = arguments.model is not None
    if changes + with_model > 1 or (changes and arguments.share):
        raise UsageError("one of MODEL, --promote, --rollback and --remove can be given at a time")
    if arguments.name is None and (changes or (arguments.share and not with_model)):
        raise UsageError("--name is missing", "It says which model is meant")
    if not is_loopback(arguments.host) and not arguments.api_key_file:
        raise UsageError(
            f"--host {arguments.host} can be reached from elsewhere",
            "An --api-key-file is needed there",
        )


def container_options(model: str, name: str, words: Sequence[str]) -> ServeOptions:
    """The checked options of `llmkit serve` in a container.

    Raises UsageError for one that the deployment sets, and what the command line raises.
    """
    for field in given_words(ServeArguments, "serve", [model, *words]):
        if field.name in _NOT_IN_CONTAINERS or field.name == "more":
            raise UsageError(
                f"{field.label} is not for a server in a container",
                "Its address, names and key are set by the deployment",
                "Leave it out",
            )
    return serve_options(model, name, list(words), None)


def absolute_model(model: str) -> str:
    """A path in full, for another working directory; a hub id as it is."""
    path = Path(model)
    return str(path.resolve()) if path.exists() else model


def object_name(text: str) -> str:
    """A name that Kubernetes allows for an object."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63] or "model"


def _show_table(output: Output, table: RolloutTable, url: str) -> None:
    models = {
        name: [
            {"application": version.app, "checkpoint": version.checkpoint, "share": version.share}
            for version in versions
        ]
        for name, versions in table.items()
    }

    def show(console: Console) -> None:
        from rich.table import Table

        lines = Table(title=f"{url}/v1", title_justify="left")
        for column in ("model", "checkpoint", "application", "traffic"):
            lines.add_column(column, justify="right" if column == "traffic" else "left")
        for name, versions in table.items():
            for version in versions:
                share = f"{version.share:.1%}"
                lines.add_row(name, version.checkpoint, version.app, share)
        if table:
            console.print(lines)
        else:
            console.print("No model is deployed.")

    output.result({"url": f"{url}/v1", "models": models}, show)
