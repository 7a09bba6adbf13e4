"""`llmkit serve`: an OpenAI-compatible server of one checkpoint, or of several."""

from __future__ import annotations

import getpass
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmkit.checkpoint.hub import is_url
from llmkit.cli.output import Output
from llmkit.cli.typer_options import parse_words
from llmkit.common.errors import InputError, UsageError
from llmkit.common.formatting import bytes_text
from llmkit.common.option_values import within
from llmkit.common.options import Argument, Option
from llmkit.runtime.engine.engine_options import NO_KV_OFFLOAD, EngineOptions, duplicate_adapter
from llmkit.runtime.gpu_sharing import parse_mps_shares
from llmkit.runtime.server.serve_options import SERVER_PANEL, ServeOptions, default_name
from llmkit.runtime.server.tiers.upstream_urls import is_upstream

if TYPE_CHECKING:
    from rich.console import Console

    from llmkit.runtime.server.shadow.shadow_options import ShadowOptions
    from llmkit.runtime.server.tiers.route_config import Routing


ROUTES_PANEL = "Routes"


def _at_least_one(option: str, value: int | None) -> None:
    if value is not None:
        within(1)(option, value)


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """What `llmkit serve` takes."""

    options: ServeOptions
    more: Annotated[
        tuple[str, ...],
        Argument(
            "More models behind the same port, each loaded when a request names it.",
            metavar="[NAME=]MODEL",
            completes_models=True,
            follows="model",
            in_recipes=False,
        ),
    ] = ()
    served_model_name: Annotated[
        tuple[str, ...],
        Option(
            "The model's name in the API; repeat for more, the first is the main one.",
            metavar="NAME",
            unset="MODEL's last part",
            follows="ep",
        ),
    ] = ()
    route: Annotated[
        tuple[str, ...],
        Option(
            "A name that several models answer, the cheapest first: a model that is not sure of "
            "its answer leaves it to the next; repeat for more (docs/routing.md).",
            metavar="NAME=TIER,TIER[:RULE]",
            unset="none",
            follows="dp",
            in_recipes=False,
            panel=ROUTES_PANEL,
        ),
    ] = ()
    route_config: Annotated[
        Path | None,
        Option(
            "A YAML file of routes and of tiers at URLs, as `llmkit bench route` writes it.",
            metavar="FILE",
            unset="none",
            follows="route",
            in_recipes=False,
            panel=ROUTES_PANEL,
        ),
    ] = None
    shadow: Annotated[
        tuple[str, ...],
        Option(
            "Send a share of NAME's requests to another model, too, and compare both answers. "
            "Clients get NAME's answers only; repeat for more.",
            metavar="NAME=SHADOW[:SHARE]",
            unset="none",
            follows="route_config",
            in_recipes=False,
            panel=ROUTES_PANEL,
        ),
    ] = ()
    shadow_judge: Annotated[
        str | None,
        Option(
            "The model of this server, or at a URL, that says which of both answers is better.",
            metavar="NAME",
            unset="none",
            follows="shadow",
            in_recipes=False,
            panel=ROUTES_PANEL,
        ),
    ] = None
    shadow_log: Annotated[
        Path | None,
        Option(
            "A file of JSON Lines that gets the result of each comparison.",
            metavar="FILE",
            unset="none",
            follows="shadow_judge",
            in_recipes=False,
            panel=ROUTES_PANEL,
        ),
    ] = None
    shadow_log_texts: Annotated[
        bool,
        Option(
            "Write requests and answers to --shadow-log, too.",
            follows="shadow_log",
            in_recipes=False,
            panel=ROUTES_PANEL,
        ),
    ] = False
    max_loaded: Annotated[
        int | None,
        Option(
            "With several models: the maximum that are loaded at a time.",
            metavar="N",
            unset="1, or as many as one route or shadow needs",
            check=_at_least_one,
            follows="dp",
            in_recipes=False,
            panel=SERVER_PANEL,
        ),
    ] = None
    idle_timeout: Annotated[
        float,
        Option(
            "With several models: unload a model after this time without requests; 0: never.",
            metavar="SECONDS",
            check=within(0),
            follows="max_loaded",
            in_recipes=False,
            panel=SERVER_PANEL,
        ),
    ] = 0.0
    mps_share: Annotated[
        tuple[str, ...],
        Option(
            "With several models on a GPU and MPS: the percent of the GPU's threads that NAME may "
            "use at most; repeat for more.",
            metavar="NAME=PERCENT",
            unset="all of them",
            follows="idle_timeout",
            in_recipes=False,
            panel=SERVER_PANEL,
        ),
    ] = ()
    api_key: Annotated[
        str | None,
        Option(
            "The key that clients must send; - asks for it on a terminal or reads a line of stdin.",
            metavar="KEY|-",
            unset="LLMKIT_API_KEY, if set",
            is_secret=True,
            in_recipes=False,
        ),
    ] = None
    plan: Annotated[
        bool,
        Option(
            "Show how memory would be divided and what fits, and stop without loading.",
            in_recipes=False,
        ),
    ] = False


def serve(output: Output, arguments: ServeArguments) -> int:
    """Serve checkpoints over the OpenAI API, with continuous batching. Ctrl-C or SIGTERM stops it
    gracefully.
    """
    arguments = _with_local_models(output, arguments)
    models = named_models(arguments.options.model, arguments.more)
    if models:
        _refuse_options_of_one_model(arguments)
    elif arguments.route or arguments.route_config is not None:
        raise UsageError(
            "--route and --route-config are for several models, and there is one",
            "NAME=MODEL or NAME=https://HOST/v1 for each tier was expected",
        )
    elif arguments.mps_share:
        raise UsageError(
            "--mps-share is for several models, and there is one",
            todo="Set CUDA_MPS_ACTIVE_THREAD_PERCENTAGE in the environment of its server",
        )
    elif arguments.shadow:
        raise UsageError(
            "--shadow is for several models, and there is one",
            "NAME=MODEL and SHADOW=MODEL, or a URL in the place of MODEL, were expected",
        )
    loads_on_request = arguments.options.sagemaker == "multi-model"
    if loads_on_request:
        _check_folder_of_models(arguments, models)
    options = server_options(arguments, output.debug)
    if arguments.plan:
        return _plan(output, options.model, options.engine)
    _take_api_key(arguments)
    from llmkit.runtime.server.process_age import process_age
    from llmkit.runtime.server.run_server import run_server

    started_at = time.perf_counter() - process_age()
    if models:
        from llmkit.runtime.server.router.check_models import ModelCheck

        models, routing = _routing(arguments, models)
        shadows = _shadows(arguments, models, routing)
        device = arguments.options.engine.device
        mps_shares = parse_mps_shares(arguments.mps_share, models, device)
        with ModelCheck(options, models) as check:
            # Imported here, while the process checks the models.
            from llmkit.runtime.server.router.run_models import run_models

            return run_models(
                options,
                models,
                _max_loaded(arguments, models, routing, shadows),
                arguments.idle_timeout,
                lambda text: output.message(f"llmkit serve: {text}"),
                lambda facts: output.result(facts, lambda console: None),
                started_at,
                check.wait,
                routing,
                shadows,
                mps_shares,
            )
    if loads_on_request:
        from llmkit.runtime.server.router.run_models import run_models

        return run_models(
            options,
            {},
            arguments.max_loaded or sys.maxsize,
            arguments.idle_timeout,
            lambda text: output.message(f"llmkit serve: {text}"),
            lambda facts: output.result(facts, lambda console: None),
            started_at,
            dict,
        )
    return run_server(
        options,
        lambda text: output.message(f"llmkit serve: {text}"),
        lambda facts: _ready(output, facts),
        started_at,
    )


def _routing(arguments: ServeArguments, models: dict[str, str]) -> tuple[dict[str, str], Routing]:
    """The local models, and the routes over them and over URLs. Raises UsageError."""
    # Keeps pydantic off the start path of servers of one model.
    from llmkit.runtime.server.http.api_keys import load_api_keys
    from llmkit.runtime.server.tiers.route_config import load_routing, split_upstreams

    local, upstreams = split_upstreams(models)
    key_names = [client.name for client in load_api_keys(arguments.options) if client.name]
    words = arguments.route
    return local, load_routing(words, arguments.route_config, local, upstreams, key_names)


def _shadows(
    arguments: ServeArguments, models: Mapping[str, str], routing: Routing
) -> ShadowOptions:
    """The shadows of local models and of URLs. Raises UsageError."""
    # Imported here for the same reason.
    from llmkit.runtime.server.shadow.shadow_options import shadow_options

    return shadow_options(
        arguments.shadow,
        arguments.shadow_judge,
        arguments.shadow_log,
        arguments.shadow_log_texts,
        models,
        routing.upstreams,
    )


def _max_loaded(
    arguments: ServeArguments,
    models: Mapping[str, str],
    routing: Routing,
    shadows: ShadowOptions,
) -> int:
    """The models that are loaded at a time. Raises UsageError where a route needs more."""
    needed_by = {
        "a route has {} models of this server as tiers": routing.num_local(models),
        "a model, its shadow and the judge are {} models of this server": shadows.num_local(models),
    }
    given = arguments.max_loaded
    for what, needed in needed_by.items():
        if given is not None and given < needed:
            raise UsageError(
                f"--max-loaded {given}: {what.format(needed)}",
                "They are loaded at the same time",
                f"Give --max-loaded {needed}",
            )
    return given or max(1, *needed_by.values())


def server_options(arguments: ServeArguments, debug: bool = False) -> ServeOptions:
    """The options that `run_server` takes.

    Raises UsageError for an adapter with the model's name, and InputError for one that is missing.
    """
    options = arguments.options
    engine = options.engine
    names = tuple(dict.fromkeys(arguments.served_model_name))
    for name, directory in engine.adapters.items():
        if name in (names or (options.model,)):
            raise duplicate_adapter(name, directory)
        if not Path(directory).is_dir():
            raise InputError(
                f"--lora {name}={directory}: {directory} is not a directory",
                "An adapter as peft saves it was expected",
            )
    return replace(
        options,
        engine=engine.with_draft_tokens(),
        served_model_name=names[0] if names else None,
        aliases=names[1:],
        debug=debug,
    )


def serve_options(
    model: str, name: str, words: list[str], api_key_file: str | None
) -> ServeOptions:
    """The options of `llmkit serve MODEL WORDS`, under another name and with another file of keys.

    Raises what the command line raises.
    """
    arguments = parse_words(ServeArguments, "serve", [model, *words])
    if arguments.api_key is not None:
        raise UsageError(
            "--api-key is for `llmkit serve`, and this command gives its servers their keys",
            todo="Leave it out",
        )
    options = server_options(replace(arguments, served_model_name=(name,)))
    return replace(options, api_key_file=None if api_key_file is None else Path(api_key_file))


def named_models(model: str, more: Sequence[str]) -> dict[str, str]:
    """The models of `serve [NAME=]MODEL ...` by name; empty for one model without a name.

    Raises UsageError for a missing part and for two models with one name.
    """
    if not more and ("=" not in model or Path(model).exists()):
        return {}
    models: dict[str, str] = {}
    for argument in (model, *more):
        name, equals, reference = argument.partition("=")
        if not equals or Path(argument).exists():
            name = default_name(argument)
            reference = argument
        if not name or not reference:
            raise UsageError(
                f"{argument!r} is not NAME=MODEL",
                "A name and a model with an equals sign between them",
            )
        if name in models:
            raise UsageError(f"two models have the name {name!r}", todo=f"Write OTHER={reference}")
        models[name] = reference
    return models


def _take_api_key(arguments: ServeArguments) -> None:
    """Move the key of --api-key to the environment, from which it is read and never shown.

    Raises UsageError when it is empty, or given beside --api-key-file.
    """
    # Keeps the library of messages between processes off the start path of other commands.
    from llmkit.runtime.process_channel import API_KEY_VARIABLE

    key = arguments.api_key
    if key is None:
        return
    if arguments.options.api_key_file is not None:
        raise UsageError("--api-key and --api-key-file exclude each other", todo="Give one of them")
    if key != "-":
        sys.stderr.write(
            "llmkit serve: warning: other users of this machine can see a key on the command line. "
            f"Give it with {API_KEY_VARIABLE}, --api-key-file or --api-key -.\n"
        )
    elif sys.stdin.isatty():
        key = getpass.getpass("API key: ")
    else:
        key = sys.stdin.readline()
    if not key.strip():
        raise UsageError("the API key is empty", "One line with the key was expected")
    os.environ[API_KEY_VARIABLE] = key.strip()


def _refuse_options_of_one_model(arguments: ServeArguments) -> None:
    options = arguments.options
    given = {
        "--lora": options.engine.adapters,
        "--lora-dir": options.lora_dir,
        "--reload-dir": options.reload_dir,
        "--enable-sleep-mode": options.enable_sleep_mode or None,
        "--served-model-name": arguments.served_model_name,
        "--plan": arguments.plan,
        "--grpc-port": options.grpc_port is not None,
    }
    for option, value in given.items():
        if value:
            raise UsageError(
                f"{option} is for one model, and there are several",
                todo="Write NAME=MODEL for a name",
            )


def _check_folder_of_models(arguments: ServeArguments, models: Mapping[str, str]) -> None:
    """Raise an error unless --sagemaker multi-model can load models from the folder MODEL."""
    folder = arguments.options.model
    if models:
        raise UsageError(
            "--sagemaker multi-model is for one folder of models, and several models are given",
            "SageMaker names the models that are loaded",
            "Give the folder only: llmkit serve /opt/ml/models --sagemaker multi-model",
        )
    _refuse_options_of_one_model(arguments)
    if not Path(folder).is_dir():
        raise InputError(
            f"{folder} is not a directory",
            "With --sagemaker multi-model, MODEL is the folder that SageMaker copies models to",
            "It is /opt/ml/models in SageMaker's containers",
        )


def _with_local_models(output: Output, arguments: ServeArguments) -> ServeArguments:
    """The arguments with local copies of models at URLs.

    So all processes load the same files.
    """
    model = arguments.options.model
    names = arguments.served_model_name
    if arguments.more:
        model = _local_argument(output, model)
        more = tuple(_local_argument(output, argument) for argument in arguments.more)
    else:
        more = ()
        if is_url(model):
            names = names or (_remote_model_name(model),)
            model = _local_copy(output, model)
        else:
            model = _local_argument(output, model)
    return replace(
        arguments,
        options=replace(arguments.options, model=model),
        more=more,
        served_model_name=names,
    )


def _local_argument(output: Output, argument: str) -> str:
    """[NAME=]MODEL with a local copy in the place of a URL; a URL without a name gets one."""
    name, equals, reference = argument.partition("=")
    if equals and is_upstream(reference):
        return argument
    if equals and is_url(reference):
        return f"{name}={_local_copy(output, reference)}"
    if is_url(argument):
        return f"{_remote_model_name(argument)}={_local_copy(output, argument)}"
    return argument


def _local_copy(output: Output, reference: str) -> str:
    # The registries' clients are heavy: imported only for a URL.
    from llmkit.checkpoint.registry.local_copies import local_copy

    return str(local_copy(reference, output.progress()))


def _remote_model_name(reference: str) -> str:
    """The API name of a model at a URL, without its bucket or registry."""
    scheme, _, path = reference.rstrip("/").partition(":/")
    return path.strip("/") if scheme in ("models", "hf") else path.rpartition("/")[2]


def _plan(output: Output, model: str, engine: EngineOptions) -> int:
    from llmkit.checkpoint.open_checkpoint import open_checkpoint
    from llmkit.runtime.engine_plan import plan_engine

    document = {"model": model} | plan_engine(open_checkpoint(model), engine).as_dict()
    output.result(document, lambda console: _show_plan(console, document))
    return 0


def _ready(output: Output, facts: Mapping[str, Any]) -> None:
    """The start-up table, and the facts on stdout with --json."""
    output.result(facts, lambda console: None)
    if output.quiet:
        return
    from rich.table import Table

    table = Table("start-up", "seconds", "memory", "size", box=None, padding=(0, 2, 0, 0))
    table.columns[1].justify = table.columns[3].justify = "right"
    stages = dict(facts["engine_seconds"])
    stages["the rest"] = max(0.0, facts["ready_s"] - sum(stages.values()))
    rows = [(stage, f"{spent:.2f}") for stage, spent in stages.items()]
    rows.append(("ready", f"{facts['ready_s']:.2f}"))
    for (stage, spent), (name, size) in zip_longest(
        rows, memory_rows(facts["memory"]), fillvalue=("", "")
    ):
        table.add_row(stage, spent, name, size)
    output.notes.print(table)
    api = ", ".join(f"{stage} {spent:.2f} s" for stage, spent in facts["api_seconds"].items())
    output.message(f"meanwhile in the API process: {api}")
    output.message("\n".join(facts["paths"]))


def _show_plan(console: Console, document: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("memory", "size")
    table.columns[1].justify = "right"
    for name, size in [
        ("on", f"{document['device']} in {document['dtype']}"),
        *memory_rows(document),
    ]:
        table.add_row(name, size)
    console.print(table)


def _state_rows(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows about recurrent states, if the model has any."""
    if "state_bytes" not in plan:
        return []
    states = f"{bytes_text(plan['state_bytes'])} ({plan['state_checkpoints']:,} of cached prefixes)"
    return [
        ("recurrent states", states),
        ("recurrent state of a request", bytes_text(plan["state_bytes_per_request"])),
        ("requests at the same time", f"{plan['max_num_seqs']:,}"),
    ]


def _host_rows(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The row about --kv-offload, if it was given."""
    if "kv_offload_bytes" not in plan:
        return []
    text = NO_KV_OFFLOAD
    if plan["kv_offload_bytes"]:
        text = f"{bytes_text(plan['kv_offload_bytes'])} ({plan['kv_offload_tokens']:,} tokens)"
    return [("KV cache in host memory", text)]


def memory_rows(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of the memory table: each part's name and size."""
    rows = [
        ("free", bytes_text(plan["free_bytes"])),
        ("weights", bytes_text(plan["weight_bytes"])),
    ]
    host_bytes = plan.get("host_weight_bytes")
    if host_bytes:
        rows.append(("weights in host memory", bytes_text(host_bytes)))
    rows += [
        ("workspace of a step, at most", bytes_text(plan["workspace_bytes"])),
        ("KV cache", bytes_text(plan["kv_cache_bytes"])),
        *_host_rows(plan),
        ("KV cache of a token", bytes_text(plan["kv_bytes_per_token"])),
        ("tokens in the KV cache", f"{plan['kv_cache_tokens']:,} ({plan['kv_blocks']:,} blocks)"),
        *_state_rows(plan),
        (
            "tokens of a request",
            f"{plan['max_model_len']:,} of the model's {plan['model_limit']:,}",
        ),
    ]
    return rows + [
        (f"requests of {int(n):,} tokens at once", f"{count:,}")
        for n, count in plan["requests"].items()
    ]
