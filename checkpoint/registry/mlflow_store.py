"""Checkpoints in an MLflow model registry: artifacts of a run, and a model version that names them.

Only the client's public calls and plain files are used. No MLflow model flavour is used, so nothing
is pickled.
MLFLOW_TRACKING_URI names the server, MLFLOW_EXPERIMENT_NAME the experiment of new runs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from llmkit.checkpoint.manifest import MANIFEST
from llmkit.checkpoint.registry.store_interface import (
    AdvanceProgress,
    Published,
    damaged_upload,
    hash_partial_file,
    missing_library,
)
from llmkit.checkpoint.tensor_reader import sha256_file
from llmkit.common.errors import UsageError
from llmkit.common.progress import Progress
from llmkit.common.version import version

ARTIFACT_FOLDER = "checkpoint"  # among a run's artifacts
EXPERIMENT = "llmkit"


@contextmanager
def open_mlflow_store(reference: str) -> Iterator[MlflowStore]:
    """See `open_store`."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        import mlflow.artifacts  # an optional dependency
    except ImportError as error:
        raise missing_library("mlflow", "mlflow") from error
    yield MlflowStore(reference, mlflow.artifacts)


class MlflowStore:
    """A version of a registered model, or a folder of a run's artifacts. See `Store`."""

    def __init__(self, reference: str, artifacts: Any) -> None:
        self.reference = reference
        self._artifacts = artifacts  # the module mlflow.artifacts

    def sizes(self) -> dict[str, int]:
        """See `ReadableStore.sizes`."""
        entries = self._artifacts.list_artifacts(self.reference)
        return {
            Path(entry.path).name: int(entry.file_size or 0)
            for entry in entries
            if not entry.is_dir
        }

    def read_small_file(self, name: str, size: int) -> bytes:
        """See `ReadableStore.read_small_file`."""
        with tempfile.TemporaryDirectory() as folder:
            return self._download(name, Path(folder)).read_bytes()

    def download(self, name: str, size: int, path: Path, advance: AdvanceProgress) -> str:
        """See `ReadableStore.download`.

        An incomplete file is downloaded again, because the client cannot resume a download.
        """
        digest, length = hash_partial_file(path, size)
        if length < size:
            path.unlink()
            self._download(name, path.parent)
            digest, length = hash_partial_file(path, size)
        advance(size)
        return str(digest.hexdigest())

    def publish(
        self,
        folder: Path,
        files: Mapping[str, Mapping[str, Any]],
        manifest: bytes,
        force: bool,
        progress: Progress,
    ) -> Published:
        """See `WritableStore.publish`.

        Every push makes a new version, after all files have been read back. `force` has no effect.
        """
        # An optional dependency.
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        scheme, _, rest = self.reference.partition(":/")
        name, _, alias = rest.partition("@")
        if scheme != "models" or "/" in rest:
            raise UsageError(
                f"{self.reference} cannot hold a checkpoint",
                "models:/NAME or models:/NAME@ALIAS was expected",
                "MLflow gives each version its number",
            )
        client = MlflowClient()
        experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = client.get_experiment_by_name(experiment_name)
        experiment_id = (
            experiment.experiment_id if experiment else client.create_experiment(experiment_name)
        )
        run_id = client.create_run(
            experiment_id, run_name=f"push {name}", tags={"llmkit.version": version()}
        ).info.run_id
        status = "FAILED"
        total_bytes = sum(entry["bytes"] for entry in files.values())
        try:
            uploaded = MlflowStore(f"runs:/{run_id}/{ARTIFACT_FOLDER}", self._artifacts)
            progress.start("send", total_bytes, "bytes")
            for file, entry in files.items():
                client.log_artifact(run_id, str(folder / file), ARTIFACT_FOLDER)
                progress.advance(entry["bytes"], file)
            progress.start("compare", total_bytes, "bytes")
            for file, entry in files.items():
                with tempfile.TemporaryDirectory() as scratch:
                    if sha256_file(uploaded._download(file, Path(scratch))) != entry["sha256"]:
                        raise damaged_upload(self.reference, file)
                progress.advance(entry["bytes"], file)
            with tempfile.TemporaryDirectory() as scratch:
                (Path(scratch) / MANIFEST).write_bytes(manifest)
                client.log_artifact(run_id, str(Path(scratch) / MANIFEST), ARTIFACT_FOLDER)
            if uploaded.read_small_file(MANIFEST, len(manifest)) != manifest:
                raise damaged_upload(self.reference, MANIFEST)
            status = "FINISHED"
        finally:
            # The client prints links to the run on stdout.
            with redirect_stdout(sys.stderr):
                client.set_terminated(run_id, status)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        model_version = client.create_model_version(
            name, f"runs:/{run_id}/{ARTIFACT_FOLDER}", run_id
        )
        if alias:
            client.set_registered_model_alias(name, alias, model_version.version)
        return Published(f"models:/{name}/{model_version.version}")

    def _download(self, name: str, folder: Path) -> Path:
        return Path(
            self._artifacts.download_artifacts(f"{self.reference}/{name}", dst_path=str(folder))
        )
