"""Tiny gpt-oss checkpoints, with experts in MXFP4 and with the same values as dense tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from support.tiny_families import COMMON, FAMILIES

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


@dataclass(frozen=True)
class Mxfp4Weight:
    """The stored tensors of [experts, out, in], and the values that they stand for."""

    blocks: torch.Tensor
    scales: torch.Tensor
    dense: torch.Tensor


def pack_mxfp4(weight: torch.Tensor) -> Mxfp4Weight:
    """Round [experts, out, in] to MXFP4. Each block's largest value becomes 4 or 6 at most."""
    blocks = weight.double().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    exponent = torch.floor(torch.log2(largest)) - 2
    scaled = blocks / 2.0**exponent
    grid = torch.tensor(VALUES, dtype=torch.float64)
    code = (scaled.abs()[..., None] - grid).abs().argmin(-1)
    dense = grid[code] * scaled.sign() * 2.0**exponent
    code = code + 8 * (scaled < 0)
    first, second = code[..., 0::2], code[..., 1::2]
    return Mxfp4Weight(
        (first + 16 * second).to(torch.uint8),
        (exponent[..., 0] + 127).to(torch.uint8),
        dense.flatten(-2).float(),
    )


def write_gpt_oss(dense: Path, packed: Path, **config: Any) -> torch.nn.Module:
    """Write one model twice, and return it as transformers' module in float32.

    dense: as transformers saves it. packed: the same values with experts in MXFP4.
    """
    sizes = COMMON | FAMILIES["gpt-oss"][1] | {"intermediate_size": 64} | config
    model_config = transformers.AutoConfig.for_model("gpt_oss", **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(model_config, attn_implementation="eager")
    model = model.float().eval()
    stored: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                weight = pack_mxfp4(parameter.mT)
                parameter.copy_(weight.dense.mT)
                stored |= {f"{name}_blocks": weight.blocks, f"{name}_scales": weight.scales}
    model.save_pretrained(dense)
    packed.mkdir(exist_ok=True)
    tensors = load_file(dense / "model.safetensors")
    for name in [name for name in tensors if f"{name}_blocks" in stored]:
        del tensors[name]
    save_file(tensors | stored, packed / "model.safetensors", {"format": "pt"})
    values = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"] = QUANTIZATION
    (packed / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return model
