"""The profile of engine steps adds up and names its parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

from llmkit.bench import profile
from llmkit.bench.profile import group_of


def test_operators_have_their_groups() -> None:
    assert group_of("product") == group_of("aten::addmm") == "linear layers and head"
    assert group_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert group_of("aten::index_select") == group_of("store") == "KV cache reads and writes"
    assert group_of("aten::silu_") == "other operators"


def test_every_step_is_taken_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint(tmp_path / "model", max_position_embeddings=2048)
    monkeypatch.setattr("sys.argv", ["profile", str(model), "--device", "cpu", "--steps", "2", "--context", "8"])
    assert profile.main() == 0
    out, err = capsys.readouterr()
    steps = json.loads(out)["steps"]
    assert [*steps] == ["decode, batch 1", "decode, batch 16", "decode, batch 32", "prefill, 512 tokens"]
    for groups in steps.values():
        assert groups["linear layers and head"] > 0 and groups["attention"] > 0
        assert groups["whole step"] > 0
    assert "decode, batch 32: " in err and "linear layers and head" in err


@pytest.mark.parametrize("words", [["--steps", "1000"], ["--context", "2000"], ["--context", "0"], ["--steps", "0"]])
def test_requests_never_end_before_the_steps_that_are_measured(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["profile", "model", *words])
    with pytest.raises(SystemExit, match="2"):
        profile.main()
    assert "are more than 1792 tokens, or less than 1" in capsys.readouterr().err
