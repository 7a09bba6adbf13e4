"""`llmkit shard plan --gpu`: the table of GPUs, the tokens that fit, and the smallest layout."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.quantized_files import SIZES, quantized_checkpoint
from support.synthetic_checkpoint import synthetic_checkpoint

from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.common.errors import InputError, UsageError
from llmkit.shard.layout_capacity import (
    GPUS,
    gpu_bytes,
    gpu_name,
    layout_figures,
    nodes_report,
    plan_report,
    smallest_layout,
    working_sizes,
)
from llmkit.shard.shard_checkpoint import open_source
from llmkit.shard.shard_source import ShardSource

# As NVIDIA publishes them: MiB that nvidia-smi shows, dense 16-bit TFLOP/s, GB/s.
DATA_SHEETS = """
    a10-24      23028   125   600
    a100-40     40960   312  1555
    a100-80     81920   312  2039
    a6000-48    49140   155   768
    b200-180   183359  2250  8000
    h100-80     81559   989  3350
    h200-141   143771   989  4800
    l4-24       23034   121   300
    l40s-48     46068   362   864
    rtx3090-24  24576    71   936
    rtx4090-24  24564   165  1008
    rtx5090-32  32607   210  1792
    t4-16       15360    65   320
    v100-32     32768   125   900
"""


@pytest.fixture
def source(tmp_path: Path) -> ShardSource:
    return open_source(synthetic_checkpoint(tmp_path / "source", num_hidden_layers=3))


def test_gpus_have_the_figures_of_their_data_sheets() -> None:
    rows = [line.split() for line in DATA_SHEETS.strip().splitlines()]
    assert list(GPUS) == [row[0] for row in rows]
    for name, mib, tera_flops, giga_bytes in rows:
        gpu = GPUS[name]
        assert gpu.memory_mib == int(mib)
        assert gpu.flops_per_s == int(tera_flops) * 10**12
        assert gpu.bytes_per_s == int(giga_bytes) * 10**9


def test_gpu_name_is_complete_or_an_unambiguous_beginning() -> None:
    assert gpu_name("H100") == "h100-80"
    assert gpu_name("a100-40") == "a100-40"
    assert gpu_name("l4") == "l4-24"  # not l40s-48
    assert gpu_bytes("t4") == 15360 * 1024 * 1024
    message = "--gpu A100 is not known. One of a100-40, a100-80, or a size like 48GiB"
    with pytest.raises(UsageError, match=re.escape(message)):
        gpu_name("A100")
    for name in ("h10", "", "h100-"):
        every = f"--gpu {name} is not known. One of {', '.join(GPUS)}, or a size"
        with pytest.raises(UsageError, match=re.escape(every)):
            gpu_name(name)


def test_plan_report_has_one_stage_and_no_tokens_unless_asked(source: ShardSource) -> None:
    report = plan_report(source, 2)
    assert (report["tp"], report["pp"], report["ep"]) == (2, 1, 1)
    assert report["max_pp"] == 3
    assert "tokens" not in report and "tokens" not in report["ranks"][0]
    figures = layout_figures(source, 2)
    assert report == figures | {"works": report["works"], "max_pp": 3}
    assert layout_figures(source, 3)["refusal"].startswith("--tp 3 does not divide q_proj")


def test_layout_figures_count_the_tokens_that_fit_beside_the_weights(source: ShardSource) -> None:
    ranks = layout_figures(source, 2, 2)["ranks"]
    # K and V of one head of 8 in bf16, in two layers and in one.
    assert [rank["kv_bytes_per_token"] for rank in ranks] == [64, 64, 32, 32]
    memory = 100_000  # of which 90,000 bytes are used
    figures = layout_figures(source, 2, 2, memory=memory)
    tokens = [
        (90_000 - rank["bytes"]) // size for rank, size in zip(ranks, (64, 64, 32, 32), strict=True)
    ]
    assert [rank["tokens"] for rank in figures["ranks"]] == tokens
    assert figures["tokens"] == min(tokens) > 0
    assert (figures["memory_bytes"], figures["utilization"]) == (100_000, 0.9)
    assert layout_figures(source, 2, 2, memory=0)["tokens"] == 0


def test_plan_counts_scalar_scales_as_replicated(tmp_path: Path) -> None:
    """Model-Optimizer stores the one scale of a weight, and that of its inputs, without a shape."""
    static = Scheme(8, kind="float", inputs="tensor", block_rows=-1)
    path = quantized_checkpoint(tmp_path / "fp8", QuantizationConfig("modelopt", static))
    dense = synthetic_checkpoint(tmp_path / "dense", **SIZES)
    replicated = [
        {rank["replicated_bytes"] for rank in plan_report(open_source(str(one)), 2)["ranks"]}
        for one in (path, dense)
    ]
    (quantized,), (unquantized,) = replicated
    assert quantized - unquantized == 7 * 2 * 4  # seven linears, two float32 scales


def test_working_sizes_of_a_model_that_cannot_be_split(tmp_path: Path) -> None:
    one_head = synthetic_checkpoint(
        tmp_path / "source", num_attention_heads=1, num_key_value_heads=1
    )
    assert working_sizes(open_source(one_head)) == [{"tp": 1, "ep": [1]}]


def test_working_sizes_try_experts_that_are_not_split(tmp_path: Path) -> None:
    """Act-order within an expert does not rule out ranks that hold whole experts."""
    mixtral = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    quantization = QuantizationConfig("gptq", Scheme(4, 8))
    path = synthetic_checkpoint(tmp_path / "source", quantization, **mixtral)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.1.w2.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    source = open_source(path)
    assert [size["tp"] for size in working_sizes(source)] == [1, 2, 4]
    assert layout_figures(source, 2, ep=2)["refusal"] is None
    assert "does not number its groups" in layout_figures(source, 2)["refusal"]


def memory_for(source: ShardSource, tp: int, pp: int, tokens: int) -> int:
    """The smallest GPU memory with which a layout holds `tokens` tokens."""
    ranks = layout_figures(source, tp, pp)["ranks"]
    needed = max(rank["bytes"] + tokens * rank["kv_bytes_per_token"] for rank in ranks)
    memory = int(needed / 0.9)
    while int(memory * 0.9) < needed:
        memory += 1
    return memory


@pytest.mark.parametrize(
    ("tp", "pp", "gpus", "nodes"),
    [(1, 1, 4, 1), (2, 1, 4, 1), (4, 1, 4, 1), (2, 2, 2, 2), (2, 3, 3, 2)],
)
def test_smallest_layout_just_holds_the_tokens(
    tp: int, pp: int, gpus: int, nodes: int, source: ShardSource
) -> None:
    memory = memory_for(source, tp, pp, 64)
    assert smallest_layout(source, memory, gpus, 64) == (tp, pp)
    # The model's context of 64 tokens is less than 65,536.
    assert nodes_report(source, memory, gpus) == {
        "node": {"gpus": gpus, "tokens": 64, "tp": tp, "pp": pp, "nodes": nodes}
    }
    try:
        larger = smallest_layout(source, memory - 1, gpus, 64)
    except InputError:
        assert pp == 3  # there is no larger one
    else:
        assert larger[0] * larger[1] > tp * pp


def test_smallest_layout_names_what_it_tried(source: ShardSource) -> None:
    text = (
        "1,000,000,000 tokens and the weights do not fit on nodes of 3 x 2 GiB."
        " Tried: TP 2 on each node, with a pipeline over up to as many nodes as layers"
    )
    with pytest.raises(InputError, match=re.escape(text)):
        smallest_layout(source, 1600 * 2**20, 3, 10**9)
    assert nodes_report(source, 1000, 2) == {"node": {"gpus": 2, "tokens": 64, "nodes": 0}}


def test_nodes_report_asks_for_65536_tokens_of_a_longer_context(tmp_path: Path) -> None:
    path = synthetic_checkpoint(tmp_path / "source", max_position_embeddings=131_072)
    assert nodes_report(open_source(path), 2**40, 8)["node"]["tokens"] == 65_536
