"""`llmkit deploy vllm`: files that start vLLM for a model that does not fit on one node, or on
accelerators other than CUDA's.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmkit.common.errors import UsageError
from llmkit.common.yaml_text import yaml_text
from llmkit.deploy.vllm_devices import CUDA, Device

RAY_PORT = 6379
# Servers listen on loopback only, because they need no key.
HOST = "127.0.0.1"
DeploymentForm = Literal["command", "ray", "lws", "kserve"]


@dataclass(frozen=True)
class VllmDeployment:
    """A model, and the layout in which vLLM serves it."""

    name: str
    model: str
    tp: int
    pp: int
    max_model_len: int
    gpus_per_node: int
    replicas: int = 1
    port: int = 8000
    # Where pods find the model: hf://…, s3://… or pvc://…; None: hf:// and the model.
    uri: str | None = None
    device: Device = CUDA
    cores: int = 1  # of each GPU; each is a rank
    node_selector: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None  # None: the device's
    # What the checkpoint's format needs.
    format_arguments: tuple[str, ...] = ()
    format_environment: tuple[tuple[str, str], ...] = ()
    max_num_seqs: int | None = None

    @property
    def nodes(self) -> int:
        """The nodes that the GPUs of one replica need."""
        return max(1, -(-self.tp * self.pp // (self.gpus_per_node * self.cores)))

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of the server."""
        return dict((*self.device.environment, *self.format_environment))

    @property
    def resources(self) -> dict[str, Any]:
        """The resources of a pod."""
        return {"limits": {self.device.resource: str(self.gpus_per_node)}}

    def arguments(self) -> list[str]:
        """The arguments of `vllm serve`."""
        sizes = ["--tensor-parallel-size", str(self.tp), "--pipeline-parallel-size", str(self.pp)]
        backend = ["--distributed-executor-backend", "ray"] if self.nodes > 1 else []
        named = ["--served-model-name", self.name, "--max-model-len", str(self.max_model_len)]
        batch = ["--max-num-seqs", str(self.max_num_seqs)] if self.max_num_seqs else []
        if self.device.max_static_batch:
            batch.append("--no-enable-prefix-caching")
        options = [*named, *sizes, *backend, *batch, *self.format_arguments]
        return [self.model, *options, "--port", str(self.port)]


def render_deployment(deployment: VllmDeployment, form: DeploymentForm) -> str:
    """The text of a file: a shell script, a Serve config file, or Kubernetes objects.

    Raises UsageError for a form that the device does not have.
    """
    if form == "ray" and deployment.device != CUDA:
        raise UsageError(
            "--form ray: Ray Serve LLM places models on GPUs of CUDA only",
            "One of command, lws and kserve was expected",
        )
    if form == "command":
        return _script(deployment)
    renderers = {
        "ray": _serve_config,
        "lws": _leader_worker_set,
        "kserve": _llm_inference_service,
    }
    objects = renderers[form](deployment)
    return yaml_text(objects)


def _script(deployment: VllmDeployment) -> str:
    serve = shlex.join(["vllm", "serve", *deployment.arguments(), "--host", HOST])
    exports = "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in deployment.environment.items()
    )
    if deployment.nodes == 1:
        return f"#!/bin/sh\n{exports}exec {serve}\n"
    return (
        "#!/bin/sh\n"
        f"# On {deployment.nodes} nodes of {deployment.gpus_per_node} GPUs, with vLLM, Ray and the "
        "checkpoint at the same path:\n"
        f"# without an argument on the first, with the first one's address on each of the others.\n"
        "set -e\n"
        f"{exports}"
        f'if [ -n "$1" ]; then exec ray start --block --address "$1:{RAY_PORT}"; fi\n'
        f"ray start --head --port {RAY_PORT}\n"
        f"{_wait(deployment.nodes)}\n"
        f"exec {serve}\n"
    )


def _wait(nodes: int) -> str:
    """A shell command that waits until all nodes have joined the Ray cluster."""
    script = (
        "import ray; ray.init(address='auto', log_to_driver=False); raise "
        "SystemExit(len(ray.nodes()) < "
    )
    return f'until python3 -c "{script}{nodes})"; do sleep 2; done'


def _serve_config(deployment: VllmDeployment) -> list[dict[str, Any]]:
    """The config of Ray Serve LLM, for `serve deploy` and KubeRay's serveConfigV2."""
    model = {
        "model_loading_config": {"model_id": deployment.name, "model_source": deployment.model},
        "engine_kwargs": {
            "tensor_parallel_size": deployment.tp,
            "pipeline_parallel_size": deployment.pp,
            "max_model_len": deployment.max_model_len,
        },
        "deployment_config": {"num_replicas": deployment.replicas},
    }
    application = {
        "name": deployment.name,
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [model]},
    }
    return [
        {"http_options": {"host": HOST, "port": deployment.port}, "applications": [application]}
    ]


def _pod(deployment: VllmDeployment, script: str, port: bool) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "vllm",
        "image": deployment.image or deployment.device.image,
        "command": ["sh", "-c", script],
        "resources": deployment.resources,
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108
    }
    if deployment.environment:
        container["env"] = _environment(deployment)
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}
    ]
    if deployment.model.startswith("/"):
        container["volumeMounts"].append(
            {"name": "models", "mountPath": deployment.model, "readOnly": True}
        )
        volumes.append(
            {
                "name": "models",
                "persistentVolumeClaim": {"claimName": deployment.name, "readOnly": True},
            }
        )
    if port:
        container["ports"] = [{"containerPort": deployment.port}]
        container["readinessProbe"] = {
            "httpGet": {"path": "/health", "port": deployment.port},
            "periodSeconds": 10,
        }
    pod: dict[str, Any] = {"containers": [container], "volumes": volumes}
    if deployment.node_selector:
        pod["nodeSelector"] = dict(deployment.node_selector)
    return pod


def _environment(deployment: VllmDeployment) -> list[dict[str, str]]:
    """A container's `env`."""
    return [{"name": name, "value": value} for name, value in deployment.environment.items()]


def _leader_worker_set(deployment: VllmDeployment) -> list[dict[str, Any]]:
    """A group of pods for each replica: the leader serves, the workers add their GPUs by Ray."""
    start_ray = ""
    if deployment.nodes > 1:
        start_ray = f"ray start --head --port {RAY_PORT}; {_wait(deployment.nodes)}; "
    leader = f"{start_ray}exec {shlex.join(['vllm', 'serve', *deployment.arguments()])}"
    worker = f"exec ray start --block --address $(LWS_LEADER_ADDRESS):{RAY_PORT}"
    labels = {"app": deployment.name, "role": "leader"}
    template: dict[str, Any] = {
        "size": deployment.nodes,
        "restartPolicy": "RecreateGroupOnPodRestart",
        "leaderTemplate": {
            "metadata": {"labels": labels},
            "spec": _pod(deployment, leader, port=True),
        },
        "workerTemplate": {"spec": _pod(deployment, worker, port=False)},
    }
    return [
        {
            "apiVersion": "leaderworkerset.x-k8s.io/v1",
            "kind": "LeaderWorkerSet",
            "metadata": {"name": deployment.name},
            "spec": {"replicas": deployment.replicas, "leaderWorkerTemplate": template},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": deployment.name},
            "spec": {
                "selector": labels,
                "ports": [{"name": "http", "port": deployment.port, "targetPort": deployment.port}],
            },
        },
    ]


def _llm_inference_service(deployment: VllmDeployment) -> list[dict[str, Any]]:
    """KServe's object; with a worker, KServe makes a LeaderWorkerSet of it."""
    container: dict[str, Any] = {"name": "main", "resources": deployment.resources}
    if deployment.device != CUDA or deployment.image:  # KServe's own image is for CUDA
        container["image"] = deployment.image or deployment.device.image
    if deployment.environment:
        container["env"] = _environment(deployment)
    pod: dict[str, Any] = {"containers": [container]}
    if deployment.node_selector:
        pod["nodeSelector"] = dict(deployment.node_selector)
    spec: dict[str, Any] = {
        "model": {"uri": deployment.uri or f"hf://{deployment.model}", "name": deployment.name},
        "replicas": deployment.replicas,
        "parallelism": {"tensor": deployment.tp, "pipeline": deployment.pp},
        "router": {"route": {}, "gateway": {}, "scheduler": {}},
        "template": pod,
    }
    if deployment.nodes > 1:
        spec["worker"] = pod
    return [
        {
            "apiVersion": "serving.kserve.io/v1alpha2",
            "kind": "LLMInferenceService",
            "metadata": {"name": deployment.name},
            "spec": spec,
        }
    ]
