"""Checkpoints in an MLflow model registry: the artifacts of a run, and a version of a model that names them.

Only the client's public calls and plain files: no flavour, so nothing is pickled. MLFLOW_TRACKING_URI says where the
server is, MLFLOW_EXPERIMENT_NAME in which experiment runs are made.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from llmkit.checkpoint.errors import UsageError
from llmkit.checkpoint.manifest import MANIFEST
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.reading import sha256_file
from llmkit.checkpoint.remote import Advance, damaged, hashed, missing
from llmkit.checkpoint.version import version

FOLDER = "checkpoint"  # of a run's artifacts
EXPERIMENT = "llmkit"


@contextmanager
def open_mlflow(reference: str) -> Iterator[MlflowStore]:
    """See `open_store`."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        import mlflow.artifacts
    except ImportError as error:
        raise missing("mlflow", "mlflow") from error
    yield MlflowStore(reference, mlflow.artifacts)


class MlflowStore:
    """A model's version, or a folder of a run's artifacts. See `Store`."""

    def __init__(self, reference: str, artifacts: Any) -> None:
        self.reference = reference
        self._artifacts = artifacts

    def sizes(self) -> dict[str, int]:
        """See `Source.sizes`."""
        entries = self._artifacts.list_artifacts(self.reference)
        return {Path(entry.path).name: int(entry.file_size or 0) for entry in entries if not entry.is_dir}

    def small(self, name: str, size: int) -> bytes:
        """See `Source.small`."""
        with tempfile.TemporaryDirectory() as folder:
            return self._download(name, Path(folder)).read_bytes()

    def fetch(self, name: str, size: int, path: Path, advance: Advance) -> str:
        """See `Source.fetch`. A file that is incomplete is fetched anew: the client knows no ranges."""
        digest, done = hashed(path, size)
        if done < size:
            path.unlink()
            self._download(name, path.parent)
            digest, done = hashed(path, size)
        advance(size)
        return str(digest.hexdigest())

    def publish(
        self, folder: Path, files: Mapping[str, Mapping[str, Any]], manifest: bytes, force: bool, progress: Progress
    ) -> str:
        """See `Target.publish`. The version appears when all files have been read back; `force` has no effect."""
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        kind, _, rest = self.reference.partition(":/")
        name, _, alias = rest.partition("@")
        if kind != "models" or "/" in rest:
            raise UsageError(
                f"{self.reference} is no place for a checkpoint", "models:/NAME or models:/NAME@ALIAS was expected",
                "MLflow gives each version its number",
            )  # fmt: skip
        client = MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else client.create_experiment(experiment)
        run = client.create_run(number, run_name=f"push {name}", tags={"llmkit.version": version()}).info.run_id
        state = "FAILED"
        try:
            sent = MlflowStore(f"runs:/{run}/{FOLDER}", self._artifacts)
            progress.start("send", sum(entry["bytes"] for entry in files.values()), "bytes")
            for file, entry in files.items():
                client.log_artifact(run, str(folder / file), FOLDER)
                progress.advance(entry["bytes"], file)
            progress.start("compare", sum(entry["bytes"] for entry in files.values()), "bytes")
            for file, entry in files.items():
                with tempfile.TemporaryDirectory() as scratch:
                    if sha256_file(sent._download(file, Path(scratch))) != entry["sha256"]:
                        raise damaged(self.reference, file)
                progress.advance(entry["bytes"], file)
            with tempfile.TemporaryDirectory() as scratch:
                (Path(scratch) / MANIFEST).write_bytes(manifest)
                client.log_artifact(run, str(Path(scratch) / MANIFEST), FOLDER)
            if sent.small(MANIFEST, len(manifest)) != manifest:
                raise damaged(self.reference, MANIFEST)
            state = "FINISHED"
        finally:
            with redirect_stdout(sys.stderr):  # where it prints addresses to look at
                client.set_terminated(run, state)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made = client.create_model_version(name, f"runs:/{run}/{FOLDER}", run)
        if alias:
            client.set_registered_model_alias(name, alias, made.version)
        return f"models:/{name}/{made.version}"

    def _download(self, name: str, folder: Path) -> Path:
        return Path(self._artifacts.download_artifacts(f"{self.reference}/{name}", dst_path=str(folder)))
