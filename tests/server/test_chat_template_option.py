"""`llmkit serve --chat-template`, and templates that do not compile, through the real command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from support.server_process import wait_for

from llmkit.checkpoint.manifest import make_manifest, manifest_text
from llmkit.cli import main

TEMPLATE = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
BROKEN = "{% for message in messages %}\n{{ message.content }\n{% endfor %}"
LINE = "does not compile (line 2: unexpected '}')"


@contextmanager
def serve(log: Path, *words: object, **environment: str) -> Iterator[tuple[str, Path]]:
    """Run `llmkit serve`, and yield its URL and the file of its stderr. It stops with SIGTERM."""
    program = [sys.executable, "-m", "llmkit.cli.main", "serve", *map(str, words)]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*program, "--port", "0", "--device", "cpu"],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=os.environ | environment,
        )
    try:
        # The URL is complete when more of its line is there.
        wait_for(
            lambda: (
                " after " in log.read_text().partition(" ready at ")[2]
                or process.poll() is not None
            )
        )
        assert process.poll() is None, log.read_text()
        yield log.read_text().split(" ready at ")[1].split()[0], log
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_chat_template_option_replaces_the_template_of_an_edited_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "llmkit.json").write_bytes(manifest_text(make_manifest(checkpoint)))
    (checkpoint / "chat_template.jinja").write_text(BROKEN)  # not used
    (checkpoint / "generation_config.json").write_text('{"temperature": 0.25}')
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    with serve(tmp_path / "log", checkpoint, "--chat-template", template) as (url, log):
        messages = [{"role": "user", "content": "ab"}]
        answer = httpx.post(f"{url}/tokenize", json={"messages": messages}).json()
        prompt = httpx.post(f"{url}/detokenize", json={"tokens": answer["tokens"]}).json()
        assert prompt == {"prompt": "[ab]"}
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            chat = client.chat.completions.create(model="model", messages=messages, max_tokens=2)
            assert chat.usage.prompt_tokens == len(answer["tokens"])
        assert httpx.get(f"{url}/info").json()["defaults"]["temperature"] == 0.25
    (line,) = [line for line in log.read_text().splitlines() if "warning" in line]
    assert "was edited after llmkit wrote it (chat_template.jinja, generation_config.json)" in line
    assert "ready at" in log.read_text()


def prompt_of(url: str, **model: str) -> tuple[str, int]:
    """The prompt of a conversation with "ab", and how many of its tokens a chat reports."""
    body = {"messages": [{"role": "user", "content": "ab"}], **model}
    with httpx.Client(base_url=url, timeout=60) as http:
        tokens = http.post("/tokenize", json=body).raise_for_status().json()["tokens"]
        prompt = http.post("/detokenize", json={"tokens": tokens, **model}).json()["prompt"]
        chat = http.post("/v1/chat/completions", json=body | {"max_tokens": 2}).raise_for_status()
        assert chat.json()["usage"]["prompt_tokens"] == len(tokens)
        return prompt, len(tokens)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    return file


@pytest.mark.slow  # four processes that are started as one is
def test_chat_template_option_is_used_with_replicas_of_ranks(
    checkpoint: Path, template: Path, tmp_path: Path
) -> None:
    layout = ("--dp", "2", "--tp", "2", "--kv-cache-memory", "32MiB")
    with serve(tmp_path / "log", checkpoint, *layout, "--chat-template", template) as (url, _):
        # Requests go to the replica with fewer of them, in turns where both have none.
        assert [prompt_of(url) for _ in range(2)] == [("[ab]", 4)] * 2


@pytest.mark.slow  # a router's servers get their options as a single one does
def test_chat_template_option_is_used_through_a_router(
    checkpoint: Path, template: Path, tmp_path: Path
) -> None:
    words = [f"a={checkpoint}", f"b={checkpoint}", "--kv-cache-memory", "32MiB"]
    with serve(tmp_path / "log", *words, "--chat-template", template) as (url, _):
        assert prompt_of(url, model="b") == ("[ab]", 4)
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.BadRequestError, match="Name one of a, b") as refused,
        ):
            client.chat.completions.create(model="", messages=[{"role": "user", "content": ""}])
        assert (refused.value.code, refused.value.param) == ("missing_required_parameter", "model")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BROKEN.encode(), LINE),
        (b"{{ messages | nothing }}", "does not compile (line 1: No filter named 'nothing'.)"),
        (b"\xff", "the chat template is not UTF-8 ("),
        (None, "the chat template cannot be read ("),
    ],
)
@pytest.mark.parametrize("command", ["serve", "serve two", "batch"])
def test_chat_template_option_is_checked_before_anything_else(
    command: str,
    text: bytes | None,
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    template = tmp_path / "template.jinja"
    if text is not None:
        template.write_bytes(text)
    words = {
        "serve": ["serve", "nowhere", "--dp", "2"],
        "serve two": ["serve", "a=nowhere", "b=nowhere"],
        "batch": ["batch", "none.jsonl", "-o", "out.jsonl", "--model", "nowhere", "--"],
    }[command]
    assert main.run([*words, "--chat-template", str(template)]) == 3
    assert reason in capsys.readouterr().err


def test_template_of_a_checkpoint_that_does_not_compile_stops_the_start(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "chat_template.jinja").write_text(BROKEN)
    for words in ([str(checkpoint)], [f"a={checkpoint}", f"b={checkpoint}"]):
        assert main.run(["serve", *words, "--port", "0", "--device", "cpu"]) == 3
        said = capsys.readouterr().err
        assert f"the chat template of {checkpoint} {LINE}" in said
        assert "Mend it, or give another file with --chat-template." in said


def test_chat_template_of_a_batch(checkpoint: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    body = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 1}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    words = ["batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    words += ["--model", str(checkpoint), "--", "--chat-template", str(template)]
    assert main.run([*words, "--device", "cpu"]) == 0
    answer = json.loads((tmp_path / "out.jsonl").read_text())
    assert answer["response"]["body"]["usage"]["prompt_tokens"] == 4
