"""`llmkit deploy ecs` by boto3, on moto's ECS, load balancer and scaling."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws
from moto.core.responses import ActionResult
from moto.ecs.models import ecs_backends
from moto.ecs.responses import EC2ContainerServiceResponse
from support.aws_models import check_call, run_script

from llmkit.cli.main import run
from llmkit.deploy import ecs

REGION = "us-east-1"
ACCOUNT = "123456789012"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/ecs"
KEY = f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:llmkit-AbCdEf"
NEEDED = ["--image", "llmkit:0.1.0", "--execution-role", ROLE, "--api-key-secret", KEY]


@dataclass
class Account:
    """An account with a cluster, a network and a load balancer."""

    subnet: str
    vpc: str
    balancer: str
    target_group: str

    @property
    def words(self) -> list[str]:
        """What every deployment needs."""
        return [*NEEDED, "--subnets", self.subnet]


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "MOTO_ECS_SERVICE_RUNNING": "9",  # tasks are healthy at once
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ecs, "_POLL_S", 0.0)
    with mock_aws():
        boto3.client("ecs").create_cluster(clusterName="llm")
        network = boto3.client("ec2")
        vpc = network.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnets = [
            network.create_subnet(
                VpcId=vpc, CidrBlock=f"10.0.{n}.0/24", AvailabilityZone=REGION + z
            )
            for n, z in enumerate("ab")
        ]
        ids = [subnet["Subnet"]["SubnetId"] for subnet in subnets]
        balancing = boto3.client("elbv2")
        balancer = balancing.create_load_balancer(Name="front", Subnets=ids)["LoadBalancers"][0]
        group = create_group("tasks", vpc)
        balancing.create_listener(
            LoadBalancerArn=balancer["LoadBalancerArn"],
            Protocol="HTTP",
            Port=80,
            DefaultActions=[{"Type": "forward", "TargetGroupArn": group}],
        )
        yield Account(ids[0], vpc, balancer["LoadBalancerArn"], group)


def create_group(name: str, vpc: str, target_type: str = "ip", path: str = "/ready") -> str:
    created = boto3.client("elbv2").create_target_group(
        Name=name,
        Protocol="HTTP",
        Port=8000,
        VpcId=vpc,
        TargetType=target_type,
        HealthCheckPath=path,
    )
    return str(created["TargetGroups"][0]["TargetGroupArn"])


def deploy(*words: str, model: str = "org/tiny") -> int:
    return run(["deploy", "ecs", model, "--cluster", "llm", *words])


def service(name: str = "tiny") -> Any:
    return boto3.client("ecs").describe_services(cluster="llm", services=[name])["services"][0]


def task_definition(name: str = "tiny") -> Any:
    found = boto3.client("ecs").describe_task_definition(taskDefinition=name)
    return found["taskDefinition"]


def policies() -> list[Any]:
    client = boto3.client("application-autoscaling")
    return list(client.describe_scaling_policies(ServiceNamespace="ecs")["ScalingPolicies"])


def scalable_targets() -> list[Any]:
    client = boto3.client("application-autoscaling")
    return list(client.describe_scalable_targets(ServiceNamespace="ecs")["ScalableTargets"])


def test_gpu_service_is_created_behind_a_load_balancer(
    account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--gpus", "2", "--target-group", account.target_group, "--autoscale", "1:4"]
    words += ["--requests-per-minute", "120", "--cpus", "8", "--memory", "64"]
    options = ["--", "--tp", "2", "--drain-timeout", "60"]
    assert deploy(*account.words, *words, "--json", *options) == 0
    assert json.loads(capsys.readouterr().out)["action"] == "created"
    definition = task_definition()
    assert definition["requiresCompatibilities"] == ["EC2"]
    assert (definition["cpu"], definition["memory"]) == ("8192", "65536")
    (container,) = definition["containerDefinitions"]
    assert container["command"][:4] == ["serve", "org/tiny", "--tp", "2"]
    assert container["command"][-4:] == ["--host", "0.0.0.0", "--port", "8000"]
    assert container["resourceRequirements"] == [{"type": "GPU", "value": "2"}]
    assert container["secrets"] == [{"name": "LLMKIT_API_KEY", "valueFrom": KEY}]
    assert container["environment"] == [{"name": "HOME", "value": "/tmp"}]
    assert container["stopTimeout"] == 70
    made = service()
    assert made["launchType"] == "EC2"
    assert made["desiredCount"] == 1
    assert made["loadBalancers"] == [
        {
            "targetGroupArn": account.target_group,
            "containerName": "llmkit",
            "containerPort": 8000,
        }
    ]
    assert made["taskDefinition"] == definition["taskDefinitionArn"]
    attributes = boto3.client("elbv2").describe_target_group_attributes(
        TargetGroupArn=account.target_group
    )["Attributes"]
    delay = {"Key": "deregistration_delay.timeout_seconds", "Value": "60"}
    assert delay in attributes
    (policy,) = policies()
    tracking = policy["TargetTrackingScalingPolicyConfiguration"]
    balancer = account.balancer.partition(":loadbalancer/")[2]
    group = account.target_group.rpartition(":")[2]
    assert tracking["TargetValue"] == 120
    assert tracking["PredefinedMetricSpecification"] == {
        "PredefinedMetricType": "ALBRequestCountPerTarget",
        "ResourceLabel": f"{balancer}/{group}",
    }
    assert policy["ResourceId"] == "service/llm/tiny"


def test_cpu_service_runs_on_fargate_and_scales_by_its_cpus(account: Account) -> None:
    assert deploy(*account.words, "--autoscale", "2:5") == 0
    assert task_definition()["requiresCompatibilities"] == ["FARGATE"]
    assert service()["launchType"] == "FARGATE"
    (policy,) = policies()
    tracking = policy["TargetTrackingScalingPolicyConfiguration"]
    metric = tracking["PredefinedMetricSpecification"]["PredefinedMetricType"]
    assert (metric, tracking["TargetValue"]) == ("ECSServiceAverageCPUUtilization", 60)


def test_second_deployment_updates_the_service(
    account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy(*account.words, "--autoscale", "1:3") == 0
    assert len(scalable_targets()) == 1
    first = service()["taskDefinition"]
    assert deploy(*account.words, "--tasks", "3") == 0
    assert "tiny: updated in the cluster llm" in capsys.readouterr().out
    assert service()["taskDefinition"] == first, "the same definition is not registered again"
    assert service()["desiredCount"] == 3
    assert scalable_targets() == []
    backend = ecs_backends[ACCOUNT][REGION]
    update_deployments(backend)
    assert deploy(*account.words, "--", "--max-model-len", "64") == 0
    assert service()["taskDefinition"] == task_definition()["taskDefinitionArn"] != first


def update_deployments(backend: Any) -> None:
    """Let moto's services have a deployment of the newest definition, which moto leaves out."""
    for found in backend.services.values():
        found.deployments[0]["taskDefinition"] = f"{task_definition()['taskDefinitionArn'][:-1]}2"
        found.deployments[0]["rolloutState"] = "COMPLETED"


def test_failed_deployment_is_an_error_with_its_reason(
    account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy(*account.words) == 0
    backend = ecs_backends[ACCOUNT][REGION]
    for found in backend.services.values():
        found.deployments[0]["rolloutState"] = "FAILED"
        found.deployments[0]["rolloutStateReason"] = "tasks failed to start"
    assert deploy(*account.words) == 4
    error = capsys.readouterr().err
    assert "the deployment of tiny failed: tasks failed to start" in error
    assert "Read the log group /ecs/tiny in CloudWatch" in error


def test_new_service_may_be_visible_late(
    account: Account, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    describe = EC2ContainerServiceResponse.describe_services
    late = [True, True]

    def describe_late(response: EC2ContainerServiceResponse) -> Any:
        if response.ecs_backend.services and late:
            late.pop()
            return ActionResult({"services": [], "failures": []})
        return describe(response)

    monkeypatch.setattr(EC2ContainerServiceResponse, "describe_services", describe_late)
    assert deploy(*account.words) == 0
    assert not late and "tiny: created in the cluster llm" in capsys.readouterr().out


def test_remove_deletes_service_scaling_and_definitions(
    account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy(*account.words, "--autoscale", "1:3") == 0
    assert deploy(*account.words, "--name", "tiny-two") == 0
    capsys.readouterr()
    remove = ["deploy", "ecs", "--cluster", "llm", "--remove", "--name", "tiny"]
    assert run([*remove, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": ["tiny", "tiny:1"]}
    client = boto3.client("ecs")
    assert client.list_task_definitions(familyPrefix="tiny")["taskDefinitionArns"] == []
    assert service("tiny-two")["status"] == "ACTIVE"
    assert scalable_targets() == []
    assert run(remove) == 3
    assert "there is no service tiny in the cluster llm" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--gpus", "1", "--autoscale", "1:4", "--capacity-provider", "gpus"],
        ["--efs", "fs-0123", "--task-role", ROLE, "--hub-token-secret", KEY, "--alarm", "a"],
        ["--startup-timeout", "3300", "--security-groups", "sg-1"],
    ],
)
def test_calls_are_those_that_aws_describes(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    group = f"arn:aws:elasticloadbalancing:{REGION}:{ACCOUNT}:targetgroup/tasks/0123456789abcdef"
    target = ["--target-group", group, "--requests-per-minute", "60"]
    needed = [*NEEDED, "--subnets", "subnet-1", *target, "--region", REGION]
    assert deploy(*needed, *words, "--dry-run", "--json") == 0
    captured = capsys.readouterr()
    calls = json.loads(captured.out)["calls"]
    for call in calls:
        check_call(call)
    (definition,) = (call for call in calls if call["operation"] == "RegisterTaskDefinition")
    health = definition["parameters"]["containerDefinitions"][0]["healthCheck"]
    allowed_s = health["startPeriod"] + health["interval"] * health["retries"]
    assert "note: put your load balancer" in captured.err
    startup_s = 3300 if "3300" in words else 900
    assert startup_s <= allowed_s <= startup_s + 60
    assert 5 <= health["interval"] <= 300
    assert health["startPeriod"] <= 300


def test_model_of_a_file_system_is_mounted_read_only(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*NEEDED, "--subnets", "subnet-1", "--region", REGION, "--efs", "fs-0123"]
    assert deploy(*words, "--dry-run", "--json", model="/models/tiny") == 0
    definition = json.loads(capsys.readouterr().out)["calls"][0]["parameters"]
    assert definition["volumes"][0]["efsVolumeConfiguration"]["fileSystemId"] == "fs-0123"
    mount = {"sourceVolume": "models", "containerPath": "/models", "readOnly": True}
    assert definition["containerDefinitions"][0]["mountPoints"] == [mount]


def test_script_makes_the_calls_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "deploy.sh"
    words = [*NEEDED, "--subnets", "subnet-1", "--region", REGION, "--autoscale", "1:2"]
    assert deploy(*words, "-o", str(script)) == 0
    assert f"{script}: 4 calls; none was made" in capsys.readouterr().err
    written = script.read_text()
    assert deploy(*words, "--tasks", "2", "-o", str(script)) == 5
    assert f"The output {script} exists and is a file. Remove it" in capsys.readouterr().err
    assert script.read_text() == written
    assert run_script(script, tmp_path) == [
        "ecs register-task-definition",
        "ecs create-service",
        "application-autoscaling register-scalable-target",
        "application-autoscaling put-scaling-policy",
    ]


OFFLINE = [*NEEDED, "--subnets", "subnet-1", "--region", REGION, "--dry-run"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (NEEDED[2:], 2, "--image is missing. A deployment needs it"),
        (NEEDED, 2, "--subnets is missing. A task has an address in a subnet"),
        ([*OFFLINE, "--api-key-secret", "hunter2"], 2, "is not an ARN of this kind"),
        ([*OFFLINE, "--execution-role", "x"], 2, "--execution-role is not an ARN"),
        ([*OFFLINE, "--", "--tp", "2"], 2, "a task (--gpus) has no GPU, and the server needs 2"),
        ([*OFFLINE, "--", "--host", "::"], 2, "--host is not for a server in a container"),
        ([*OFFLINE, "--", "--drain-timeout", "200"], 2, "Give -- --drain-timeout 110 or less"),
        ([*OFFLINE, "--gpus", "1", "--autoscale", "1:2"], 2, "needs --requests-per-minute"),
        ([*OFFLINE, "--requests-per-minute", "9"], 2, "needs --target-group"),
        ([*NEEDED, "--subnets", "s", "--dry-run"], 2, "--region is missing"),
    ],
)
def test_wrong_deployments_are_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, text: str
) -> None:
    assert deploy(*words) == code
    error = capsys.readouterr().err
    assert text in error and "hunter2" not in error


def test_target_group_must_take_tasks(account: Account, capsys: pytest.CaptureFixture[str]) -> None:
    instances = create_group("instances", account.vpc, "instance")
    assert deploy(*account.words, "--target-group", instances) == 3
    assert "instances has targets of the type instance" in capsys.readouterr().err
    alone = create_group("alone", account.vpc, path="/")
    assert deploy(*account.words, "--target-group", alone) == 3
    error = capsys.readouterr().err
    assert "--target-group alone has no load balancer" in error
    assert "warning: the target group asks for /. /ready says" in error
    gone = account.target_group.replace("tasks", "gone")
    assert deploy(*account.words, "--target-group", gone) == 3
    assert "AWS refused DescribeTargetGroups (TargetGroupNotFound)" in capsys.readouterr().err
    assert boto3.client("ecs").list_services(cluster="llm")["serviceArns"] == []


def test_missing_cluster_is_reported(account: Account, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["deploy", "ecs", "org/tiny", "--cluster", "none", *account.words]) == 3
    assert "AWS refused DescribeServices (ClusterNotFoundException)" in capsys.readouterr().err
