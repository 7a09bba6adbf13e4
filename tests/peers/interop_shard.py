"""`make interop-shard`: the output of `llmkit shard --format vllm` in the real vLLM 0.32 on a CPU.

    python tests/peers/interop_shard.py [--work DIR] [--skip-generate]

For tiny models of every supported family at 1, 2 and 4 ranks, the keys, shapes and bytes of each
rank are compared with vLLM's own loading (`vllm_shards.py`). Then vLLM answers with SmolLM2 on one
rank, from the sharded files and from the unsharded checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from common import ROOT, llmkit, real_model, run_peer, table

sys.path.insert(0, str(ROOT / "tests"))

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 500,  # padded to 512
}
# Row by row: the family, and what of it is different from a plain model.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, biases": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, one KV head each": ("llama", {"num_key_value_heads": 8, "vocab_size": 320}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
}
PROMPTS = [[1, 504, 3575, 282, 4649, 314], [1, 28, 339, 523, 253, 1743], list(range(100, 160))]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(".interop") / "shard")
    parser.add_argument(
        "--skip-generate", action="store_true", help="only compare tensors: no model is run"
    )
    arguments = parser.parse_args()
    from support.tiny_models import tiny_checkpoint

    work = arguments.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    pairs: list[str] = []
    for index, (kind, differences) in enumerate(MODELS.values()):
        whole = tiny_checkpoint(work / f"{index}", kind, **(SIZES | differences))
        for tp in (1, 2, 4):
            shards = work / f"{index}-tp{tp}"
            llmkit("shard", whole, "--tp", tp, "--format", "vllm", "--quiet", "-o", shards)
            pairs += [str(whole), str(shards), str(tp)]
    done = run_peer("vllm", "vllm_shards.py", "--out", work / "compared.json", *pairs, check=False)
    if not (work / "compared.json").exists():
        raise SystemExit(done.stderr[-3000:])
    results = json.loads((work / "compared.json").read_text())
    names = [name for name in MODELS for _ in range(3)]
    rows = [
        [
            name,
            str(result["tp"]),
            str(sum(result["tensors"])),
            "; ".join(result["problems"][:3]) or "the same",
        ]
        for name, result in zip(names, results, strict=True)
    ]
    wrong = [row for row in rows if row[-1] != "the same"]
    if not arguments.skip_generate:
        source = real_model(work.parent)
        shards = work / "smollm2-tp1"
        prompts = work / "prompts.json"
        llmkit("shard", source, "--tp", 1, "--format", "vllm", "--quiet", "-o", shards)
        prompts.write_text(json.dumps(PROMPTS))
        answers = []
        for model, engine in ((source, {}), (shards, {"load_format": "sharded_state"})):
            out = work / "answer.json"
            common = ("--prompts", prompts, "--tokens", 16, "--out", out, "--dtype", "bfloat16")
            run_peer(
                "vllm",
                "vllm_generate.py",
                "--model",
                model,
                *common,
                "--engine",
                json.dumps(engine),
            )
            answers.append(json.loads(out.read_text()))
        same = all(answers[0][key] == answers[1][key] for key in ("tokens", "top_logprobs"))
        rows.append(
            ["SmolLM2-135M-Instruct, 16 tokens", "1", "", "the same" if same else "other answers"]
        )
        wrong += [] if same else [rows[-1]]
    print(table(("model", "TP", "tensors compared", "vLLM 0.32"), rows))
    shutil.rmtree(work)
    if wrong:
        raise SystemExit(f"{len(wrong)} differ")


if __name__ == "__main__":
    main()
