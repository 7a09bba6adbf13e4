"""`llmkit deploy vllm`: a model that does not fit on a node goes to vLLM on Ray, as the checkpoint that llmkit made."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any, Literal

import yaml

IMAGE = "vllm/vllm-openai:latest"
RAY_PORT = 6379
HOST = "127.0.0.1"  # of what listens on a machine: it asks for no key
Form = Literal["command", "ray", "lws", "kserve"]


@dataclass(frozen=True)
class HandOver:
    """A model and the layout in which vLLM is to serve it. uri: where pods find it; model: where commands do."""

    name: str
    model: str
    tp: int
    pp: int
    max_model_len: int
    gpus_per_node: int
    replicas: int = 1
    port: int = 8000
    uri: str | None = None  # hf://…, s3://… or pvc://…; None: the model, as a path on every node

    @property
    def nodes(self) -> int:
        """Of one replica: a pipeline stage each, as far as a stage fills a node."""
        return max(1, -(-self.tp * self.pp // self.gpus_per_node))

    def arguments(self) -> list[str]:
        """Of `vllm serve`."""
        sizes = ["--tensor-parallel-size", str(self.tp), "--pipeline-parallel-size", str(self.pp)]
        backend = ["--distributed-executor-backend", "ray"] if self.nodes > 1 else []
        named = ["--served-model-name", self.name, "--max-model-len", str(self.max_model_len)]
        return [self.model, *named, *sizes, *backend, "--port", str(self.port)]


def written(hand_over: HandOver, form: Form) -> str:
    """The file of a form: a shell script, a Serve config, or Kubernetes objects."""
    if form == "command":
        return _script(hand_over)
    objects = {"ray": _serve_config, "lws": _leader_worker_set, "kserve": _llm_inference_service}[form](hand_over)
    return yaml.safe_dump_all(objects, sort_keys=False, width=120)


def _script(one: HandOver) -> str:
    serve = shlex.join(["vllm", "serve", *one.arguments(), "--host", HOST])
    if one.nodes == 1:
        return f"#!/bin/sh\nexec {serve}\n"
    return (
        "#!/bin/sh\n"
        f"# On {one.nodes} nodes of {one.gpus_per_node} GPUs, with vLLM, Ray and the checkpoint at the same path:\n"
        f"# without an argument on the first, with the first one's address on each of the others.\n"
        "set -e\n"
        f'if [ -n "$1" ]; then exec ray start --block --address "$1:{RAY_PORT}"; fi\n'
        f"ray start --head --port {RAY_PORT}\n"
        f"{_wait(one.nodes)}\n"
        f"exec {serve}\n"
    )


def _wait(nodes: int) -> str:
    """A command that ends when all nodes have joined the Ray cluster."""
    seen = "import ray; ray.init(address='auto', log_to_driver=False); raise SystemExit(len(ray.nodes()) < "
    return f'until python3 -c "{seen}{nodes})"; do sleep 2; done'


def _serve_config(one: HandOver) -> list[dict[str, Any]]:
    """For `serve deploy` and KubeRay's serveConfigV2: Ray Serve LLM."""
    model = {
        "model_loading_config": {"model_id": one.name, "model_source": one.model},
        "engine_kwargs": {
            "tensor_parallel_size": one.tp,
            "pipeline_parallel_size": one.pp,
            "max_model_len": one.max_model_len,
        },
        "deployment_config": {"num_replicas": one.replicas},
    }
    application = {
        "name": one.name,
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [model]},
    }
    return [{"http_options": {"host": HOST, "port": one.port}, "applications": [application]}]


def _pod(one: HandOver, script: str, port: bool) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "vllm",
        "image": IMAGE,
        "command": ["sh", "-c", script],
        "resources": {"limits": {"nvidia.com/gpu": str(one.gpus_per_node)}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108
    }
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}]
    if one.model.startswith("/"):
        container["volumeMounts"].append({"name": "models", "mountPath": one.model, "readOnly": True})
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": one.name, "readOnly": True}})
    if port:
        container["ports"] = [{"containerPort": one.port}]
        container["readinessProbe"] = {"httpGet": {"path": "/health", "port": one.port}, "periodSeconds": 10}
    return {"containers": [container], "volumes": volumes}


def _leader_worker_set(one: HandOver) -> list[dict[str, Any]]:
    """A group of pods a replica: the leader serves, the others lend their GPUs through Ray."""
    begin = f"ray start --head --port {RAY_PORT}; {_wait(one.nodes)}; " if one.nodes > 1 else ""
    leader = f"{begin}exec {shlex.join(['vllm', 'serve', *one.arguments()])}"
    worker = f"exec ray start --block --address $(LWS_LEADER_ADDRESS):{RAY_PORT}"
    labels = {"app": one.name, "role": "leader"}
    template: dict[str, Any] = {
        "size": one.nodes,
        "restartPolicy": "RecreateGroupOnPodRestart",
        "leaderTemplate": {"metadata": {"labels": labels}, "spec": _pod(one, leader, port=True)},
        "workerTemplate": {"spec": _pod(one, worker, port=False)},
    }
    return [
        {
            "apiVersion": "leaderworkerset.x-k8s.io/v1",
            "kind": "LeaderWorkerSet",
            "metadata": {"name": one.name},
            "spec": {"replicas": one.replicas, "leaderWorkerTemplate": template},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": one.name},
            "spec": {"selector": labels, "ports": [{"name": "http", "port": one.port, "targetPort": one.port}]},
        },
    ]


def _llm_inference_service(one: HandOver) -> list[dict[str, Any]]:
    """KServe's own object, which it turns into a LeaderWorkerSet where there is a worker."""
    gpus = {"limits": {"nvidia.com/gpu": str(one.gpus_per_node)}}
    pod = {"containers": [{"name": "main", "resources": gpus}]}
    spec: dict[str, Any] = {
        "model": {"uri": one.uri or f"hf://{one.model}", "name": one.name},
        "replicas": one.replicas,
        "parallelism": {"tensor": one.tp, "pipeline": one.pp},
        "router": {"route": {}, "gateway": {}, "scheduler": {}},
        "template": pod,
    }
    if one.nodes > 1:
        spec["worker"] = pod
    return [
        {
            "apiVersion": "serving.kserve.io/v1alpha2",
            "kind": "LLMInferenceService",
            "metadata": {"name": one.name},
            "spec": spec,
        }
    ]
