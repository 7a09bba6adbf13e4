"""Weights in FP4 and MX formats, packed and unpacked by other projects' own code: an oracle.

Run with the Python of a virtual environment made from fp4.txt:
`python fp4_pack.py --out FILE.safetensors`.

For case N the file holds the tensors of a checkpoint (`N.weight_packed`, ...), `N.source`,
bfloat16 [out, in], the weight that the package was given, and `N.dense`, float32 [out, in], the one
that it unpacks. The header's metadata has one JSON text for each case: the format of llmkit that
stores such tensors, and the scheme's fields.

- compressed-tensors: its compressors, with scales by its own `calculate_qparams`.
- nvidia-modelopt: its quantized tensors, which its Hugging Face export writes.
- torchao: its NVFP4 and MX tensors. It has no checkpoint of its own; the names are modelopt's.
"""

import argparse
import json
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor
from safetensors.torch import save_file
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

OUT, IN = 8, 64
Tensors = dict[str, torch.Tensor]
# By preset: the `format`, and the scheme as llmkit describes it.
COMPRESSED = {
    "NVFP4A16": ("nvfp4-pack-quantized", {"bits": 4, "group_size": 16, "scale_format": "e4m3"}),
    "MXFP4A16": ("mxfp4-pack-quantized", {"bits": 4, "group_size": 32, "scale_format": "e8m0"}),
    "MXFP8A16": ("mxfp8-quantized", {"bits": 8, "group_size": 32, "scale_format": "e8m0"}),
}


def random_weight(seed: int) -> torch.Tensor:
    """float32 [OUT, IN] of bfloat16 values: groups of very different sizes, one all zero."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=draw)
    weight *= torch.exp(torch.randn(OUT, IN // 32, generator=draw)).repeat_interleave(32, 1)
    weight[3, 32:64] = 0
    return weight.to(torch.bfloat16).float()


def compressed_tensors_case(preset: str, storage: str, weight: torch.Tensor) -> Tensors:
    """Scales from the largest magnitudes, then compress and decompress."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    groups = weight.unflatten(1, (-1, scheme.weights.group_size))
    global_scale = None
    if storage.startswith("nvfp4"):
        global_scale = generate_gparam(weight.min(), weight.max())
    scales, zeros = calculate_qparams(
        groups.amin(-1), groups.amax(-1), scheme.weights, global_scale=global_scale
    )
    state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    compressor = BaseCompressor.get_value_from_registry(storage)
    stored = compressor.compress(state, scheme)
    dense = compressor.decompress(dict(stored), scheme)["weight"]
    return {**stored, "dense": dense.float()}


def modelopt_case(name: str, weight: torch.Tensor) -> Tensors:
    """NVFP4 or MXFP8 as Model-Optimizer's export computes them."""
    if name == "NVFP4":
        values, scales, global_scale = NVFP4QTensor.quantize(weight.clone(), 16)
        dense = values.dequantize(
            torch.float32, scale=scales, double_scale=global_scale, block_sizes={-1: 16}
        )
        return {
            "weight": values._quantized_data,
            "weight_scale": scales,
            "weight_scale_2": global_scale.reshape(()),
            "dense": dense,
        }
    values, scales = MXFP8QTensor.quantize(weight.clone())
    dense = values.dequantize(torch.float32, scale=scales, block_sizes={-1: 32})
    return {"weight": values._quantized_data, "weight_scale": scales, "dense": dense}


def torchao_case(name: str, weight: torch.Tensor) -> Tensors:
    """NVFP4 with a global scale, or MXFP4, as torchao's tensors hold them."""
    if name == "NVFP4":
        global_scale = per_tensor_amax_to_scale(weight.abs().max())
        packed = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=global_scale)
        return {
            "weight": packed.qdata.view(torch.uint8),
            "weight_scale": packed.scale,
            "weight_scale_2": global_scale.reshape(()),
            "dense": packed.dequantize(torch.float32),
        }
    packed = MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32)
    return {
        "weight": packed.qdata.view(torch.uint8),
        "weight_scale": packed.scale.view(torch.uint8),
        "dense": packed.dequantize(torch.float32),
    }


def main() -> None:
    """Write all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    nvfp4 = {"bits": 4, "group_size": 16, "scale_format": "e4m3"}
    mxfp4 = {"bits": 4, "group_size": 32, "scale_format": "e8m0"}
    mxfp8 = {"bits": 8, "group_size": 32, "scale_format": "e8m0"}
    cases: dict[str, tuple[str, dict[str, object], Tensors]] = {}
    for seed, (preset, (storage, scheme)) in enumerate(COMPRESSED.items()):
        weight = random_weight(seed)
        stored = compressed_tensors_case(preset, storage, weight)
        stored["source"] = weight.bfloat16()
        cases[f"compressed-tensors {preset}"] = ("compressed-tensors", scheme, stored)
    for seed, (name, scheme) in enumerate({"NVFP4": nvfp4, "MXFP8": mxfp8}.items(), start=3):
        weight = random_weight(seed)
        stored = modelopt_case(name, weight) | {"source": weight.bfloat16()}
        cases[f"modelopt {name}"] = ("modelopt", scheme, stored)
    for seed, (name, scheme) in enumerate({"NVFP4": nvfp4, "MXFP4": mxfp4}.items(), start=5):
        weight = random_weight(seed)
        stored = torchao_case(name, weight) | {"source": weight.bfloat16()}
        cases[f"torchao {name}"] = ("modelopt", scheme, stored)
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    for case, (form, scheme, stored) in cases.items():
        metadata[case] = json.dumps({"format": form, "scheme": scheme})
        for suffix, tensor in stored.items():
            tensors[f"{case}.{suffix}"] = tensor.detach().contiguous().clone()
    save_file(tensors, options.out, metadata)


if __name__ == "__main__":
    main()
