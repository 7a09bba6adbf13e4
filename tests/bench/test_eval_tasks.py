"""`--tasks`: the real lm-evaluation-harness on a real server, with local task data."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.server_process import LlmkitServer

from llmkit.bench.bench_report import BenchReport, TargetReport, compare_reports
from llmkit.bench.gates import parse_gate
from llmkit.bench.report_tables import spread_text
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.cli import main
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine

QUESTIONS = [
    {"question": "What is the capital of France?", "choices": [" Paris", " dog"], "answer": 0},
    {"question": "the quick brown", "choices": [" sun", " fox jumps over"], "answer": 1},
    {"question": "one two three", "choices": [" four five", " France"], "answer": 0},
    {"question": "how are you", "choices": [" a report", " today?"], "answer": 1},
    {"question": "the lazy", "choices": [" dog", " model is loaded"], "answer": 0},
]
CHOICES = """\
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITTEN = """\
task: tiny_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


MODEL = {"seed": 3}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    data = path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (path / "choices.yaml").write_text(CHOICES.format(data=data))
    (path / "written.yaml").write_text(WRITTEN.format(data=data))
    return path


@pytest.fixture(scope="module", autouse=True)
def data_sets_lie_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def most_probable(model: Path) -> list[int]:
    """Which choice the engine itself finds more probable, question by question."""
    engine = load_engine(model, EngineOptions(device="cpu", kv_cache_memory=2**22))
    tokenizer = load_tokenizer(open_checkpoint(model))
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    chosen = []
    for index, one in enumerate(QUESTIONS):
        start = len(tokenizer.encode(str(one["question"]), add_special_tokens=False))
        sums = []
        for number, choice in enumerate(one["choices"]):  # type: ignore[arg-type, var-annotated]
            prompt = tokenizer.encode(f"{one['question']}{choice}", add_special_tokens=False)
            engine.add(EngineRequest(f"{index}-{number}", prompt, sampling))
            logprobs: list[float] = []
            while engine.has_work:
                logprobs += [
                    logs.logprob
                    for output in engine.step()
                    for logs in output.prompt_logprobs or ()
                ]
            sums.append(sum(logprobs[start - 1 :]))
        chosen.append(sums.index(max(sums)))
    return chosen


def completion(server: LlmkitServer, model: str, prompt: str) -> str:
    """What the server writes where the task asks for four tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, "stop": ["\n\n"]}
    with server.client() as client:
        text: str = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    return text


def test_eval_tasks_are_run_gated_and_reported(
    model: Path, task_folder: Path, server: LlmkitServer, tmp_path: Path
) -> None:
    out = tmp_path / "x.json"
    html = tmp_path / "x.html"
    data = tmp_path / "written.jsonl"
    (tmp_path / "written.yaml").write_text(WRITTEN.format(data=data))
    answers = [completion(server, model.name, str(one["question"])) for one in QUESTIONS[:3]]
    answers += ["something else", "and else"]
    data.write_text(
        "\n".join(
            json.dumps({"question": one["question"], "choices": [answer], "answer": 0})
            for one, answer in zip(QUESTIONS, answers, strict=True)
        )
    )
    command = [
        "bench",
        "--url",
        server.url,
        "--tokenizer",
        str(model),
        "--no-speed",
        "--no-quality",
        "-q",
    ]
    command += [
        "--tasks",
        str(task_folder / "choices.yaml"),
        "--tasks",
        str(tmp_path / "written.yaml"),
    ]
    right = sum(a == one["answer"] for a, one in zip(most_probable(model), QUESTIONS, strict=True))
    gates = [
        "--gate",
        f"task.tiny_choices.acc>={right / 5 - 1e-6}",
        "--gate",
        "task.tiny_written.exact_match>0.59",
    ]
    assert main.run([*command, *gates, "-o", str(out), "--html", str(html)]) == 0
    report = json.loads(out.read_text())
    metrics = report["targets"][0]["metrics"]
    assert metrics["task.tiny_choices.acc"] == pytest.approx(right / 5)
    deviation = (right / 5 * (1 - right / 5) / 4) ** 0.5  # n - 1 = 4
    assert metrics["task.tiny_choices.acc_stderr"] == pytest.approx(deviation)
    assert metrics["task.tiny_written.exact_match"] == pytest.approx(3 / 5)
    assert report["tasks"]["questions"] == {"tiny_choices": 5, "tiny_written": 5}
    assert "tiny_choices, acc" in html.read_text()
    assert main.run([*command, "--gate", f"task.tiny_choices.acc>{right / 5 + 0.01}"]) == 1


def test_eval_tasks_use_chats_and_limits(
    model: Path, task_folder: Path, server: LlmkitServer, tmp_path: Path
) -> None:
    out = tmp_path / "x.json"
    command = [
        "bench",
        "--url",
        server.url,
        "--tokenizer",
        str(model),
        "--no-speed",
        "--no-quality",
        "-q",
    ]
    command += ["--tasks-chat", "--tasks-limit", "2"]
    assert main.run([*command, "--tasks", str(task_folder / "written.yaml"), "-o", str(out)]) == 0
    tasks = json.loads(out.read_text())["tasks"]
    assert (tasks["questions"], tasks["api"]) == ({"tiny_written": 2}, "chat")
    assert main.run([*command, "--tasks", str(task_folder / "choices.yaml")]) == 2


def test_eval_tasks_refuse_bad_options(
    model: Path,
    task_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choices = str(task_folder / "choices.yaml")
    (tmp_path / "lost.yaml").write_text(CHOICES.format(data=tmp_path / "lost.jsonl"))
    for options, code, words in (
        (["--tasks", "none.yaml"], 2, "task file none.yaml does not exist"),
        (["--tasks", str(tmp_path / "lost.yaml")], 3, "cannot be loaded"),
        (["--tasks", choices, "--offline"], 2, "--tasks asks a server"),
        (
            ["--tasks", choices, "--gate", "task.tiny_choices.f1>0"],
            2,
            "which is not measured for model",
        ),
    ):
        assert (
            main.run(["bench", str(model), "-q", "--device", "cpu", "--limit", "1", *options])
            == code
        )
        assert words in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert main.run(["bench", str(model), "-q", "--device", "cpu", "--tasks", choices]) == 4
    assert "pip install 'llmkit[tasks]'" in capsys.readouterr().err


def test_eval_tasks_differ_beyond_the_standard_error() -> None:
    def report(name: str, acc: float) -> BenchReport:
        return BenchReport(
            [TargetReport(name, name, "url", {"task.x.acc": acc, "task.x.acc_stderr": 0.02})]
        )

    near, far = (compare_reports(report("a", 0.50), report("b", acc)) for acc in (0.53, 0.60))
    assert near.differs(near.targets[1], "task.x.acc") is False
    assert far.differs(far.targets[1], "task.x.acc") is True
    assert spread_text(near.targets[0], "task.x.acc", 1.0) == " ±0.039"
    assert parse_gate("task.arc-Easy.acc >= 0.9*baseline").metric == "task.arc-Easy.acc"
