"""`--tasks`: tasks of EleutherAI's lm-evaluation-harness (the `tasks` extra), run on a server.

Log likelihoods use `/v1/completions`, as the harness's `local-completions` does. Chats use
`/v1/chat/completions`. A task file with local data needs no download. No generated code is run.
"""

from __future__ import annotations

import io
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

from llmkit.bench.bench_metrics import TASK_PREFIX
from llmkit.bench.bench_options import EvalTaskOptions
from llmkit.bench.confidence_intervals import STDERR_SUFFIX
from llmkit.bench.load_client import Server
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.common.errors import InputError, ShortageError, UsageError
from llmkit.runtime.process_channel import API_KEY_VARIABLE

MAX_CONCURRENCY = 8  # requests
TIMEOUT_S = 600


class EvalTasks:
    """Evaluation tasks whose data is loaded, ready to run on servers."""

    def __init__(self, options: EvalTaskOptions) -> None:
        """Find the tasks and load their data.

        Raises ShortageError without the harness, UsageError for an unknown task, and InputError for
        data that cannot be loaded.
        """
        try:
            with _quiet():
                # The harness is optional, and its import takes seconds.
                from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ShortageError(
                f"--tasks needs lm-evaluation-harness ({error})",
                todo="Run pip install 'llmkit[tasks]'",
            ) from error
        self.options = options
        files = [name for name in options.names if name.endswith((".yaml", ".yml"))]
        for file in files:
            if not Path(file).is_file():
                raise UsageError(f"task file {file} does not exist")
        with _quiet():
            self._manager = TaskManager(include_defaults=len(files) < len(options.names))
        known = {*files, *self._manager.all_tasks}
        unknown = [name for name in options.names if name not in known]
        if unknown:
            raise UsageError(
                f"no task or group is called {unknown[0]}", todo="`lm-eval ls tasks` lists them"
            )
        try:
            with _quiet():
                loaded = self._manager.load(list(options.names))
        except Exception as error:  # the harness, `datasets` and the hub raise any class
            raise InputError(
                f"tasks {', '.join(options.names)} cannot be loaded ({_first_line(error)})"
            ) from error
        self.metrics = _expected_metrics(loaded)  # full names
        for name, task in loaded["tasks"].items():
            if options.chat and str(task.OUTPUT_TYPE) != "generate_until":
                raise UsageError(
                    f"task {name} needs log likelihoods, which chats do not have",
                    todo="Drop --tasks-chat",
                )

    def run(
        self, server: Server, tokenizer: Checkpoint, seed: int
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Run the tasks. Returns the metrics by full name, and the report's entry about the tasks.

        Raises InputError when the harness fails.
        """
        # Optional and slow to import, as above.
        from lm_eval.evaluator import simple_evaluate

        options = self.options
        try:
            with tempfile.TemporaryDirectory() as folder, _quiet():
                for name, content in tokenizer.side_files().items():
                    (Path(folder) / name).write_bytes(content)
                (Path(folder) / "config.json").write_text("{}")
                results = simple_evaluate(
                    _model(server, folder, options.chat),
                    tasks=list(options.names),
                    task_manager=self._manager,
                    num_fewshot=options.shots,
                    limit=options.limit,
                    apply_chat_template=options.chat,
                    bootstrap_iters=1000,
                    log_samples=False,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
        except Exception as error:  # as above, and the errors of its HTTP client
            raise InputError(
                f"lm-evaluation-harness failed at {server.url} ({_first_line(error)})"
            ) from error
        description = {
            "lm_eval": metadata.version("lm-eval"),
            "versions": results["versions"],
            "shots": results["n-shot"],
            "questions": {name: count["effective"] for name, count in results["n-samples"].items()},
            "api": "chat" if options.chat else "completions",
        }
        return _task_metrics(results["results"]), description


def _model(server: Server, tokenizer: str, chat: bool) -> Any:
    # Optional and slow to import, as above.
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    key = os.environ.get(API_KEY_VARIABLE)
    settings: dict[str, Any] = {
        "model": server.model,
        "num_concurrent": MAX_CONCURRENCY,
        "max_retries": 1,
        "timeout": TIMEOUT_S,
        "max_length": server.context_tokens or 2048,
        "header": {"Authorization": f"Bearer {key}"} if key else {},
    }
    if chat:
        return LocalChatCompletion(base_url=f"{server.url}/v1/chat/completions", **settings)
    completions = f"{server.url}/v1/completions"
    return LocalCompletionsAPI(
        base_url=completions, tokenizer_backend="huggingface", tokenizer=tokenizer, **settings
    )


def _expected_metrics(loaded: dict[str, Any]) -> list[str]:
    """The full names of the tasks' metrics. A group may have any metric of its tasks."""
    pairs: dict[tuple[str, str], None] = {}  # (metric, filter), in order
    for task in loaded["tasks"].values():
        filters = task.config.filter_list
        filter_names = ["none"] if filters is None else [entry["name"] for entry in filters]
        for metric in task.aggregation():
            for filter_name in filter_names:
                pairs[metric, filter_name] = None
    owners = [*loaded["tasks"], *loaded.get("groups", ())]
    return [_metric_name(owner, metric, name) for owner in owners for metric, name in pairs]


def _task_metrics(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The harness's results as metrics by full name."""
    metrics = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if comma and isinstance(value, (int, float)) and math.isfinite(value):
                base = metric.removesuffix(STDERR_SUFFIX)
                suffix = STDERR_SUFFIX if metric != base else ""
                metrics[_metric_name(task, base, filter_name) + suffix] = float(value)
    return metrics


def _metric_name(task: str, metric: str, filter_name: str) -> str:
    """filter_name: the filter that took the answer out of the output; "none" for no filter."""
    name = f"{TASK_PREFIX}{task}.{metric}"
    return name if filter_name == "none" else f"{name}.{filter_name}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the harness's progress bars and logs."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def _first_line(error: Exception) -> str:
    """The class and the first line of an error."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
