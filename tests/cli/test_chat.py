"""`llmkit chat`: in a real terminal, in a pipe, with a running server and with its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from support.chat_server import ChatServer
from support.terminal import CTRL_C, CTRL_D, Terminal, llmkit_terminal

from llmkit.cli.chat_display import MarkdownView, Tail, finished_chars
from llmkit.common.terminal_text import TerminalFilter, clean_line, clean_text
from llmkit.runtime.chat_client import Answer

ANSWERS = {
    "hello": [{"content": "Good **mor"}, {"content": "ning**.\n\n- one\n- two\n"}],
    "again": [{"content": "Yes."}],
    "two\nlines": [{"content": "Both came."}],
    "think": [{"reasoning_content": "Hm, let me"}, {"reasoning": " see."}, {"content": "Four."}],
    "long": [{"content": "It begins"}, {"wait": ""}],
    "evil": [
        {"content": "a\x1b[31mred\x1b]0;ow"},
        {"content": "ned\x07b\x1b"},
        {"content": "[2Jc\x9b5Ad\x07\x08e"},
    ],
    "/slash": [{"content": "A path."}],
}


@pytest.fixture(scope="module")
def answers() -> Iterator[ChatServer]:
    with ChatServer(ANSWERS).running() as server:
        yield server


@pytest.fixture
def fake_server(answers: ChatServer) -> ChatServer:
    answers.bodies.clear()
    answers.keys.clear()
    answers.client_left.clear()
    return answers


@pytest.fixture
def terminal(fake_server: ChatServer, tmp_path: Path) -> Iterator[Terminal]:
    variables = {"XDG_STATE_HOME": str(tmp_path / "state"), "LLMKIT_API_KEY": "secret"}
    with llmkit_terminal(["chat", fake_server.url, "--seed", "7"], variables) as terminal:
        terminal.wait_for(">>> ")
        yield terminal


def run(*arguments: str, stdin: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmkit.cli.start", "chat", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **variables},
    )


def test_chat_renders_markdown_and_remembers_the_conversation(
    terminal: Terminal, fake_server: ChatServer
) -> None:
    terminal.write("hello\n")
    shown = terminal.wait_for(">>> ")
    assert "Good morning." in shown
    assert " • two" in shown
    assert "**" not in shown
    terminal.write("again\n")
    assert "Yes." in terminal.wait_for(">>> ")
    first, second = fake_server.bodies
    assert first["messages"] == [{"role": "user", "content": "hello"}]
    assert second["messages"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Good **morning**.\n\n- one\n- two\n"},
        {"role": "user", "content": "again"},
    ]
    assert (first["model"], first["stream"], first["seed"]) == ("tiny", True, 7)
    assert set(fake_server.keys) == {"Bearer secret"}
    terminal.write(CTRL_D)
    assert terminal.wait_end() == 0


def test_chat_message_of_several_lines(terminal: Terminal, fake_server: ChatServer) -> None:
    for typed in ("two\\\nlines\n", '"""two\nlines"""\n', '"""\ntwo\nlines\n"""\n'):
        terminal.write(typed)
        assert "Both came." in terminal.wait_for("\n>>> ")
    assert [body["messages"][-1]["content"] for body in fake_server.bodies] == ["two\nlines"] * 3


def test_chat_commands(terminal: Terminal, fake_server: ChatServer, tmp_path: Path) -> None:
    def enter(line: str) -> str:
        terminal.write(f"{line}\n")
        return terminal.wait_for("\n>>> ")

    assert "/retry" in enter("/help")
    assert "no such command: /retri. The nearest is /retry" in enter("/retri")
    assert "there is no message to answer" in enter("/retry")
    enter("/system Be brief.")
    enter("hello")
    enter("/retry")
    first, second = fake_server.bodies
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
    ]
    assert first["messages"] == second["messages"] == expected
    assert (first["seed"], second["seed"]) == (7, 8)
    assert "A path." in enter("//slash")

    file = tmp_path / "saved.json"
    assert "saved" in enter(f"/save {file}")
    saved = json.loads(file.read_text())
    assert [message["role"] for message in saved] == ["system", *["user", "assistant"] * 2]
    enter("/new")
    enter("again")
    assert fake_server.bodies[-1]["messages"] == [expected[0], {"role": "user", "content": "again"}]
    assert "loaded 4 messages" in enter(f"/load {file}")
    enter("again")
    assert fake_server.bodies[-1]["messages"] == [*saved, {"role": "user", "content": "again"}]
    foreign = tmp_path / "other"
    foreign.write_text("kept")
    assert "exists. Choose another name" in enter(f"/save {foreign}")
    assert foreign.read_text() == "kept"
    assert "is not JSON" in enter(f"/load {foreign}")
    enter("/system")
    terminal.write("/exit\n")
    assert terminal.wait_end() == 0


def test_chat_ctrl_c_stops_the_answer_and_twice_ends(
    terminal: Terminal, fake_server: ChatServer
) -> None:
    terminal.write("long\n")
    terminal.wait_for("It begins")
    terminal.write(CTRL_C)
    terminal.wait_for("(stopped)")
    assert fake_server.client_left.wait(60)
    terminal.wait_for(">>> ")
    terminal.write("again\n")
    assert "Yes." in terminal.wait_for(">>> ")
    assert fake_server.bodies[-1]["messages"][1] == {"role": "assistant", "content": "It begins"}
    terminal.interrupt_prompt("Ctrl-C again ends the chat")
    terminal.wait_for(">>> ")
    terminal.write("again\n")  # a line between the two: the next Ctrl-C is a first one
    terminal.wait_for("\n>>> ")
    terminal.interrupt_prompt("Ctrl-C again ends the chat")
    terminal.wait_for(">>> ")
    assert terminal.process.poll() is None
    terminal.interrupt_prompt("\n")
    assert terminal.wait_end() == 130
    assert "Traceback" not in terminal.text


def test_chat_goes_on_after_a_refused_request(terminal: Terminal, fake_server: ChatServer) -> None:
    terminal.write("unknown\n")
    assert "error: the server refused the request (HTTP 400: too long)" in terminal.wait_for(
        "\n>>> "
    )
    terminal.write("again\n")
    assert "Yes." in terminal.wait_for(">>> ")
    assert fake_server.bodies[-1]["messages"] == [{"role": "user", "content": "again"}]


def test_chat_history_is_private_and_kept(terminal: Terminal, tmp_path: Path) -> None:
    terminal.write("again\n")
    terminal.wait_for("\n>>> ")
    history = tmp_path / "state" / "llmkit" / "chat_history"
    assert history.read_text() == "again\n"
    assert history.stat().st_mode & 0o777 == 0o600
    assert history.parent.stat().st_mode & 0o777 == 0o700
    terminal.write("\x1b[A\n")  # arrow up
    assert "Yes." in terminal.wait_for("\n>>> ")
    terminal.write(CTRL_D)
    assert terminal.wait_end() == 0
    assert history.read_text() == "again\n" * 2


def test_chat_without_history_writes_none(fake_server: ChatServer, tmp_path: Path) -> None:
    variables = {"XDG_STATE_HOME": str(tmp_path / "state")}
    with llmkit_terminal(["chat", fake_server.url, "--no-history"], variables) as terminal:
        terminal.wait_for(">>> ")
        terminal.write("again\n")
        terminal.wait_for("\n>>> ")
    assert not (tmp_path / "state").exists()


def test_chat_dims_reasoning_and_drops_escape_sequences(terminal: Terminal) -> None:
    terminal.write("think\n")
    terminal.wait_for("\n>>> ")
    assert "\x1b[2mHm, let me see.\x1b[0m" in terminal.raw
    assert "Four." in terminal.text
    terminal.write("evil\n")
    assert "aredbcde" in terminal.wait_for("\n>>> ")
    for sequence in ("\x1b[31m", "owned", "\x1b]", "\x9b", "\x1b[2J", "\x07", "\x08"):
        assert sequence not in terminal.raw.partition("aredbcde")[2]


def test_chat_in_a_pipe_answers_and_ends(fake_server: ChatServer, tmp_path: Path) -> None:
    done = run(fake_server.url, "--system", "Brief.", "--temperature", "0", stdin="think\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Four.\n", "")
    (body,) = fake_server.bodies
    assert body["messages"][0] == {"role": "system", "content": "Brief."}
    assert (body["temperature"], "top_p" in body) == (0, False)
    key = tmp_path / "key"
    key.write_text("of-the-file name=me\n")
    options = ["--json", "--api-key-file", str(key), "--model", "other", "--max-tokens", "5"]
    done = run(fake_server.url, *options, stdin="evil")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document == {
        "model": "other",
        "content": "aredbcde",
        "reasoning": None,
        "finish_reason": "stop",
        "usage": {"completion_tokens": 3},
        "messages": [
            {"role": "user", "content": "evil"},
            {"role": "assistant", "content": "aredbcde"},
        ],
    }
    assert fake_server.keys[-2:] == ["Bearer of-the-file"] * 2
    assert fake_server.bodies[-1]["max_tokens"] == 5


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "message"),
    [
        (["URL"], " \n", 2, "stdin has no question"),
        (["URL", "--", "--tp", "2"], "x", 2, "are given with a URL"),
        (["m", "--model", "x"], "x", 2, "--model is for the URL of a server"),
        (["URL", "--model", "absent"], "x", 3, "does not serve absent"),
        (["URL"], "unknown", 3, "refused the request"),
        (["http://127.0.0.1:1"], "x", 4, "cannot be reached"),
        (["URL", "--api-key-file", "/dev/null"], "x", 3, "has no key"),
        (["/absent"], "x", 3, "/absent does not exist"),
    ],
)
def test_chat_in_a_pipe_fails_as_other_commands_do(
    fake_server: ChatServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    stdin: str,
    code: int,
    message: str,
) -> None:
    from llmkit.cli import main

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    words = [fake_server.url if word == "URL" else word for word in arguments]
    assert main.run(["chat", "--json", *words]) == code
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error["exit_code"] == code
    assert message in error["what"]
    assert message in captured.err


def test_chat_with_a_checkpoint_starts_a_server(model: Path) -> None:
    small = ["--", "--device", "cpu", "--kv-cache-memory", "32MiB"]
    options = ["--quiet", "--max-tokens", "4", "--seed", "1", "--json"]
    done = run(str(model), *options, *small, stdin="hello")
    assert (done.returncode, done.stderr) == (0, "")
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["model"] == "model"
    assert document["usage"]["completion_tokens"] <= 4
    assert document["messages"][0] == {"role": "user", "content": "hello"}


@pytest.mark.parametrize("size", [1, 2, 100])
def test_terminal_filter_removes_sequences_split_anywhere(size: int) -> None:
    text = (
        "a\x1b[1;31mb\x1b]8;;http://x\x1b\\c\x1b]0;t\x07d\x1bPq\x1b\\e\x1b(Bf\x9b1mg\x90x\x9ch"
        "\ti\rj\x00k\x7fl\x1b]never ends\nm\ud800n\x1b]x\x1b[1mo"
    )
    terminal_filter = TerminalFilter()
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    shown = "".join(map(terminal_filter.feed, pieces))
    assert shown == "abcdefgh\tijkl\nmno"
    assert clean_line("a\x1b[1mb\n c" + "x" * 400) == "ab c" + "x" * 291


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("one\n\ntwo", ""),  # the line may become a list
        ("one\n\ntwo\n", "one\n\n"),
        ("one\n\n\n\ntwo\n\nthree\n", "one\n\n\n\ntwo\n\n"),
        ("- one\n\n- two\n", ""),
        ("1. one\n\n   more\n\n2. two\n\nend\n", "1. one\n\n   more\n\n2. two\n\n"),
        ("```py\na\n\nb\n", ""),
        ("```py\na\n\nb\n```\n\nc\n", "```py\na\n\nb\n```\n\n"),
        ("````\n```\n\nb\n", ""),
        ("~~~\n```\n\n~~~\n\nc\n", "~~~\n```\n\n~~~\n\n"),
    ],
)
def test_markdown_block_is_finished_when_nothing_can_change_it(text: str, finished: str) -> None:
    assert text[: finished_chars(text)] == finished


def test_markdown_view_prints_every_block_once() -> None:
    """The part that is drawn again is not recorded: without interaction Live draws nothing."""
    console = Console(
        file=io.StringIO(), force_terminal=True, force_interactive=False, width=40, height=6
    )
    text = "".join(f"Paragraph {number}.\n\n" for number in range(9)) + "[<b>](http://x.y)"
    answer = Answer(reasoning="First line.\nSecond line.")
    with MarkdownView(console) as view:
        view.update(answer)
        for end in range(0, len(text) + 7, 7):
            answer.content = text[:end]
            view.update(answer)
    file = console.file
    assert isinstance(file, io.StringIO)
    shown = [line.strip() for line in clean_lines(file.getvalue()) if line.strip()]
    paragraphs = [f"Paragraph {number}." for number in range(9)]
    assert shown == ["First line.", "Second line.", *paragraphs, "<b> (http://x.y)"]


def clean_lines(text: str) -> list[str]:
    return clean_text(text).splitlines()


def test_markdown_view_draws_only_what_fits_the_terminal() -> None:
    """More than the terminal's height cannot be drawn again in place."""
    console = Console(file=io.StringIO(), width=40, height=6)
    console.print(Tail(Text("\n".join(f"line {number}" for number in range(30)))))
    file = console.file
    assert isinstance(file, io.StringIO)
    assert file.getvalue().split() == [
        word for number in range(26, 30) for word in ("line", str(number))
    ]
