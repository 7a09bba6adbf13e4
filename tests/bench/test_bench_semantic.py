"""`llmkit bench semantic-cache`: what counts as a right and as a wrong hit, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from llmkit.bench.semantic.cache_quality import THRESHOLDS, measure
from llmkit.bench.semantic.question_pairs import BUILTIN, QuestionPair, read_pairs
from llmkit.cli.main import run
from llmkit.common.errors import InputError

MODEL = {"dtype": "float32"}
PAIRS = [
    QuestionPair("How tall is the tower in Paris?", "What is the height in Paris?", True),
    QuestionPair("How far is it to Rome?", "What is the distance to Rome?", True),
    QuestionPair("How far is it to Rome?", "How far is it to Oslo?", False, "entity"),
]
ANGLES = {
    PAIRS[0].first: 0.0,
    PAIRS[0].second: 0.1,
    PAIRS[1].first: 1.5,
    PAIRS[1].second: 1.9,
    PAIRS[2].second: 1.5,
}
VECTORS = {
    text: np.array([np.cos(angle), np.sin(angle)], np.float32) for text, angle in ANGLES.items()
}


@pytest.mark.parametrize(
    ("threshold", "compares_facts", "expected"),
    [
        (0.9, True, (2, 0, 0, 1.0)),
        (0.9, False, (2, 0, 1, 2 / 3)),
        (0.95, True, (1, 0, 0, 1.0)),
        (0.999, False, (0, 0, 1, 0.0)),
    ],
)
def test_bench_semantic_counts_hits(
    threshold: float, compares_facts: bool, expected: tuple[int, int, int, float]
) -> None:
    found = measure(PAIRS, VECTORS, threshold, compares_facts)
    assert (found.right_hits, found.mixed_up, found.wrong_hits, found.precision) == expected
    assert (found.num_same, found.num_different) == (2, 1)
    assert found.wrong_by_kind == {"entity": expected[2]}


def test_bench_semantic_counts_an_answer_to_another_question() -> None:
    swapped = VECTORS | {PAIRS[0].second: VECTORS[PAIRS[1].first]}
    found = measure(PAIRS, swapped, 0.99, False)
    assert (found.right_hits, found.mixed_up, found.wrong_hits) == (0, 1, 1)
    none = measure(PAIRS, dict.fromkeys(VECTORS, VECTORS[PAIRS[0].first]), 0.5, True)
    assert none.precision is not None


def test_bench_semantic_builtin_pairs_are_of_many_kinds() -> None:
    pairs = read_pairs(BUILTIN)
    assert len(pairs) >= 200
    assert sum(pair.same for pair in pairs) * 2 == len(pairs)
    kinds = {"paraphrase", "number", "negation", "entity", "unit", "order", "qualifier"}
    assert {pair.kind for pair in pairs} == kinds
    assert all((pair.kind == "paraphrase") == pair.same for pair in pairs)
    assert len({(pair.first, pair.second) for pair in pairs}) == len(pairs)
    assert any(pair.held_out for pair in pairs)


def test_bench_semantic_writes_a_table_json_and_a_chart(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"first": p.first, "second": p.second, "same": p.same} for p in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["bench", "semantic-cache", str(model), "--pairs", str(tmp_path / "pairs.jsonl")]
    command += ["--device", "cpu", "--chart", str(tmp_path / "curve.svg")]
    assert run(command) == 0
    assert "Right hits" in capsys.readouterr().out
    assert run([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["pooling"]) == ("semantic-cache", "last")
    assert [row["threshold"] for row in report["results"]] == [*THRESHOLDS, *THRESHOLDS]
    assert report["held_out"] == []
    for row in report["results"]:
        assert row["wrong_hits"] <= (0 if row["compares_facts"] else 1)
    assert ElementTree.parse(tmp_path / "curve.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "has no pairs"),
        ('{"pairs": [{"first": "a"}]}', "second"),
        ('{"pairs": []}', "0 pairs of one kind"),
        ('{"pairs": [{"first": "a", "second": "b", "same": true}]}', "1 pairs of one kind"),
    ],
)
def test_bench_semantic_refuses_files_without_pairs(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "pairs.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_pairs(str(tmp_path / "pairs.json"))
    with pytest.raises(InputError, match="cannot be read"):
        read_pairs(str(tmp_path / "none.json"))
