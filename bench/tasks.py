"""`--tasks`: EleutherAI's lm-evaluation-harness (the `tasks` extra) asking a server.

Log likelihoods go through `/v1/completions`, as the harness's `local-completions` does it, chats through
`/v1/chat/completions`. Nothing is downloaded for a task file whose data is local, and no generated code is run.
"""

from __future__ import annotations

import io
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from llmkit.bench.intervals import ERROR
from llmkit.bench.load import Server
from llmkit.bench.metrics import TASK
from llmkit.checkpoint.errors import InputError, ShortageError, UsageError
from llmkit.checkpoint.source import Checkpoint
from llmkit.runtime.channel import API_KEY_VARIABLE

CONCURRENT = 8  # requests at a time
TIMEOUT_S = 600


@dataclass(frozen=True)
class TaskOptions:
    """What is asked, and how."""

    names: tuple[str, ...]  # tasks, groups, or .yaml files of tasks
    limit: int | None = None  # only the first so many questions of each task
    shots: int | None = None  # examples before each question; None: as the task says
    chat: bool = False  # as chats, with the server's template; without log likelihoods


class Tasks:
    """Tasks that were found and whose data was loaded."""

    def __init__(self, options: TaskOptions) -> None:
        """Raises ShortageError without the harness, UsageError for an unknown task, InputError for data that fails."""
        try:
            with _quiet():
                from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ShortageError(
                f"--tasks needs lm-evaluation-harness ({error})", todo="Run pip install 'llmkit[tasks]'"
            ) from error
        self.options = options
        files = [name for name in options.names if name.endswith((".yaml", ".yml"))]
        for file in files:
            if not Path(file).is_file():
                raise UsageError(f"task file {file} does not exist")
        with _quiet():
            self._manager = TaskManager(include_defaults=len(files) < len(options.names))
        if unknown := [n for n in options.names if n not in files and n not in self._manager.all_tasks]:
            raise UsageError(f"no task or group is called {unknown[0]}", todo="`lm-eval ls tasks` lists them")
        try:
            with _quiet():
                loaded = self._manager.load(list(options.names))
        except Exception as error:  # whatever the harness, `datasets` and the hub raise
            raise InputError(f"tasks {', '.join(options.names)} cannot be loaded ({_told(error)})") from error
        self.metrics = _metrics(loaded)  # full names of the figures there will be
        kinds = {name: str(task.OUTPUT_TYPE) for name, task in loaded["tasks"].items()}
        if options.chat and (other := [name for name, kind in kinds.items() if kind != "generate_until"]):
            raise UsageError(
                f"task {other[0]} needs log likelihoods, which chats do not have", todo="Drop --tasks-chat"
            )

    def run(self, server: Server, tokenizer: Checkpoint, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
        """Ask the server: the figures by full name, and what was asked. Raises InputError when it fails."""
        from lm_eval.evaluator import simple_evaluate

        options = self.options
        try:
            with tempfile.TemporaryDirectory() as folder, _quiet():
                for name, content in tokenizer.side_files().items():
                    (Path(folder) / name).write_bytes(content)
                (Path(folder) / "config.json").write_text("{}")
                found = simple_evaluate(
                    _model(server, folder, options.chat), tasks=list(options.names), task_manager=self._manager,
                    num_fewshot=options.shots, limit=options.limit, apply_chat_template=options.chat,
                    bootstrap_iters=1000, log_samples=False, random_seed=seed, numpy_random_seed=seed,
                    torch_random_seed=seed, fewshot_random_seed=seed,
                )  # fmt: skip
        except Exception as error:  # as above, and what its client raises
            raise InputError(f"lm-evaluation-harness failed at {server.url} ({_told(error)})") from error
        about = {
            "lm_eval": metadata.version("lm-eval"),
            "versions": found["versions"],
            "shots": found["n-shot"],
            "questions": {name: count["effective"] for name, count in found["n-samples"].items()},
            "api": "chat" if options.chat else "completions",
        }
        return _figures(found["results"]), about


def _model(server: Server, tokenizer: str, chat: bool) -> Any:
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    key = os.environ.get(API_KEY_VARIABLE)
    about: dict[str, Any] = {
        "model": server.model, "num_concurrent": CONCURRENT, "max_retries": 1, "timeout": TIMEOUT_S,
        "max_length": server.context_tokens or 2048, "header": {"Authorization": f"Bearer {key}"} if key else {},
    }  # fmt: skip
    if chat:
        return LocalChatCompletion(base_url=f"{server.url}/v1/chat/completions", **about)
    completions = f"{server.url}/v1/completions"
    return LocalCompletionsAPI(base_url=completions, tokenizer_backend="huggingface", tokenizer=tokenizer, **about)


def _metrics(loaded: dict[str, Any]) -> list[str]:
    """The figures that tasks will give; groups may give any that theirs do."""
    named = [
        (metric, filtered.name)
        for task in loaded["tasks"].values()
        for metric in task.aggregation()
        for filtered in task._filters
    ]
    owners = [*loaded["tasks"], *loaded.get("groups", ())]
    return [_name(owner, metric, chosen) for owner in owners for metric, chosen in dict.fromkeys(named)]


def _figures(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    figures = {}
    for task, found in results.items():
        for key, value in found.items():
            metric, comma, chosen = key.partition(",")
            if comma and isinstance(value, (int, float)) and math.isfinite(value):
                base = metric.removesuffix(ERROR)
                figures[_name(task, base, chosen) + (ERROR if metric != base else "")] = float(value)
    return figures


def _name(task: str, metric: str, chosen: str) -> str:
    """chosen: the filter that took the answer out of what was said; "none": there was none."""
    return f"{TASK}{task}.{metric}" + ("" if chosen == "none" else f".{chosen}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, the harness's own bars and logs are not shown."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def _told(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
