"""`llmkit deploy vllm`: the fewest nodes that hold a model, and what it writes for them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from llmkit.cli.main import run
from llmkit.deploy.vllm_on_ray import VllmDeployment, render_deployment
from llmkit.shard.layout_capacity import plan_report, smallest_layout
from llmkit.shard.shard_checkpoint import open_source

MODEL = {"num_hidden_layers": 4, "max_position_embeddings": 512}
TWO_NODES = VllmDeployment("big", "/models/big", 8, 2, 32_768, 8)


def test_smallest_layout_holds_weights_and_tokens(model: Path) -> None:
    source = open_source(str(model))
    whole = max(rank["bytes"] for rank in plan_report(source, 1)["ranks"])
    assert smallest_layout(source, 4 * whole, 2, 64) == (1, 1)
    assert smallest_layout(source, whole, 2, 64) == (2, 1)
    tp, pp = smallest_layout(source, whole // 2, 2, 64)
    assert tp == 2 and pp > 1
    assert plan_report(source, tp, pp, memory=whole // 2)["tokens"] >= 64
    assert plan_report(source, tp, pp - 1, memory=whole // 2)["tokens"] < 64


def test_script_for_two_nodes_waits_for_both() -> None:
    text = render_deployment(TWO_NODES, "command")
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)
    command = shlex.split(text.splitlines()[-1])
    assert command[:4] == ["exec", "vllm", "serve", "/models/big"]
    options = dict(zip(command[4::2], command[5::2], strict=True))
    assert options["--tensor-parallel-size"] == "8" and options["--pipeline-parallel-size"] == "2"
    assert options["--distributed-executor-backend"] == "ray" and options["--host"] == "127.0.0.1"
    assert "len(ray.nodes()) < 2" in text
    one = render_deployment(VllmDeployment("small", "org/name", 4, 1, 4096, 8), "command")
    assert one.splitlines() == ["#!/bin/sh", one.splitlines()[1]] and "ray" not in one


def test_leader_worker_set_has_a_pod_for_each_node() -> None:
    group, service = yaml.safe_load_all(render_deployment(TWO_NODES, "lws"))
    template = group["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    (leader,) = template["leaderTemplate"]["spec"]["containers"]
    (worker,) = template["workerTemplate"]["spec"]["containers"]
    assert (
        "vllm serve /models/big" in leader["command"][-1]
        and "$(LWS_LEADER_ADDRESS)" in worker["command"][-1]
    )
    for container in (leader, worker):
        subprocess.run(["sh", "-n"], input=container["command"][-1], text=True, check=True)
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert service["spec"]["selector"] == template["leaderTemplate"]["metadata"]["labels"]


def test_kserve_and_ray_files_have_the_same_layout() -> None:
    (service,) = yaml.safe_load_all(render_deployment(TWO_NODES, "kserve"))
    assert (
        service["spec"]["parallelism"] == {"tensor": 8, "pipeline": 2}
        and "worker" in service["spec"]
    )
    (config,) = yaml.safe_load_all(render_deployment(TWO_NODES, "ray"))
    (application,) = config["applications"]
    assert config["http_options"]["host"] == "127.0.0.1"
    (llm,) = application["args"]["llm_configs"]
    assert llm["engine_kwargs"]["pipeline_parallel_size"] == 2
    assert llm["model_loading_config"] == {"model_id": "big", "model_source": "/models/big"}


def test_ray_accepts_the_config() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="llmkit[ray] is not installed")
    (config,) = yaml.safe_load_all(render_deployment(TWO_NODES, "ray"))
    schema.ServeDeploySchema.parse_obj(config)


def test_deploy_vllm_command_and_shard_plan_agree(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = plan_report(open_source(str(model)), 1)
    size = f"{report['ranks'][0]['bytes'] // 2}B"
    out = tmp_path / "group.yaml"
    words = ["deploy", "vllm", str(model), "--gpu", size, "--gpus-per-node", "2", "--tokens", "64"]
    assert run([*words, "--form", "lws", "-o", str(out), "--json"]) == 0
    reported = json.loads(capsys.readouterr().out)
    assert reported["nodes"] > 1 and out.read_text() == reported["text"]
    out.write_text("mine")
    assert run([*words, "-o", str(out)]) == 5
    assert f"The output {out} exists and is a file. Remove it" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert (
        next(yaml.safe_load_all(reported["text"]))["spec"]["leaderWorkerTemplate"]["size"]
        == reported["nodes"]
    )
    assert run(["deploy", "vllm", str(model), "--gpu", "48GiB", "--tokens", "64"]) == 0
    assert "needs no other engine" in capsys.readouterr().err
    assert (
        run(["shard", "plan", str(model), "--tp", "2", "--gpu", size, "--gpus-per-node", "2"]) == 0
    )
    assert "`llmkit deploy vllm" in capsys.readouterr().out
    assert run(["shard", "plan", str(model), "--tp", "2", "--gpu", "48GiB"]) == 0
    assert "fits on one node" in capsys.readouterr().out
    assert run(["deploy", "vllm", str(model), "--gpu", "16KiB", "--gpus-per-node", "1"]) == 3
    assert "Name a larger GPU" in capsys.readouterr().err
    assert run(["deploy"]) == 2
    assert re.search(r"llmkit deploy ray \|.* vllm ", capsys.readouterr().err)
