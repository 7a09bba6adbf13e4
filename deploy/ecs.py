"""`llmkit deploy ecs`: a task definition, a service behind a load balancer, and its scaling."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from llmkit.common.errors import InputError, ShortageError, UsageError
from llmkit.deploy.aws_calls import AwsCall, aws_errors, error_code, new_client, version_of
from llmkit.deploy.aws_deployments import AwsDeployments, Log

PORT = 8000
SCALABLE_DIMENSION = "ecs:service:DesiredCount"
CPU_TARGET = 60.0  # percent, without a number of requests to aim at
FARGATE = "FARGATE"
MODELS_FOLDER = "/models"  # where the file system of --efs is
# A probe of the server in its container, which has no curl.
_PROBE = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{PORT}/ready', timeout=5)"
_VERSION_LABEL = "llmkit.version"
_FARGATE_MAX_STOP_S = 120
_STOP_MARGIN_S = 10  # for the engine to end after the last request
_MAX_START_PERIOD_S = 300
_RETRIES = 10  # of the container's health check
_POLL_S = 10.0  # between two questions after a service's state

Action = Literal["created", "updated"]


@dataclass(frozen=True, kw_only=True)
class EcsDeployment:
    """A service of `llmkit serve` on a cluster."""

    name: str  # of the service, and of its family of task definitions
    cluster: str
    image: str
    words: tuple[str, ...]  # of `llmkit serve`, without its address
    execution_role: str
    subnets: tuple[str, ...]
    key_secret: str  # the ARN of the API key
    task_role: str | None = None
    hub_secret: str | None = None  # the ARN of HF_TOKEN
    security_groups: tuple[str, ...] = ()
    capacity_provider: str | None = None  # None: EC2 with GPUs, else Fargate
    cpus: float = 4.0
    memory_mib: int = 16_384
    gpus: int = 0
    efs: str | None = None  # a file system with models
    region: str = ""  # of the logs
    tasks: int = 1
    target_group: str | None = None
    load_balancer: str | None = None  # the ARN of the target group's
    autoscale: tuple[int, int] | None = None
    requests_per_minute: float | None = None  # of a task, at which the scaling aims
    startup_s: int = 900
    drain_s: float = 30.0  # --drain-timeout of the server
    alarms: tuple[str, ...] = ()

    @property
    def launch_type(self) -> str | None:
        """What runs the tasks; None: the capacity provider."""
        if self.capacity_provider is not None:
            return None
        return "EC2" if self.gpus else FARGATE

    @property
    def stop_s(self) -> int:
        """How long a task may take to end after SIGTERM.

        Raises UsageError where Fargate allows less than the server's drain needs.
        """
        seconds = math.ceil(self.drain_s) + _STOP_MARGIN_S
        if self.launch_type == FARGATE and seconds > _FARGATE_MAX_STOP_S:
            most = _FARGATE_MAX_STOP_S - _STOP_MARGIN_S
            raise UsageError(
                f"--drain-timeout {self.drain_s:g} is longer than a task of Fargate may take",
                f"Fargate kills tasks after {_FARGATE_MAX_STOP_S} s",
                f"Give -- --drain-timeout {most} or less",
            )
        return max(2, seconds)

    @cached_property
    def version(self) -> str:
        """A hash of the task definition."""
        return version_of(self._task_definition(""))

    def register_task_definition(self) -> AwsCall:
        parameters = self._task_definition(self.version)
        return AwsCall("ecs", "RegisterTaskDefinition", parameters)

    def create_service(self, task_definition: str) -> AwsCall:
        parameters = {
            "serviceName": self.name,
            **self._service(task_definition),
            "desiredCount": self.autoscale[0] if self.autoscale else self.tasks,
            "enableECSManagedTags": True,
            "propagateTags": "SERVICE",
        }
        if self.launch_type is not None:
            parameters["launchType"] = self.launch_type
        return AwsCall("ecs", "CreateService", parameters)

    def update_service(self, task_definition: str) -> AwsCall:
        parameters = {"service": self.name, **self._service(task_definition)}
        if self.autoscale is None:  # otherwise the scaling says how many there are
            parameters["desiredCount"] = self.tasks
        return AwsCall("ecs", "UpdateService", parameters)

    def scaling(self) -> list[AwsCall]:
        """The calls that scale the service; none without `autoscale`."""
        if self.autoscale is None:
            return []
        target = {
            "ServiceNamespace": "ecs",
            "ResourceId": resource_id(self.cluster, self.name),
            "ScalableDimension": SCALABLE_DIMENSION,
        }
        metric: dict[str, Any] = {"PredefinedMetricType": "ECSServiceAverageCPUUtilization"}
        if self.requests_per_minute is not None:
            metric = {
                "PredefinedMetricType": "ALBRequestCountPerTarget",
                "ResourceLabel": self._resource_label(),
            }
        policy = {
            "TargetValue": self.requests_per_minute or CPU_TARGET,
            "PredefinedMetricSpecification": metric,
            "ScaleOutCooldown": 60,
            "ScaleInCooldown": 600,
        }
        lowest, highest = self.autoscale
        return [
            AwsCall(
                "application-autoscaling",
                "RegisterScalableTarget",
                {**target, "MinCapacity": lowest, "MaxCapacity": highest},
            ),
            AwsCall(
                "application-autoscaling",
                "PutScalingPolicy",
                {
                    **target,
                    "PolicyName": f"{self.name}-load",
                    "PolicyType": "TargetTrackingScaling",
                    "TargetTrackingScalingPolicyConfiguration": policy,
                },
            ),
        ]

    def drain_targets(self) -> list[AwsCall]:
        """The call that lets the load balancer wait for running requests of an ending task."""
        if self.target_group is None:
            return []
        attribute = {
            "Key": "deregistration_delay.timeout_seconds",
            "Value": str(math.ceil(self.drain_s)),
        }
        return [
            AwsCall(
                "elbv2",
                "ModifyTargetGroupAttributes",
                {"TargetGroupArn": self.target_group, "Attributes": [attribute]},
            )
        ]

    def calls(self) -> list[AwsCall]:
        """The calls that create the service."""
        return [
            self.register_task_definition(),
            *self.drain_targets(),
            self.create_service(self.name),
            *self.scaling(),
        ]

    def _task_definition(self, version: str) -> dict[str, Any]:
        task: dict[str, Any] = {
            "family": self.name,
            "networkMode": "awsvpc",
            "executionRoleArn": self.execution_role,
            "containerDefinitions": [self._container(version)],
            "cpu": str(round(self.cpus * 1024)),
            "memory": str(self.memory_mib),
        }
        if self.launch_type is not None:
            task["requiresCompatibilities"] = [self.launch_type]
        if self.task_role is not None:
            task["taskRoleArn"] = self.task_role
        if self.efs is not None:
            volume = {"fileSystemId": self.efs, "transitEncryption": "ENABLED"}
            task["volumes"] = [{"name": "models", "efsVolumeConfiguration": volume}]
        return task

    def _container(self, version: str) -> dict[str, Any]:
        # A container may not be checked less often than it may fail.
        checked_s = max(0, self.startup_s - _MAX_START_PERIOD_S)
        interval_s = min(300, max(10, math.ceil(checked_s / _RETRIES)))
        secrets = [{"name": "LLMKIT_API_KEY", "valueFrom": self.key_secret}]
        if self.hub_secret is not None:
            secrets.append({"name": "HF_TOKEN", "valueFrom": self.hub_secret})
        address = ("--host", "0.0.0.0", "--port", str(PORT))  # noqa: S104 the server needs a key
        container: dict[str, Any] = {
            "name": "llmkit",
            "image": self.image,
            "essential": True,
            "command": ["serve", *self.words, *address],
            "portMappings": [{"containerPort": PORT, "protocol": "tcp"}],
            # The image's user has no home for models that are downloaded and compiled kernels.
            "environment": [{"name": "HOME", "value": "/tmp"}],  # noqa: S108
            "secrets": secrets,
            "healthCheck": {
                "command": ["CMD", "python", "-c", _PROBE],
                "interval": interval_s,
                "timeout": 10,
                "retries": _RETRIES,
                "startPeriod": min(self.startup_s, _MAX_START_PERIOD_S),
            },
            "stopTimeout": self.stop_s,
            "ulimits": [{"name": "nofile", "softLimit": 65_536, "hardLimit": 65_536}],
            "logConfiguration": {
                "logDriver": "awslogs",
                "options": {
                    "awslogs-group": f"/ecs/{self.name}",
                    "awslogs-region": self.region,
                    "awslogs-stream-prefix": "llmkit",
                    "awslogs-create-group": "true",
                },
            },
            "dockerLabels": {_VERSION_LABEL: version},
        }
        if self.gpus:
            container["resourceRequirements"] = [{"type": "GPU", "value": str(self.gpus)}]
            # Ranks exchange tensors by shared memory, of which Docker gives 64 MiB.
            container["linuxParameters"] = {"sharedMemorySize": self.memory_mib // 4}
        if self.efs is not None:
            mount = {"sourceVolume": "models", "containerPath": MODELS_FOLDER, "readOnly": True}
            container["mountPoints"] = [mount]
        return container

    def _service(self, task_definition: str) -> dict[str, Any]:
        deployment: dict[str, Any] = {
            # A new version that does not become healthy goes, and the old one stays.
            "deploymentCircuitBreaker": {"enable": True, "rollback": True},
            "minimumHealthyPercent": 100,
            "maximumPercent": 200,
        }
        if self.alarms:
            names = list(self.alarms)
            deployment["alarms"] = {"alarmNames": names, "enable": True, "rollback": True}
        service: dict[str, Any] = {
            "cluster": self.cluster,
            "taskDefinition": task_definition,
            "networkConfiguration": {
                "awsvpcConfiguration": {
                    "subnets": list(self.subnets),
                    "securityGroups": list(self.security_groups),
                    "assignPublicIp": "DISABLED",
                }
            },
            "deploymentConfiguration": deployment,
        }
        if self.capacity_provider is not None:
            provider = {"capacityProvider": self.capacity_provider, "weight": 1}
            service["capacityProviderStrategy"] = [provider]
        if self.target_group is not None:
            service["loadBalancers"] = [
                {
                    "targetGroupArn": self.target_group,
                    "containerName": "llmkit",
                    "containerPort": PORT,
                }
            ]
            service["healthCheckGracePeriodSeconds"] = self.startup_s
        return service

    def _resource_label(self) -> str:
        """The load balancer and the target group, as a scaling policy names them."""
        balancer = (self.load_balancer or "").partition(":loadbalancer/")[2]
        group = (self.target_group or "").partition(":targetgroup/")[2]
        return f"{balancer or 'app/LOAD-BALANCER/ID'}/targetgroup/{group}"


def resource_id(cluster: str, service: str) -> str:
    """What application autoscaling calls a service."""
    return f"service/{cluster.rpartition('/')[2]}/{service}"


class EcsServices(AwsDeployments):
    """The services of an account in a region."""

    def __init__(self, region: str | None, log: Log) -> None:
        """log: gets lines for the user."""
        super().__init__("ecs", SCALABLE_DIMENSION, region, log)
        self._balancing = new_client("elbv2", region)

    def load_balancer(self, target_group: str) -> str:
        """The ARN of a target group's load balancer.

        Raises InputError when tasks cannot be registered with the group, or when no load balancer
        sends it requests.
        """
        with aws_errors():
            groups = self._balancing.describe_target_groups(TargetGroupArns=[target_group])
        group = groups["TargetGroups"][0]
        if group.get("TargetType") != "ip":
            raise InputError(
                f"--target-group {group['TargetGroupName']} has targets of the type "
                f"{group.get('TargetType')}",
                "Tasks have addresses of their own: the type ip was expected",
                "Create one with `aws elbv2 create-target-group --target-type ip "
                "--health-check-path /ready`",
            )
        if group.get("HealthCheckPath") not in ("/ready", "/health"):
            self.log(
                f"warning: the target group asks for {group.get('HealthCheckPath')}. /ready says "
                "whether the server accepts requests"
            )
        balancers = group.get("LoadBalancerArns") or []
        if not balancers:
            raise InputError(
                f"--target-group {group['TargetGroupName']} has no load balancer",
                todo="Name it in a rule of a listener first",
            )
        return str(balancers[0])

    def deploy(self, deployment: EcsDeployment) -> Action:
        """Create or update the service, and wait until its tasks are healthy.

        Raises ShortageError when they do not become healthy, and the LlmkitError of AWS' refusals.
        """
        with aws_errors():
            exists = self._describe(deployment.cluster, deployment.name) is not None
            task_definition = self._current_definition(deployment)
            if task_definition is None:
                registered = deployment.register_task_definition().make(self.client)
                task_definition = registered["taskDefinition"]["taskDefinitionArn"]
            for call in deployment.drain_targets():
                call.make(self._balancing)
            if exists:
                deployment.update_service(task_definition).make(self.client)
            else:
                deployment.create_service(task_definition).make(self.client)
            if deployment.autoscale is None:
                self.deregister(resource_id(deployment.cluster, deployment.name))
            for call in deployment.scaling():
                call.make(self.autoscaling)
            self._wait(deployment, task_definition)
        return "updated" if exists else "created"

    def remove(self, cluster: str, name: str) -> list[str]:
        """Delete a service with its scaling and task definitions; return their names.

        Raises InputError when there is no such service.
        """
        with aws_errors():
            if self._describe(cluster, name) is None:
                raise InputError(
                    f"there is no service {name} in the cluster {cluster}",
                    todo="Check --name, --cluster and --region",
                )
            self.deregister(resource_id(cluster, name))
            self.client.delete_service(cluster=cluster, service=name, force=True)
            removed = [name]
            pages = self.client.get_paginator("list_task_definitions").paginate(familyPrefix=name)
            for page in pages:
                for arn in page["taskDefinitionArns"]:
                    family_and_revision = arn.rpartition("/")[2]
                    if family_and_revision.rpartition(":")[0] == name:
                        self.client.deregister_task_definition(taskDefinition=arn)
                        removed.append(family_and_revision)
        return removed

    def _describe(self, cluster: str, name: str) -> Any:
        """AWS' description of a service; None: there is no such one."""
        answer = self.client.describe_services(cluster=cluster, services=[name])
        active = [service for service in answer["services"] if service["status"] != "INACTIVE"]
        return active[0] if active else None

    def _current_definition(self, deployment: EcsDeployment) -> str | None:
        """The ARN of the newest task definition, if it is the deployment's; None: it is not."""
        from botocore.exceptions import ClientError

        try:
            answer = self.client.describe_task_definition(taskDefinition=deployment.name)
        except ClientError as error:
            if error_code(error) == "ClientException":  # there is none of this family
                return None
            raise
        definition = answer["taskDefinition"]
        labels = definition["containerDefinitions"][0].get("dockerLabels", {})
        if labels.get(_VERSION_LABEL) != deployment.version:
            return None
        return str(definition["taskDefinitionArn"])

    def _wait(self, deployment: EcsDeployment, task_definition: str) -> None:
        """Wait until the tasks of the newest version are healthy."""
        limit_s = 2 * deployment.startup_s + deployment.drain_s + 600
        deadline = time.monotonic() + limit_s
        state = ""
        while True:
            service = self._describe(deployment.cluster, deployment.name)
            rollouts = [
                rollout
                for rollout in (service or {}).get("deployments", [])
                if rollout.get("taskDefinition") == task_definition
            ]
            if service is None and state:
                raise ShortageError(f"the service {deployment.name} was deleted meanwhile")
            # What was just asked for may not be visible yet. Once it was, its absence is its end.
            missing = "FAILED" if state else ""
            rollout = rollouts[0] if rollouts else {"rolloutState": missing}
            if rollout.get("rolloutState") != state:
                state = str(rollout.get("rolloutState"))
                self.log(f"{deployment.name}: {state}")
            if state == "COMPLETED":
                return
            if state == "FAILED":
                reason = rollout.get("rolloutStateReason") or "its tasks did not become healthy"
                raise ShortageError(
                    f"the deployment of {deployment.name} failed: {reason}",
                    todo=f"Read the log group /ecs/{deployment.name} in CloudWatch",
                )
            if time.monotonic() > deadline:
                found = state or "not there"
                raise ShortageError(
                    f"the service {deployment.name} is {found} after {limit_s:.0f} s",
                    todo="Run the command again to wait on",
                )
            time.sleep(_POLL_S)
