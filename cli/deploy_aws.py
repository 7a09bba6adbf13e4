"""`llmkit deploy sagemaker` and `llmkit deploy ecs`: a checkpoint on Amazon Web Services."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmkit.checkpoint.output_directory import write_new_file
from llmkit.cli.deploy import REPLICA_BOUNDS, SERVE_WORDS, container_options
from llmkit.cli.output import Output
from llmkit.cli.serve import ServeArguments
from llmkit.cli.typer_options import given_words
from llmkit.common.errors import InputError, UsageError
from llmkit.common.option_values import within
from llmkit.common.options import Argument, Option
from llmkit.runtime.server.serve_options import default_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from llmkit.deploy.aws_calls import AwsCall
    from llmkit.deploy.ecs import EcsDeployment
    from llmkit.deploy.sagemaker import SagemakerDeployment

REGION = Option("The AWS region.", metavar="REGION", unset="boto3's: AWS_REGION or the profile's")
REMOVE = Option("Delete what was deployed under --name.")
DRY_RUN = Option("Show the calls of AWS' API, and make none.")
CALLS_FILE = Option(
    "Write the calls to this file, as a script for the AWS CLI; it must be absent.",
    flags=("--output", "-o"),
    metavar="FILE",
    unset="none",
)
BOUNDS = Option(
    "Add and remove instances or tasks by the load.",
    metavar="LOW:HIGH",
    format=REPLICA_BOUNDS,
    unset="off",
)
ALARMS = Option(
    "A CloudWatch alarm that brings the old version back during an update; repeat for more.",
    metavar="NAME",
    unset="none",
)
_SAGEMAKER_KILLS_S = 30  # after SIGTERM
_ECR_IMAGE = re.compile(
    r"[0-9]{12}\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/[\w./-]+(:[\w.-]+)?"
    r"(@sha256:[0-9a-f]{64})?"
)
_SAGEMAKER_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9])*")
_MAX_NAME = 54  # SageMaker's limit of 63, without the hash of a version
_ROLE_EXAMPLE = "arn:aws:iam::123456789012:role/NAME"
_SECRET_EXAMPLE = "arn:aws:secretsmanager:us-east-1:123456789012:secret:NAME-AbCdEf"  # noqa: S105


@dataclass(frozen=True, kw_only=True)
class SagemakerArguments:
    """What `llmkit deploy sagemaker` takes."""

    model: Annotated[
        str | None,
        Argument(
            "A checkpoint in S3 (s3://BUCKET/FOLDER, or a .tar.gz file), or a hub id. With "
            "--upload, a directory.",
            metavar="MODEL",
            completes_models=True,
        ),
    ] = None
    serve_words: Annotated[tuple[str, ...], SERVE_WORDS] = ()
    name: Annotated[
        str | None, Option("The endpoint's name.", metavar="NAME", unset="MODEL's last part")
    ] = None
    image: Annotated[
        str | None,
        Option(
            "The image in ECR, made with recipes/sagemaker.",
            metavar="URI",
            unset="needed to deploy",
        ),
    ] = None
    role: Annotated[
        str | None,
        Option(
            "The role of the container: it reads the image and S3.",
            metavar="ARN",
            unset="needed to deploy",
        ),
    ] = None
    instance: Annotated[
        str | None,
        Option(
            "The instance type, such as ml.g6e.2xlarge.", metavar="TYPE", unset="needed to deploy"
        ),
    ] = None
    instances: Annotated[
        int, Option("Number of instances without --autoscale.", metavar="N", check=within(1))
    ] = 1
    autoscale: Annotated[tuple[int, int] | None, BOUNDS] = None
    concurrency: Annotated[
        int | None,
        Option(
            "With --autoscale: requests of an instance at a time, at which it aims.",
            metavar="N",
            check=within(1),
            unset="four fifths of --max-num-seqs",
        ),
    ] = None
    multi_model: Annotated[
        bool,
        Option(
            "A multi-model endpoint, on CPUs: MODEL is a folder in S3 with a .tar.gz file for each "
            "model."
        ),
    ] = False
    upload: Annotated[
        str | None,
        Option(
            "Push the directory MODEL to this folder in S3 first, as `llmkit push` does.",
            metavar="URL",
            unset="nothing is uploaded",
        ),
    ] = None
    startup_timeout: Annotated[
        int,
        Option(
            "How long copying the model may take, and loading it.",
            metavar="SECONDS",
            check=within(60, 3600),
        ),
    ] = 1800
    ami: Annotated[
        str | None,
        Option(
            "The instances' machine image (InferenceAmiVersion), which has the GPU's driver.",
            metavar="NAME",
            unset="with GPUs the one of CUDA 13, else SageMaker's",
        ),
    ] = None
    volume: Annotated[
        int | None,
        Option(
            "Disk of an instance, where its type has no fixed one.",
            metavar="GIB",
            check=within(1, 512),
            unset="SageMaker's",
        ),
    ] = None
    canary: Annotated[
        int | None,
        Option(
            "In an update: send traffic to this share of the new instances first.",
            metavar="PERCENT",
            check=within(1, 50),
            unset="all at once",
        ),
    ] = None
    bake: Annotated[
        int,
        Option(
            "In an update: how long --alarm is watched before the old instances go.",
            metavar="SECONDS",
            check=within(0, 3600),
        ),
    ] = 300
    alarm: Annotated[tuple[str, ...], ALARMS] = ()
    region: Annotated[str | None, REGION] = None
    remove: Annotated[bool, REMOVE] = False
    dry_run: Annotated[bool, DRY_RUN] = False
    output: Annotated[str | None, CALLS_FILE] = None


@dataclass(frozen=True, kw_only=True)
class EcsArguments:
    """What `llmkit deploy ecs` takes."""

    model: Annotated[
        str | None,
        Argument(
            "A checkpoint as the container finds it: a hub id, s3://BUCKET/FOLDER, or /models/NAME "
            "with --efs.",
            metavar="MODEL",
            completes_models=True,
        ),
    ] = None
    serve_words: Annotated[tuple[str, ...], SERVE_WORDS] = ()
    name: Annotated[
        str | None, Option("The service's name.", metavar="NAME", unset="MODEL's last part")
    ] = None
    cluster: Annotated[str, Option("The cluster's name or ARN.", metavar="NAME")] = "default"
    image: Annotated[
        str | None,
        Option(
            "The image, made with recipes/kubernetes/Dockerfile.",
            metavar="URI",
            unset="needed to deploy",
        ),
    ] = None
    execution_role: Annotated[
        str | None,
        Option(
            "The role by which ECS reads the image and the secrets, and writes logs.",
            metavar="ARN",
            unset="needed to deploy",
        ),
    ] = None
    task_role: Annotated[
        str | None,
        Option("The role of the server, for models in S3.", metavar="ARN", unset="none"),
    ] = None
    api_key_secret: Annotated[
        str | None,
        Option(
            "The API key in Secrets Manager or Systems Manager.",
            metavar="ARN",
            unset="needed to deploy",
        ),
    ] = None
    hub_token_secret: Annotated[
        str | None,
        Option("HF_TOKEN there, for gated models.", metavar="ARN", unset="none"),
    ] = None
    subnets: Annotated[
        tuple[str, ...],
        Option("A subnet of the tasks; repeat for more.", metavar="ID", unset="needed to deploy"),
    ] = ()
    security_groups: Annotated[
        tuple[str, ...],
        Option("A security group of the tasks; repeat for more.", metavar="ID", unset="the VPC's"),
    ] = ()
    target_group: Annotated[
        str | None,
        Option(
            "The load balancer's target group (type ip) that gets the tasks.",
            metavar="ARN",
            unset="none",
        ),
    ] = None
    gpus: Annotated[int, Option("GPUs of a task.", metavar="N", check=within(0))] = 0
    cpus: Annotated[float, Option("CPU cores of a task.", metavar="N", check=within(0.25))] = 4.0
    memory: Annotated[int, Option("Memory of a task.", metavar="GIB", check=within(1))] = 16
    capacity_provider: Annotated[
        str | None,
        Option(
            "The cluster's capacity provider that runs the tasks.",
            metavar="NAME",
            unset="EC2 instances with --gpus, else Fargate",
        ),
    ] = None
    efs: Annotated[
        str | None,
        Option("A file system of EFS, mounted at /models.", metavar="ID", unset="none"),
    ] = None
    tasks: Annotated[
        int, Option("Number of tasks without --autoscale.", metavar="N", check=within(1))
    ] = 1
    autoscale: Annotated[tuple[int, int] | None, BOUNDS] = None
    requests_per_minute: Annotated[
        float | None,
        Option(
            "With --autoscale: requests of a task in a minute, at which it aims.",
            metavar="N",
            check=within(1),
            unset="60 % of the CPUs",
        ),
    ] = None
    startup_timeout: Annotated[
        int,
        Option(
            "How long a task may take until it is ready.", metavar="SECONDS", check=within(30, 3300)
        ),
    ] = 900
    alarm: Annotated[tuple[str, ...], ALARMS] = ()
    region: Annotated[str | None, REGION] = None
    remove: Annotated[bool, REMOVE] = False
    dry_run: Annotated[bool, DRY_RUN] = False
    output: Annotated[str | None, CALLS_FILE] = None


def sagemaker(output: Output, arguments: SagemakerArguments) -> None:
    """Serve a model on an endpoint of Amazon SageMaker. Run it again to update the endpoint by
    blue/green.

    Needs boto3 (the extra aws) and AWS credentials. SageMaker checks who may call the endpoint;
    there is no API key.
    """
    from llmkit.deploy.sagemaker import SagemakerEndpoints

    if arguments.remove:
        name = _removed_name(arguments)
        removed = SagemakerEndpoints(arguments.region, output.message).remove(name)
        _show_removed(output, removed)
        return
    model, deployment = _sagemaker_deployment(output, arguments)
    if arguments.dry_run or arguments.output is not None:
        _show_calls(output, deployment.calls(), arguments.output)
        return
    endpoints = SagemakerEndpoints(arguments.region, output.message)
    match = _ECR_IMAGE.fullmatch(deployment.image)
    if match is not None and match["region"] != endpoints.region:
        raise UsageError(
            f"--image is in {match['region']}, and the endpoint in {endpoints.region}",
            "SageMaker takes images of its own region",
            "Copy the image, or give another --region",
        )
    if arguments.upload is not None:
        # The registries' clients are heavy: imported only for a push.
        from llmkit.checkpoint.registry.transfer import push

        push(Path(model), arguments.upload, output.progress())
    action = endpoints.deploy(deployment)
    document = {
        "endpoint": deployment.name,
        "configuration": deployment.config_name,
        "region": endpoints.region,
        "action": action,
    }
    text = f"{deployment.name}: {action}, as {deployment.config_name} in {endpoints.region}"
    output.result(document, lambda console: _print(console, text))


def ecs(output: Output, arguments: EcsArguments) -> None:
    """Serve a model on a cluster of Amazon ECS: a task definition and a service, on GPUs or
    Fargate. Run it again to update the service.

    Needs boto3 (the extra aws) and AWS credentials. Secrets stay in Secrets Manager or Systems
    Manager.
    """
    from llmkit.deploy.ecs import EcsServices

    if arguments.remove:
        name = _removed_name(arguments)
        services = EcsServices(arguments.region, output.message)
        _show_removed(output, services.remove(arguments.cluster, name))
        return
    deployment = _ecs_deployment(output, arguments)
    if arguments.dry_run or arguments.output is not None:
        if arguments.region is None:
            raise UsageError("--region is missing", "Without calls, AWS is not asked for it")
        if deployment.requests_per_minute is not None:
            output.message(
                "note: put your load balancer in the place of app/LOAD-BALANCER/ID: AWS was not "
                "asked which one it is"
            )
        _show_calls(output, deployment.calls(), arguments.output)
        return
    services = EcsServices(arguments.region, output.message)
    balancer = None
    if arguments.target_group is not None:
        balancer = services.load_balancer(arguments.target_group)
    deployment = replace(deployment, region=services.region, load_balancer=balancer)
    action = services.deploy(deployment)
    document = {
        "service": deployment.name,
        "cluster": deployment.cluster,
        "region": services.region,
        "action": action,
    }
    text = f"{deployment.name}: {action} in the cluster {deployment.cluster}"
    output.result(document, lambda console: _print(console, text))


def _sagemaker_deployment(
    output: Output, arguments: SagemakerArguments
) -> tuple[str, SagemakerDeployment]:
    """MODEL, and the deployment. Raises UsageError and InputError."""
    from llmkit.deploy.aws_calls import ROLE_ARN, require_arn
    from llmkit.deploy.aws_instances import check_gpus, num_gpus
    from llmkit.deploy.sagemaker import GPU_AMI, SagemakerDeployment

    model, image, role, instance = _needed(
        arguments, model="MODEL", image="--image", role="--role", instance="--instance"
    )
    if not _ECR_IMAGE.fullmatch(image):
        raise UsageError(
            f"--image {image} is not in ECR",
            "SageMaker takes images of Amazon ECR only",
            "Write it like 123456789012.dkr.ecr.us-east-1.amazonaws.com/llmkit-sagemaker:0.1.0",
        )
    require_arn("--role", role, ROLE_ARN, _ROLE_EXAMPLE)
    gpus = num_gpus("--instance", instance)
    if not instance.startswith("ml."):
        raise UsageError(
            f"--instance {instance} is not a type of SageMaker's", f"Write it like ml.{instance}"
        )
    source = _model_in_s3(arguments, model)
    name = arguments.name or re.sub(r"[^a-zA-Z0-9]+", "-", _last_part(model)).strip("-")
    if len(name) > _MAX_NAME or not _SAGEMAKER_NAME.fullmatch(name):
        raise UsageError(
            f"--name {name} is not a name of SageMaker's",
            f"Up to {_MAX_NAME} letters, digits and hyphens between them were expected",
        )
    options = container_options(model, name, arguments.serve_words)
    if options.drain_timeout > _SAGEMAKER_KILLS_S:
        raise UsageError(
            f"--drain-timeout {options.drain_timeout:g} is too long",
            f"SageMaker kills a container {_SAGEMAKER_KILLS_S} s after SIGTERM",
            "Give -- --drain-timeout 25, or leave it out",
        )
    if arguments.multi_model and gpus != 0:
        raise UsageError(
            f"--multi-model and --instance {instance} exclude each other",
            "On GPUs, SageMaker has multi-model endpoints for Triton's image only",
            "Take a type without GPU, such as ml.c7i.8xlarge, or an endpoint for each model",
        )
    engine = options.engine
    _note_gpus(output, check_gpus(instance, gpus, engine.tp * engine.pp * engine.dp, engine.device))
    variables = _variables(arguments.serve_words)
    if not arguments.multi_model:
        variables["LLMKIT_SERVE_SERVED_MODEL_NAME"] = name
    return model, SagemakerDeployment(
        name=name,
        image=image,
        role=role,
        instance_type=instance,
        instances=arguments.instances,
        model=source,
        variables=variables,
        multi_model=arguments.multi_model,
        autoscale=arguments.autoscale,
        concurrency=arguments.concurrency or max(1, engine.max_num_seqs * engine.dp * 4 // 5),
        startup_s=arguments.startup_timeout,
        ami=arguments.ami or (GPU_AMI if gpus else None),
        volume_gib=arguments.volume,
        canary_percent=arguments.canary,
        bake_s=arguments.bake,
        alarms=arguments.alarm,
    )


def _ecs_deployment(output: Output, arguments: EcsArguments) -> EcsDeployment:
    """The deployment, without what AWS says of it. Raises UsageError and InputError."""
    from llmkit.deploy.aws_calls import ROLE_ARN, SECRET_ARN, require_arn
    from llmkit.deploy.aws_instances import check_gpus
    from llmkit.deploy.ecs import EcsDeployment

    model, image, role, key = _needed(
        arguments,
        model="MODEL",
        image="--image",
        execution_role="--execution-role",
        api_key_secret="--api-key-secret",  # noqa: S106
    )
    if not arguments.subnets:
        raise UsageError("--subnets is missing", "A task has an address in a subnet")
    require_arn("--execution-role", role, ROLE_ARN, _ROLE_EXAMPLE)
    if arguments.task_role is not None:
        require_arn("--task-role", arguments.task_role, ROLE_ARN, _ROLE_EXAMPLE)
    require_arn("--api-key-secret", key, SECRET_ARN, _SECRET_EXAMPLE)
    if arguments.hub_token_secret is not None:
        require_arn("--hub-token-secret", arguments.hub_token_secret, SECRET_ARN, _SECRET_EXAMPLE)
    name = arguments.name or re.sub(r"[^a-zA-Z0-9_-]+", "-", _last_part(model)).strip("-")
    options = container_options(model, name, arguments.serve_words)
    engine = options.engine
    needed = engine.tp * engine.pp * engine.dp
    _note_gpus(output, check_gpus("a task (--gpus)", arguments.gpus, needed, engine.device))
    if arguments.autoscale is not None and arguments.requests_per_minute is None and arguments.gpus:
        raise UsageError(
            "--autoscale of tasks with GPUs needs --requests-per-minute",
            "Their CPUs say little about their load",
            "Measure what one task answers in a minute with `llmkit bench`",
        )
    if arguments.requests_per_minute is not None and arguments.target_group is None:
        raise UsageError(
            "--requests-per-minute needs --target-group", "The load balancer counts requests"
        )
    words = (model, *arguments.serve_words, "--served-model-name", name)
    return EcsDeployment(
        name=name,
        cluster=arguments.cluster,
        image=image,
        words=words,
        execution_role=role,
        subnets=arguments.subnets,
        key_secret=key,
        task_role=arguments.task_role,
        hub_secret=arguments.hub_token_secret,
        security_groups=arguments.security_groups,
        capacity_provider=arguments.capacity_provider,
        cpus=arguments.cpus,
        memory_mib=arguments.memory * 1024,
        gpus=arguments.gpus,
        efs=arguments.efs,
        region=arguments.region or "",
        tasks=arguments.tasks,
        target_group=arguments.target_group,
        autoscale=arguments.autoscale,
        requests_per_minute=arguments.requests_per_minute,
        startup_s=arguments.startup_timeout,
        drain_s=options.drain_timeout,
        alarms=arguments.alarm,
    )


def _needed(arguments: Any, **names: str) -> list[str]:
    """The values of options that a deployment needs. Raises UsageError for one that is missing."""
    values = []
    for field, name in names.items():
        value = getattr(arguments, field)
        if value is None:
            raise UsageError(f"{name} is missing", "A deployment needs it")
        values.append(value)
    return values


def _model_in_s3(arguments: SagemakerArguments, model: str) -> str:
    """MODEL as SageMaker takes it: a URL of S3, or a hub id. Raises UsageError and InputError."""
    url = model
    if arguments.upload is not None:
        if not Path(model).is_dir():
            raise InputError(f"{model} is not a directory", "--upload pushes a directory")
        url = arguments.upload
    elif Path(model).exists():
        raise InputError(
            f"{model} is on this machine, and SageMaker reads models from S3",
            todo=f"Run `llmkit push {model} s3://BUCKET/NAME` and give that URL, or give --upload",
        )
    if url.startswith("s3://"):
        is_archive = url.endswith(".tar.gz")
        if is_archive and arguments.multi_model:
            raise UsageError(
                f"{url} is one model", "With --multi-model, MODEL is a folder of .tar.gz files"
            )
        return url if is_archive else url.rstrip("/") + "/"
    if "://" in url or arguments.multi_model or arguments.upload is not None:
        raise UsageError(f"{url} is not in S3", "A URL like s3://BUCKET/FOLDER was expected")
    return url


def _variables(words: Sequence[str]) -> dict[str, str]:
    """The options of `llmkit serve` as variables of a container. Raises UsageError."""
    variables = {}
    for field, value in given_words(ServeArguments, "serve", ["MODEL", *words]).items():
        if isinstance(field.option, Argument):
            continue
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, (list, tuple)):
            if any("," in str(item) for item in value):
                raise UsageError(
                    f"{field.label}: a comma cannot be in a value here",
                    "Containers get options as variables, whose lists are separated by commas",
                )
            text = ",".join(map(str, value))
        else:
            text = str(value)
        variables[f"LLMKIT_SERVE_{field.name.upper()}"] = text
    return variables


def _last_part(model: str) -> str:
    """The last part of MODEL, without the ending of an archive."""
    return default_name(model).rstrip("/").rpartition("/")[2].removesuffix(".tar.gz")


def _removed_name(arguments: SagemakerArguments | EcsArguments) -> str:
    if arguments.model is not None:
        raise UsageError("MODEL and --remove exclude each other", todo="Give --name and --remove")
    if arguments.name is None:
        raise UsageError("--name is missing", "It says what is deleted")
    return arguments.name


def _note_gpus(output: Output, note: str | None) -> None:
    if note is not None:
        output.message(f"note: {note}")


def _show_calls(output: Output, calls: Sequence[AwsCall], file: str | None) -> None:
    """Show the calls, or write them to a file."""
    from llmkit.deploy.aws_calls import shell_script

    text = shell_script(calls)
    if file is not None:
        write_new_file(Path(file), text)
        output.message(f"{file}: {len(calls)} calls; none was made")
    document = {"calls": [call.to_dict() for call in calls], "output": file}

    def show(console: Console) -> None:
        if file is None:
            console.print(text, markup=False, highlight=False, soft_wrap=True, end="")

    output.result(document, show)


def _show_removed(output: Output, removed: Sequence[str]) -> None:
    output.result({"removed": list(removed)}, lambda console: _print(console, "\n".join(removed)))


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
