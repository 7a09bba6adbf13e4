"""Weights packed and unpacked by auto-gptq's own code: an oracle for readers of GPTQ v1.

Run with the Python of a virtual environment made from autogptq.txt:
`python autogptq_pack.py --out FILE.safetensors`.

For case N the file holds `caseN.qweight`, `caseN.qzeros`, `caseN.scales` and `caseN.g_idx` as in a
checkpoint, and `caseN.dense`, float32 [out, in], the weight that the package unpacks. The header's
metadata has one JSON text for each case (`caseN`: bits, group_size, in, out, sym, desc_act).
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import auto_gptq
import torch
from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear
from safetensors.torch import save_file


@dataclass(frozen=True)
class Case:
    """One weight to pack; `desc_act` shuffles which group each input belongs to."""

    bits: int
    group_size: int
    in_features: int
    out_features: int
    sym: bool
    desc_act: bool = False

    def describe(self) -> str:
        """Return the case as JSON text for the file's header."""
        keys = {
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
        }
        return json.dumps(keys | {"in": self.in_features, "out": self.out_features})


CASES = (
    Case(4, 32, 128, 64, sym=True),
    Case(4, 64, 192, 96, sym=True),
    Case(4, 32, 128, 64, sym=False),
    Case(4, 64, 192, 96, sym=False),
    Case(8, 32, 128, 64, sym=True),
    Case(8, 64, 192, 96, sym=True),
    Case(8, 32, 128, 64, sym=False),
    Case(8, 64, 192, 96, sym=False),
    Case(4, 128, 128, 64, sym=True),
    Case(4, 32, 128, 64, sym=True, desc_act=True),
    Case(2, 32, 64, 32, sym=True),
    Case(2, 32, 64, 64, sym=False),
    Case(3, 32, 64, 32, sym=True),
    Case(3, 32, 96, 64, sym=False),
)


def pack(case: Case, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Draw quantized values, scales and zero points.

    Returns the tensors that `QuantLinear.pack` makes of them, and `dense`.

    Zero points start at 1: the format stores z - 1, and for z = 0 the package writes into the
    neighbouring values."""
    groups = case.in_features // case.group_size
    top = 2**case.bits
    int_values = torch.randint(0, top, (case.out_features, case.in_features), generator=rng)
    scales = (torch.rand(case.out_features, groups, generator=rng) * 0.02 + 0.001).half().float()
    drawn = torch.randint(1, top, (case.out_features, groups), generator=rng)
    zeros = torch.full_like(drawn, top // 2) if case.sym else drawn
    g_idx = torch.arange(case.in_features) // case.group_size
    if case.desc_act:
        g_idx = g_idx[torch.randperm(case.in_features, generator=rng)]
    weight = scales[:, g_idx] * (int_values - zeros[:, g_idx])

    linear = torch.nn.Linear(case.in_features, case.out_features, bias=False)
    linear.weight.data = weight
    layer = QuantLinear(case.bits, case.group_size, case.in_features, case.out_features, bias=False)
    layer.pack(linear, scales.clone(), zeros.float(), g_idx.to(torch.int32))
    # Packed from a float32 linear, the layer's scales are float32: its forward then rounds nothing,
    # and the product with the unit matrix is the unpacked weight itself.
    dense = layer(torch.eye(case.in_features)).T.contiguous()
    if not torch.equal(dense, weight):
        raise SystemExit(f"auto-gptq unpacks another weight than it packed: {case}")
    packed = {
        "qweight": layer.qweight,
        "qzeros": layer.qzeros,
        "scales": layer.scales.half(),
        "g_idx": layer.g_idx,
    }
    return {name: tensor.contiguous() for name, tensor in packed.items()} | {"dense": dense}


def main() -> None:
    """Pack every case into the file that `--out` names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rng = torch.Generator().manual_seed(0)
    tensors = {
        f"case{n}.{name}": t for n, case in enumerate(CASES) for name, t in pack(case, rng).items()
    }
    metadata = {f"case{n}": case.describe() for n, case in enumerate(CASES)}
    save_file(
        tensors,
        out,
        metadata | {"packer": f"auto-gptq {auto_gptq.__version__}", "cases": str(len(CASES))},
    )


if __name__ == "__main__":
    with torch.no_grad():
        main()
