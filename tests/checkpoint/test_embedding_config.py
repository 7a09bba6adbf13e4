"""How a checkpoint says that it makes embeddings, file by file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.checkpoint.embedding_config import PoolingConfig, read_pooling_config
from llmkit.checkpoint.open_model_files import open_model_files
from llmkit.common.errors import InputError


def read(path: Path, config: dict[str, Any] | None = None) -> PoolingConfig:
    (path / "config.json").write_text(json.dumps(config or {}))
    return read_pooling_config(open_model_files(path))


def write_pooling(path: Path, folder: str, content: object) -> None:
    (path / folder).mkdir()
    (path / folder / "config.json").write_text(json.dumps(content))


def write_modules(path: Path, *modules: object) -> None:
    (path / "modules.json").write_text(json.dumps(modules))


def module(kind: str, path: str = "") -> dict[str, str]:
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, PoolingConfig("last", 0, (), False)),
        ({}, PoolingConfig()),
        ({"hidden_size": None}, PoolingConfig()),
        ({"hidden_size": 64}, PoolingConfig(size=64)),
        ({"is_matryoshka": True}, PoolingConfig(any_size=True)),
        ({"is_matryoshka": "yes"}, PoolingConfig()),
        ({"is_matryoshka": True, "matryoshka_dimensions": []}, PoolingConfig(any_size=True)),
        (
            {"is_matryoshka": True, "matryoshka_dimensions": [8, "16", 32]},
            PoolingConfig(sizes=(8, 32)),
        ),
        ({"matryoshka_dimensions": "8"}, PoolingConfig()),
    ],
)
def test_pooling_config_reads_sizes(
    tmp_path: Path, config: dict[str, Any], expected: PoolingConfig
) -> None:
    found = read(tmp_path, config)
    assert found == expected
    assert hash(found) == hash(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "last"),
        ({"pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, "mean and last"),
        ({"pooling_mode": "lasttoken", "pooling_mode_mean_tokens": True}, "last"),
        ({"pooling_mode": "", "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"word_embedding_dimension": 64, "include_prompt": True}, "last"),
    ],
)
def test_pooling_config_reads_the_mode(tmp_path: Path, content: object, expected: str) -> None:
    write_pooling(tmp_path, "1_Pooling", content)
    assert read(tmp_path).pooling == expected
    write_pooling(tmp_path, "own", {"pooling_mode": "mean"})
    write_modules(tmp_path, module("Transformer"), module("Pooling", "own"), module("Normalize"))
    assert read(tmp_path).pooling == "mean"


def test_pooling_config_names_what_is_not_supported(tmp_path: Path) -> None:
    write_modules(tmp_path, module("Transformer"), module("Dense"), module("Pooling"))
    assert read(tmp_path).pooling == "Dense"
    write_modules(tmp_path, module("Transformer"))
    assert read(tmp_path).pooling == "unknown"
    write_modules(tmp_path, module("Transformer"), module("Pooling", "nowhere"))
    assert read(tmp_path).pooling == "unknown"
    # A path that leads out of the checkpoint is not followed.
    write_pooling(tmp_path, "own", {"pooling_mode": "mean"})
    write_modules(tmp_path, module("Pooling", "../../own"))
    assert read(tmp_path).pooling == "mean"


@pytest.mark.parametrize("content", ['{"type"', "[1]", '[{"type": "Pooling"}]', "7", "[" * 10**5])
def test_pooling_config_refuses_modules_of_another_form(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(InputError, match=r"modules.json is not what sentence-transformers writes"):
        read(tmp_path)
