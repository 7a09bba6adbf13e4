"""The dense weights of checkpoints' linears, and their logits, as mlx-lm has them.

    python mlx_weights.py --jobs JOBS.json

Run with the Python of a virtual environment made from mlx.txt; reader_jobs.py describes JOBS.json.
Each file holds float32 `logits` [tokens, vocab], and a float32 `<module>.weight` [out, in] for
every linear. Products are computed in float32, with the scales and biases that mlx-lm has in
16 bits.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model
from reader_jobs import run_jobs
from safetensors.numpy import save_file


def dense(module: nn.Module) -> mx.array:
    """The weight of a linear, float32 [out, in]."""
    if not isinstance(module, nn.QuantizedLinear):
        return module.weight.astype(mx.float32)
    weight = mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )
    return weight.astype(mx.float32)


def read(path: Path, tokens: list[int], out: Path) -> None:
    """Load a checkpoint, run it and write its weights."""
    model, _ = load_model(path)
    model.set_dtype(mx.float32)
    tensors = {
        f"{name}.weight": np.array(dense(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear)
    }
    logits = model(mx.array([tokens]))[0].astype(mx.float32)
    save_file(tensors | {"logits": np.array(logits)}, out)


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    run_jobs(read)
