"""Greedy tokens and top log probabilities from transformers, as JSON.

The interface is that of vllm_generate.py. Run with the Python of a virtual environment made from
transformers.txt:

    python transformers_generate.py --model DIR --prompts PROMPTS.json --tokens 16 --out OUT.json

PROMPTS.json is a list of lists of token ids. OUT.json holds `tokens` (a list of ids for each
prompt), `top_logprobs` (for each prompt and step the two most probable ids with their log
probabilities, {"id": logprob}) and `versions`. With exit code 1 it holds `error`: the last line of
the exception.
"""

import argparse
import functools
import json
import os
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("transformers", "torch", "compressed-tensors", "optimum", "gptqmodel")


def generate(
    model: Path, prompts: list[list[int]], steps: int, dtype: str, dequantize: bool
) -> dict[str, Any]:
    """Return `tokens`, `top_logprobs` and `versions` for `steps` greedy tokens after each prompt,
    one at a time.

    With `dequantize` compressed-tensors weights are made dense after loading, as asymmetric ones
    need it."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        CompressedTensorsConfig,
    )

    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    is_multimodal = "text_config" in json.loads((model / "config.json").read_text())
    auto_class = AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM
    causal = auto_class.from_pretrained(model, dtype=dtype, local_files_only=True, **more).eval()
    unpack_once(causal)
    tokens = []
    top = []
    for ids in prompts:
        written: list[int] = []
        steps_top = []
        cache = None
        fed = ids
        while len(written) < steps:
            with torch.no_grad():
                out = causal(input_ids=torch.tensor([fed]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            best = out.logits[0, -1].float().log_softmax(-1).topk(2)
            steps_top.append(
                {
                    str(i): value
                    for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                }
            )
            fed = [int(best.indices[0])]
            written += fed
        tokens.append(written)
        top.append(steps_top)
    return {"tokens": tokens, "top_logprobs": top, "versions": installed()}


def unpack_once(model: Any) -> None:
    """Keep the dense weights of gptqmodel's linears: in float32 it unpacks them anew for every
    product.
    """
    for module in model.modules():
        for name in ("dequantize_weight", "awq_weight_dequantize"):
            if hasattr(module, name):
                setattr(module, name, functools.cache(getattr(module, name)))


def installed() -> dict[str, str]:
    """Return the versions of the packages that had a say, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Generate, write the file that `--out` names, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--dequantize", action="store_true", help="make compressed-tensors weights dense at load"
    )
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault(
        "TORCHDYNAMO_DISABLE", "1"
    )  # gptqmodel would compile its layers: minutes, same numbers
    prompts = json.loads(args.prompts.read_text())
    try:
        result = generate(args.model, prompts, args.tokens, args.dtype, args.dequantize)
    except Exception as error:
        traceback.print_exc()
        result = {
            "error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1].strip()}"
        }
    args.out.write_text(json.dumps(result))
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main())
