"""A checkpoint of DeepSeek V3's shape through `quantize` and `shard`: peak memory and seconds.

    python tests/peers/bench_deepseek.py [--work DIR] [--layers 19]

19 layers of 64 experts and latent attention are 21 GB in bfloat16, with random weights. It is
quantized to INT4 by rounding and sharded to TP 4 x EP 4. Quantizing may use one tensor and 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from common import table
from llmkit.model.checkpoint_tensors import checkpoint_tensors
from llmkit.model.families import model_spec

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 1,
    "n_routed_experts": 64,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 768,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FILE_BYTES = 2 << 30
GIB = 2**30


def generate(out: Path, layers: int) -> int:
    """Write the checkpoint; return its bytes. All weights are parts of one random tensor."""
    out.mkdir(parents=True)
    config = CONFIG | {"num_hidden_layers": layers}
    (out / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    pool = (torch.randn(1 << 27) * 0.02).bfloat16()
    files: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}
    total = 0

    def save() -> None:
        name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(part, out / name, {"format": "pt"})
        files.update(dict.fromkeys(part, name))
        part.clear()

    for index, (name, (_, packed)) in enumerate(
        checkpoint_tensors(model_spec(config), None).items()
    ):
        shape = packed.shape
        start = index * 4096 % (1 << 24)
        tensor = pool[start : start + torch.Size(shape).numel()].clone().view(shape)
        if name.endswith("norm.weight"):
            tensor = torch.ones(shape, dtype=torch.bfloat16)
        part[name] = tensor.float() if name.endswith("correction_bias") else tensor
        total += part[name].nbytes
        if sum(held.nbytes for held in part.values()) > FILE_BYTES:
            save()
    save()
    index_file = {"metadata": {"total_size": total}, "weight_map": files}
    (out / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return total


def run(*arguments: str) -> tuple[float, float]:
    """Run llmkit; return its seconds and peak resident memory in GiB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "llmkit.cli.main", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, arguments
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / GIB


def main() -> None:
    """Make the checkpoint, run the commands, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".bench-memory"))
    parser.add_argument("--layers", type=int, default=19)
    arguments = parser.parse_args()
    work = arguments.work / "deepseek"
    shutil.rmtree(work, ignore_errors=True)
    # In a process of its own: the peak of a child counts what its parent has held.
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        size = pool.apply(generate, (work / "dense", arguments.layers))
    print(f"{size / 1e9:.1f} GB")
    dense, packed, sharded = (str(work / name) for name in ("dense", "int4", "tp4"))
    steps = {
        "quantize --method rtn --group-size 32": (
            ("quantize", dense, "--method", "rtn", "--group-size", "32", "--no-eval", "-o", packed)
        ),
        "shard --tp 4 --ep 4": ("shard", packed, "--tp", "4", "--ep", "4", "-o", sharded),
        "shard verify": ("shard", "verify", sharded),
    }
    rows = []
    for name, command in steps.items():
        seconds, peak = run(*command)
        rows.append([f"`{name}`", f"{seconds:.0f}", f"{peak:.2f}"])
    print(table(["", "seconds", "peak, GiB"], rows))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
