"""docs/models.md: it is current, and every architecture has its names and its parity tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import models_page, tiny_wrappers
from support.model_coverage import coverage, peer_lists
from support.tiny_families import COMMON, FAMILIES, family_oracle
from support.tiny_models import write_tokenizer

from llmkit.cli import main
from llmkit.model.families import SUPPORTED
from llmkit.model.wrappers import WRAPPERS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_models_page_names_every_architecture() -> None:
    native = [names[0] for names in models_page.native_architectures().values()]
    assert models_page.MODEL_NAMES.keys() == {*native, *WRAPPERS}
    assert all(models_page.MODEL_NAMES.values())


def test_models_page_has_a_parity_test_for_every_architecture() -> None:
    rows = [names[0] for names in models_page.native_architectures().values()]
    native = [name for row in rows for name in models_page.parity_tests(row)]
    multimodal = [name for row in WRAPPERS for name in models_page.parity_tests(row)]
    assert all(models_page.parity_tests(row) for row in (*SUPPORTED, *WRAPPERS))
    # Each test is in one row.
    assert sorted(native) == sorted(FAMILIES)
    assert sorted(multimodal) == sorted(tiny_wrappers.WRAPPERS)
    assert models_page.MODELS_OF_TEST.keys() <= FAMILIES.keys()


def test_models_page_tables_are_current() -> None:
    tables = models_page.tables_section()
    assert PAGE.read_text().startswith(tables + "\n"), "run: make docs"
    cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", tables, re.MULTILINE)
    assert sorted(re.findall(r"\w+", " ".join(cells))) == sorted([*SUPPORTED, *WRAPPERS])


def test_models_page_counts_native_architectures_of_other_programs() -> None:
    """The counts by the fallback take seconds; see the slow test."""
    page = PAGE.read_text()
    for peer in peer_lists():
        row = re.search(rf"^\| {peer.name} {peer.version} \|.*$", page, re.MULTILINE)
        assert row is not None
        number, native, fallback, refused = map(int, re.findall(r" (\d+) (?=\|)", row[0]))
        assert number == len(peer.architectures) == native + fallback + refused
        assert native == sum(name in SUPPORTED for name in peer.architectures), "run: make docs"


@pytest.mark.parametrize(
    ("architecture", "way", "reason"),
    [
        ("LlamaForCausalLM", "native", ""),
        ("OPTForCausalLM", "fallback", "its class has no tp_plan"),
        ("MambaForCausalLM", "no", "a state besides keys and values, such as a recurrent one"),
        ("MiniCPM3ForCausalLM", "no", "keys and values of different sizes, as in latent attention"),
        ("BaichuanForCausalLM", "no", "no causal language model of that name"),
    ],
)
def test_model_coverage_decides_like_the_commands(architecture: str, way: str, reason: str) -> None:
    found_way, found_reason = coverage(architecture)
    assert found_way == way
    assert found_reason.startswith(reason)


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of three kinds of Gemma 4, by the name of the parity test."""
    path = tmp_path_factory.mktemp("gemma4")
    for name in ("gemma4", "gemma4-moe", "gemma4-dense"):
        family_oracle(name, path / name)
        write_tokenizer(path / name, vocab=COMMON["vocab_size"])
    return path


@pytest.mark.parametrize(
    ("name", "words", "error"),
    [
        ("gemma4", "quantize MODEL --method int8", ""),
        ("gemma4", "quantize MODEL --method gptq", ""),
        ("gemma4", "shard plan MODEL --tp 2", ""),
        ("gemma4", "shard plan MODEL --tp 1 --pp 2", ""),
        ("gemma4-moe", "quantize MODEL --method bf16 --no-eval", ""),
        ("gemma4-moe", "quantize MODEL --method int8 --no-eval", ""),
        ("gemma4-moe", "shard plan MODEL --tp 2 --pp 2 --ep 2", ""),
        ("gemma4-dense", "quantize MODEL --method int8", ""),
        ("gemma4-dense", "shard plan MODEL --tp 1 --pp 2", ""),
    ],
)
def test_models_page_limits_are_those_of_the_commands(
    name: str,
    words: str,
    error: str,
    gemma4: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = words.replace("MODEL", str(gemma4 / name)).split()
    if arguments[0] == "quantize":
        arguments += ["--dry-run", "-o", str(gemma4 / "out")]
    assert (main.run([*arguments, "--quiet"]) == 0) == (not error)
    assert error in capsys.readouterr().err


@pytest.mark.slow
def test_models_page_comparison_is_current() -> None:
    assert PAGE.read_text() == models_page.models_page(), "run: make docs"
