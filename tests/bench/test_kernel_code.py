"""Instruction counts of compiled Triton kernels."""

from __future__ import annotations

import json
import re

import pytest

from llmkit.bench.gpu import kernel_code

# Two loops, one in the other, code that runs rarely and jumps back, and the padding at the end.
SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   LDG.E.128 R4, [R2] ;
        /*0020*/                   IADD3 R2, R2, 0x10, RZ ;
.L_x_1:
        /*0030*/                   LOP3.LUT R4, R4, 0xf000f, R5, 0xea, !PT ;
        /*0040*/              @!P1 BRA `(.L_x_3) ;
.L_x_4:
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/                   F2F.F64.F32 R4, R8 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/               @P2 BRA `(.L_x_2) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   MUFU.EX2 R8, R8 ;
        /*00b0*/                   BRA `(.L_x_4) ;
.L_x_5:
        /*00c0*/                   BRA `(.L_x_5);
"""


def test_kernel_code_finds_loops() -> None:
    outer, inner = sorted(kernel_code.loops_of(SASS), key=lambda loop: loop.depth)
    assert (outer.depth, outer.instructions) == (1, 10)
    assert (inner.depth, inner.instructions) == (2, 7)
    assert inner.kinds == {
        "control": 3,
        "logic": 1,
        "matrix": 1,
        "conversion": 1,
        "special": 1,
    }
    code = kernel_code.KernelCode("x", "sm_90a", 32, 0, 0, 4, [outer, inner], "a tile", 2)
    assert code.hottest == inner
    assert code.per_unit() == 7 * 4 / 2
    assert code.per_unit("logic") == 2


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HGMMA.64x16x16.F32.BF16", "matrix"),
        ("F2FP.F16.E4M3.UNPACK_B", "conversion"),
        ("F2FP.BF16.F32.PACK_AB", "packing"),
        ("HFMA2.BF16_V2", "half"),
        ("IMAD.WIDE", "integer"),
        ("LDGSTS.E.BYPASS.128", "global memory"),
        ("LDSM.16.M88.4", "shared memory"),
        ("ULDC.64", "constant"),
        ("USHF.L.U32", "uniform"),
        ("PRMT", "logic"),
        ("XYZ", "other"),
    ],
)
def test_kernel_code_kinds(opcode: str, kind: str) -> None:
    assert kernel_code.kind_of(opcode) == kind


@pytest.mark.parametrize(("rows", "tile_rows"), [(1, 8), (16, 16), (64, 64)])
def test_weights_and_inputs_are_copied_in_pieces_of_16_bytes(rows: int, tile_rows: int) -> None:
    """From global memory to shared memory, and from there by `ldmatrix`."""
    pytest.importorskip("triton")
    (case,) = (one for one in kernel_code.weight_only_cases(90) if one.name == f"w4-{rows}")
    assert case.constants["BM"] == tile_rows
    code = kernel_code.kernel_code(case, "sm_90a")
    assert code.hottest is not None
    opcodes = code.hottest.opcodes
    copies = {name: count for name, count in opcodes.items() if name.startswith("LDGSTS")}
    wide = sum(count for name, count in copies.items() if name.endswith(".128"))
    # 256 inputs of 64 outputs in 4 bits, and of the tile's rows in 16 bits.
    assert wide * 32 * code.warps * 16 == 64 * 256 // 2 + tile_rows * 256 * 2
    assert sum(copies.values()) - wide <= 2, "scales"
    assert not any(re.match(r"LDG\b", name) for name in opcodes)
    assert any(name.startswith("LDSM") for name in opcodes)


def test_kernel_code_compiles_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert kernel_code.main(["w4-16", "--target", "sm_80", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["target"] == "sm_80"
    assert found["loops"][0]["kinds"]["matrix"] >= 32
    assert found["instructions_a_unit"] > 100
    assert kernel_code.main(["w4-16", "--target", "sm_80"]) == 0
    assert "64 x 256 weights" in capsys.readouterr().out


def test_kernel_code_lists_every_name_once(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert kernel_code.main(["--list"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == len(set(names)) and "w4-16" in names
    with pytest.raises(SystemExit):
        kernel_code.main(["nothing"])
    assert "w4-16" in capsys.readouterr().err
