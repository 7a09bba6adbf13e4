"""`make bench-memory`: peak memory of `llmkit quantize` on a checkpoint of Llama-3-8B's shape.

    python tests/peers/bench_memory.py [--work DIR] [--layers 32]

The peak is compared with a bound. Casts and rounding may use one tensor and 1 GiB. GPTQ and AWQ, on
the first two layers, may use one decoder layer in float32, its Hessians, the calibration
activations and 1.5 GiB. The weights are random, and the same in every layer. With `--device cuda`
(part of `make gpu`) the whole model is quantized with 128 x 2,048 tokens, and timed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from common import ROOT, table

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SAMPLES = 4
LENGTH = 1024
GIB = 2**30
# Options of `llmkit quantize`, and whether it runs the model.
RUNS: dict[str, tuple[tuple[str, ...], bool]] = {
    "int8": (("--method", "int8"), False),
    "rtn": (("--method", "rtn"), False),
    "gptq, layers 0-1": (("--method", "gptq", "--layers", "0-1"), True),
    "awq, layers 0-1": (("--method", "awq", "--layers", "0-1"), True),
}
CUDA = (
    "--method",
    "gptq",
    "--group-size",
    "128",
    "--samples",
    "128",
    "--seq-len",
    "2048",
    "--device",
    "cuda",
)
CUDA_BOUND_S = 300.0


def generate(out: Path, layers: int, **more: int) -> Path:
    """Write the checkpoint, one file a layer, with the small tokenizer of the tests. `more`: of its
    config.
    """
    config = LLAMA_3_8B | {"num_hidden_layers": layers, **more}
    hidden = 4096
    inner = 14336
    kv = 1024
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    out.mkdir(parents=True)
    files: dict[str, dict[str, torch.Tensor]] = {}
    layer = {
        "input_layernorm": torch.ones(hidden).bfloat16(),
        "post_attention_layernorm": torch.ones(hidden).bfloat16(),
        "self_attn.q_proj": random(hidden, hidden),
        "self_attn.k_proj": random(kv, hidden),
        "self_attn.v_proj": random(kv, hidden),
        "self_attn.o_proj": random(hidden, hidden),
        "mlp.gate_proj": random(inner, hidden),
        "mlp.up_proj": random(inner, hidden),
        "mlp.down_proj": random(hidden, inner),
    }
    located = {}
    for index in range(layers):
        named = {f"model.layers.{index}.{name}.weight": tensor for name, tensor in layer.items()}
        files[f"model-{index + 1:05d}-of-{layers + 1:05d}.safetensors"] = named
    ends = {
        "model.embed_tokens.weight": random(config["vocab_size"], hidden),
        "model.norm.weight": layer["input_layernorm"],
    }
    files[f"model-{layers + 1:05d}-of-{layers + 1:05d}.safetensors"] = ends | {
        "lm_head.weight": ends["model.embed_tokens.weight"].clone()
    }
    for file, tensors in files.items():
        save_file(tensors, out / file, {"format": "pt"})
        located |= dict.fromkeys(tensors, file)
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": located})
    )
    (out / "config.json").write_text(json.dumps(config))
    sys.path.insert(0, str(ROOT / "tests"))
    from support import tiny_models as tiny

    tiny.write_tokenizer(out)
    return out


def bound(calibrated: bool) -> int:
    """Bytes that a run may take."""
    hidden = 4096
    inner = 14336
    vocab = 128256
    if not calibrated:
        return 2 * vocab * hidden + GIB
    layer = 4 * (hidden * (2 * hidden + 2 * 1024) + 3 * hidden * inner)
    hessians = 4 * (3 * hidden**2 + inner**2)
    return layer + hessians + 4 * SAMPLES * LENGTH * hidden + 3 * GIB // 2


def peak(command: list[str]) -> tuple[int, float]:
    """Peak resident memory of a process in bytes, and its seconds."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)  # ours is the figures'
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * 1024, time.perf_counter() - started


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(".bench-memory"))
    parser.add_argument("--generate", action="store_true", help="only write the checkpoint")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="run those whose name starts with this")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    source = arguments.work / "llama-8b"
    if arguments.generate:
        generate(source, arguments.layers)
        return
    if (
        not source.exists()
    ):  # in a process of its own: a child's peak begins with that of its parent
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--generate"], check=True)
    if arguments.device == "cuda":
        out = arguments.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "llmkit.cli.main",
            "quantize",
            str(source),
            *CUDA,
            "--no-eval",
        ]
        taken, seconds = peak([*command, "--output", str(out)])
        report = json.loads((out / "llmkit_report.json").read_text())
        shutil.rmtree(out)
        figures = {
            "seconds": report["seconds"],
            "wall_s": seconds,
            "bound_s": CUDA_BOUND_S,
            "peak_host_bytes": taken,
        }
        print(json.dumps({"gptq g128, 8B-shaped, 128 x 2,048 tokens": figures}, indent=2))
        return
    rows = []
    over = []
    for name, (options, calibrated) in RUNS.items():
        if not name.startswith(arguments.only):
            continue
        out = arguments.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        text = ("--samples", str(SAMPLES), "--seq-len", str(LENGTH)) if calibrated else ()
        command = [
            sys.executable,
            "-m",
            "llmkit.cli.main",
            "quantize",
            str(source),
            *options,
            *text,
            "--no-eval",
        ]
        taken, seconds = peak([*command, "--quiet", "--output", str(out)])
        rows.append(
            [name, f"{taken / GIB:.2f}", f"{bound(calibrated) / GIB:.2f}", f"{seconds:.0f}"]
        )
        print(" | ".join(rows[-1]), flush=True)
        if taken > bound(calibrated):
            over.append(name)
        shutil.rmtree(out)
    print(table(("", "peak, GiB", "bound, GiB", "seconds"), rows))
    if over:
        raise SystemExit(f"over the bound: {', '.join(over)}")


if __name__ == "__main__":
    main()
