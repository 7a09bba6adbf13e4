"""What the endpoints of SageMaker and the services of ECS have in common."""

from __future__ import annotations

from collections.abc import Callable

from llmkit.deploy.aws_calls import new_client

Log = Callable[[str], None]


class AwsDeployments:
    """The deployments of an account on one of AWS' services in a region.

    Application Auto Scaling adds and removes what they run on.
    """

    def __init__(self, service: str, dimension: str, region: str | None, log: Log) -> None:
        """Raises ShortageError without boto3, UsageError without a region.

        service: "ecs", as boto3 and the scaling name it. dimension: what is scaled. region: None:
        boto3's. log: gets lines for the user.
        """
        self.client = new_client(service, region)
        self.autoscaling = new_client("application-autoscaling", region)
        self.log = log
        self._target = {"ServiceNamespace": service, "ScalableDimension": dimension}

    @property
    def region(self) -> str:
        """The region in which the deployments are."""
        return str(self.client.meta.region_name)

    def deregister(self, resource: str) -> None:
        """Remove the scaling of a deployment, if there is one.

        resource: what the scaling calls it.
        """
        found = self.autoscaling.describe_scalable_targets(**self._target, ResourceIds=[resource])
        if found["ScalableTargets"]:
            self.autoscaling.deregister_scalable_target(**self._target, ResourceId=resource)
