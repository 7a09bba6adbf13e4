"""`llmkit bench --tool-cases`: models that write what a test wants, behind real servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.chat_server import ChatServer
from support.scripted_model import FORMATS, TEMPLATE, TOOLS, scripted_checkpoint, trigger
from support.server_process import LlmkitServer, serving

from llmkit.cli import main

ONLY_TOOLS = ["--no-speed", "--no-quality", "-q"]


def written(name: str, **arguments: Any) -> str:
    """A call as Hermes models write it."""
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


PARIS = written("get_weather", city="Paris")
OSLO = written("get_weather", city="Oslo")
ADD = written("add", a=1)
EXPECTED = {
    "paris": {"name": "get_weather", "arguments": {"city": "Paris"}},
    "oslo": {"name": "get_weather", "arguments": {"city": "Oslo"}},
    "add": {"name": "add", "arguments": {"a": 1}},
}
# By case: what the good model answers, the category, and the expected calls.
CASES = {
    "right": (PARIS, "simple", ["paris"]),
    "swapped": (f"{ADD}\n{OSLO}", "parallel", ["oslo", "add"]),
    "words": ("It is a fine day.", "irrelevance", []),
    "value": (OSLO, "simple", ["paris"]),
    "city": (written("get_weather", city="Rome"), "simple", ["paris"]),
    "cut": (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": Paris}',
        "simple",
        ["paris"],
    ),
    "unknown": (written("tides", city="Paris"), "simple", ["paris"]),
    "other_dialect": ('[TOOL_CALLS] get_weather {"city": "Paris"}', "simple", ["paris"]),
    "extra": (f"{PARIS}\n{ADD}", "simple", ["paris"]),
    "missing": (OSLO, "parallel", ["oslo", "add"]),
    "silent": ("I cannot know that.", "simple", ["paris"]),
    "needless": (ADD, "irrelevance", []),
}
FAILED = {
    "value": "equal",
    "city": "schema",
    "cut": "well_formed",
    "unknown": "name",
    "other_dialect": "well_formed",
    "extra": "equal",
    "missing": "equal",
    "silent": "name",
    "needless": "no_call",
    "long": "well_formed",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, `good` and `bad`, which has words for each right call, and a file of cases."""
    folder = tmp_path_factory.mktemp("tools")
    template = TEMPLATE.replace("FORMAT", FORMATS["hermes"])
    scripts = {name: text for name, (text, _, _) in CASES.items()}
    scripted_checkpoint(folder / "good", scripts, template)
    bad = {"right": "No idea.", "swapped": "I had rather not.", "words": "Well."}
    scripted_checkpoint(folder / "bad", bad, template)
    lines = [
        {
            "id": name,
            "category": category,
            "messages": trigger(name),
            "tools": TOOLS,
            "calls": [EXPECTED[call] for call in calls],
        }
        for name, (_, category, calls) in CASES.items()
    ]
    # Longer than the context.
    lines.append({**lines[0], "id": "long", "messages": "x" * 5000})
    (folder / "cases.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def good(folder: Path) -> Iterator[LlmkitServer]:
    with serving(folder / "log", folder / "good", kv_cache_memory=2**26, max_num_seqs=8) as server:
        yield server


def test_bench_checks_the_calls_of_a_served_model(
    folder: Path, good: LlmkitServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.json"
    page = tmp_path / "x.html"
    sheet = tmp_path / "x.csv"
    command = ["bench", "--url", good.url, *ONLY_TOOLS, "--tool-cases", str(folder / "cases.jsonl")]
    gates = ["--gate", "tool_accuracy>=0.23", "--gate", "tool.irrelevance.accuracy>=0.5"]
    files = ["-o", str(out), "--html", str(page), "--csv", str(sheet)]
    assert main.run([*command, *gates, *files]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "tool cases answered right" in shown
    assert "10 of 13 answered wrong" in shown
    report = json.loads(out.read_text())
    (target,) = report["targets"]
    found = {result["id"]: result["failed"] for result in target["tool_results"]}
    assert found == dict.fromkeys(CASES, "") | FAILED
    metrics = {name: target["metrics"][name] for name in target["metrics"] if "tool" in name}
    assert metrics == pytest.approx(
        {
            "tool_accuracy": 3 / 13,
            "tool_well_formed": 10 / 13,
            "tool_name": 6 / 11,
            "tool_schema": 5 / 11,
            "tool_equal": 2 / 11,
            "tool_no_call": 1 / 2,
            "tool.simple.accuracy": 1 / 9,
            "tool.parallel.accuracy": 1 / 2,
            "tool.irrelevance.accuracy": 1 / 2,
        }
    )
    assert report["tool_cases"]["categories"] == {"simple": 9, "parallel": 2, "irrelevance": 2}
    by_id = {result["id"]: result for result in target["tool_results"]}
    assert by_id["value"]["expected"] == [EXPECTED["paris"]]
    assert by_id["value"]["got"]["calls"] == [EXPECTED["oslo"]]
    assert "HTTP 400" in by_id["long"]["problem"]
    assert "tides, which is not offered" in by_id["unknown"]["problem"]
    assert "I cannot know that." in page.read_text()
    assert "Wrong answers to tool cases" in page.read_text()
    row = next(line for line in sheet.read_text().splitlines() if "tool.parallel.acc" in line)
    assert row.split(",")[1:5] == ["", "tool.parallel.accuracy", "share", "0.5"]
    again = tmp_path / "again.html"
    assert main.run(["bench", "show", str(out), "--html", str(again), "-q"]) == 0
    assert again.read_bytes() == page.read_bytes()


def test_bench_gate_compares_tool_accuracy_with_the_baseline(
    folder: Path, good: LlmkitServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.json"
    out = tmp_path / "x.json"
    cases = ["--tool-cases", str(folder / "cases.jsonl"), "--tool-limit", "3"]
    gates = ["--gate", "tool_accuracy>=0.97x", "--gate", "tool_no_call>=0.97x"]
    assert main.run(["bench", "--url", good.url, *ONLY_TOOLS, *cases, "-q", "-o", str(base)]) == 0
    capsys.readouterr()
    command = ["bench", str(folder / "bad"), *ONLY_TOOLS, "--device", "cpu", *cases]
    assert main.run([*command, *gates, "--baseline", str(base), "-o", str(out)]) == 1
    report = json.loads(out.read_text())
    right = {target["name"]: target["metrics"]["tool_accuracy"] for target in report["targets"]}
    assert right == pytest.approx({"bad": 1 / 3, report["baseline"]: 1})
    passed = {gate["metric"]: gate["passed"] for gate in report["gates"]}
    assert passed == {"tool_accuracy": False, "tool_no_call": True}
    captured = capsys.readouterr()
    assert "~0.33x" in captured.out  # three cases are too few for a difference
    assert "tool_accuracy is 0.333333 (tool_accuracy>=0.97*baseline, limit 0.97)" in captured.err


def test_bench_says_why_a_model_is_not_asked_tool_cases(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model's chat template has no tools."""
    command = ["bench", str(model), "--tool-cases", str(folder / "cases.jsonl"), "--no-speed"]
    assert main.run([*command, "--no-quality", "-q"]) == 2
    error = capsys.readouterr().err
    assert "no target can be asked tool cases (model: its chat template has no place for" in error
    assert "--chat-template and --tool-parser" in error
    gate = ["--gate", "tool_accuracy>0.5"]
    assert main.run([*command, "-q", *gate]) == 2
    assert "is on tool_accuracy, which is not measured for model" in capsys.readouterr().err
    out = tmp_path / "x.json"
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 200)
    short = ["--windows", "1", "--window-tokens", "16", "--text", str(text), "-o", str(out), "-q"]
    assert main.run([*command, *short]) == 0
    report = json.loads(out.read_text())
    refused = "model was not asked the tool cases: its chat template has no place for tools"
    assert refused in report["notes"]
    (target,) = report["targets"]
    (reason,) = (why for names, why in target["absent"].items() if "tool_accuracy" in names)
    assert reason == "its chat template has no place for tools"


def test_bench_says_that_a_server_refuses_tools(
    server: LlmkitServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "--url", server.url, *ONLY_TOOLS]
    assert main.run([*command, "--tool-cases", str(folder / "cases.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "the server refuses tools (HTTP 400: The model's chat template has no place" in error


def test_bench_ends_when_a_server_does_not_answer_tool_cases(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server streams although a whole answer was asked for."""
    chat = ChatServer({"Hello": [{"content": "Hi"}]})
    with chat.running():
        command = ["bench", "--url", chat.url, *ONLY_TOOLS]
        assert main.run([*command, "--tool-cases", str(folder / "cases.jsonl")]) == 3
    assert "did not answer as a chat" in capsys.readouterr().err


def test_bench_ends_when_a_server_refuses_all_tool_cases(
    folder: Path, good: LlmkitServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = json.loads((folder / "cases.jsonl").read_text().splitlines()[0])
    path = tmp_path / "robot.jsonl"
    path.write_text(json.dumps({**case, "messages": [{"role": "robot", "content": "Hi"}]}))
    command = ["bench", "--url", good.url, *ONLY_TOOLS, "--tool-cases", str(path)]
    assert main.run(command) == 3
    assert "refused all 1 tool cases (the first, right: HTTP 400" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--offline"], 2, "--tool-cases asks a server, and --offline has none"),
        (["--tool-cases", "absent.jsonl"], 3, "tool cases absent.jsonl cannot be read"),
        (["--tool-limit", "0"], 2, "--tool-limit"),
    ],
)
def test_bench_refuses_wrong_options_of_tool_cases(
    model: Path,
    options: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["bench", str(model), "--tool-cases", "builtin", *ONLY_TOOLS]
    assert main.run([*command, *options]) == code
    assert message in capsys.readouterr().err
