"""What /metrics and --log-requests tell of requests, and that the recipes for Grafana name nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import ServerProcess, serving, wait_for
from tiny import tiny_checkpoint

from llmkit.runtime.engine.types import EngineOptions
from llmkit.runtime.server.engines.engine_process import Waits
from llmkit.runtime.server.engines.messages import Add, Stats
from llmkit.runtime.server.generation import Choice, Generation
from llmkit.runtime.server.metrics import Metrics
from llmkit.runtime.server.options import ServeOptions
from llmkit.runtime.server.state import State
from llmkit.runtime.server.usage import Gpus

RECIPES = Path(__file__).parents[1] / "recipes" / "grafana"
SECRET = "hello, this is never written down"
PROMPT: dict[str, Any] = {"model": "tiny", "prompt": SECRET, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("metrics")
    model = tiny_checkpoint(folder / "model", max_position_embeddings=4096)
    options: dict[str, Any] = {"served_model_name": "tiny", "max_num_seqs": 2, "kv_cache_memory": 2**24}
    with serving(folder / "log", model, log_requests=True, speculate=2, **options) as running:
        yield running


def figures(server: ServerProcess) -> dict[str, float]:
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def logged(server: ServerProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]


def test_a_requests_times_add_up(server: ServerProcess) -> None:
    before = figures(server)
    with server.client() as client:
        client.post("/v1/completions", json=PROMPT | {"max_tokens": 9}).raise_for_status()
    after = figures(server)

    def gained(name: str) -> float:
        return after[f"llmkit:{name}"] - before[f"llmkit:{name}"]

    for name in ("time_to_first_token", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert gained(f"{name}_seconds_count") == 1, name
    assert gained("request_time_per_output_token_seconds_count") == gained("e2e_request_latency_seconds_count") == 1
    assert gained("inter_token_latency_seconds_count") == 8
    ttft, decode = gained("time_to_first_token_seconds_sum"), gained("request_decode_time_seconds_sum")
    assert gained("e2e_request_latency_seconds_sum") == pytest.approx(ttft + decode)
    assert gained("request_time_per_output_token_seconds_sum") == pytest.approx(decode / 8)
    assert 0 < gained("request_queue_time_seconds_sum") + gained("request_prefill_time_seconds_sum") < ttft
    tokens = gained("prompt_tokens_total") + gained("generation_tokens_total")
    assert gained("iteration_tokens_total_sum") == tokens
    assert 1 < gained("iteration_tokens_total_count") <= 9
    assert after["llmkit:spec_decode_num_draft_tokens_total"] >= after["llmkit:spec_decode_num_accepted_tokens_total"]


def test_those_that_wait_are_told_to_have_waited(server: ServerProcess) -> None:
    before = figures(server)
    with server.client() as client:
        client.post("/v1/completions", json=PROMPT | {"prompt": [SECRET] * 4, "max_tokens": 200}).raise_for_status()
    after = figures(server)
    name = "llmkit:request_queue_time_seconds"
    assert after[f"{name}_count"] - before[f"{name}_count"] == 4
    whole = after["llmkit:e2e_request_latency_seconds_sum"] - before["llmkit:e2e_request_latency_seconds_sum"]
    assert after[f"{name}_sum"] - before[f"{name}_sum"] > whole / 6  # two of four, each about half of its time


def test_memory_of_both_processes_is_told(server: ServerProcess) -> None:
    told = figures(server)
    for process in ("api", "engine"):
        assert told[f'llmkit:process_resident_memory_bytes{{process="{process}"}}'] > 20 * 2**20
    assert told['llmkit:process_resident_memory_bytes{process="api"}'] < 150 * 2**20


def test_a_line_is_logged_for_each_request_and_tells_nothing_of_its_text(server: ServerProcess) -> None:
    before = len(logged(server))
    with server.client() as client:
        whole = client.post("/v1/completions", json=PROMPT | {"max_tokens": 5, "n": 2}).json()
        refused = client.post("/v1/completions", json=PROMPT | {"prompt": [1] * 4000, "max_tokens": 5000})
        assert refused.status_code == 400
        body = PROMPT | {"max_tokens": 4000, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            next(stream.iter_lines())
    wait_for(lambda: len(logged(server)) == before + 2)
    first, second = logged(server)[before:]
    assert first["id"] == whole["id"]
    assert (first["model"], first["ended"], first["finish_reasons"]) == ("tiny", "finished", ["length", "length"])
    assert first["prompt_tokens"] == 2 * whole["usage"]["prompt_tokens"]  # as many as the engine was given
    assert first["completion_tokens"] == 10
    assert 0 < first["ttft_s"] <= first["duration_s"]
    assert (second["ended"], second["finish_reasons"]) == ("cancelled", [None])
    assert SECRET not in server.log.read_text()
    assert "hello" not in server.log.read_text()


def test_the_adapters_in_use_are_told() -> None:
    metrics = Metrics(Stats, gpus=False)
    engine = EngineOptions(adapters={"formal": "a", "terse": "b", "dull": "c"})
    state = State(ServeOptions("model", engine=engine), None, metrics, "model")  # type: ignore[arg-type]
    metrics.watch(state)
    asked = [Add(str(index), [1], 9, adapter=name) for index, name in enumerate((None, "terse", "formal", "dull"))]
    choices = [Choice(request, 0, None) for request in asked]  # type: ignore[arg-type]
    for choice in choices:
        made = Generation(None, metrics, [choice], (), 0.0)  # type: ignore[arg-type]
        state.generations.add(made)
    choices[1].times.first = choices[3].times.first = 1.0
    choices[3].finish_reason = "stop"
    told = metrics.render().decode()
    labels = '{max_lora="3",running_lora_adapters="terse",waiting_lora_adapters="formal"}'
    assert f"llmkit:lora_requests_info{labels}" in told
    assert "llmkit:lora_adapters 3.0" in told


def test_the_names_that_vllm_made_customary_are_there(server: ServerProcess) -> None:
    names = {name.partition("{")[0] for name in figures(server)}
    plain = (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "lora_requests_info",
        *(f"{name}_total" for name in (
            "prefix_cache_queries", "prefix_cache_hits", "external_prefix_cache_queries", "external_prefix_cache_hits",
            "num_preemptions", "prompt_tokens", "generation_tokens", "request_success",
            "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens",
        )),
        *(f"{name}_bucket" for name in (
            "time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds",
            "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
            "request_decode_time_seconds", "iteration_tokens_total",
        )),
    )  # fmt: skip
    assert {f"llmkit:{name}" for name in plain} <= names


def test_a_wait_is_told_once_and_nothing_is_kept_of_what_has_ended() -> None:
    waits = Waits()
    for name in ("runs", "waits", "cancelled", "at once"):
        waits.added(name)
    waits.forget("cancelled")
    waits.stepped(1e12, ["runs"], ["at once"])
    assert waits.take("runs") is not None
    assert waits.take("runs") is None
    assert waits.take("at once") is not None
    assert waits.take("waits") is None
    waits.stepped(0.0, ["waits"], [])
    assert waits.take("waits") == 0.0
    assert vars(waits) == {"_since": {}, "_waited": {}}


def test_without_a_gpu_nothing_is_told_of_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-there-is-no-such-thing")
    assert Gpus().read() == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Gpus().read() == {}


def expressions() -> dict[str, list[str]]:
    dashboard = json.loads((RECIPES / "dashboard.json").read_text())
    rules = yaml.safe_load((RECIPES / "alerts.yaml").read_text())["groups"][0]["rules"]
    return {
        "dashboard": [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        + [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable],
        "alerts": [rule["expr"] for rule in rules],
    }


@pytest.mark.parametrize("recipe", ["dashboard", "alerts"])
def test_every_metric_of_the_grafana_recipes_is_one_of_the_servers(server: ServerProcess, recipe: str) -> None:
    with server.client() as client:
        text = client.get("/metrics").text
    known = set(re.findall(r"^# TYPE (\S+)|^(llmkit:\w+)", text, re.MULTILINE))
    names = {name for pair in known for name in pair if name}
    labels = set(re.findall(r'[{,](\w+)="', text)) | {"job", "instance", "gpu"}
    found = expressions()[recipe]
    assert len(found) >= 7
    for expression in found:
        assert set(re.findall(r"llmkit:\w+", expression)) <= names, expression
        used = set(re.findall(r"(\w+)=~?\"", expression))
        used |= {label for group in re.findall(r"by \(([\w, ]+)\)", expression) for label in group.split(", ")}
        assert used <= labels, expression
