"""Recipes: the schema and its messages, the runner, and every shipped recipe on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.output_directory import output_lock
from llmkit.cli import main, recipes
from llmkit.cli.recipe_stages import stage_types
from llmkit.pipeline.recipe import read_recipe

ROOT = Path(__file__).parents[2]
MODEL = {"max_position_embeddings": 512}
SHIPPED = recipes.shipped()
SHORT = """\
model: org/model
stages:
  int4:
    run: quantize
    method: rtn
  judged:
    run: gate
    of: int4
    gates: [mean_kl <= 100]
"""
pytestmark = pytest.mark.usefixtures("short_builtin_text")


def recipe_with_sharding(model: Path) -> str:
    """The short recipe with a stage that reads the first."""
    text = SHORT.replace("org/model", str(model)).replace("rtn", "rtn\n    group_size: 32")
    return text + "  tp2: {run: shard, model: int4, tp: 2}\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def run_recipe_json(
    capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0
) -> dict[str, dict[str, Any]]:
    """Runs a recipe with --json; its stages by name."""
    capsys.readouterr()
    assert main.run(["run", *map(str, arguments), "--json", "--quiet"]) == code
    document = json.loads(capsys.readouterr().out)
    return {stage["stage"]: stage for stage in document.get("stages") or document["plan"]}


def outcomes(stages: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: stage["outcome"] for name, stage in stages.items()}


def error_line(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    capsys.readouterr()
    assert main.run([str(argument) for argument in arguments]) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    return line


# --- the file


def test_recipe_schema_is_up_to_date() -> None:
    written = (ROOT / "recipes" / "schema.json").read_text()
    assert written == recipes.schema_text(), "run: llmkit recipes schema > recipes/schema.json"


@pytest.mark.parametrize("name", SHIPPED)
def test_recipes_that_are_shipped_are_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        SHIPPED[name]
        .read_text()
        .startswith("# yaml-language-server: $schema=schema.json\ndescription: ")
    )
    assert main.run(["recipes", "validate", str(SHIPPED[name])]) == 0
    assert " is valid: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("method: rtn", "metod: rtn"),
            "r.yaml:5: unknown key stages.int4.metod. The nearest is method.",
        ),
        (
            ("model: org", "modle: org"),
            "r.yaml:1: unknown key modle. The nearest is model. 1 more problem after it.",
        ),
        (
            ("method: rtn", "method: rnt"),
            "r.yaml:5: stages.int4.method is 'rnt'. Expected 'auto', 'bf16', 'fp16',",
        ),
        (("method: rtn", "bits: 4"), "r.yaml:3: stages.int4 lacks 'method'."),
        (
            ("rtn", "rtn\n    samples: many"),
            "r.yaml:6: stages.int4.samples is 'many'. Expected a valid integer.",
        ),
        (
            ("rtn", "rtn\n    samples: 0"),
            "r.yaml:6: stages.int4.samples is 0. Expected greater than or equal to 1.",
        ),
        (
            ("rtn", "rtn\n    group_size: big"),
            "r.yaml:6: stages.int4.group_size is 'big'. Expected a valid integer or 'auto'.",
        ),
        (("rtn", "rtn\n    method: gptq"), "r.yaml:6: 'method' was already set in line 5."),
        (
            ("run: quantize", "run: quantise"),
            "r.yaml:4: stages.int4.run is 'quantise'. The nearest is quantize.",
        ),
        (("    run: quantize\n", ""), "r.yaml:3: stages.int4 lacks 'run'."),
        (("int4:", "model:"), "r.yaml:3: stages.model: a stage's name has letters a to z,"),
        (
            ("of: int4", "of: int8"),
            "r.yaml:8: stages.judged.of is 'int8', which is no stage. The nearest is int4.",
        ),
        (
            ("rtn", "rtn\n    model: judged"),
            "r.yaml:6: stages.int4.model is 'judged', which comes later",
        ),
        (
            ("rtn", "rtn\n    model: in4"),
            "r.yaml:6: stages.int4.model is 'in4', which is no stage and no file.",
        ),
        (
            ("rtn", "rtn\n    eval: false"),
            "r.yaml:10: gate 'mean_kl <= 100' is on mean_kl, which is not measured for",
        ),
        (
            ("mean_kl <= 100", "mean_kl = 1"),
            "r.yaml:9: stages.judged.gates.0: gate 'mean_kl = 1' is not understood.",
        ),
        (("stages:", "stages: ["), "not valid YAML"),
    ],
)
def test_recipe_mistakes_are_reported_with_their_line(
    change: tuple[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "r.yaml", SHORT.replace(*change, 1))
    assert message in error_line(capsys, 2, "recipes", "validate", file)


def test_recipe_stage_inputs_must_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = SHORT + "  tp: {run: shard, tp: 2, model: judged}\n"
    message = error_line(capsys, 2, "recipes", "validate", write(tmp_path / "r.yaml", text))
    assert (
        "r.yaml:10: stages.tp.model is 'judged', a gate stage. Expected a stage that writes one."
        in message
    )


@pytest.mark.parametrize(
    ("bench", "gate", "message"),
    [
        ("mode: startup", "startup.stage_building_s <= 9", ""),
        (
            "mode: startup, speed: false",
            "stage_building_s <= 9",
            "is on stage_building_s, which is not measured",
        ),
        ("mode: serve", "stage_building_s <= 9", "is on stage_building_s, which is not measured"),
        ("quality: false", "max_kl <= 1", "is on max_kl, which is not measured"),
        ("quality: false", "mean_kl_bound <= 1", "is on mean_kl_bound, which is not measured"),
        ("quality: true", "max_kl <= 1", ""),
    ],
)
def test_recipe_gates_need_measured_metrics(
    bench: str, gate: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = (
        f"  seen: {{run: bench, {bench}}}\n  judged: {{run: gate, of: seen, gates: ['{gate}']}}\n"
    )
    file = write(tmp_path / "r.yaml", f"model: org/model\nstages:\n{stages}")
    if message:
        assert message in error_line(capsys, 2, "recipes", "validate", file)
    else:
        assert main.run(["recipes", "validate", str(file)]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "int4.samples=many",
            "--set int4.samples=many: stages.int4.samples is 'many'. Expected a valid integer.",
        ),
        ("stages.int4.sampels=3", "unknown key stages.int4.sampels. The nearest is samples."),
        ("int5.samples=3", "--set int5.samples=3: the recipe has no int5. The nearest is int4."),
        ("modle=x", "--set modle=x: unknown key modle. The nearest is model."),
        ("int4", "--set 'int4' is not KEY=VALUE."),
    ],
)
def test_recipe_changes_are_checked(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "r.yaml", SHORT)
    assert message in error_line(capsys, 2, "run", file, "--set", change, "-o", tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_recipe_changes_are_typed_and_stages_inherit_device_and_seed(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", SHORT + "seed: 7\ndevice: cpu\n")
    changes = [
        "int4.samples=16",
        "stages.int4.eval=true",
        "int4.keep=down_proj",
        "int4.group_size=32",
        "seed=8",
    ]
    recipe = read_recipe(file, stage_types(), changes)
    settings = recipe.stages["int4"].settings
    wanted = {
        "samples": 16,
        "eval": True,
        "keep": "down_proj",
        "group_size": 32,
        "seed": 8,
        "device": "cpu",
    }
    assert {key: settings[key] for key in wanted} == wanted
    assert recipe.model == "org/model"


def test_recipes_command_lists_shows_and_copies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["recipes", "list", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["recipes"]] == list(SHIPPED)
    assert main.run(["recipes", "show", "smollm2-cpu"]) == 0
    assert capsys.readouterr().out == SHIPPED["smollm2-cpu"].read_text()
    assert main.run(["recipes", "copy", "smollm2-cpu", str(tmp_path / "mine")]) == 0
    assert sorted(file.name for file in (tmp_path / "mine").iterdir()) == [
        "schema.json",
        "smollm2-cpu.yaml",
    ]
    assert "smollm2-cpu.yaml exists. Remove it" in error_line(
        capsys, 5, "recipes", "copy", "smollm2-cpu", tmp_path / "mine"
    )
    assert "The nearest is smollm2-cpu" in error_line(capsys, 2, "recipes", "show", "smolm2-cpu")
    assert "The nearest is smollm2-cpu" in error_line(capsys, 3, "run", "smolm2-cpu")


def test_recipe_ci_examples_run_a_shipped_recipe() -> None:
    for file in (ROOT / "recipes" / "ci").glob("*.yml"):
        assert yaml.safe_load(file.read_text())
        words = next(
            line for line in file.read_text().splitlines() if " llmkit run " in line
        ).split()
        assert words[words.index("run", words.index("llmkit")) + 1] == "ci-regression.yaml"
    assert "ci-regression" in SHIPPED


# --- the runner


def test_run_skips_unchanged_stages(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "r.yaml", recipe_with_sharding(model))
    work = tmp_path / "w"
    first = run_recipe_json(capsys, file, "-o", work)
    assert outcomes(first) == {"int4": "done", "judged": "passed", "tp2": "done"}
    assert first["judged"]["gates"][0]["value"] == first["int4"]["result"]["quality"]["mean_kl"]
    assert (
        "mean_kl" in (work / "judged.md").read_text()
        and "<testcase" in (work / "judged.xml").read_text()
    )
    stamps = {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
    assert outcomes(run_recipe_json(capsys, file, "-o", work)) == {
        "int4": "there already",
        "judged": "passed",
        "tp2": "there already",
    }
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")} == stamps
    assert main.run(["run", str(file), "-o", str(work)]) == 0
    assert f"int4 (1 of 3): skipped, {work / 'int4'} is there already\n" in capsys.readouterr().err

    # Another setting reruns a stage, and what reads it when its bytes have changed.
    assert outcomes(run_recipe_json(capsys, file, "-o", work, "--set", "tp2.tp=1"))["tp2"] == "done"
    assert outcomes(run_recipe_json(capsys, file, "-o", work, "--set", "tp2.tp=1")) == outcomes(
        {
            "int4": {"outcome": "there already"},
            "judged": {"outcome": "passed"},
            "tp2": {"outcome": "there already"},
        }
    )
    changed = run_recipe_json(
        capsys, file, "-o", work, "--set", "tp2.tp=1", "--set", "int4.keep=down_proj"
    )
    assert outcomes(changed) == {"int4": "done", "judged": "passed", "tp2": "done"}
    # Another gate judges what is there.
    failed = run_recipe_json(
        capsys,
        file,
        "-o",
        work,
        "--set",
        "tp2.tp=1",
        "--set",
        "int4.keep=down_proj",
        "--set",
        "judged.gates=[mean_kl <= 0, perplexity <= 2 * baseline]",
        code=1,
    )
    assert outcomes(failed) == {"int4": "there already", "judged": "FAILED"}
    assert [result["passed"] for result in failed["judged"]["gates"]] == [False, True]


def test_run_skips_stages_with_the_same_bytes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "r.yaml", recipe_with_sharding(model))
    work = tmp_path / "w"
    run_recipe_json(
        capsys,
        file,
        "-o",
        work,
        "--set",
        "judged.gates=[checkpoint_bytes < baseline]",
        "--set",
        "int4.eval=false",
    )
    again = run_recipe_json(
        capsys, file, "-o", work
    )  # now with an evaluation, which changes the report alone
    assert outcomes(again) == {"int4": "done", "judged": "passed", "tp2": "there already"}


def test_run_accepts_a_model_named_like_a_stage(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("int4").symlink_to(model)
    write(tmp_path / "r.yaml", SHORT.replace("org/model", "int4"))
    assert run_recipe_json(capsys, "r.yaml")["int4"]["output"] == str(tmp_path / "r" / "int4")


def test_run_repeats_all_stages_of_a_changed_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny_checkpoint(tmp_path / "tiny")
    file = write(tmp_path / "r.yaml", SHORT.replace("org/model", str(tiny)))
    work = tmp_path / "w"
    run_recipe_json(capsys, file, "-o", work)
    tiny_checkpoint(tmp_path / "tiny", seed=1)
    assert outcomes(run_recipe_json(capsys, file, "-o", work))["int4"] == "done"


def test_run_stops_at_a_failed_gate(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SHORT.replace("org/model", str(model)).replace(
        "mean_kl <= 100", "mean_kl <= 1e-9, top1 >= 0"
    )
    file = write(tmp_path / "r.yaml", text + "  tp2: {run: shard, model: int4, tp: 2}\n")
    assert main.run(["run", str(file), "-o", str(tmp_path / "w")]) == 1
    captured = capsys.readouterr()
    table = " ".join(captured.out.split())
    assert "│ mean_kl<=1e-09 │ int4" in table and "FAIL │" in table and "pass │" in table
    assert "llmkit run: error: 1 of 2 gate checks failed: int4: mean_kl is " in captured.err
    assert not (tmp_path / "w" / "tp2").exists()


def test_run_error_names_its_stage(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SHORT.replace("org/model", str(model)) + "  tp3: {run: shard, model: int4, tp: 3}\n"
    message = error_line(capsys, 3, "run", write(tmp_path / "r.yaml", text), "-o", tmp_path / "w")
    assert "llmkit run: error: stage tp3: --tp 3 does not divide " in message


def test_run_refuses_another_output(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "r.yaml", SHORT.replace("org/model", str(model)))
    work = tmp_path / "w"
    write(tmp_path / "file", "x")
    (tmp_path / "full").mkdir()
    write(tmp_path / "full" / "mine.txt", "x")
    assert "is a file" in error_line(capsys, 5, "run", file, "-o", tmp_path / "file")
    assert "exists and is not the run of a recipe" in error_line(
        capsys, 5, "run", file, "-o", tmp_path / "full"
    )
    with output_lock(work):
        assert f"is being written by another run (process {os.getpid()})" in error_line(
            capsys, 5, "run", file, "-o", work
        )
    run_recipe_json(capsys, file, "-o", work)
    other = write(tmp_path / "other.yaml", file.read_text())
    assert "is that of recipe r. Choose another" in error_line(capsys, 5, "run", other, "-o", work)


def test_run_resumes_after_a_kill(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SHORT.replace("org/model", str(model)).replace(
        "rtn", "gptq\n    samples: 64\n    seq_len: 256"
    )
    file = write(tmp_path / "r.yaml", text)
    work = tmp_path / "w"
    command = [sys.executable, "-m", "llmkit.cli.main", "run", str(file), "-o", str(work)]
    running = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (work / "int4.partial").exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    _, message = running.communicate(timeout=60)
    assert running.returncode == 143
    assert message.endswith(f"llmkit run: error: stopped. To resume: llmkit run {file} -o {work}\n")
    assert not (work / "int4").exists() and (work / "state.json").exists()
    assert outcomes(run_recipe_json(capsys, file, "-o", work))["int4"] == "done"
    assert not (work / "int4.partial").exists()


def test_dry_run_plans_missing_outputs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"""\
model: {model}
stages:
  half: {{run: quantize, method: bf16, eval: false}}
  int4: {{run: quantize, model: half, method: gptq, group_size: 32,
          samples: 2, seq_len: 64, eval: false}}
  tp2: {{run: shard, model: int4, tp: 2}}
  compare: {{run: bench, models: [model, int4], offline: true,
             speed: false, windows: 1, window_tokens: 64}}
  server: {{run: serve, model: tp2, kv_cache_memory: 1MiB, max_num_batched_tokens: 64}}
"""
    file = write(tmp_path / "r.yaml", text)
    work = tmp_path / "w"
    plan = run_recipe_json(capsys, file, "-o", work, "--dry-run")
    assert not work.exists()
    done = run_recipe_json(capsys, file, "-o", work)
    for stage in ("half", "int4"):
        files = (work / stage).glob("*.safetensors")
        assert plan[stage]["disk_bytes"] == sum(path.stat().st_size for path in files)
    assert plan["tp2"]["disk_bytes"] == done["tp2"]["result"]["bytes"]
    assert all(plan[stage]["memory_bytes"] > 2**29 and plan[stage]["seconds"] > 0 for stage in plan)
    assert done["server"]["outcome"] == "left out"
    after = run_recipe_json(capsys, file, "-o", work, "--dry-run")
    assert [stage for stage, row in after.items() if row["there"]] == [
        "half",
        "int4",
        "tp2",
        "compare",
    ]
    assert plan["server"]["memory_bytes"] == after["server"]["memory_bytes"], "of a rank"
    assert main.run(["run", str(file), "-o", str(work), "--dry-run"]) == 0
    assert "(nothing written)" in capsys.readouterr().out


def test_run_measures_a_server_every_time(model: Path, tmp_path: Path) -> None:
    from llmkit.pipeline.run_recipe import RunDirectory

    text = f"""\
model: {model}
stages:
  by-url: {{run: bench, url: ['http://127.0.0.1:1']}}
  served: {{run: bench}}
"""
    recipe = read_recipe(write(tmp_path / "r.yaml", text), stage_types())
    run_directory = RunDirectory(recipe, tmp_path / "w", stage_types())
    assert run_directory.fingerprint(recipe.stages["by-url"]) is None
    assert (
        run_directory.fingerprint(recipe.stages["served"])
        == run_directory.fingerprint(recipe.stages["served"])
        is not None
    )


def test_run_starts_the_server_with_serve(model: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stage = f"{{run: serve, device: cpu, port: {port}, kv_cache_memory: 8MiB}}"
    text = f"model: {model}\nstages:\n  server: {stage}\n"
    file = write(tmp_path / "r.yaml", text)
    command = [
        sys.executable,
        "-m",
        "llmkit.cli.main",
        "run",
        str(file),
        "--serve",
        "-o",
        str(tmp_path / "w"),
    ]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    answer = b""
    while not answer:
        assert running.poll() is None and time.monotonic() < deadline, (
            tmp_path / "log"
        ).read_text()
        with (
            suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as response,
        ):
            answer = response.read()
        time.sleep(0.05)
    assert json.loads(answer)["data"][0]["id"] == "model"
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 0
    assert "server │ serve   │ done" in (tmp_path / "log").read_text()


# --- the shipped recipes


# Their stages, with other settings, are those of the other recipes.
SLOW_RECIPES = ("llama-3.1-8b-awq", "llama-3.1-8b-gptq", "method-sweep")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_RECIPES else [])
        for name in SHIPPED
    ],
)
def test_recipes_that_are_shipped_run(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model with little calibration data, few requests, and without gates on speed."""
    if "a3b" in name:
        model = tiny_checkpoint(tmp_path / "moe", "qwen3_moe", max_position_embeddings=512)
    changes = [f"model={model}", "device=cpu", *(["int4.group_size=32"] if "tp2" in name else [])]
    for stage in read_recipe(SHIPPED[name], stage_types()).stages.values():
        if "samples" in stage.settings:
            changes += [f"{stage.name}.samples=2", f"{stage.name}.seq_len=64"]
        if stage.run == "bench":
            small = {
                "scenario": "[quick]",
                "repeats": 1,
                "limit": 2,
                "windows": 2,
                "window_tokens": 64,
                "offline": "true",
            }
            changes += [f"{stage.name}.{key}={value}" for key, value in small.items()]
        if stage.run == "gate" and any("tps" in gate for gate in stage.settings["gates"]):
            changes.append(f"{stage.name}.gates=[top1 >= 0, output_tps > 0]")
    arguments = [
        name,
        "-o",
        tmp_path / "w",
        *(word for change in changes for word in ("--set", change)),
    ]
    plan = run_recipe_json(capsys, *arguments, "--dry-run")
    assert all(row["memory_bytes"] > 0 for row in plan.values() if row["run"] != "gate")
    stages = run_recipe_json(capsys, *arguments)
    for stage, row in stages.items():
        assert row["outcome"] == {"gate": "passed", "serve": "left out"}.get(row["run"], "done"), (
            stage
        )
        if row["run"] == "bench":
            assert (tmp_path / "w" / f"{stage}.html").read_text().startswith("<!DOCTYPE html>")
