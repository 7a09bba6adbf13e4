"""A server with synthetic acceptance: it warns, marks every response, and keeps no answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.server_process import LlmkitServer

from llmkit.bench.load_client import query_server
from llmkit.cli.main import run

SERVER = {"speculate": 2, "synthetic_acceptance_length": 2.5}
HEADER = "x-llmkit-synthetic-acceptance"


def test_server_warns_and_marks_every_response(server: LlmkitServer) -> None:
    warning = server.wait_for_line("warning: SYNTHETIC ACCEPTANCE")
    assert "(100%, 50% at their places)" in warning and "NOT THE MODEL'S" in warning
    prompt = [5, 6, 7, 8] * 4
    body = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    with server.client() as client:
        answers = [
            client.post("/v1/completions", json=body),
            client.post("/v1/completions", json=body | {"stream": True}),
            client.get("/health"),
            client.get("/v1/models"),
            client.get("/nowhere"),
            client.get("/metrics", headers={"host": "elsewhere.example"}),
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 404, 403]
    assert [answer.headers.get(HEADER) for answer in answers] == ["1,0.5"] * 6
    drafts = server.metric("spec_decode_num_drafts_total")
    accepted = server.metric("spec_decode_num_accepted_tokens_total")
    assert drafts > 0
    assert 1 <= accepted / drafts <= 2
    assert query_server(server.url).synthetic_acceptance == "1,0.5"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--response-cache", "1MiB"], "--response-cache with synthetic acceptance"),
        (["--response-store", "store"], "--response-store with synthetic acceptance"),
        (["--grpc-port", "0"], "--grpc-port with synthetic acceptance"),
        (["--synthetic-accept-rates", "0.5"], "exclude each other"),
        (["--speculate", "1"], "2.5 is out of range. From 1 to 2"),
    ],
)
def test_serve_refuses_what_would_keep_or_hide_such_answers(
    model: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--speculate", "2", "--synthetic-accept-length", "2.5", "--port", "0"]
    assert run(["serve", str(model), *options, *words]) == 2
    assert message in capsys.readouterr().err
