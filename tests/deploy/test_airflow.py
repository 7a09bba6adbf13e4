"""recipes/airflow: a real `airflow dags test`, with SQLite and without a network."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import tiny_checkpoint

FOLDER = Path(__file__).parents[2]
RECIPE = FOLDER / "recipes/airflow/llmkit_nightly_batch.py"
AIRFLOW = FOLDER / ".venv-airflow/bin/airflow"
DAY = "2026-02-03"
# The first call is interrupted, as by a lost worker, once it has two results.
INTERRUPTED = """\
#!/bin/sh
if [ -e {folder}/called ]; then exec {program} "$@"; fi
touch {folder}/called
{program} "$@" &
child=$!
while [ "$(wc -l < {output}.partial 2>/dev/null || echo 0)" -lt 2 ]; do sleep 0.05; done
kill -TERM $child
wait $child
"""


def test_airflow_recipe_imports_nothing_heavy_when_it_is_parsed() -> None:
    tree = ast.parse(RECIPE.read_text())
    modules = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert "airflow" in modules
    assert modules - {"airflow"} <= set(sys.stdlib_module_names)


def airflow(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | {
        "AIRFLOW_HOME": str(folder / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(folder / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [AIRFLOW, *words], env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has a database, the recipe with a retry after a second, a model and a day's requests."""
    folder = tmp_path_factory.mktemp("airflow")
    (folder / "dags").mkdir()
    text = RECIPE.read_text()
    assert "retry_delay=timedelta(minutes=2)," in text
    text = text.replace("retry_delay=timedelta(minutes=2),", "retry_delay=timedelta(seconds=1),")
    (folder / "dags" / RECIPE.name).write_text(text)
    tiny_checkpoint(folder / "model")
    (folder / "in").mkdir()
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": [number + 5], "max_tokens": 200, "ignore_eos": True, "seed": 1},
        }
        for number in range(12)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "in" / f"{DAY}.jsonl").write_text(text)
    (folder / "in" / "2026-02-04.jsonl").write_text(
        text + '{"custom_id": "wrong", "method": "POST", "url": "/v1/completions", "body": {}}\n'
    )
    migrated = airflow(folder, "db", "migrate")
    assert migrated.returncode == 0, migrated.stderr
    return folder


def run_dag(folder: Path, day: str, **params: Any) -> str:
    """Run the DAG for a day. Returns everything that it has logged."""
    given: Mapping[str, Any] = {
        "program": str(Path(sys.executable).with_name("llmkit")),
        "model": str(folder / "model"),
        "input_folder": str(folder / "in"),
        "output_folder": str(folder / "out"),
        "concurrency": 1,
        "serve_options": "--device cpu --kv-cache-memory 32MiB",
    }
    words = ("dags", "test", "llmkit_nightly_batch", day, "-c", json.dumps({**given, **params}))
    done = airflow(folder, *words)
    return done.stdout + done.stderr


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


@pytest.mark.scale
@pytest.mark.timeout(900)
def test_airflow_retry_continues_an_interrupted_batch(folder: Path) -> None:
    output = folder / "out" / f"{DAY}.jsonl"
    program = folder / "interrupted"
    real = Path(sys.executable).with_name("llmkit")
    program.write_text(INTERRUPTED.format(folder=folder, program=real, output=output))
    program.chmod(0o755)
    log = run_dag(folder, DAY, program=str(program))
    assert "llmkit batch ended with exit code 143" in log, log[-3000:]
    assert log.count("[DAG TEST] running task <TaskInstance: llmkit_nightly_batch.batch") == 2
    assert "state:success" in log.rpartition("Marking run")[0] or "state=success" in log
    assert ids(output) == [str(number) for number in range(12)], "no request twice, none missing"
    before = output.read_bytes()
    again = run_dag(folder, DAY)
    assert "is complete already" in again, again[-3000:]
    assert output.read_bytes() == before
    # The same requests without an interruption.
    whole = run_dag(folder, DAY, output_folder=str(folder / "whole"))
    assert "ended with exit code" not in whole
    uninterrupted = (folder / "whole" / output.name).read_text().splitlines()
    texts = [
        [json.loads(line)["response"]["body"]["choices"][0]["text"] for line in lines]
        for lines in (before.decode().splitlines(), uninterrupted)
    ]
    assert texts[0] == texts[1]


@pytest.mark.scale
@pytest.mark.timeout(900)
def test_airflow_run_fails_for_too_many_failed_requests_and_a_bad_input(folder: Path) -> None:
    log = run_dag(folder, "2026-02-04", max_failed_percent=5)
    assert "1 of 13 requests failed (7.69 %)" in log, log[-3000:]
    assert log.count("running task <TaskInstance: llmkit_nightly_batch.batch") == 1
    log = run_dag(folder, "2026-02-05")
    assert "llmkit batch ended with exit code 3" in log, log[-3000:]
    assert log.count("running task <TaskInstance: llmkit_nightly_batch.batch") == 1, "no retry"
