"""INT4 weights packed by NVIDIA's Model-Optimizer, as its W4A16_AWQ export does: an oracle.

Run with the Python of a virtual environment made from fp4.txt:
`python int4_awq_pack.py --out FILE.safetensors`.

For case N the file holds `N.weight` and `N.weight_scale`, as a checkpoint stores them, and
`N.dense`, float32 [out, in], the weight that was packed: codes from -8 to 7 times their scales. The
name of a case ends with its group size. The header's metadata has Model-Optimizer's version.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import torch
from modelopt.torch.export.quant_utils import pack_int4_in_uint8
from safetensors.torch import save_file

# [out, in, group size]
CASES = ((8, 128, 64), (6, 128, 128), (10, 64, 32))


def main() -> None:
    """Write all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for rows, columns, group_size in CASES:
        codes = torch.randint(-8, 8, (rows, columns), generator=draw)
        scales = torch.rand(rows, columns // group_size, generator=draw) * 0.01 + 0.001
        scales = scales.to(torch.bfloat16)
        dense = codes * scales.float().repeat_interleave(group_size, 1)
        case = f"groups of {group_size}"
        tensors[f"{case}.weight"] = pack_int4_in_uint8(dense, scales.float(), group_size)
        tensors[f"{case}.weight_scale"] = scales
        tensors[f"{case}.dense"] = dense
    save_file(tensors, options.out, {"nvidia-modelopt": version("nvidia-modelopt")})


if __name__ == "__main__":
    main()
