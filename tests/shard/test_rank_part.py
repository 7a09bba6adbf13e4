"""`rank_parts`: what a rank reads is the same from its own file and from the whole checkpoint."""

import re
from pathlib import Path

import pytest
import torch
from support.synthetic_checkpoint import synthetic_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.common.errors import UsageError
from llmkit.shard import rank_part
from llmkit.shard.rank_part import RankPart, rank_parts
from llmkit.shard.shard_checkpoint import shard

GPTQ = QuantizationConfig("gptq", Scheme(4, 8))
GPTQ_3 = QuantizationConfig("gptq_v2", Scheme(3, 32, symmetric=False))
WIDE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 192}
PACKED = QuantizationConfig("compressed-tensors", Scheme(4, 8))
PHI3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_rows(part: RankPart, name: str, expected: torch.Tensor) -> None:
    """Every interval of rows is that of the whole slice."""
    for start in range(expected.shape[0]):
        for stop in range(start + 1, expected.shape[0] + 1):
            rows = part.checkpoint.read_slice(name, [(start, stop)], 0)
            assert rows.shape == (stop - start, *expected.shape[1:])
            assert bytes_of(rows) == bytes_of(expected[start:stop]), (name, start, stop)


@pytest.mark.parametrize(
    ("quantization", "config", "sizes", "checked"),
    [
        # 70 words on ranks of 64 rows: the second has padding, the third nothing else.
        (None, {}, (4, 2, 1), ("embed_tokens", "0.mlp.down_proj", "0.mlp.up_proj")),
        (None, PHI3, (4, 1, 1), ("0.self_attn.qkv_proj", "1.self_attn.o_proj")),
        (None, MIXTRAL | {"num_hidden_layers": 3}, (4, 2, 2), ("1.block_sparse_moe.experts.1",)),
        (GPTQ, {}, (2, 2, 1), ("0.mlp.down_proj", "0.mlp.gate")),
        (PACKED, {}, (2, 1, 1), ("0.mlp.down_proj", "1.mlp.up_proj")),
        # Three words hold 32 values, some of which lie in two words.
        (GPTQ_3, WIDE, (2, 1, 1), ("0.mlp.down_proj", "1.mlp.up_proj", "0.self_attn.k_proj")),
    ],
    ids=["dense", "fused", "experts", "gptq", "compressed-tensors", "gptq of 3 bits"],
)
def test_rank_parts_are_the_same_with_and_without_shards(
    quantization: QuantizationConfig | None,
    config: dict,
    sizes: tuple[int, int, int],
    checked: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_part, "CHUNK_BYTES", 300)  # a few rows of columns
    source = synthetic_checkpoint(tmp_path / "source", quantization, **config)
    tp, pp, ep = sizes
    shard(source, tmp_path / "ranks", tp, pp, ep)
    cut = rank_parts(open_checkpoint(source), tp, pp, ep)
    stored = rank_parts(open_checkpoint(tmp_path / "ranks"))
    files = [f"rank-pp{stage}-tp{rank}.safetensors" for stage in range(pp) for rank in range(tp)]
    assert [part.file for part in stored] == files
    assert {part.file for part in cut} == {""}
    assert [part.spec for part in cut] == [part.spec for part in stored]
    for index, (one, other) in enumerate(zip(cut, stored, strict=True)):
        ranks = one.spec.rank
        assert (ranks.tp_rank, ranks.tp_size, ranks.ep_size) == (index % tp, tp, ep)
        assert (
            one.nbytes == other.nbytes == sum(t.nbytes for t in other.checkpoint.tensors.values())
        )
        assert one.checkpoint.tensors.keys() == other.checkpoint.tensors.keys()
        for name in other.checkpoint.tensors:
            expected = other.checkpoint.read(name)
            found = one.checkpoint.read(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert bytes_of(found) == bytes_of(expected), name
            if index in (1, 2) and any(word in name for word in checked):
                check_rows(one, name, expected)


def test_rank_parts_refuse_other_sizes_than_those_of_the_shards(tmp_path: Path) -> None:
    source = synthetic_checkpoint(tmp_path / "source", **MIXTRAL)
    shard(source, tmp_path / "ranks", 4, 2, 2)
    checkpoint = open_checkpoint(tmp_path / "ranks")
    for sizes in ((2, 1, 1), (1, 3, 1), (1, 1, 4), (4, 2, 4), (0, 1, 1)):
        tp, pp, ep = sizes
        text = (
            f"{tmp_path / 'ranks'} is sharded for TP 4, PP 2, EP 2; the command asks for TP {tp},"
            f" PP {pp}, EP {ep}. The sizes it was made for, or none. Leave them out, or shard it"
            f" again: llmkit shard {tmp_path / 'ranks'} --tp {tp} --pp {pp} -o DIR"
        )
        with pytest.raises(UsageError, match=re.escape(text)):
            rank_parts(checkpoint, *sizes)
    assert len(rank_parts(checkpoint, 4)) == len(rank_parts(checkpoint, 1, 2)) == 8
    assert len(rank_parts(open_checkpoint(source))) == 1
