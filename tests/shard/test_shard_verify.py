"""Nothing wrong in a sharded directory goes unnoticed, by `verify` or by `merge`."""

import json
import random
import re
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.sharded_files import edit_manifest, overwrite
from support.synthetic_checkpoint import synthetic_checkpoint

from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.checkpoint.safetensors_header import read_header
from llmkit.common.errors import InputError
from llmkit.shard import verify as verify_module
from llmkit.shard.merge import merge
from llmkit.shard.shard_checkpoint import shard
from llmkit.shard.verify import verify

Change = Callable[[dict[str, Any]], object]
RANK0 = "rank-pp0-tp0.safetensors"
RANK1 = "rank-pp0-tp1.safetensors"


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    source = synthetic_checkpoint(tmp_path / "source", QuantizationConfig("gptq", Scheme(4, 16)))
    shard(source, tmp_path / "ranks", 2)
    return tmp_path / "ranks"


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << position % 8
    file.write_bytes(data)


def rejected(ranks: Path) -> str:
    with pytest.raises(InputError) as caught:
        merge(ranks, ranks.parent / "merged")
    assert caught.value.exit_code == 3
    assert not (ranks.parent / "merged").exists()
    return str(caught.value)


def test_verify_figures_of_an_intact_directory(ranks: Path) -> None:
    result = verify(ranks)
    assert result.ok
    assert (result.tp, result.pp, result.ep, result.files) == (2, 1, 1, 2)
    infos = [info for file in (RANK0, RANK1) for info in read_header(ranks / file).values()]
    assert (result.tensors, result.bytes) == (len(infos), sum(info.nbytes for info in infos))
    # 70 words: 64 and 6 with 58 of padding, in the embedding and the head.
    assert result.padding_bytes == 2 * 58 * 32 * 2
    # Per layer two norms and the group indices of the five column-parallel linears; the final norm.
    assert result.replica_groups == 2 * (2 + 5) + 1
    assert json.loads(json.dumps(result.to_json()))["ok"] is True


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([RANK0, RANK1, "config.json"]), st.integers(0, 2**30))
def test_verify_finds_a_flipped_bit_anywhere(ranks: Path, file: str, position: int) -> None:
    path = ranks / file
    kept = path.read_bytes()
    flip(path, position % len(kept))
    try:
        assert any(file in problem for problem in verify(ranks).problems)
        assert file in rejected(ranks)
    finally:
        path.write_bytes(kept)
    assert verify(ranks).ok


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**30))
def test_verify_finds_a_flipped_bit_of_the_manifest(ranks: Path, position: int) -> None:
    path = ranks / "llmkit.json"
    kept = path.read_bytes()
    flip(path, position % len(kept))
    try:
        with pytest.raises(InputError, match=r"llmkit\.json|sharded"):
            verify(ranks)
        rejected(ranks)
    finally:
        path.write_bytes(kept)


def test_verify_names_the_tensor_and_both_digests(ranks: Path) -> None:
    info = random.Random(0).choice(list(read_header(ranks / RANK1).values()))
    flip(ranks / RANK1, info.start)
    manifest = json.loads((ranks / "llmkit.json").read_text())
    said = manifest["tensors"][f"{RANK1}::{info.name}"]["sha256"]
    said_of_file = manifest["files"][RANK1]["sha256"]
    data = (ranks / RANK1).read_bytes()
    found = sha256(data[info.start : info.end]).hexdigest()
    of_tensor, of_file = verify(ranks).problems
    assert of_tensor == f"{RANK1}: tensor {info.name} has SHA-256 {found}, the manifest says {said}"
    assert (
        of_file == f"{ranks / RANK1} has SHA-256 {sha256(data).hexdigest()},"
        f" llmkit.json says {said_of_file}"
    )
    assert of_file in rejected(ranks)


def test_verify_finds_a_changed_header(ranks: Path) -> None:
    data = (ranks / RANK1).read_bytes()
    assert b'{"format":"pt"}' in data
    (ranks / RANK1).write_bytes(data.replace(b'{"format":"pt"}', b'{"format":"tf"}'))
    for text in (verify(ranks).problems[0], rejected(ranks)):
        assert re.search(rf"{RANK1} has SHA-256 \w{{64}}, llmkit\.json says \w{{64}}", text)


def test_verify_finds_padding_that_is_not_zero(ranks: Path) -> None:
    overwrite(ranks, RANK1, "lm_head.weight", 63 * 32 * 2 + 5, bytes([1]))
    assert verify(ranks).problems == [
        f"{RANK1}::lm_head.weight: its 58 rows of padding are not all zero"
    ]


def test_verify_checks_padding_up_to_the_end_of_the_data(ranks: Path) -> None:
    overwrite(ranks, RANK1, "lm_head.weight", 6 * 32 * 2 - 1, bytes([77]))
    assert verify(ranks).ok
    overwrite(ranks, RANK1, "lm_head.weight", 6 * 32 * 2, bytes([77]))
    assert not verify(ranks).ok


def test_verify_finds_replicas_that_differ(ranks: Path) -> None:
    overwrite(ranks, RANK1, "model.norm.weight", 3, bytes([99]))
    assert verify(ranks).problems == [
        f"{RANK0}::model.norm.weight differs from its replica in {RANK1}"
    ]


def test_verify_finds_a_missing_rank(ranks: Path) -> None:
    (ranks / RANK1).unlink()
    problems = verify(ranks).problems
    assert f"{ranks / RANK1} is in llmkit.json but absent" in problems
    assert f"{RANK1} is in llmkit.json but absent" in rejected(ranks)


def test_verify_finds_a_truncated_rank(ranks: Path) -> None:
    size = (ranks / RANK0).stat().st_size
    (ranks / RANK0).write_bytes((ranks / RANK0).read_bytes()[:-10])
    assert any(
        f"{ranks / RANK0}: " in problem and "data bytes" in problem
        for problem in verify(ranks).problems
    )
    assert f"has {size - 10} bytes, llmkit.json says {size}" in rejected(ranks)


def test_verify_finds_ranks_of_different_sources(ranks: Path, tmp_path: Path) -> None:
    other = synthetic_checkpoint(
        tmp_path / "other", QuantizationConfig("gptq", Scheme(4, 16)), seed=1
    )
    shard(other, tmp_path / "others", 2)
    shutil.copy(tmp_path / "others" / RANK1, ranks / RANK1)
    assert any(RANK1 in problem for problem in verify(ranks).problems)
    manifests = [
        json.loads((path / "llmkit.json").read_text()) for path in (ranks, tmp_path / "others")
    ]
    said, found = (manifest["files"][RANK1]["sha256"] for manifest in manifests)
    assert f"{RANK1} has SHA-256 {found}, llmkit.json says {said}" in rejected(ranks)


def test_verify_finds_swapped_ranks(ranks: Path) -> None:
    (ranks / RANK0).rename(ranks / "aside")
    (ranks / RANK1).rename(ranks / RANK0)
    (ranks / "aside").rename(ranks / RANK1)
    assert not verify(ranks).ok
    assert "SHA-256" in rejected(ranks)


def test_verify_finds_a_layout_that_leaves_rows_out(ranks: Path) -> None:
    key = f"{RANK1}::model.layers.0.mlp.up_proj.scales"

    def change(manifest: dict[str, Any]) -> None:
        manifest["layout"]["tensors"][key]["intervals"] = [[33, 64]]

    edit_manifest(ranks, change)
    assert (
        "model.layers.0.mlp.up_proj.scales: its slices leave out 33 of 64" in verify(ranks).problems
    )
    assert "its slices leave out 33 of 64" in rejected(ranks)


def test_verify_finds_a_layout_without_a_tensors_end(ranks: Path) -> None:
    """The last rows: no slice that begins later shows that they are left out."""
    key = f"{RANK1}::model.layers.0.mlp.up_proj.scales"

    def change(manifest: dict[str, Any]) -> None:
        manifest["layout"]["tensors"][key]["intervals"] = [[32, 63]]

    edit_manifest(ranks, change)
    assert "model.layers.0.mlp.up_proj.scales: its slices end at 63 of 64" in verify(ranks).problems
    assert "its slices end at 63 of 64" in rejected(ranks)


NORM = f"{RANK1}::model.norm.weight"


def layout_change(**changes: Any) -> Change:
    return lambda manifest: manifest["layout"].update(changes)


def norm_change(**changes: Any) -> Change:
    """A change of the layout's entry of the last norm, which has 32 elements."""
    return lambda manifest: manifest["layout"]["tensors"][NORM].update(changes)


def of_unknown_file(manifest: dict[str, Any]) -> None:
    for tensors in (manifest["tensors"], manifest["layout"]["tensors"]):
        tensors["other.safetensors::model.norm.weight"] = tensors.pop(NORM)


def swapped_ranks(manifest: dict[str, Any]) -> None:
    manifest["layout"]["ranks"].reverse()


MALFORMED: list[tuple[Change, str]] = [
    (norm_change(intervals=[[0, 33]]), "model.norm.weight has the interval [0, 33) of 32"),
    (norm_change(intervals=[[8, 4]]), "has the interval [8, 4)"),
    (norm_change(intervals=[[4, 4]]), "has the interval [4, 4)"),
    (norm_change(intervals=[[-1, 4]]), "has the interval [-1, 4)"),
    (norm_change(intervals=[[0, 8], [7, 32]]), "has the interval [7, 32)"),
    (norm_change(intervals=7), "TypeError"),
    (norm_change(dim=5), "IndexError"),
    (norm_change(dim=-1), "model.norm.weight has padding 0 along dimension -1"),
    (norm_change(padding=-1), "model.norm.weight has padding -1 along dimension 0"),
    (norm_change(source="lm_head.weight"), f"{NORM} belongs to no rank"),
    (of_unknown_file, "other.safetensors::model.norm.weight belongs to no rank"),
    (norm_change(replicas=[9]), "IndexError"),
    (norm_change(derived={"kind": "new"}), "is derived by new, which this llmkit does not know"),
    (layout_change(tp=3), "2 ranks for TP 3 and PP 1"),
    (layout_change(pp=2), "2 ranks for TP 2 and PP 2"),
    (swapped_ranks, "2 ranks for TP 2 and PP 1"),
    (layout_change(ep=3), "EP 3 for TP 2"),
    (layout_change(ep=0), "EP 0 for TP 2"),
    (layout_change(ep=-1), "EP -1 for TP 2"),
    (
        lambda manifest: manifest["layout"]["order"].pop(),
        "order does not list the tensors of the ranks",
    ),
    (lambda manifest: manifest["layout"].pop("stages"), "KeyError: 'stages'"),
    (
        lambda manifest: manifest["layout"]["tensors"].pop(NORM),
        "layout and manifest list different tensors",
    ),
    (lambda manifest: manifest.update(layout=[1]), "TypeError"),
]


@pytest.mark.parametrize(("change", "text"), MALFORMED, ids=range(len(MALFORMED)))
def test_verify_refuses_a_malformed_layout(change: Change, text: str, ranks: Path) -> None:
    edit_manifest(ranks, change)
    with pytest.raises(InputError, match=rf"llmkit\.json: layout is malformed.*{re.escape(text)}"):
        verify(ranks)
    assert "layout is malformed" in rejected(ranks)


@pytest.mark.parametrize("change", [layout_change(ep=2), norm_change(padding=0)], ids=range(2))
def test_verify_accepts_other_layouts(change: Change, ranks: Path) -> None:
    edit_manifest(ranks, change)
    assert verify(ranks).ok


@pytest.mark.parametrize("replicas", [[], [1], [0]], ids=str)
def test_verify_finds_replicas_that_are_not_mutual(replicas: list[int], ranks: Path) -> None:
    edit_manifest(ranks, norm_change(replicas=replicas))
    other = f"{RANK0}::model.norm.weight"
    expected = [f"{other} and {RANK1} do not both name each other as replicas"]
    if replicas == [0]:
        expected = []
    assert verify(ranks).problems == expected
    edit_manifest(ranks, lambda manifest: manifest["layout"]["tensors"][other].update(replicas=[0]))
    expected = [f"{NORM} and {RANK0} do not both name each other as replicas"]
    assert verify(ranks).problems == (expected if replicas == [0] else [])


def test_verify_finds_a_tensor_of_another_type(ranks: Path) -> None:
    edit_manifest(ranks, norm_change(dtype="F16"))
    assert f"{NORM} is BF16 [32], the layout says F16 [32]" in verify(ranks).problems
    edit_manifest(ranks, norm_change(dtype="BF16", source_shape=[31], intervals=[[0, 31]]))
    assert f"{NORM} is BF16 [32], the layout says BF16 [31]" in verify(ranks).problems


def norms_change(**changes: Any) -> Change:
    """A change of the last norm's entries of all ranks."""

    def change(manifest: dict[str, Any]) -> None:
        for key, entry in manifest["layout"]["tensors"].items():
            if key.endswith("::model.norm.weight"):
                entry.update(changes)

    return change


def test_merge_refuses_files_that_differ_from_the_layout(ranks: Path) -> None:
    edit_manifest(ranks, norms_change(dtype="F16"))
    text = f"{ranks / RANK0}: tensor model.norm.weight is BF16 [32]. F16 [32]. Shard the source"
    assert text in rejected(ranks)
    edit_manifest(ranks, norms_change(dtype="BF16", source_shape=[31], intervals=[[0, 31]]))
    assert "tensor model.norm.weight is BF16 [32]. BF16 [31]" in rejected(ranks)


def test_merge_names_the_first_gap(ranks: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for name in ("up_proj", "down_proj"):
            key = f"{RANK1}::model.layers.0.mlp.{name}.scales"
            manifest["layout"]["tensors"][key]["intervals"] = [[3, 4]]

    edit_manifest(ranks, change)
    first, second = verify(ranks).problems[:2]
    assert f"{ranks}: {first}. Ranks that make up the whole checkpoint" in rejected(ranks)
    assert second not in rejected(ranks)


def test_verify_checks_other_ranks_beside_a_broken_one(
    ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "CHUNK_BYTES", 1000)  # of 58 rows of 64 bytes
    overwrite(ranks, RANK1, "lm_head.weight", 64 * 64 - 1, bytes([1]))
    (ranks / RANK0).write_bytes(b"\0" * 100)
    problems = verify(ranks).problems
    assert f"{RANK1}::lm_head.weight: its 58 rows of padding are not all zero" in problems
    assert any(str(ranks / RANK0) in problem for problem in problems)


def test_verify_refuses_a_layout_of_the_first_form(ranks: Path) -> None:
    manifest = json.loads((ranks / "llmkit.json").read_text())
    manifest["tool"]["version"] = "0.1.0"
    del manifest["sha256"], manifest["layout"]["ep"]
    (ranks / "llmkit.json").write_text(json.dumps(manifest))
    text = rejected(ranks)
    assert "was sharded by llmkit 0.1.0, whose layouts had another form" in text
    assert "Shard its source again, or merge it with that version: llmkit shard merge" in text


def test_verify_refuses_what_is_not_sharded(tmp_path: Path) -> None:
    source = synthetic_checkpoint(tmp_path / "source")
    for path in (source, tmp_path / "absent"):
        with pytest.raises(
            InputError, match=f"{path.name} is not sharded. A directory that `llmkit shard` wrote"
        ):
            verify(path)
    assert "is not sharded" in rejected(source)
