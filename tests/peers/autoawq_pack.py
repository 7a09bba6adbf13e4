"""Weights packed and unpacked by autoawq's own code: an oracle for readers of AWQ GEMM.

Run with the Python of a virtual environment made from autoawq.txt:
`python autoawq_pack.py --out FILE.safetensors`.

For case N the file holds `caseN.qweight`, `caseN.qzeros` and `caseN.scales` as in a checkpoint (the
format has no `g_idx`), and `caseN.dense`, float32 [out, in], the weight that the package unpacks.
The header's metadata has one JSON text for each case (`caseN`: bits, group_size, in, out, sym).
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import awq
import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import save_file

BITS = 4  # all that the GEMM layout has


@dataclass(frozen=True)
class Case:
    """One weight to pack; `sym` is zero point 8 everywhere."""

    group_size: int
    in_features: int
    out_features: int
    sym: bool

    def describe(self) -> str:
        """Return the case as JSON text for the file's header."""
        keys = {"bits": BITS, "group_size": self.group_size, "sym": self.sym}
        return json.dumps(keys | {"in": self.in_features, "out": self.out_features})


CASES = (
    Case(32, 128, 64, sym=False),
    Case(64, 192, 96, sym=False),
    Case(128, 256, 64, sym=False),
    Case(32, 128, 64, sym=True),
    Case(64, 192, 96, sym=True),
)


def pack(case: Case, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Draw quantized values, scales and zero points.

    Returns the tensors that `from_linear` makes of them, and `dense`.
    """
    groups = case.in_features // case.group_size
    top = 2**BITS
    int_values = torch.randint(0, top, (case.out_features, case.in_features), generator=rng)
    scales = (torch.rand(groups, case.out_features, generator=rng) * 0.02 + 0.001).half().float()
    drawn = torch.randint(0, top, (groups, case.out_features), generator=rng)
    zeros = torch.full_like(drawn, top // 2) if case.sym else drawn
    group = torch.arange(case.in_features) // case.group_size
    weight = scales[group].T * (int_values - zeros[group].T)

    linear = torch.nn.Linear(case.in_features, case.out_features, bias=False)
    linear.weight.data = weight
    layer = WQLinear_GEMM.from_linear(linear, BITS, case.group_size, scales=scales, zeros=zeros)
    # With float32 scales the unpacking rounds nothing: the stored float16 scales are exact in
    # float32.
    dense = dequantize_gemm(
        layer.qweight, layer.qzeros, layer.scales.float(), BITS, case.group_size
    ).T.contiguous()
    if not torch.equal(dense, weight):
        raise SystemExit(f"autoawq unpacks another weight than it packed: {case}")
    return {
        "qweight": layer.qweight,
        "qzeros": layer.qzeros,
        "scales": layer.scales,
        "dense": dense,
    }


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
        tensors, out, metadata | {"packer": f"autoawq {awq.__version__}", "cases": str(len(CASES))}
    )


if __name__ == "__main__":
    with torch.no_grad():
        main()
