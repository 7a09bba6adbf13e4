"""Splitting FP8 checkpoints with block scales, also where a split cuts a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.fp8_files import write_fp8
from support.synthetic_checkpoint import stored_bytes
from support.tiny_families import family_oracle

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.model.checkpoint_tensors import check_checkpoint
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import read_activation_quant, read_parameter
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.parallel.leader import LeadEngine
from llmkit.shard.merge import merge
from llmkit.shard.rank_part import rank_parts
from llmkit.shard.shard_checkpoint import shard
from llmkit.shard.verify import verify

QWEN3 = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 24}
MINIMAX = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}


def write_pair(folder: Path, family: str, block: tuple[int, int], **config: Any) -> Path:
    """A checkpoint in FP8; `dense` beside it has the same values."""
    family_oracle(family, folder / "dense", **config)
    write_fp8(folder / "dense", folder / "fp8", block)
    return folder / "fp8"


@pytest.mark.parametrize(
    ("family", "config", "block", "sizes"),
    [
        # Heads of 24 rows and halves of 96 columns, in blocks of 128: every split cuts a block.
        ("qwen3", QWEN3, (128, 128), (2, 1, 1)),
        # As MiniMax-M2 on eight ranks: each has 1.5 blocks of an expert's features.
        ("minimax-m2", MINIMAX, (16, 16), (2, 1, 1)),
        ("minimax-m2", MINIMAX, (32, 32), (4, 1, 2)),
        ("qwen3", QWEN3 | {"num_key_value_heads": 1}, (32, 64), (4, 2, 1)),
        ("phi3", {"hidden_size": 64, "intermediate_size": 64}, (16, 16), (2, 1, 1)),
        # Halves of 24 features: the second one begins within a block, and covers two.
        ("glm4-moe", {}, (16, 16), (2, 1, 1)),
    ],
)
def test_shard_fp8_blocks_of_ranks_have_the_values_of_the_whole(
    tmp_path: Path,
    family: str,
    config: dict[str, Any],
    block: tuple[int, int],
    sizes: tuple[int, int, int],
) -> None:
    fp8 = write_pair(tmp_path, family, block, **config)
    tp, pp, ep = sizes
    shard(fp8, tmp_path / "ranks", tp, pp, ep)
    assert not verify(tmp_path / "ranks").problems
    dense_parts = rank_parts(open_checkpoint(tmp_path / "dense"), tp, pp, ep)
    stored_parts = rank_parts(open_checkpoint(tmp_path / "ranks"))
    sliced_parts = rank_parts(open_checkpoint(fp8), tp, pp, ep)
    num_compared = 0
    for dense, stored, sliced in zip(dense_parts, stored_parts, sliced_parts, strict=True):
        for row in parameters(dense.spec):
            expected = read_parameter(dense.checkpoint, row, torch.float32)
            for part in (stored, sliced):
                check_checkpoint(part.checkpoint, part.spec)
                found = read_parameter(part.checkpoint, row, torch.float32)
                assert torch.equal(found, expected), row.name
            num_compared += row.is_linear
    assert num_compared >= 16
    merge(tmp_path / "ranks", tmp_path / "merged")
    assert stored_bytes(tmp_path / "merged") == stored_bytes(fp8)


def test_shard_fp8_blocks_input_groups_of_a_rank(tmp_path: Path) -> None:
    """A rank whose columns begin inside a block has smaller groups, so that the first is whole."""
    fp8 = write_pair(tmp_path, "minimax-m2", (32, 32), **MINIMAX)
    groups = []
    for part in rank_parts(open_checkpoint(fp8), 2):
        row = next(
            row for row in parameters(part.spec) if row.name.endswith("experts.1.down.weight")
        )
        quant = read_activation_quant(part.checkpoint, row)[row.module]
        groups.append(quant.group_size)
    assert groups == [32, 8]  # 48 features: the second rank begins with column 24


def test_shard_fp8_blocks_refuses_fused_projections_inside_a_block(tmp_path: Path) -> None:
    """Phi-3's qkv_proj: the slices of q, k and v are stored next to each other."""
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    fp8 = write_pair(tmp_path, "phi3", (32, 32), **sizes)
    with pytest.raises(InputError, match=r"qkv_proj: 32/2 = 0\.5 blocks of 32; TP 1 works"):
        shard(fp8, tmp_path / "ranks", 2)
    assert not (tmp_path / "ranks").exists()
    write_fp8(tmp_path / "dense", tmp_path / "other", (48, 32))
    with pytest.raises(InputError, match=r"begins at 1\.333 blocks of 48 rows"):
        shard(tmp_path / "other", tmp_path / "ranks", 2)


def answers(path: Path, **options: Any) -> list[list[int]]:
    running = load_engine(path, EngineOptions(device="cpu", kv_cache_memory=1 << 20, **options))
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    try:
        return running.generate([[5, 6, 7], [9, 8, 7, 6] * 8], [greedy] * 2)
    finally:
        if isinstance(running, LeadEngine):
            running.close()


def test_shard_fp8_blocks_serves_two_ranks(tmp_path: Path) -> None:
    fp8 = write_pair(tmp_path, "qwen3", (16, 16), **QWEN3)
    assert answers(fp8, tp=2) == answers(fp8)
