"""`llmkit deploy sagemaker`: a model, an endpoint configuration, an endpoint, and its scaling.

The model and the configuration have names with a hash of their content. So a second deployment of
the same is no change, and another one is an update by blue/green.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from llmkit.common.errors import InputError, ShortageError
from llmkit.deploy.aws_calls import AwsCall, aws_errors, error_message, new_client, version_of
from llmkit.deploy.aws_deployments import AwsDeployments, Log

VARIANT = "all"
SCALABLE_DIMENSION = "sagemaker:variant:DesiredInstanceCount"
METRIC = "SageMakerVariantConcurrentRequestsPerModelHighResolution"
TAG = "llmkit:endpoint"
# The only image of a host whose driver runs PyTorch's default build, of CUDA 13.
GPU_AMI = "al2023-ami-sagemaker-inference-gpu-4-1"
_POLL_S = 10.0  # between two questions after an endpoint's state
_BUSY_STATES = frozenset({"Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting"})
_UPDATE_S = 1800.0  # for SageMaker to find instances and to move the traffic

Action = Literal["created", "updated", "unchanged"]


@dataclass(frozen=True, kw_only=True)
class SagemakerDeployment:
    """An endpoint of one model, or of many models in S3."""

    name: str  # of the endpoint
    image: str
    role: str
    instance_type: str
    instances: int
    model: str  # s3://…, a folder or a .tar.gz file, or a hub id
    variables: Mapping[str, str]  # of the container
    multi_model: bool = False
    autoscale: tuple[int, int] | None = None
    concurrency: int = 0  # requests of an instance at a time, at which the scaling aims
    startup_s: int = 1800
    ami: str | None = None  # of the instances; None: SageMaker's
    volume_gib: int | None = None
    canary_percent: int | None = None  # of the new instances, which get traffic first; None: all
    bake_s: int = 300  # how long alarms are watched, before and after all traffic moves
    alarms: tuple[str, ...] = ()

    @cached_property
    def version(self) -> str:
        """A hash of all that makes the model and the configuration."""
        return version_of(
            self._container(), self._variant(""), {"role": self.role, "image": self.image}
        )

    @property
    def config_name(self) -> str:
        """The name of the endpoint configuration, and of the model."""
        return f"{self.name}-{self.version}"

    @property
    def resource_id(self) -> str:
        """What application autoscaling calls the endpoint's instances."""
        return resource_id(self.name)

    def create_model(self) -> AwsCall:
        return AwsCall(
            "sagemaker",
            "CreateModel",
            {
                "ModelName": self.config_name,
                "PrimaryContainer": self._container(),
                "ExecutionRoleArn": self.role,
                "Tags": self._tags,
            },
        )

    def create_config(self) -> AwsCall:
        return AwsCall(
            "sagemaker",
            "CreateEndpointConfig",
            {
                "EndpointConfigName": self.config_name,
                "ProductionVariants": [self._variant(self.config_name)],
                "Tags": self._tags,
            },
        )

    def create_endpoint(self) -> AwsCall:
        return AwsCall(
            "sagemaker",
            "CreateEndpoint",
            {
                "EndpointName": self.name,
                "EndpointConfigName": self.config_name,
                "Tags": self._tags,
            },
            wait=("endpoint-in-service", "--endpoint-name", self.name),
        )

    def update_endpoint(self) -> AwsCall:
        """The update by blue/green: new instances first, then the traffic, then the old ones go."""
        routing: dict[str, Any] = {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": self.bake_s}
        if self.canary_percent is not None:
            size = {"Type": "CAPACITY_PERCENT", "Value": self.canary_percent}
            routing |= {"Type": "CANARY", "CanarySize": size}
        config: dict[str, Any] = {
            "BlueGreenUpdatePolicy": {
                "TrafficRoutingConfiguration": routing,
                "TerminationWaitInSeconds": self.bake_s,
            }
        }
        if self.alarms:
            names = [{"AlarmName": name} for name in self.alarms]
            config["AutoRollbackConfiguration"] = {"Alarms": names}
        return AwsCall(
            "sagemaker",
            "UpdateEndpoint",
            {
                "EndpointName": self.name,
                "EndpointConfigName": self.config_name,
                # A scaled endpoint keeps its number of instances.
                "RetainAllVariantProperties": self.autoscale is not None,
                "DeploymentConfig": config,
            },
        )

    def scaling(self) -> list[AwsCall]:
        """The calls that scale by the requests in flight; none without `autoscale`."""
        if self.autoscale is None:
            return []
        target = {
            "ServiceNamespace": "sagemaker",
            "ResourceId": self.resource_id,
            "ScalableDimension": SCALABLE_DIMENSION,
        }
        policy = {
            "TargetValue": float(self.concurrency),
            "PredefinedMetricSpecification": {"PredefinedMetricType": METRIC},
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
                    "PolicyName": f"{self.name}-requests",
                    "PolicyType": "TargetTrackingScaling",
                    "TargetTrackingScalingPolicyConfiguration": policy,
                },
            ),
        ]

    def calls(self) -> list[AwsCall]:
        """The calls that create the endpoint."""
        return [
            self.create_model(),
            self.create_config(),
            self.create_endpoint(),
            *self.scaling(),
        ]

    @property
    def _tags(self) -> list[dict[str, str]]:
        return [{"Key": TAG, "Value": self.name}]

    def _container(self) -> dict[str, Any]:
        container: dict[str, Any] = {"Image": self.image, "Environment": dict(self.variables)}
        if self.multi_model:
            return container | {"Mode": "MultiModel", "ModelDataUrl": self.model}
        if not self.model.startswith("s3://"):
            container["Environment"]["HF_MODEL_ID"] = self.model
            return container
        source = {"S3Uri": self.model, "S3DataType": "S3Prefix", "CompressionType": "None"}
        if not self.model.endswith("/"):
            source |= {"S3DataType": "S3Object", "CompressionType": "Gzip"}
        return container | {"ModelDataSource": {"S3DataSource": source}}

    def _variant(self, model_name: str) -> dict[str, Any]:
        variant: dict[str, Any] = {
            "VariantName": VARIANT,
            "ModelName": model_name,
            "InstanceType": self.instance_type,
            "InitialInstanceCount": self.autoscale[0] if self.autoscale else self.instances,
            "ContainerStartupHealthCheckTimeoutInSeconds": self.startup_s,
            "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
        }
        if not self.multi_model and self.model.startswith("s3://"):
            variant["ModelDataDownloadTimeoutInSeconds"] = self.startup_s
        if self.ami is not None:
            variant["InferenceAmiVersion"] = self.ami
        if self.volume_gib is not None:
            variant["VolumeSizeInGB"] = self.volume_gib
        return variant


def resource_id(endpoint: str) -> str:
    """What application autoscaling calls an endpoint's instances."""
    return f"endpoint/{endpoint}/variant/{VARIANT}"


class SagemakerEndpoints(AwsDeployments):
    """The endpoints of an account in a region."""

    def __init__(self, region: str | None, log: Log) -> None:
        """log: gets lines for the user."""
        super().__init__("sagemaker", SCALABLE_DIMENSION, region, log)
        self._cloudwatch = new_client("cloudwatch", region)

    def deploy(self, deployment: SagemakerDeployment) -> Action:
        """Create or update the endpoint, and wait until it is in service.

        Raises ShortageError when it is being changed, when it does not start or when an alarm
        rolled it back, and the LlmkitError of AWS' refusals.
        """
        with aws_errors():
            self._check_alarms(deployment.alarms)
            endpoint = self._describe(deployment.name)
            if endpoint is None:
                self._create_version(deployment)
                deployment.create_endpoint().make(self.client)
                action: Action = "created"
            elif _brings(endpoint, deployment.config_name):  # an earlier run began it
                action = "created" if endpoint["EndpointStatus"] == "Creating" else "updated"
            elif endpoint["EndpointStatus"] in _BUSY_STATES:
                raise ShortageError(
                    f"the endpoint {deployment.name} is {endpoint['EndpointStatus']}",
                    "An endpoint in service was expected",
                    "Wait, and run the command again",
                )
            elif endpoint["EndpointStatus"] == "Failed":
                raise ShortageError(
                    f"the endpoint {deployment.name} has failed: "
                    f"{endpoint.get('FailureReason', 'AWS gives no reason')}",
                    todo="Delete it with --remove, then deploy again",
                )
            elif endpoint["EndpointConfigName"] == deployment.config_name:
                action = "unchanged"
            else:
                self._create_version(deployment)
                self.deregister(resource_id(deployment.name))  # it would block the update
                deployment.update_endpoint().make(self.client)
                action = "updated"
            try:
                self._wait(deployment)
            finally:
                self._scale(deployment)
        return action

    def remove(self, name: str) -> list[str]:
        """Delete an endpoint with its scaling, configurations and models; return their names.

        Raises InputError when there is no such endpoint.
        """
        with aws_errors():
            if self._describe(name) is None:
                raise InputError(
                    f"there is no endpoint {name} in {self.region}",
                    todo="Check --name and --region",
                )
            self.deregister(resource_id(name))
            self.client.delete_endpoint(EndpointName=name)
            removed = [name]
            for config in self._versions("list_endpoint_configs", "EndpointConfig", name):
                self.client.delete_endpoint_config(EndpointConfigName=config)
                removed.append(config)
            for model in self._versions("list_models", "Model", name):
                self.client.delete_model(ModelName=model)
                removed.append(model)
        return list(dict.fromkeys(removed))

    def _create_version(self, deployment: SagemakerDeployment) -> None:
        """Create the model and the configuration, unless an earlier run did."""
        name = deployment.config_name
        if name not in self._versions("list_models", "Model", deployment.name):
            deployment.create_model().make(self.client)
        configs = self._versions("list_endpoint_configs", "EndpointConfig", deployment.name)
        if name not in configs:
            deployment.create_config().make(self.client)

    def _versions(self, operation: str, kind: str, endpoint: str) -> list[str]:
        """The names of the models or configurations of an endpoint."""
        return [
            name for name in self._names(operation, kind, endpoint) if _is_version(name, endpoint)
        ]

    def _names(self, operation: str, kind: str, endpoint: str) -> Iterator[str]:
        pages = self.client.get_paginator(operation).paginate(NameContains=endpoint)
        for page in pages:
            for entry in page[f"{kind}s"]:
                yield str(entry[f"{kind}Name"])

    def _describe(self, name: str) -> Any:
        """AWS' description of an endpoint; None: there is no such one."""
        from botocore.exceptions import ClientError

        try:
            return self.client.describe_endpoint(EndpointName=name)
        except ClientError as error:
            if "Could not find" in error_message(error):
                return None
            raise

    def _wait(self, deployment: SagemakerDeployment) -> None:
        """Wait until the endpoint serves the deployment's version."""
        limit_s = 2 * deployment.startup_s + 2 * deployment.bake_s + _UPDATE_S
        deadline = time.monotonic() + limit_s
        status = ""
        while True:
            endpoint = self._describe(deployment.name)
            if endpoint is None:
                raise ShortageError(f"the endpoint {deployment.name} was deleted meanwhile")
            if endpoint["EndpointStatus"] != status:
                status = endpoint["EndpointStatus"]
                self.log(f"{deployment.name}: {status}")
            if status not in _BUSY_STATES:
                break
            if time.monotonic() > deadline:
                raise ShortageError(
                    f"the endpoint {deployment.name} is {status} after {limit_s:.0f} s",
                    todo="Run the command again to wait on",
                )
            time.sleep(_POLL_S)
        if status == "InService" and endpoint["EndpointConfigName"] == deployment.config_name:
            return
        reason = endpoint.get("FailureReason", "AWS gives no reason")
        went_back = " and serves the version before" if status == "InService" else ""
        raise ShortageError(
            f"the endpoint {deployment.name} is {status}{went_back}: {reason}",
            todo=f"Read the log group /aws/sagemaker/Endpoints/{deployment.name} in CloudWatch",
        )

    def _scale(self, deployment: SagemakerDeployment) -> None:
        """Register the scaling of an endpoint in service; without any, remove an earlier one."""
        endpoint = self._describe(deployment.name)
        if endpoint is None or endpoint["EndpointStatus"] != "InService":
            return
        if deployment.autoscale is None:
            self.deregister(resource_id(deployment.name))
        for call in deployment.scaling():
            call.make(self.autoscaling)

    def _check_alarms(self, alarms: tuple[str, ...]) -> None:
        if not alarms:
            return
        found = self._cloudwatch.describe_alarms(
            AlarmNames=list(alarms), AlarmTypes=["MetricAlarm", "CompositeAlarm"]
        )
        known = {alarm["AlarmName"] for alarm in found["MetricAlarms"] + found["CompositeAlarms"]}
        for name in alarms:
            if name not in known:
                raise InputError(
                    f"--alarm {name}: there is no such alarm in {self.region}",
                    todo="Create it with `aws cloudwatch put-metric-alarm`",
                )


def _brings(endpoint: Mapping[str, Any], config: str) -> bool:
    """Whether AWS is bringing an endpoint to a configuration now."""
    pending = endpoint.get("PendingDeploymentSummary") or endpoint
    is_changing = endpoint["EndpointStatus"] in ("Creating", "Updating")
    return is_changing and pending["EndpointConfigName"] == config


def _is_version(name: str, endpoint: str) -> bool:
    return re.fullmatch(re.escape(endpoint) + "-[0-9a-f]{8}", name) is not None
