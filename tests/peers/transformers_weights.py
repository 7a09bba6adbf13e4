"""The dense weights of checkpoints' linears, and their logits, as transformers has them.

    python transformers_weights.py --jobs JOBS.json

Run with the Python of a virtual environment made from transformers.txt; reader_jobs.py describes
JOBS.json. Each file holds float32 `logits` [tokens, vocab], and a float32 `<module>.weight` for
every linear whose weight is dense after the forward pass (transformers decompresses some formats at
the first one). If the file's name ends in `.dequantized`, the model is loaded with
`dequantize=True`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from reader_jobs import run_jobs
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

DENSE = (torch.float32, torch.bfloat16, torch.float16)
CONFIGS = {"compressed-tensors": CompressedTensorsConfig, "fp8": FineGrainedFP8Config}


def read(path: Path, tokens: list[int], out: Path) -> None:
    """Load a checkpoint, run it and write its weights."""
    is_dequantized = out.suffix == ".dequantized"
    method = json.loads((path / "config.json").read_text())["quantization_config"]["quant_method"]
    more: dict[str, Any] = {}
    if is_dequantized:
        more["quantization_config"] = CONFIGS[method](dequantize=True)
    # Other weights are made bfloat16, whatever the model is.
    is_exact = is_dequantized and method == "compressed-tensors"
    dtype = torch.float32 if is_exact else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, **more)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([tokens])).logits[0].float()
    weights = {
        f"{name}.weight": module.weight.detach().float().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight.dtype in DENSE
    }
    save_file(weights | {"logits": logits}, out)


if __name__ == "__main__":
    run_jobs(read)
