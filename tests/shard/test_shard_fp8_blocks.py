"""Splitting FP8 checkpoints with block scales, also where a split cuts a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.compare_ranks import compare_ranks
from support.fp8_files import write_fp8
from support.tiny_families import family_oracle

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import read_activation_quant
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.parallel.leader import LeadEngine
from llmkit.shard.rank_part import rank_parts
from llmkit.shard.shard_checkpoint import shard

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
    for _ in compare_ranks(fp8, tmp_path, sizes, min_linears=16):
        pass  # it compares


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
