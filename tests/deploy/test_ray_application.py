"""The files of models that Ray Serve reads: ours are right, and what a file must not say is
refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from llmkit.cli.ray_application import ApplicationArguments, build
from llmkit.cli.serve import serve_options

RECIPES = Path(__file__).parents[2] / "recipes"
CHAT = {"name": "chat", "model": "/models/chat"}


def files() -> list[dict[str, Any]]:
    service = yaml.safe_load((RECIPES / "kubernetes/kuberay/rayservice.yaml").read_text())
    return [
        yaml.safe_load((RECIPES / "ray/models.yaml").read_text()),
        yaml.safe_load(service["spec"]["serveConfigV2"]),
    ]


@pytest.mark.parametrize("file", files(), ids=["models.yaml", "rayservice.yaml"])
def test_shipped_config_files_can_be_built(file: dict[str, Any]) -> None:
    (application,) = file["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    given = msgspec.convert(application["args"], ApplicationArguments)
    for one in given.models:
        assert serve_options(one.model, one.name, one.options.split(), None).model == one.model
    assert given.host == file["http_options"]["host"]
    assert given.host == "127.0.0.1" or given.api_key_file


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"models": []}, "models: there is none"),
        ({"models": [CHAT], "host": "0.0.0.0"}, "can be reached from elsewhere"),
        ({"models": [CHAT], "allowed_hosts": ["http://a"]}, "'http://a' is not a host name"),
        ({"models": [CHAT], "allowed_origins": ["a.example"]}, "'a.example' is not an origin"),
        ({"models": [CHAT, CHAT]}, "the shares of chat do not sum to 100%"),
        ({"models": [CHAT | {"share": "40%"}]}, "the shares of chat do not sum to 100%"),
        ({"models": [CHAT | {"share": "0.4"}]}, "'0.4' is not a share"),
        ({"models": [CHAT | {"replica": 2}]}, "unknown field `replica`"),
        ({"models": [CHAT | {"options": "--max-model-lenn 5"}]}, "--max-model-lenn"),
    ],
)
def test_config_file_mistakes_are_refused(said: dict[str, Any], expected: str) -> None:
    with pytest.raises(Exception, match=expected):
        build(said)
