"""docs/models.md: it is current, and every architecture has its names and its parity tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import models_page, tiny_wrappers
from support.model_coverage import coverage, peer_lists
from support.tiny_families import FAMILIES

from llmkit.model.families import SUPPORTED
from llmkit.model.wrappers import WRAPPERS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_models_page_names_every_architecture() -> None:
    assert models_page.MODEL_NAMES.keys() == {*SUPPORTED, *WRAPPERS}
    assert all(models_page.MODEL_NAMES.values())


def test_models_page_has_a_parity_test_for_every_architecture() -> None:
    native = [name for row in SUPPORTED for name in models_page.parity_tests(row)]
    multimodal = [name for row in WRAPPERS for name in models_page.parity_tests(row)]
    assert all(models_page.parity_tests(row) for row in (*SUPPORTED, *WRAPPERS))
    # Each test is in one row.
    assert sorted(native) == sorted(FAMILIES)
    assert sorted(multimodal) == sorted(tiny_wrappers.WRAPPERS)
    assert models_page.MODELS_OF_TEST.keys() <= FAMILIES.keys()


def test_models_page_tables_are_current() -> None:
    tables = models_page.tables_section()
    assert PAGE.read_text().startswith(tables + "\n"), "run: make docs"
    listed = re.findall(r"^\| `(\w+)` \|", tables, re.MULTILINE)
    assert listed == [*SUPPORTED, *WRAPPERS]


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
        ("OPTForCausalLM", "fallback", ""),
        ("MambaForCausalLM", "no", "a state besides keys and values, such as a recurrent one"),
        ("MiniCPM3ForCausalLM", "no", "keys and values of different sizes, as in latent attention"),
        ("BaichuanForCausalLM", "no", "no causal language model of that name in transformers 5.23"),
    ],
)
def test_model_coverage_decides_like_the_commands(architecture: str, way: str, reason: str) -> None:
    assert coverage(architecture) == (way, reason)


@pytest.mark.slow
def test_models_page_comparison_is_current() -> None:
    assert PAGE.read_text() == models_page.models_page(), "run: make docs"
