"""An Airflow DAG that answers a file of requests each night with `llmkit batch`.

Copy this file into the folder of DAGs. It needs Airflow 3 and no other package: `llmkit` is a
program here, in an environment of its own, and nothing of it is imported.

- A retry continues after the last complete result, and so does a run that is cleared. A run whose
  output is complete already does nothing.
- Killing or stopping the task ends `llmkit batch` as Ctrl-C does, with its results kept.
- A wrong option or an unusable input is not tried again. An unreachable server or a full disk is.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator, Connection, Param, dag, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException

# Exit codes of llmkit (docs/batch.md).
WRONG_OPTION = 2
BAD_INPUT = 3
OUTPUT_EXISTS = 5
STOP_S = 30.0  # for `llmkit batch` to write what it has


class LlmkitBatchOperator(BaseOperator):
    """Runs `llmkit batch`, and returns its summary."""

    template_fields = (
        "program",
        "model",
        "url",
        "input_file",
        "output_file",
        "concurrency",
        "serve_options",
    )

    def __init__(
        self,
        *,
        input_file: str,
        output_file: str,
        program: str = "llmkit",
        model: str = "",
        url: str = "",
        concurrency: str = "512",
        serve_options: str = "",
        connection: str | None = None,
        **kwargs: Any,
    ) -> None:
        """input_file, output_file: of requests and of results, on a disk that every worker has.

        model: a checkpoint, for a server of its own; or, with url, a name there. url: a running
        server; "": none. serve_options: words of `llmkit serve`, as on a command line.
        connection: the id of a connection whose password is the server's API key; None: the
        worker's LLMKIT_API_KEY.
        """
        super().__init__(**kwargs)
        self.input_file = input_file
        self.output_file = output_file
        self.program = program
        self.model = model
        self.url = url
        self.concurrency = concurrency
        self.serve_options = serve_options
        self.connection = connection
        self._process: subprocess.Popen[str] | None = None

    def execute(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """Run until the output is complete. Raises AirflowFailException for what stays wrong."""
        command = self._command()
        self.log.info("%s", shlex.join(command))
        Path(self.output_file).parent.mkdir(parents=True, exist_ok=True)
        code, summary = self._run(command)
        if code == 0:
            document: dict[str, Any] = json.loads(summary)
            return document
        if code == OUTPUT_EXISTS and Path(self.output_file).is_file():
            self.log.info("%s is complete already", self.output_file)
            return {"output": self.output_file, "complete_before": True}
        message = f"llmkit batch ended with exit code {code}; its messages are in the log"
        if code in (WRONG_OPTION, BAD_INPUT, OUTPUT_EXISTS):
            raise AirflowFailException(message)
        raise AirflowException(f"{message}; a retry continues after the last complete result")

    def on_kill(self) -> None:
        """Let `llmkit batch` end with its results kept."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()

    def _command(self) -> list[str]:
        command = [self.program, "batch", self.input_file, "-o", self.output_file, "--json"]
        command += ["--concurrency", self.concurrency]
        if self.model:
            command += ["--model", self.model]
        if self.url:
            command += ["--url", self.url]
        words = shlex.split(self.serve_options)
        return [*command, "--", *words] if words else command

    def _run(self, command: list[str]) -> tuple[int, str]:
        """Run a command, and log its messages. Returns its exit code and its stdout."""
        environment = dict(os.environ)
        if self.connection is not None:
            environment["LLMKIT_API_KEY"] = Connection.get(self.connection).password or ""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as stdout:
            self._process = subprocess.Popen(  # noqa: S603
                command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
            )
            try:
                assert self._process.stderr is not None
                for line in self._process.stderr:
                    self.log.info("%s", line.rstrip())
                code = self._process.wait()
            finally:
                self.on_kill()  # after an exception, such as the task's timeout
            stdout.seek(0)
            return code, stdout.read()


@dag(
    dag_id="llmkit_nightly_batch",
    schedule="0 1 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,  # one GPU
    tags=["llmkit"],
    params={
        "program": Param("llmkit", type="string", description="The program, in its environment"),
        "model": Param("", type="string", description="A checkpoint, or with url a name there"),
        "url": Param("", type="string", description="A running server; empty: one of its own"),
        "input_folder": Param("/data/requests", type="string", description="Has DATE.jsonl"),
        "output_folder": Param("/data/results", type="string", description="Gets DATE.jsonl"),
        "concurrency": Param(512, type="integer", minimum=1),
        "serve_options": Param("", type="string", description="Options of llmkit serve"),
        "max_failed_percent": Param(
            1.0, type="number", minimum=0, maximum=100, description="More fail the run"
        ),
    },
)
def llmkit_nightly_batch() -> None:
    """Answer the requests of a day."""
    batch = LlmkitBatchOperator(
        task_id="batch",
        program="{{ params.program }}",
        model="{{ params.model }}",
        url="{{ params.url }}",
        input_file="{{ params.input_folder }}/{{ ds }}.jsonl",
        output_file="{{ params.output_folder }}/{{ ds }}.jsonl",
        concurrency="{{ params.concurrency }}",
        serve_options="{{ params.serve_options }}",
        retries=5,
        retry_delay=timedelta(minutes=2),
        retry_exponential_backoff=True,
        max_retry_delay=timedelta(minutes=30),
        execution_timeout=timedelta(hours=12),
    )

    @task
    def check(summary: dict[str, Any], params: dict[str, Any]) -> None:
        """Fail when too many requests have no answer."""
        if summary.get("complete_before"):
            return
        percent = 100 * summary["failed"] / summary["requests"]
        if percent > params["max_failed_percent"]:
            raise AirflowFailException(
                f"{summary['failed']} of {summary['requests']} requests failed ({percent:.2f} %), "
                f"by error: {summary['errors']}"
            )

    check(batch.output)


llmkit_nightly_batch()
