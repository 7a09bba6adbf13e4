"""`llmkit quantize --ray` on a real Ray: the same bytes as here. Deselected unless asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_models import tiny_checkpoint

pytestmark = [pytest.mark.scale, pytest.mark.timeout(600)]
ray = pytest.importorskip("ray", reason="llmkit[ray] is not installed")

from llmkit.cli.main import run  # noqa: E402

WORDS = ["--method", "gptq", "--samples", "4", "--seq-len", "256", "--no-eval", "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*.safetensors")
    }


@pytest.mark.parametrize("architecture", ["mixtral", "llama"])
def test_ray_gives_the_bytes_of_one_machine(
    architecture: str, tmp_path: Path, short_builtin_text: None
) -> None:
    model = tiny_checkpoint(tmp_path / "model", architecture)
    assert run(["quantize", str(model), "-o", str(tmp_path / "here"), *WORDS]) == 0
    assert (
        run(["quantize", str(model), "-o", str(tmp_path / "there"), *WORDS, "--ray", "auto"]) == 0
    )
    assert digests(tmp_path / "here") == digests(tmp_path / "there") != {}


def test_ray_quantizes_many_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [
        str(tiny_checkpoint(tmp_path / name, seed=seed))
        for seed, name in enumerate(("one", "two", "three"))
    ]
    words = ["--method", "int8", "--no-eval", "--quiet"]
    assert run(["quantize", *models, "-o", str(tmp_path / "out"), *words]) == 2
    assert "--ray auto" in capsys.readouterr().err
    assert run(["quantize", models[0], "-o", str(tmp_path / "here"), *words]) == 0
    assert run(["quantize", *models, "-o", str(tmp_path / "out"), *words, "--ray", "auto"]) == 0
    assert digests(tmp_path / "here") == digests(tmp_path / "out" / "one")
    assert len({str(digests(tmp_path / "out" / name)) for name in ("one", "two", "three")}) == 3


def test_ray_reports_a_failed_model_and_writes_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    words = [
        str(tmp_path / "bad"),
        str(model),
        "-o",
        str(tmp_path / "out"),
        "--method",
        "int8",
        "--no-eval",
        "--quiet",
    ]
    assert run(["quantize", *words, "--ray", "auto"]) == 3
    assert "bad: bad has no config.json" in capsys.readouterr().err.replace(f"{tmp_path}/", "")
    assert digests(tmp_path / "out" / "good")
