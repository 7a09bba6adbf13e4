"""/metrics, --log-requests, and the metrics that the Grafana recipes use."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.engine_requests import engine_request
from support.server_process import LlmkitServer, wait_for

from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_outputs import EngineStats
from llmkit.runtime.server.choice import Choice
from llmkit.runtime.server.engines.engine_process import QueueTimes
from llmkit.runtime.server.generation import Generation
from llmkit.runtime.server.process_usage import GpuUsageReader
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server.server_metrics import ServerMetrics
from llmkit.runtime.server.server_state import ServerState
from llmkit.runtime.server.state_metrics import StateCollector

MODEL = {"max_position_embeddings": 4096}
SERVER = {
    "served_model_name": "tiny",
    "max_num_seqs": 2,
    "kv_cache_memory": 2**24,
    "log_requests": True,
    "speculate": 2,
}
RECIPES = Path(__file__).parents[2] / "recipes" / "grafana"
SECRET = "hello, this is never written down"
PROMPT: dict[str, Any] = {"model": "tiny", "prompt": SECRET, "temperature": 0, "ignore_eos": True}


def read_metrics(server: LlmkitServer) -> dict[str, float]:
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if not line.startswith("#")
    }


def logged_lines(server: LlmkitServer) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")
    ]


def test_metrics_of_request_times_add_up(server: LlmkitServer) -> None:
    before = read_metrics(server)
    with server.client() as client:
        client.post("/v1/completions", json=PROMPT | {"max_tokens": 9}).raise_for_status()
    after = read_metrics(server)

    def gained(name: str) -> float:
        return after[f"llmkit:{name}"] - before[f"llmkit:{name}"]

    for name in (
        "time_to_first_token",
        "request_queue_time",
        "request_prefill_time",
        "request_decode_time",
    ):
        assert gained(f"{name}_seconds_count") == 1, name
    assert (
        gained("request_time_per_output_token_seconds_count")
        == gained("e2e_request_latency_seconds_count")
        == 1
    )
    assert gained("inter_token_latency_seconds_count") == 8
    ttft = gained("time_to_first_token_seconds_sum")
    decode = gained("request_decode_time_seconds_sum")
    assert gained("e2e_request_latency_seconds_sum") == pytest.approx(ttft + decode)
    assert gained("request_time_per_output_token_seconds_sum") == pytest.approx(decode / 8)
    assert (
        0
        < gained("request_queue_time_seconds_sum") + gained("request_prefill_time_seconds_sum")
        < ttft
    )
    tokens = gained("prompt_tokens_total") + gained("generation_tokens_total")
    assert gained("iteration_tokens_total_sum") == tokens
    assert 1 < gained("iteration_tokens_total_count") <= 9
    assert (
        after["llmkit:spec_decode_num_draft_tokens_total"]
        >= after["llmkit:spec_decode_num_accepted_tokens_total"]
    )
    per_pos = "llmkit:spec_decode_num_accepted_tokens_per_pos_total"
    by_position = [after[f'{per_pos}{{position="{position}"}}'] for position in (0, 1)]
    assert sum(by_position) == after["llmkit:spec_decode_num_accepted_tokens_total"]
    assert after["llmkit:spec_decode_num_drafts_total"] >= by_position[0] >= by_position[1]


def test_metrics_report_queue_times(server: LlmkitServer) -> None:
    before = read_metrics(server)
    with server.client() as client:
        client.post(
            "/v1/completions", json=PROMPT | {"prompt": [SECRET] * 4, "max_tokens": 200}
        ).raise_for_status()
    after = read_metrics(server)
    name = "llmkit:request_queue_time_seconds"
    assert after[f"{name}_count"] - before[f"{name}_count"] == 4
    whole = (
        after["llmkit:e2e_request_latency_seconds_sum"]
        - before["llmkit:e2e_request_latency_seconds_sum"]
    )
    assert (
        after[f"{name}_sum"] - before[f"{name}_sum"] > whole / 6
    )  # two of four, each about half of its time


def test_metrics_report_memory_of_both_processes(server: LlmkitServer) -> None:
    metrics = read_metrics(server)
    for process in ("api", "engine"):
        assert metrics[f'llmkit:process_resident_memory_bytes{{process="{process}"}}'] > 20 * 2**20
    assert metrics['llmkit:process_resident_memory_bytes{process="api"}'] < 150 * 2**20


def test_request_log_has_a_line_per_request_without_text(
    server: LlmkitServer,
) -> None:
    before = len(logged_lines(server))
    with server.client() as client:
        whole = client.post(
            "/v1/completions",
            json=PROMPT | {"max_tokens": 5, "n": 2},
            headers={"x-request-id": "mine-1"},
        ).json()
        refused = client.post(
            "/v1/completions", json=PROMPT | {"prompt": [1] * 4000, "max_tokens": 5000}
        )
        assert refused.status_code == 400
        body = PROMPT | {"max_tokens": 4000, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            next(stream.iter_lines())
    wait_for(lambda: len(logged_lines(server)) == before + 2)
    first, second = logged_lines(server)[before:]
    assert (first["id"], first["request_id"]) == (whole["id"], "mine-1")
    assert (first["model"], first["ended"], first["finish_reasons"]) == (
        "tiny",
        "finished",
        ["length", "length"],
    )
    assert (
        first["prompt_tokens"] == 2 * whole["usage"]["prompt_tokens"]
    )  # as many as the engine was given
    assert first["completion_tokens"] == 10
    assert 0 < first["ttft_s"] <= first["duration_s"]
    assert (second["ended"], second["finish_reasons"]) == ("cancelled", [None])
    assert SECRET not in server.log.read_text()
    assert "hello" not in server.log.read_text()


def test_metrics_report_adapters_in_use() -> None:
    metrics = ServerMetrics(EngineStats, gpus=False)
    engine = EngineOptions(adapters={"formal": "a", "terse": "b", "dull": "c"})
    state = ServerState(ServeOptions("model", engine=engine), None, metrics, "model")
    metrics.register(StateCollector(state))
    asked = [
        engine_request(str(index), [1], 9, adapter=name)
        for index, name in enumerate((None, "terse", "formal", "dull"))
    ]
    choices = [Choice(request, 0, None) for request in asked]  # type: ignore[arg-type]
    for choice in choices:
        made = Generation(None, metrics, [choice], (), 0.0)  # type: ignore[arg-type]
        state.generations.add(made)
    choices[1].times.first_token = choices[3].times.first_token = 1.0
    choices[3].finish_reason = "stop"
    metrics_text = metrics.render().decode()
    labels = '{max_lora="3",running_lora_adapters="terse",waiting_lora_adapters="formal"}'
    assert f"llmkit:lora_requests_info{labels}" in metrics_text
    assert "llmkit:lora_adapters 3.0" in metrics_text


def test_metrics_report_recurrent_states() -> None:
    stats = EngineStats(
        state_snapshots=3,
        state_total_snapshots=8,
        state_snapshot_bytes=4096,
        prefix_stateless_total=48,
    )
    lines = ServerMetrics(lambda: stats, gpus=False).render().decode().splitlines()
    assert "llmkit:state_cache_checkpoints 3.0" in lines
    assert "llmkit:state_cache_max_checkpoints 8.0" in lines
    assert "llmkit:state_cache_bytes 4096.0" in lines
    assert "llmkit:prefix_cache_without_state_total 48.0" in lines


def test_metrics_have_vllms_names(server: LlmkitServer) -> None:
    names = {name.partition("{")[0] for name in read_metrics(server)}
    plain = (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "lora_requests_info",
        *(
            f"{name}_total"
            for name in (
                "prefix_cache_queries",
                "prefix_cache_hits",
                "external_prefix_cache_queries",
                "external_prefix_cache_hits",
                "num_preemptions",
                "prompt_tokens",
                "generation_tokens",
                "request_success",
                "spec_decode_num_drafts",
                "spec_decode_num_draft_tokens",
                "spec_decode_num_accepted_tokens",
                "spec_decode_num_accepted_tokens_per_pos",
            )
        ),
        *(
            f"{name}_bucket"
            for name in (
                "time_to_first_token_seconds",
                "inter_token_latency_seconds",
                "request_time_per_output_token_seconds",
                "e2e_request_latency_seconds",
                "request_queue_time_seconds",
                "request_prefill_time_seconds",
                "request_decode_time_seconds",
                "iteration_tokens_total",
            )
        ),
    )
    assert {f"llmkit:{name}" for name in plain} <= names


def test_queue_times_are_returned_once_and_not_kept() -> None:
    queue_times = QueueTimes()
    for name in ("runs", "waits", "cancelled", "at once"):
        queue_times.added(name)
    queue_times.remove("cancelled")
    queue_times.step_started(1e12, ["runs"], ["at once"])
    assert list(queue_times.pop(["runs"])) == ["runs"]
    assert queue_times.pop(["runs"]) == {}
    assert list(queue_times.pop(["at once"])) == ["at once"]
    assert queue_times.pop(["waits"]) == {}
    queue_times.step_started(0.0, ["waits"], [])
    assert queue_times.pop(["waits"]) == {"waits": 0.0}
    assert vars(queue_times) == {"_added_at": {}, "_waited_s": {}}


def test_gpu_metrics_are_empty_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-there-is-no-such-thing")
    assert GpuUsageReader().read() == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert GpuUsageReader().read() == {}


def expressions() -> dict[str, list[str]]:
    dashboard = json.loads((RECIPES / "dashboard.json").read_text())
    rules = yaml.safe_load((RECIPES / "alerts.yaml").read_text())["groups"][0]["rules"]
    return {
        "dashboard": [
            target["expr"] for panel in dashboard["panels"] for target in panel["targets"]
        ]
        + [
            variable["definition"]
            for variable in dashboard["templating"]["list"]
            if "definition" in variable
        ],
        "alerts": [rule["expr"] for rule in rules],
    }


@pytest.mark.parametrize("recipe", ["dashboard", "alerts"])
def test_grafana_recipes_use_existing_metrics(server: LlmkitServer, recipe: str) -> None:
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
        used |= {
            label
            for group in re.findall(r"by \(([\w, ]+)\)", expression)
            for label in group.split(", ")
        }
        assert used <= labels, expression
