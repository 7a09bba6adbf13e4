"""An adapter's two files, value by value: which configs are plain LoRA, and what a pair says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmkit.checkpoint.lora_files import ALLOWED_FIELDS, ALLOWED_VALUES, AdapterFiles
from llmkit.common.errors import InputError

LINEARS = {f"model.layers.{i}.{name}.weight": (3, 2) for i in range(2) for name in ("up", "down")}
UP = "model.layers.0.up.weight"


def pair(name: str = "model.layers.0.up", rank: int = 1) -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.{name}.lora_A.weight": torch.full((rank, 2), 0.5),
        f"base_model.model.{name}.lora_B.weight": torch.arange(3.0 * rank).reshape(3, rank),
    }


def adapter(
    path: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any
) -> AdapterFiles:
    """An adapter of rank 1 and alpha 2, changed by `config`; an absent field is `...`."""
    values = {"peft_type": "LORA", "r": 1, "lora_alpha": 2} | config
    given = {name: value for name, value in values.items() if value is not ...}
    (path / "adapter_config.json").write_text(json.dumps(given))
    save_file(pair() if tensors is None else tensors, path / "adapter_model.safetensors")
    return AdapterFiles(path, LINEARS)


def scale(path: Path, rank: int = 1, **config: Any) -> float:
    """What the B of layer 0's `up` is multiplied by."""
    read = adapter(path, pair(rank=rank), **config).read(UP, torch.float32)
    assert read is not None
    a, b = read
    assert a.tolist() == [[0.5, 0.5]] * rank
    factor = float(b[1, 0]) / rank
    assert torch.equal(b, torch.arange(3.0 * rank).reshape(3, rank) * factor)
    return factor


@pytest.mark.parametrize(
    ("rank", "config", "expected"),
    [
        (1, {}, 2.0),
        (1, {"lora_alpha": 0.5}, 0.5),
        (4, {"r": 4, "lora_alpha": 8}, 2.0),
        (4, {"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        (4, {"r": 4, "lora_alpha": 8, "use_rslora": None}, 2.0),
        (4, {"rank_pattern": {"up": 4}}, 0.5),
        (1, {"rank_pattern": {"layers.1.up": 4}}, 2.0),
        (1, {"rank_pattern": {"p": 4}}, 2.0),  # the end of a name, from a dot on
        (2, {"rank_pattern": {"down": 3, "up": 2, r"layers\.0\.up": 5}}, 1.0),
        (1, {"alpha_pattern": {"model.layers.0.up": 6.5}, "rank_pattern": None}, 6.5),
    ],
)
def test_adapter_scale(tmp_path: Path, rank: int, config: dict[str, Any], expected: float) -> None:
    assert scale(tmp_path, rank, **config) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name, values in ALLOWED_VALUES.items() for value in values),
        *((name, ["text"]) for name in ALLOWED_FIELDS[4:]),
        *(("invented_tomorrow", empty) for empty in (None, False, 0, "", [], {})),
    ],
)
def test_adapter_fields_without_effect_are_accepted(
    tmp_path: Path, name: str, value: object
) -> None:
    assert scale(tmp_path, **{name: value}) == 2.0


def test_adapter_fields_have_these_values() -> None:
    assert ALLOWED_VALUES == {
        "peft_type": ("LORA",),
        "bias": ("none",),
        "use_rslora": (None, False, True),
        "init_lora_weights": (None, False, True, "gaussian", "eva", "orthogonal"),
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": ...}, "has peft_type None. Plain LoRA was expected, with 'LORA' there"),
        ({"bias": None}, "has bias None. Plain LoRA was expected, with 'none' there"),
        (
            {"use_rslora": "no"},
            "has use_rslora no. .*, with None or False or True there. Merge it into the model",
        ),
        ({"invented": "x" * 90}, f"has invented {'x' * 80}. Plain LoRA was expected, with nothing"),
        ({"r": ...}, "has r None. A positive integer was expected"),
        ({"r": -1}, "has r -1. A positive integer was expected"),
        ({"r": 1.0}, "has r 1.0. A positive integer was expected"),
        ({"lora_alpha": 0}, "has lora_alpha 0. A positive number was expected"),
        ({"lora_alpha": math.inf}, "has lora_alpha inf. A positive number was expected"),
        ({"lora_alpha": True}, "has lora_alpha True. A positive number was expected"),
        ({"lora_alpha": "8"}, "has lora_alpha 8. A positive number was expected"),
        ({"alpha_pattern": {"up": "8"}}, "has alpha_pattern .* A positive number was expected"),
        ({"rank_pattern": {"up": 0}}, "has rank_pattern .* A positive integer was expected"),
        ({"rank_pattern": {"up": 2.0}}, "has rank_pattern .* A positive integer was expected"),
    ],
)
def test_adapter_refuses_fields(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"adapter_config.json {message}"):
        adapter(tmp_path, **config)


def test_adapter_changes_the_linears_it_names(tmp_path: Path) -> None:
    files = adapter(tmp_path, pair("model.layers.0.down") | pair("model.layers.1.up"))
    changed = [name for name in LINEARS if files.read(name, torch.float32) is not None]
    assert changed == ["model.layers.0.down.weight", "model.layers.1.up.weight"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"has no tensors. Names like base_model.model.model.layers.0.up.lora_A.weight were"),
        (
            pair() | {f"odd{i}": torch.ones(1) for i in range(6)},
            r"has 6 tensors of no linear layer of the model \(odd0, odd1, odd2, odd3, odd4\)",
        ),
        (dict([*pair().items()][:1]), "lacks base_model.model.model.layers.0.up.lora_B.weight"),
        (dict([*pair().items()][1:]), "lacks base_model.model.model.layers.0.up.lora_A.weight"),
        (pair() | dict([*pair("model.layers.1.down").items()][1:]), "lacks .*1.down.lora_A.weight"),
    ],
)
def test_adapter_refuses_other_tensors(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(InputError, match=f"adapter_model.safetensors {message}"):
        adapter(tmp_path, tensors)


def test_adapter_refuses_values_beyond_the_dtype(tmp_path: Path) -> None:
    largest = torch.finfo(torch.float16).max
    for name, value in ((".lora_B.", 1.1 * largest), (".lora_A.", math.nan)):
        tensors = pair()
        changed = next(key for key in tensors if name in key)
        tensors[changed][0, 0] = value
        files = adapter(tmp_path, tensors, lora_alpha=1)
        with pytest.raises(InputError, match=f"{changed} has values .* finite in torch.float16"):
            files.read(UP, torch.float16)
        tensors[changed][0, 0] = largest
        assert adapter(tmp_path, tensors, lora_alpha=1).read(UP, torch.float16) is not None
