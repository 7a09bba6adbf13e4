"""`llmkit deploy ray` on a real Ray: streams, a killed replica, scaling, rollouts. Deselected
unless asked for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support.free_ports import free_port
from support.tiny_models import tiny_checkpoint

pytestmark = [pytest.mark.scale, pytest.mark.timeout(600)]
ray = pytest.importorskip("ray", reason="llmkit[ray] is not installed")

from ray import serve as ray_serve  # noqa: E402

from llmkit.cli.serve import serve_options  # noqa: E402
from llmkit.common.errors import InputError, OutputError, UsageError  # noqa: E402
from llmkit.deploy.ray_serve import Cluster, ClusterAddress, ReplicaOptions  # noqa: E402

WORDS = ["--max-num-seqs", "4", "--device", "cpu", "--dtype", "float32"]
LONG = 600  # tokens: a few seconds on a busy machine


def wait_for(done: Callable[[], Any], limit_s: float = 120.0) -> None:
    until = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("ray")
    return [
        tiny_checkpoint(folder / name, seed=seed, dtype="float32", max_position_embeddings=4096)
        for seed, name in enumerate(("old", "new"))
    ]


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """The address that `serve deploy` takes, of a Ray cluster on this machine."""
    context = ray.init(
        num_cpus=8, include_dashboard=True, dashboard_port=free_port(), log_to_driver=False
    )
    yield f"http://{context.dashboard_url}"
    ray.shutdown()


@pytest.fixture(scope="module")
def address(dashboard: str) -> Iterator[ClusterAddress]:
    yield ClusterAddress(port=free_port())
    ray_serve.shutdown()


@pytest.fixture
def cluster(address: ClusterAddress) -> Iterator[Cluster]:
    """With nothing deployed, before and after."""
    cluster = Cluster(address)
    yield cluster
    for name in cluster.table():
        cluster.remove(name)


@pytest.fixture
def client(address: ClusterAddress) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{address.port}/v1", api_key="-", max_retries=0, timeout=120
    ) as client:
        yield client


def say(client: openai.OpenAI, prompt: str = "hello", tokens: int = 8, model: str = "chat") -> str:
    done = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert done.usage is not None and done.usage.completion_tokens == tokens
    return done.choices[0].text


def stream(client: openai.OpenAI, prompt: str, tokens: int = LONG) -> str:
    """The text of a stream that came to its end."""
    text = ""
    reason = None
    extra = {"ignore_eos": True}
    for part in client.completions.create(
        model="chat", prompt=prompt, max_tokens=tokens, temperature=0, stream=True, extra_body=extra
    ):
        text += part.choices[0].text
        reason = part.choices[0].finish_reason or reason
    assert reason == "length"
    return text


def running(app: str) -> int:
    deployment = ray_serve.status().applications[app].deployments["replica"]
    return int(deployment.replica_states.get("RUNNING", 0))


def servers(said: str = "llmkit.runtime.server.serve_process") -> list[psutil.Process]:
    """API processes of replicas on this machine, or others whose command line says so."""
    found = []
    for process in psutil.process_iter():
        try:
            if said in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def ray_metrics(name: str, application: str) -> dict[str, float]:
    """Of each replica, by its id, as Ray's agent on this machine shows them."""
    text = httpx.get(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics").text
    samples = [
        sample for family in text_string_to_metric_families(text) for sample in family.samples
    ]
    return {
        sample.labels["replica"]: sample.value
        for sample in samples
        if sample.name == name and sample.labels["application"] == application
    }


def test_two_replicas_stream_and_answer_alike(
    cluster: Cluster, address: ClusterAddress, client: openai.OpenAI, models: list[Path]
) -> None:
    table = cluster.deploy(
        "chat",
        serve_options(str(models[0]), "chat", WORDS, None),
        ReplicaOptions(2, cpus=0.5),
        None,
    )
    assert [version.checkpoint for version in table["chat"]] == [str(models[0])]
    assert running("llmkit-chat-1") == 2
    prompts = [f"prompt number {number}" for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        streamed = list(pool.map(lambda prompt: stream(client, prompt, 40), prompts))
    assert streamed == [say(client, prompt, 40) for prompt in prompts]
    assert [model.id for model in client.models.list()] == ["chat"]
    with pytest.raises(openai.NotFoundError) as wrong:
        say(client, model="other")
    assert wrong.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="chat", prompt="x", temperature=9)
    assert bad.value.param == "temperature"
    assert httpx.get(f"http://127.0.0.1:{address.port}/metrics").status_code == 404
    generated = "ray_llmkit_generation_tokens_total"
    wait_for(lambda: sum(ray_metrics(generated, "llmkit-chat-1").values()) == 16 * 40)
    assert len(ray_metrics(generated, "llmkit-chat-1")) == 2
    with pytest.raises(OutputError, match="--share"):
        cluster.deploy(
            "chat",
            serve_options(str(models[1]), "chat", WORDS, None),
            ReplicaOptions(cpus=0.5),
            None,
        )


def test_router_sends_equal_prefixes_to_one_replica(
    cluster: Cluster, client: openai.OpenAI, models: list[Path]
) -> None:
    cluster.deploy(
        "chat",
        serve_options(str(models[0]), "chat", WORDS, None),
        ReplicaOptions(2, cpus=0.5),
        None,
    )
    for group in range(4):
        begins = f"group {group}: " + "the same words again and again " * 40
        cached = [
            client.completions.create(
                model="chat", prompt=f"{begins}{turn}", max_tokens=1
            ).usage.prompt_tokens_details.cached_tokens  # type: ignore[union-attr]
            for turn in range(4)
        ]
        assert cached[0] < cached[1] and all(cached[1:]), cached


def test_killed_replica_fails_only_its_own_requests(
    cluster: Cluster, client: openai.OpenAI, models: list[Path]
) -> None:
    cluster.deploy(
        "chat",
        serve_options(str(models[0]), "chat", WORDS, None),
        ReplicaOptions(2, cpus=0.5),
        None,
    )
    expected = say(client, "steady", 40)
    victim = servers()[0]
    actor = victim.parent()
    assert actor is not None
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, client, f"stream {number}") for number in range(4)]
        time.sleep(1.0)
        os.kill(actor.pid, signal.SIGKILL)
        whole = [pool.submit(say, client, "steady", 40) for _ in range(8)]
        assert [one.result() for one in whole] == [
            expected
        ] * 8  # none was streamed: each is asked for again
        failures = [error for one in streams if (error := one.exception()) is not None]
    assert len(failures) < 4  # those of the other replica ended well
    assert all(isinstance(error, (openai.APIError, httpx.HTTPError)) for error in failures), (
        failures
    )
    wait_for(lambda: not victim.is_running())  # the server goes with its replica
    wait_for(lambda: running("llmkit-chat-1") == 2)
    assert say(client, "steady", 40) == expected


def test_replicas_scale_with_the_load(
    cluster: Cluster, client: openai.OpenAI, models: list[Path]
) -> None:
    size = ReplicaOptions(1, 2, cpus=0.5, downscale_delay=5.0)
    cluster.deploy("chat", serve_options(str(models[0]), "chat", WORDS, None), size, None)
    assert running("llmkit-chat-1") == 1
    stop = threading.Event()

    def load() -> int:
        count = 0
        while not stop.is_set():
            stream(client, f"load {count}", 200)
            count += 1
        return count

    with ThreadPoolExecutor(12) as pool:
        loads = [pool.submit(load) for _ in range(12)]
        try:
            wait_for(lambda: running("llmkit-chat-1") == 2)
        finally:
            stop.set()
        assert all(one.result() > 0 for one in loads)
    wait_for(lambda: running("llmkit-chat-1") == 1)
    assert say(client)


def test_rollout_is_promoted_or_rolled_back(
    cluster: Cluster, client: openai.OpenAI, models: list[Path]
) -> None:
    old, new = (serve_options(str(model), "chat", WORDS, None) for model in models)
    cluster.deploy("chat", old, ReplicaOptions(cpus=0.5), None)
    answer = {"old": say(client, "who are you", 24)}
    fronts = {one.pid for one in servers("ServeReplica:llmkit:front")}
    table = cluster.deploy("chat", new, ReplicaOptions(cpus=0.5), 0.5)
    assert [version.share for version in table["chat"]] == [0.5, 0.5]
    reported = {say(client, "who are you", 24) for _ in range(24)}
    assert len(reported) == 2 and answer["old"] in reported
    with pytest.raises(OutputError, match="--promote or --rollback"):
        cluster.deploy("chat", old, ReplicaOptions(cpus=0.5), 0.5)
    running_before = stream_in_background(client)
    cluster.rollback("chat")
    assert running_before.result() is None  # what ran on the version that went away was drained
    assert {say(client, "who are you", 24) for _ in range(8)} == {answer["old"]}
    cluster.deploy("chat", new, ReplicaOptions(cpus=0.5), 0.01)
    assert cluster.set_share("chat", 0.9)["chat"][1].share == 0.9
    cluster.promote("chat")
    assert {say(client, "who are you", 24) for _ in range(8)} == reported - {answer["old"]}
    wait_for(lambda: len(servers()) == 1)
    with pytest.raises(UsageError, match="only one version"):
        cluster.rollback("chat")
    assert {one.pid for one in servers("ServeReplica:llmkit:front")} == fronts and len(fronts) == 2
    with pytest.raises(UsageError, match="--api-key-file none"):
        Cluster(ClusterAddress(api_key_file="keys")).deploy(
            "other", old, ReplicaOptions(cpus=0.5), None
        )


def stream_in_background(client: openai.OpenAI) -> Any:
    pool = ThreadPoolExecutor(8)
    streams = [pool.submit(stream, client, f"drained {number}", 300) for number in range(8)]
    time.sleep(1.0)
    return pool.submit(lambda: [one.result() for one in streams] and None)


def test_ingress_checks_host_and_origin_by_option(
    address: ClusterAddress, models: list[Path]
) -> None:
    opened = replace(
        address, allowed_hosts=("llm.example.com",), allowed_origins=("app://obsidian.md",)
    )
    cluster = Cluster(opened)
    options = serve_options(str(models[0]), "chat", WORDS, None)
    try:
        cluster.deploy("chat", options, ReplicaOptions(1, cpus=0.5), None)
        with pytest.raises(UsageError, match="have --allowed-hosts llm"):
            Cluster(address).deploy("other", options, ReplicaOptions(1, cpus=0.5), None)
        url = f"http://127.0.0.1:{address.port}/v1/completions"
        body = {"prompt": "a", "max_tokens": 1}
        own = {"origin": f"http://127.0.0.1:{address.port}"}
        for headers, status, allowed in (
            ({}, 200, None),
            (own, 200, None),  # of a page of the models' server
            ({"host": "llm.example.com"}, 200, None),
            ({"origin": "app://obsidian.md"}, 200, "app://obsidian.md"),
            ({"host": "evil.example"}, 403, None),
            ({"origin": "http://evil.example"}, 403, None),
        ):
            answer = httpx.post(url, json=body, headers=headers, timeout=60)
            assert answer.status_code == status, (headers, answer.text)
            assert answer.headers.get("access-control-allow-origin") == allowed
        asked = {"access-control-request-method": "POST", "origin": "app://obsidian.md"}
        preflight = httpx.options(url, headers=asked)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == "app://obsidian.md"
    finally:
        for name in cluster.table():
            cluster.remove(name)


def test_several_models_behind_one_address(
    cluster: Cluster, client: openai.OpenAI, models: list[Path]
) -> None:
    for name, model in zip(("first", "second"), models, strict=True):
        cluster.deploy(
            name, serve_options(str(model), name, WORDS, None), ReplicaOptions(cpus=0.5), None
        )
    assert say(client, model="first") != say(client, model="second")
    assert list(cluster.remove("first")) == ["second"]
    with pytest.raises(openai.NotFoundError):
        say(client, model="first")
    assert say(client, model="second")


def test_checkpoint_that_does_not_load_is_an_error_and_leaves_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"no replica of .* starts: .*config.json"):
        cluster.deploy(
            "broken",
            serve_options(str(tmp_path), "broken", WORDS, None),
            ReplicaOptions(cpus=0.5),
            None,
        )
    assert cluster.table() == {}
    assert not [app for app in ray_serve.status().applications if "broken" in app]


def test_config_file_makes_one_application(
    dashboard: str,
    address: ClusterAddress,
    client: openai.OpenAI,
    models: list[Path],
    tmp_path: Path,
) -> None:
    file = yaml.safe_load((Path(__file__).parents[2] / "recipes/ray/models.yaml").read_text())
    (application,) = file["applications"]
    file["http_options"]["port"] = address.port
    for one, model in zip(application["args"]["models"], [*models, models[1]], strict=True):
        one |= {"model": str(model), "options": " ".join(WORDS), "cpus": 0.5, "gpus": 0}
    application["args"]["models"][1]["share"] = "40%"
    path = tmp_path / "models.yaml"

    def deploy() -> None:
        path.write_text(yaml.safe_dump(file))
        subprocess.run(
            [Path(sys.executable).with_name("serve"), "deploy", "-a", dashboard, path], check=True
        )

    def reported() -> set[str]:
        return {say(client, "who are you", 24) for _ in range(24)}

    deploy()
    wait_for(lambda: ray_serve.status().applications["llmkit"].status == "RUNNING")
    wait_for(lambda: httpx.get(f"http://127.0.0.1:{address.port}/ready").status_code == 200)
    assert {model.id for model in client.models.list()} == {"chat", "embed"}
    assert len(ray_serve.status().applications) == 1
    both = reported()
    other = say(client, "who are you", 24, model="embed")
    assert len(both) == 2 and other in both
    with pytest.raises(UsageError, match="from a file"):
        Cluster(address).remove("chat")
    servers_before = {one.pid for one in servers()}
    table = [
        {"app": "chat-1", "checkpoint": "a", "share": 0.0},
        {"app": "chat-2", "checkpoint": "b", "share": 1.0},
    ]
    application["deployments"] = [{"name": "front", "user_config": {"chat": table}}]
    # all of its requests to the new one, and the other model gone: no replica is started anew
    deploy()
    wait_for(lambda: [model.id for model in client.models.list()] == ["chat"])
    assert reported() == {other} and {one.pid for one in servers()} == servers_before
    ray_serve.delete("llmkit")
