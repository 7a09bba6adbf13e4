"""`llmkit batch`: a file of requests in, a file of answers out."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.server_process import LlmkitServer, wait_for

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.cli import main
from llmkit.runtime import batch_lines
from llmkit.runtime.batch_lines import Line, Tally, read_lines
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine

PROMPTS = [[5 + index, 9, 11, 300] * (1 + index % 5) for index in range(40)]
LINES = 100  # of a run that is stopped in its middle
SMALL = ["--", "--device", "cpu", "--kv-cache-memory", "32MiB", "--max-num-seqs", "8"]
MODEL = {"dtype": "float32", "max_position_embeddings": 2048}
SERVER = {"max_num_seqs": 2, "max_waiting": 2, "kv_cache_memory": 2**25}
API_KEYS = ("secret",)


def request(index: int, url: str = "/v1/completions", **more: Any) -> dict[str, Any]:
    body = {
        "prompt": PROMPTS[index % len(PROMPTS)],
        "max_tokens": 1 + index % 7,
        "temperature": 0,
        "ignore_eos": True,
    }
    given = {
        "custom_id": f"request {index}",
        "method": "POST",
        "url": url,
        "body": body | {"return_token_ids": True},
    }
    return given | more


def write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def given(server: LlmkitServer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of a run through the module's server, whose queue is shorter than the batch."""
    monkeypatch.setenv("LLMKIT_API_KEY", "secret")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    return ["--url", server.url, "--quiet"]


def run(*arguments: object) -> int:
    return main.run(["batch", *map(str, arguments)])


def test_batch_results_are_in_the_order_of_the_input(
    given: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    out = tmp_path / "out.jsonl"
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "temperature": 0}
    write(
        source, *map(request, range(40)), {**request(40, "/v1/chat/completions"), "body": chat}, b""
    )
    assert run(source, "-o", out, *given, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (
        summary["requests"],
        summary["succeeded"],
        summary["failed"],
        summary["errors"],
    ) == (41, 41, 0, {})
    found = results(out)
    assert [one["custom_id"] for one in found] == [f"request {index}" for index in range(41)]
    engine = load_engine(open_checkpoint(model), EngineOptions(device="cpu"))
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=1 + index % 7, ignore_eos=True)
        for index in range(40)
    ]
    answers = engine.generate(PROMPTS, sampling)
    assert [one["response"]["body"]["choices"][0]["token_ids"] for one in found[:40]] == answers
    assert summary["completion_tokens"] == sum(map(len, answers)) + 2
    for one in found:
        assert one.keys() == {"id", "custom_id", "response", "error"}
        assert one["response"].keys() == {"status_code", "request_id", "body"}
        assert (one["response"]["status_code"], one["error"]) == (200, None)
        assert one["response"]["body"]["model"] == "model"
    assert found[40]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"], (
        "nothing else is left"
    )
    again = tmp_path / "again.jsonl"
    assert run(source, "-o", again, *given, "--concurrency", "1") == 0
    assert again.read_bytes() == out.read_bytes()
    assert run(source, "-o", out, *given) == 5
    assert f"The output {out} exists" in capsys.readouterr().err


def test_batch_line_that_is_wrong_gets_an_error_result(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 5000)
    wrong: dict[str, Any] = {
        "invalid_json_line": b'{"custom_id": "x", ',
        "no object": b"[1]",
        "no UTF-8": b'{"custom_id": "\xff"}',
        "line_too_long": b'{"custom_id": "' + b"x" * 9000 + b'"}',
        "invalid_custom_id": {**request(1), "custom_id": 7},
        "duplicate_custom_id": request(0),
        "invalid_method": request(2, method="GET"),
        "invalid_url": request(3, "/v1/models"),
        "invalid_body": request(4, body=[]),
        "a stream": request(5, body={"prompt": "a", "stream": True}),
    }
    refused = {
        "model_not_found": request(6, body={"model": "other", "prompt": "a"}),
        "invalid_value": request(7, body={"prompt": "a", "max_tokens": -2}),
    }
    source = tmp_path / "in.jsonl"
    out = tmp_path / "out.jsonl"
    write(source, request(0), *wrong.values(), b"  ", *refused.values(), request(8))
    assert run(source, "-o", out, *given) == 0
    first, *found, last = results(out)
    assert first["response"]["status_code"] == last["response"]["status_code"] == 200
    assert last["custom_id"] == "request 8"
    for (name, _), one in zip(wrong.items(), found, strict=False):
        code = name if "_" in name else {"a stream": "invalid_body"}.get(name, "invalid_json_line")
        assert (one["response"], one["error"]["code"]) == (None, code)
        assert one["error"]["message"].startswith("Line ")
    for code, one in zip(refused, found[len(wrong) :], strict=True):
        assert (one["response"]["body"]["error"]["code"], one["error"]) == (code, None)
        assert one["response"]["status_code"] in (400, 404)
    assert len({one["id"] for one in results(out)}) == 14


def test_batch_results_name_the_fields_that_had_no_effect(
    given: list[str], tmp_path: Path, server: LlmkitServer, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {"role": "user", "content": "hello", "odd": 1}
    chats = [
        {"messages": [odd] * count, "max_tokens": 1, "unheard": None, "other": 1}
        for count in (1, 2)
    ]
    source = write(
        tmp_path / "in.jsonl",
        request(0),
        *({**request(1 + i, "/v1/chat/completions"), "body": one} for i, one in enumerate(chats)),
    )
    out = tmp_path / "out.jsonl"
    assert run(source, "-o", out, *given, "--json") == 0
    assert json.loads(capsys.readouterr().out)["ignored_fields"] == {
        "unheard": 2,
        "other": 2,
        "messages.*.odd": 2,
    }
    assert [one["response"].get("headers") for one in results(out)] == [
        None,
        {"x-llmkit-ignored": "unheard, other, messages.0.odd"},
        {"x-llmkit-ignored": "unheard, other, messages.0.odd, messages.1.odd"},
    ]
    log = server.log.read_text()
    for name in ("unheard", "other", "messages.*.odd"):
        assert log.count(f"the field {name} in a request to /v1/chat/completions is ignored") == 1
    assert run(source, "-o", tmp_path / "again", *given) == 0
    assert re.search(r"ignored: messages\.\*\.odd +│ +2 ", capsys.readouterr().out)


def test_batch_counts_no_fields_that_a_header_only_counts() -> None:
    result = batch_lines.response_result(
        Line(1, 10, "a", "/v1/completions"), 200, b"{}", 0, "top.12.x.3, 4, and 7 more"
    )
    tally = Tally()
    tally.add(result)
    assert tally.ignored_fields == {"top.*.x.*": 1, "4": 1}


def test_batch_without_a_success_exits_with_3(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", b"{", request(1, "/v1/unheard"))
    out = tmp_path / "out.jsonl"
    assert run(source, "-o", out, *given) == 3
    assert "none of the 2 requests of" in capsys.readouterr().err
    assert len(results(out)) == 2
    assert run(write(source, b""), "-o", tmp_path / "none", *given) == 3
    assert "has no requests" in capsys.readouterr().err
    assert run(tmp_path / "absent", "-o", tmp_path / "none", *given) == 3
    assert not (tmp_path / "none").exists()


def test_batch_reads_stdin_and_writes_stdout(
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    source = write(tmp_path / "in.jsonl", request(0), request(1))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(source.read_bytes())))
    assert run("-", "-o", "-", *given) == 0
    assert [
        json.loads(line)["custom_id"] for line in capsysbinary.readouterr().out.splitlines()
    ] == [
        "request 0",
        "request 1",
    ]


@pytest.mark.parametrize(
    ("arguments", "summary"),
    [
        (["in", "-o", "out"], "neither --model nor --url is given"),
        (["in", "-o", "-", "--url", "http://127.0.0.1:1", "--json"], "both want stdout"),
        (
            ["in", "-o", "out", "--url", "http://127.0.0.1:1", "--", "--tp", "2"],
            "are given with --url",
        ),
        (
            ["in", "-o", "out", "--model", "m", "--concurrency", "0"],
            "--concurrency: 0 is out of range",
        ),
        (["in", "-o", "out", "--model", "m", "--", "--tpp", "2"], "no such option"),
    ],
)
def test_batch_usage_errors(
    arguments: list[str], summary: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert summary in capsys.readouterr().err.lower()


def test_batch_reads_a_line_when_it_is_needed() -> None:
    """Input of any length: as many lines are in memory as requests are under way."""

    class Endless(io.RawIOBase):
        given = 0

        def readline(self, size: int | None = -1, /) -> bytes:  # type: ignore[override]
            self.given += 1
            return json.dumps(request(self.given)).encode() + b"\n"

    endless = Endless()
    lines = read_lines(endless, "m")  # type: ignore[arg-type]
    assert [next(lines).custom_id for _ in range(3)] == ["request 1", "request 2", "request 3"]
    assert endless.given == 3


def test_batch_that_was_stopped_continues_and_writes_the_same_bytes(
    given: list[str],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped by SIGTERM, continued after half a line, and compared with one whole run."""
    lines = [request(index) for index in range(LINES)]
    for one in lines:
        one["body"] |= {"max_tokens": 40}
    source = write(tmp_path / "in.jsonl", *lines)
    out = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"

    def written() -> int:
        return partial.read_bytes().count(b"\n") if partial.exists() else 0

    with (tmp_path / "log").open("w") as log:
        command = [
            sys.executable,
            "-m",
            "llmkit.cli.main",
            "batch",
            str(source),
            "-o",
            str(out),
            *given,
        ]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
    wait_for(lambda: written() > 5 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    said = (tmp_path / "log").read_text().splitlines()[-1]
    assert "stopped. To resume: llmkit batch" in said
    assert 5 < written() < LINES
    assert not out.exists()
    assert run(source, "-o", out, "--model", model) == 5
    other = write(tmp_path / "other.jsonl", *[request(index + 1) for index in range(LINES)])
    assert run(other, "-o", out, *given) == 5
    assert capsys.readouterr().err.count("written by a run with other options") == 2
    before = partial.read_bytes()
    partial.write_bytes(before + b'{"id": "batch_req_')  # the machine stopped here
    assert run(source, "-o", out, *given, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["requests"], summary["succeeded"], summary["resumed"]) == (
        LINES,
        LINES,
        before.count(b"\n"),
    )
    assert out.read_bytes().startswith(before)
    whole = tmp_path / "whole.jsonl"
    monkeypatch.setenv("LLMKIT_API_KEY", "somebody else's")
    assert run(source, "-o", whole, "--model", model, "--quiet", *SMALL) == 0
    assert whole.read_bytes() == out.read_bytes()
    assert [one["custom_id"] for one in results(out)] == [one["custom_id"] for one in lines]
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.jsonl"]


def test_batch_server_that_cannot_start_or_be_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", request(0))
    out = tmp_path / "out.jsonl"
    assert run(source, "-o", out, "--model", tmp_path / "absent") == 3
    assert "absent does not exist" in capsys.readouterr().err
    assert run(source, "-o", out, "--url", "http://127.0.0.1:1") == 4
    assert "cannot be reached" in capsys.readouterr().err
