"""The profile of engine steps adds up and names its groups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_models import tiny_checkpoint

from llmkit.bench.gpu import host_profile
from llmkit.bench.gpu import step_profile as profile
from llmkit.bench.gpu.step_profile import operator_group


def test_profile_groups_operators() -> None:
    assert operator_group("product") == operator_group("aten::addmm") == "linear layers and head"
    assert operator_group("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert (
        operator_group("aten::index_select")
        == operator_group("store")
        == "KV cache reads and writes"
    )
    assert operator_group("aten::silu_") == "other operators"


def test_profile_measures_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint(tmp_path / "model", max_position_embeddings=2048)
    monkeypatch.setattr(
        "sys.argv", ["profile", str(model), "--device", "cpu", "--steps", "2", "--context", "8"]
    )
    assert profile.main() == 0
    out, err = capsys.readouterr()
    steps = json.loads(out)["steps"]
    assert [*steps] == [
        "decode, batch 1",
        "decode, batch 16",
        "decode, batch 32",
        "prefill, 512 tokens",
    ]
    for groups in steps.values():
        assert groups["linear layers and head"] > 0 and groups["attention"] > 0
        assert groups["whole step"] > 0
    assert "decode, batch 32: " in err and "linear layers and head" in err


@pytest.mark.parametrize(
    "words", [["--steps", "1000"], ["--context", "2000"], ["--context", "0"], ["--steps", "0"]]
)
def test_profile_refuses_more_steps_than_tokens(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["profile", "model", *words])
    with pytest.raises(SystemExit, match="2"):
        profile.main()
    expected = "at least one step" if words[-1] == "0" and words[0] == "--steps" else "less than 1"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("with_prompt", [False, True])
def test_host_profile_has_phases_that_add_up(with_prompt: bool) -> None:
    steps = host_profile.profile_host(3, 2, with_prompt)
    assert len(steps) == 2
    for step in steps:
        assert [*step] == [*host_profile.PHASES, "whole step"]
        assert min(step.values()) > 0, "a phase is not measured, or inside another"
        rest_ms = step["whole step"] - sum(step[phase] for phase in host_profile.PHASES)
        assert 0 <= rest_ms < step["whole step"]
    assert host_profile.median_step(steps)["update"] > 0


def test_host_profile_prints_a_table_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host_profile, "BATCHES", (1, 2))
    monkeypatch.setattr("sys.argv", ["profile", "--host", "--steps", "1"])
    assert profile.main() == 0
    out, err = capsys.readouterr()
    steps = json.loads(out)["steps"]
    assert [*steps] == [
        f"decode, {count} sequences{prompt}" for prompt in ("", " + prompt") for count in (1, 2)
    ]
    assert err.splitlines()[0].split() == ["milliseconds", *host_profile.PHASES, "whole", "step"]
    assert len(err.splitlines()) == 5


@pytest.mark.parametrize("words", [[], ["model", "--host"]])
def test_profile_takes_a_model_or_the_host_alone(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["profile", *words])
    with pytest.raises(SystemExit, match="2"):
        profile.main()
    assert "expected a model or --host" in capsys.readouterr().err
