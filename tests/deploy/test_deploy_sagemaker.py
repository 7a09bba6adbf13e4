"""`llmkit deploy sagemaker` by boto3, on moto's SageMaker, scaling and alarms."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from moto import mock_aws
from moto.sagemaker.models import sagemaker_backends
from support.aws_models import check_call, run_script
from support.synthetic_checkpoint import synthetic_checkpoint

from llmkit.checkpoint.registry import transfer
from llmkit.cli.deploy_aws import _variables
from llmkit.cli.main import COMMANDS, run
from llmkit.cli.serve import ServeArguments
from llmkit.cli.settings import Defaults, read_environment, spellings, unknown_variables
from llmkit.cli.typer_options import parse_words
from llmkit.common.errors import ShortageError
from llmkit.common.options import build_options
from llmkit.deploy import sagemaker

REGION = "us-east-1"
ACCOUNT = "123456789012"
IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/llmkit-sagemaker:0.1.0"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/SageMaker"
MODEL = "s3://bucket/models/tiny-int4"
GPU = ["--image", IMAGE, "--role", ROLE, "--instance", "ml.g4dn.2xlarge"]
CPU = ["--image", IMAGE, "--role", ROLE, "--instance", "ml.m5.4xlarge"]
TARGET = "endpoint/tiny-int4/variant/all"


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sagemaker, "_POLL_S", 0.0)
    with mock_aws():
        yield


Answer = Callable[..., Any]
AnswerCall = Callable[[str, Answer], None]


@pytest.fixture
def answer_call() -> Iterator[AnswerCall]:
    """Answers an operation of SageMaker's in the place of moto."""
    # One session for all tests: it keeps AWS' descriptions, which take a second to read.
    if boto3.DEFAULT_SESSION is None:
        boto3.setup_default_session()
    session = boto3.DEFAULT_SESSION
    assert session is not None
    answers: list[tuple[str, Answer]] = []

    def register(operation: str, answer: Answer) -> None:
        event = f"before-call.sagemaker.{operation}"
        answers.append((event, answer))
        session.events.register(event, answer)

    yield register
    for event, answer in answers:
        session.events.unregister(event, answer)


def deploy(*words: str, model: str = MODEL) -> int:
    return run(["deploy", "sagemaker", model, *words])


def endpoint(name: str = "tiny-int4") -> dict[str, Any]:
    """The endpoint with its configuration's variant and its model's container."""
    client = boto3.client("sagemaker")
    found = client.describe_endpoint(EndpointName=name)
    config = client.describe_endpoint_config(EndpointConfigName=found["EndpointConfigName"])
    (variant,) = config["ProductionVariants"]
    model = client.describe_model(ModelName=variant["ModelName"])
    return {"config": found["EndpointConfigName"], "variant": variant, "model": model}


def scalable_targets() -> list[dict[str, Any]]:
    client = boto3.client("application-autoscaling")
    found = client.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    return [dict(one) for one in found]


def answer_updates(answer_call: AnswerCall, change: bool, reason: str = "") -> list[dict[str, Any]]:
    """Answer UpdateEndpoint, which moto lacks; return the list that gets what was sent.

    change: the endpoint gets the new configuration; otherwise it is rolled back.
    """
    sent: list[dict[str, Any]] = []

    def answer(params: dict[str, Any], **_: Any) -> Any:
        body = json.loads(params["body"])
        sent.append(body)
        found = sagemaker_backends[ACCOUNT][REGION].endpoints[body["EndpointName"]]
        if change:
            found.endpoint_config_name = body["EndpointConfigName"]
        else:
            found.failure_reason = reason
        arn = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:endpoint/{body['EndpointName']}"
        http = type("Answer", (), {"status_code": 200})()
        return http, {"EndpointArn": arn, "ResponseMetadata": {}}

    answer_call("UpdateEndpoint", answer)
    return sent


def dry_run(capsys: pytest.CaptureFixture[str], *words: str, model: str = MODEL) -> Any:
    assert deploy(*words, "--dry-run", "--json", model=model) == 0
    return json.loads(capsys.readouterr().out)["calls"]


def test_deploy_creates_model_configuration_endpoint_and_scaling(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert deploy(*GPU, "--autoscale", "2:6", "--json", "--", "--max-num-seqs", "100") == 0
    printed = json.loads(capsys.readouterr().out)
    made = endpoint()
    assert (printed["action"], printed["configuration"]) == ("created", made["config"])
    container = made["model"]["PrimaryContainer"]
    assert container["ModelDataSource"]["S3DataSource"]["S3Uri"] == f"{MODEL}/"
    assert container["Environment"] == {
        "LLMKIT_SERVE_MAX_NUM_SEQS": "100",
        "LLMKIT_SERVE_SERVED_MODEL_NAME": "tiny-int4",
    }
    assert made["model"]["ExecutionRoleArn"] == ROLE
    assert made["variant"]["InitialInstanceCount"] == 2
    assert made["variant"]["ContainerStartupHealthCheckTimeoutInSeconds"] == 1800
    assert made["variant"]["InferenceAmiVersion"] == sagemaker.GPU_AMI
    (target,) = scalable_targets()
    assert (target["ResourceId"], target["MinCapacity"], target["MaxCapacity"]) == (TARGET, 2, 6)
    client = boto3.client("application-autoscaling")
    (policy,) = client.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
    tracking = policy["TargetTrackingScalingPolicyConfiguration"]
    assert tracking["TargetValue"] == 80
    metric = tracking["PredefinedMetricSpecification"]["PredefinedMetricType"]
    assert metric == "SageMakerVariantConcurrentRequestsPerModelHighResolution"


def test_same_deployment_again_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy(*CPU) == 0
    before = endpoint()["config"]
    capsys.readouterr()
    assert deploy(*CPU) == 0
    assert f"tiny-int4: unchanged, as {before}" in capsys.readouterr().out
    assert len(boto3.client("sagemaker").list_models()["Models"]) == 1


def test_deploy_waits_until_the_endpoint_is_in_service(
    answer_call: AnswerCall, capsys: pytest.CaptureFixture[str]
) -> None:
    states = ["Creating", "Creating"]

    def still_creating(**_: Any) -> Any:
        endpoints = sagemaker_backends[ACCOUNT][REGION].endpoints
        if "tiny-int4" not in endpoints or not states:
            return None  # moto answers
        answer = {"EndpointStatus": states.pop(), "EndpointConfigName": "x"}
        return type("Answer", (), {"status_code": 200})(), answer

    answer_call("DescribeEndpoint", still_creating)
    assert deploy(*CPU, "--autoscale", "1:2") == 0
    assert "tiny-int4: Creating\ntiny-int4: InService\n" in capsys.readouterr().err
    assert states == [] and len(scalable_targets()) == 1


def test_second_run_waits_for_the_update_of_the_first(
    answer_call: AnswerCall, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy(*CPU) == 0
    config = endpoint()["config"]
    capsys.readouterr()
    states = ["Updating", "Updating"]

    def still_updating(**_: Any) -> Any:
        if not states:
            return None  # moto answers
        answer = {
            "EndpointStatus": states.pop(),
            "EndpointConfigName": "tiny-int4-00000000",
            "PendingDeploymentSummary": {"EndpointConfigName": config},
        }
        return type("Answer", (), {"status_code": 200})(), answer

    answer_call("DescribeEndpoint", still_updating)
    assert deploy(*CPU, "--autoscale", "1:2", "--instances", "1") == 0
    captured = capsys.readouterr()
    assert f"tiny-int4: updated, as {config}" in captured.out
    assert "tiny-int4: Updating\ntiny-int4: InService\n" in captured.err
    assert len(scalable_targets()) == 1


def test_update_is_blue_green_with_alarms(
    answer_call: AnswerCall, capsys: pytest.CaptureFixture[str]
) -> None:
    boto3.client("cloudwatch").put_metric_alarm(
        AlarmName="errors",
        MetricName="Invocation5XXErrors",
        Namespace="AWS/SageMaker",
        ComparisonOperator="GreaterThanThreshold",
        EvaluationPeriods=1,
        Period=60,
        Statistic="Sum",
        Threshold=5,
    )
    sent = answer_updates(answer_call, change=True)
    assert deploy(*CPU, "--autoscale", "1:4") == 0
    old = endpoint()["config"]
    words = ("--autoscale", "1:8", "--canary", "25", "--bake", "120", "--alarm", "errors")
    assert deploy(*CPU, *words, "--", "--max-model-len", "4096") == 0
    assert ": updated, as tiny-int4-" in capsys.readouterr().out
    (update,) = sent
    assert update["EndpointConfigName"] == endpoint()["config"] != old
    assert update["RetainAllVariantProperties"] is True
    config = update["DeploymentConfig"]
    assert config["AutoRollbackConfiguration"] == {"Alarms": [{"AlarmName": "errors"}]}
    assert config["BlueGreenUpdatePolicy"] == {
        "TrafficRoutingConfiguration": {
            "Type": "CANARY",
            "WaitIntervalInSeconds": 120,
            "CanarySize": {"Type": "CAPACITY_PERCENT", "Value": 25},
        },
        "TerminationWaitInSeconds": 120,
    }
    assert [target["MaxCapacity"] for target in scalable_targets()] == [8]


def test_update_without_autoscale_removes_the_scaling(answer_call: AnswerCall) -> None:
    answer_updates(answer_call, change=True)
    assert deploy(*CPU, "--autoscale", "1:4") == 0
    assert len(scalable_targets()) == 1
    assert deploy(*CPU, "--instances", "2") == 0
    assert scalable_targets() == []


def test_rolled_back_update_is_an_error_and_keeps_the_scaling(
    answer_call: AnswerCall,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer_updates(answer_call, change=False, reason="the alarm errors went off")
    assert deploy(*CPU, "--autoscale", "1:4") == 0
    assert deploy(*CPU, "--autoscale", "1:4", "--", "--max-model-len", "64") == 4
    error = capsys.readouterr().err
    assert "tiny-int4 is InService and serves the version before: the alarm errors" in error
    assert "Read the log group /aws/sagemaker/Endpoints/tiny-int4" in error
    assert len(scalable_targets()) == 1


def test_endpoint_that_changes_or_has_failed_is_not_updated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert deploy(*CPU) == 0
    found = sagemaker_backends[ACCOUNT][REGION].endpoints["tiny-int4"]
    found.endpoint_status = "Updating"
    assert deploy(*CPU, "--instances", "2") == 4
    assert "the endpoint tiny-int4 is Updating. An endpoint in service" in capsys.readouterr().err
    found.endpoint_status = "Failed"
    assert deploy(*CPU, "--instances", "2") == 4
    assert "Delete it with --remove, then deploy again" in capsys.readouterr().err


def test_remove_deletes_what_was_made_and_nothing_else(
    answer_call: AnswerCall,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer_updates(answer_call, change=True)
    client = boto3.client("sagemaker")
    container = {"Image": IMAGE}
    for name in ("tiny-int4-other", "my-tiny-int4-0123abcd"):
        client.create_model(ModelName=name, PrimaryContainer=container, ExecutionRoleArn=ROLE)
    assert deploy(*CPU, "--autoscale", "1:4") == 0
    assert deploy(*CPU, "--autoscale", "1:4", "--", "--max-model-len", "64") == 0
    capsys.readouterr()
    assert run(["deploy", "sagemaker", "--remove", "--name", "tiny-int4", "--json"]) == 0
    removed = json.loads(capsys.readouterr().out)["removed"]
    assert len(removed) == 3
    assert client.list_endpoints()["Endpoints"] == []
    assert client.list_endpoint_configs()["EndpointConfigs"] == []
    left = {model["ModelName"] for model in client.list_models()["Models"]}
    assert left == {"tiny-int4-other", "my-tiny-int4-0123abcd"}
    assert scalable_targets() == []
    assert run(["deploy", "sagemaker", "--remove", "--name", "tiny-int4"]) == 3
    assert "there is no endpoint tiny-int4 in us-east-1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (MODEL, [*GPU, "--autoscale", "1:4", "--volume", "512"]),
        ("s3://bucket/tiny.tar.gz", CPU),
        ("org/Some_Model.v2", [*CPU, "--startup-timeout", "60"]),
        ("s3://bucket/many", [*CPU, "--multi-model", "--name", "many"]),
    ],
)
def test_calls_are_those_that_aws_describes(
    capsys: pytest.CaptureFixture[str], model: str, words: list[str]
) -> None:
    calls = dry_run(capsys, *words, model=model)
    for call in calls:
        check_call(call)
    assert [call["operation"] for call in calls[:3]] == [
        "CreateModel",
        "CreateEndpointConfig",
        "CreateEndpoint",
    ]
    assert boto3.client("sagemaker").list_endpoints()["Endpoints"] == []


def test_model_data_follows_from_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    def container(model: str, *words: str) -> Any:
        return dry_run(capsys, *CPU, *words, model=model)[0]["parameters"]["PrimaryContainer"]

    source = container("s3://bucket/tiny.tar.gz")["ModelDataSource"]["S3DataSource"]
    assert (source["S3DataType"], source["CompressionType"]) == ("S3Object", "Gzip")
    hub = container("org/model")
    assert hub["Environment"]["HF_MODEL_ID"] == "org/model"
    assert "ModelDataSource" not in hub
    many = container("s3://bucket/many", "--multi-model")
    assert (many["Mode"], many["ModelDataUrl"]) == ("MultiModel", "s3://bucket/many/")
    assert many["Environment"] == {}


def test_upload_comes_before_the_deployment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The push itself is recorded; tests/deploy/test_sagemaker_upload.py makes a real one."""
    pushed: list[tuple[Path, str]] = []

    def push(source: Path, target: str, *_: Any) -> None:
        assert not boto3.client("sagemaker").list_models()["Models"]
        pushed.append((source, target))

    monkeypatch.setattr(transfer, "push", push)
    model = synthetic_checkpoint(tmp_path / "tiny")
    words = [*CPU, "--upload", "s3://bucket/models/tiny", "--name", "chat"]
    assert deploy(*words, model=str(model)) == 0
    assert pushed == [(model, "s3://bucket/models/tiny")]
    made = endpoint("chat")
    source = made["model"]["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]
    assert source["S3Uri"] == "s3://bucket/models/tiny/"
    # What makes no calls of AWS' API uploads nothing.
    for other in (["--dry-run"], ["-o", str(tmp_path / "calls.sh")]):
        assert deploy(*words, *other, model=str(model)) == 0
    assert len(pushed) == 1
    script = (tmp_path / "calls.sh").read_text()
    assert '"S3Uri": "s3://bucket/models/tiny/"' in script


def test_failed_upload_deploys_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def push(*_: Any) -> None:
        raise ShortageError("the bucket cannot be written")

    monkeypatch.setattr(transfer, "push", push)
    model = synthetic_checkpoint(tmp_path / "tiny")
    assert deploy(*CPU, "--upload", "s3://bucket/tiny", model=str(model)) == 4
    assert "the bucket cannot be written" in capsys.readouterr().err
    assert not boto3.client("sagemaker").list_models()["Models"]


def test_script_makes_the_calls_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "deploy.sh"
    assert deploy(*CPU, "--autoscale", "1:4", "-o", str(script)) == 0
    assert f"{script}: 5 calls; none was made" in capsys.readouterr().err
    written = script.read_text()
    assert deploy(*CPU, "-o", str(script)) == 5
    assert f"The output {script} exists and is a file. Remove it" in capsys.readouterr().err
    assert script.read_text() == written
    assert run_script(script, tmp_path) == [
        "sagemaker create-model",
        "sagemaker create-endpoint-config",
        "sagemaker create-endpoint",
        "sagemaker wait",
        "application-autoscaling register-scalable-target",
        "application-autoscaling put-scaling-policy",
    ]


def test_serve_options_reach_the_server_as_variables() -> None:
    words = ["--tp", "2", "--max-model-len", "8192", "--kv-cache-memory", "2GiB"]
    words += ["--no-prefix-cache"]
    words += ["--log-requests", "--allowed-hosts", "a.example", "--allowed-hosts", "b.example"]
    variables = _variables(words)
    assert unknown_variables(variables, COMMANDS) == []
    defaults = Defaults()
    read_environment(variables, "serve", spellings(COMMANDS["serve"]), defaults)
    model = {"options_model": "MODEL"}
    read = build_options(ServeArguments, model | defaults.values | _typed(defaults))
    assert read == parse_words(ServeArguments, "serve", ["MODEL", *words])
    assert read.options.engine.tp == 2 and not read.options.engine.prefix_cache


def _typed(defaults: Defaults) -> dict[str, Any]:
    """The values of variables as the command-line parser converts them."""
    fields = {field.parameter: field for field in COMMANDS["serve"].fields}
    return {
        name: fields[name].value_type(value)
        for name, value in defaults.values.items()
        if fields[name].value_type in (int, float)
    }


REFUSED = [
    ([*GPU, "--image", "docker.io/llmkit:1"], 2, "--image docker.io/llmkit:1 is not in ECR"),
    ([*GPU, "--role", "SageMaker"], 2, "--role is not an ARN of this kind"),
    ([*GPU, "--instance", "g6e.2xlarge"], 2, "Write it like ml.g6e.2xlarge"),
    ([*GPU, "--instance", "large"], 2, "'large' is not an instance type"),
    ([*GPU, "--instance", "ml.inf2.xlarge"], 2, "ml.inf2.xlarge has no NVIDIA GPU"),
    ([*CPU, "--", "--device", "cuda"], 2, "ml.m5.4xlarge has no GPU, and the server needs 1"),
    ([*GPU, "--", "--tp", "4"], 2, "ml.g4dn.2xlarge has 1 GPU, and the server needs 4"),
    ([*GPU, "--multi-model"], 2, "On GPUs, SageMaker has multi-model endpoints for Triton's"),
    ([*CPU, "--autoscale", "0:2"], 2, "--autoscale: '0:2' is not LOW:HIGH. Two numbers"),
    ([*CPU, "--name", "a_b"], 2, "--name a_b is not a name of SageMaker's"),
    ([*CPU, "--", "--port", "80"], 2, "--port is not for a server in a container"),
    ([*CPU, "--", "--api-key", "x"], 2, "--api-key is not for a server in a container"),
    ([*CPU, "--", "--drain-timeout", "60"], 2, "SageMaker kills a container 30 s after SIGTERM"),
    ([*CPU, "--region", "eu-west-1"], 2, "--image is in us-east-1, and the endpoint in eu-west-1"),
    ([*CPU, "--upload", "s3://b/m"], 3, "s3://bucket/models/tiny-int4 is not a directory"),
    (CPU[2:], 2, "--image is missing. A deployment needs it"),
]


@pytest.mark.parametrize(("words", "code", "text"), REFUSED)
def test_wrong_deployments_are_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, text: str
) -> None:
    assert deploy(*words) == code
    assert text in capsys.readouterr().err


def test_missing_alarm_is_noticed_before_anything_is_made(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert deploy(*CPU, "--alarm", "none") == 3
    assert "--alarm none: there is no such alarm in us-east-1" in capsys.readouterr().err
    assert boto3.client("sagemaker").list_models()["Models"] == []


def test_wrong_models_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy(*CPU, model=str(tmp_path)) == 3
    assert f"Run `llmkit push {tmp_path} s3://BUCKET/NAME`" in capsys.readouterr().err
    assert deploy(*CPU, model="gs://bucket/model") == 2
    assert "gs://bucket/model is not in S3" in capsys.readouterr().err
    assert deploy(*CPU, "--multi-model", model="s3://bucket/one.tar.gz") == 2
    assert "MODEL is a folder of .tar.gz files" in capsys.readouterr().err
    assert run(["deploy", "sagemaker", *CPU]) == 2
    assert "MODEL is missing" in capsys.readouterr().err
    assert run(["deploy", "sagemaker", MODEL, "--remove", "--name", "x"]) == 2
    assert "MODEL and --remove exclude each other" in capsys.readouterr().err
    assert run(["deploy", "sagemaker", "--remove"]) == 2
    assert "--name is missing. It says what is deleted" in capsys.readouterr().err


def test_idle_gpus_and_cpus_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    dry_run_words = ("--dry-run", "--quiet")
    assert deploy(*GPU, "--instance", "ml.g6e.12xlarge", "--dry-run", "--", "--tp", "2") == 0
    note = "2 of 4 GPUs of ml.g6e.12xlarge stay idle: use them with -- --tp 4 or -- --dp 4"
    assert note in capsys.readouterr().err
    assert deploy(*CPU, "--dry-run") == 0
    assert "ml.m5.4xlarge has no GPU: the model is served on the CPU" in capsys.readouterr().err
    assert deploy(*CPU, *dry_run_words) == 0
    assert capsys.readouterr().err == ""


def test_missing_boto3_credentials_or_region_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "boto3", None)
        assert deploy(*CPU) == 4
        assert "Install it with `pip install 'llmkit[aws]'`" in capsys.readouterr().err
        assert deploy(*CPU, "--dry-run") == 0
        capsys.readouterr()
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    assert deploy(*CPU) == 2
    assert "no AWS region is set. Give --region, or set AWS_REGION" in capsys.readouterr().err
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    assert deploy(*CPU, "--region", REGION) == 4
    assert "no AWS credentials were found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "exit_code", "todo"),
    [
        ("AccessDeniedException", 4, "Add this permission to the role or user that deploys"),
        ("ExpiredTokenException", 4, "Sign in again"),
        ("ResourceLimitExceeded", 4, "Ask AWS for a higher quota"),
        ("InternalFailure", 4, "Try again later"),
        ("ValidationException", 3, "AWS refused CreateModel (ValidationException): no good"),
    ],
)
def test_refusals_of_aws_have_their_reason(
    answer_call: AnswerCall,
    capsys: pytest.CaptureFixture[str],
    code: str,
    exit_code: int,
    todo: str,
) -> None:
    def refuse(**_: Any) -> Any:
        status = 500 if code == "InternalFailure" else 400
        answer: Any = {
            "Error": {"Code": code, "Message": "no good"},
            "ResponseMetadata": {"HTTPStatusCode": status},
        }
        raise ClientError(answer, "CreateModel")

    answer_call("CreateModel", refuse)
    assert deploy(*CPU) == exit_code
    error = capsys.readouterr().err
    assert "no good" in error and todo in error
