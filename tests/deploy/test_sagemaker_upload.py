"""`llmkit deploy sagemaker --upload` on a server of S3 and SageMaker's API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.moto_server import moto_server
from support.synthetic_checkpoint import synthetic_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.cli.main import run
from llmkit.deploy import sagemaker

pytestmark = pytest.mark.scale

ACCOUNT = "123456789012"
WORDS = [
    "--image",
    f"{ACCOUNT}.dkr.ecr.us-east-1.amazonaws.com/llmkit-sagemaker:0.1.0",
    "--role",
    f"arn:aws:iam::{ACCOUNT}:role/SageMaker",
    "--instance",
    "ml.m5.4xlarge",
    "--json",
]


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of S3 with the bucket `models`."""
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("flask")  # of moto's extra `server`
    monkeypatch.setattr(sagemaker, "_POLL_S", 0.0)
    with moto_server(tmp_path / "log") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        files = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        files.mkdir("models")
        yield files


def test_deploy_uploads_the_checkpoint_that_the_endpoint_reads(
    s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import boto3

    model = synthetic_checkpoint(tmp_path / "tiny")
    words = ["deploy", "sagemaker", str(model), *WORDS, "--upload", "s3://models/team/tiny"]
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out)["action"] == "created"
    client = boto3.client("sagemaker")
    (name,) = [entry["ModelName"] for entry in client.list_models()["Models"]]
    container = client.describe_model(ModelName=name)["PrimaryContainer"]
    url = container["ModelDataSource"]["S3DataSource"]["S3Uri"]
    assert url == "s3://models/team/tiny/"
    # What SageMaker copies from there is the checkpoint.
    s3.get(url, str(tmp_path / "copied"), recursive=True)
    for file in model.iterdir():
        assert (tmp_path / "copied" / file.name).read_bytes() == file.read_bytes()
    assert open_checkpoint(tmp_path / "copied").weight_bytes == open_checkpoint(model).weight_bytes
    # The same again sends nothing and changes nothing; another checkpoint is not overwritten.
    changed = {entry["name"]: entry["LastModified"] for entry in s3.ls("models/team/tiny", True)}
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out)["action"] == "unchanged"
    again = {entry["name"]: entry["LastModified"] for entry in s3.ls("models/team/tiny", True)}
    assert again == changed
    other = synthetic_checkpoint(tmp_path / "other", seed=1)
    assert run(["deploy", "sagemaker", str(other), *words[3:]]) == 5
    assert "s3://models/team/tiny" in capsys.readouterr().err
    assert len(client.list_models()["Models"]) == 1
