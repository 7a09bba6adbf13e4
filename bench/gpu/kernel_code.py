"""The machine code of Triton kernels: registers, spills, and instructions by kind. No GPU is used.

Kernels are compiled from their signatures alone, by Triton's own compiler, and read back with the
tools of its wheel. Run it as `python -m llmkit.bench.gpu.kernel_code [names...]`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TARGETS = {"sm_80": 80, "sm_86": 86, "sm_89": 89, "sm_90a": 90, "sm_100a": 100, "sm_120a": 120}
# The kind of an instruction, by the beginning of its name. The first match counts.
KINDS = (
    ("matrix", r"[HIQBDO]?G?MMA|WARPGROUP"),
    ("conversion", r"F2F\b|F2F\.|F2I|I2F|FRND|F2FP?.*(E4M3|E5M2)"),  # on pipes of a lower rate
    ("special", "MUFU"),  # exp2, log2, reciprocal: a quarter of the rate, or less
    ("packing", "F2FP"),
    ("half", r"H(ADD|MUL|FMA|MNMX|SET|SETP)2"),
    ("float", r"F(ADD|MUL|FMA|MNMX|SEL|SET|SETP|CHK|SWZADD)|D(ADD|MUL|FMA)"),
    ("logic", r"LOP3|SHF|PRMT|LOP|SHL|SHR|BMSK|SGXT|FLO|POPC|BREV|VOTE|PLOP3|P2R|R2P"),
    ("integer", r"I?(ADD3?|MAD|MNMX|SETP|ABS|DP|MUL)\b|I(ADD|MAD|SETP|MNMX)|LEA|VI|SEL|XMAD|CS2R"),
    ("shared memory", r"LDS(M|\b)|STS|ATOMS|STAS|SYNCS|STSM"),
    ("global memory", r"LDGSTS|LD[GL]?\b|ST[GL]?\b|ATOM|RED\b|UTMA|UBLK|CCTL"),
    ("shuffle", r"SHFL|REDUX|MATCH"),
    ("constant", r"LDC|ULDC|S2R|S2UR"),
    ("uniform", r"U[A-Z]|R2UR"),
    ("move", r"MOV"),
    ("control", r"BRA|BSSY|BSYNC|BAR|WARPSYNC|DEPBAR|LDGDEPBAR|EXIT|NOP|CALL|RET|YIELD|MEMBAR|FENCE"
     r"|ERRBAR|BREAK|BRX|ELECT|ACQ|CGA|UCG"),
)  # fmt: skip


@dataclass(frozen=True)
class KernelCase:
    """A kernel with the types and constants that it is compiled for.

    arguments: the types of those that are not constants ("*bf16", "i32"); pointers and integers
    are multiples of 16, except `any_integer`. unit: what one turn of the hottest loop works on;
    units: how many of these a program does in one turn.
    """

    name: str
    module: str  # in llmkit.kernels
    kernel: str
    arguments: Mapping[str, str]
    constants: Mapping[str, object]
    unit: str
    units: float = 1.0
    warps: int = 4
    any_integer: Sequence[str] = ()
    min_capability: int = 80
    options: Mapping[str, int] = field(default_factory=dict)  # of Triton's compiler


def weight_only_case(
    name: str,
    tile: Sequence[int],
    *,
    capability: int = 90,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    dtype: str = "bf16",
    split: bool = True,
    columns: int = 4096,
    scales: str = "float",
) -> KernelCase:
    """The product with packed weights, for a tile as in `quantized_linear.TILES`.

    scales: the kernel's SCALES; other than "float": of a weight in FP4.
    """
    import torch

    from llmkit.kernels.quantized_linear import compiler_options, tile_constants

    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    _, rows, outputs, warps, stages, _ = tile
    has_bytes = scales != "float"
    arguments = {"x": f"*{dtype}", "words": "*i16"}
    arguments |= {"scales_and_zeros": "*u8" if has_bytes else "*i32"}
    arguments |= {"factors": "*fp32"} if has_bytes else {}
    arguments |= {"y": "*fp32"} if split else {"bias": f"*{dtype}", "y": f"*{dtype}"}
    arguments |= {"power": "fp32"} | dict.fromkeys(("M", "N", "K", "blocks_per_split"), "i32")
    width = group if group < 64 else 64
    weight: dict[str, int | str]
    weight = {"BITS": bits, "GROUP": group, "SYMMETRIC": symmetric, "W": width, "SCALES": scales}
    constants = weight | tile_constants(weight, kinds[dtype], columns, rows, capability // 10)
    constants |= {"BM": rows, "BN": outputs, "STAGES": stages} | ({"bias": None} if split else {})
    constants |= {} if has_bytes else {"factors": None}
    units = outputs / 64 * int(str(constants["COLUMNS"])) * 16 / bits / 256
    return KernelCase(
        name,
        "quantized_linear",
        "_weight_only_linear_kernel",
        arguments,
        constants,
        unit="64 x 256 weights",
        units=units,
        warps=warps,
        any_integer=("M", "blocks_per_split"),
        options=compiler_options(rows, is_fp4=has_bytes, major=capability // 10),
    )


def weight_only_cases(capability: int) -> list[KernelCase]:
    """The products with 4- and 8-bit weights, with the tiles that run where nothing is tuned.

    "wide": the tile of weights with many outputs. Float16 on 8.x has no such tile.
    """
    import torch

    from llmkit.kernels.quantized_linear import WIDE_TILE, default_tile

    cases = []
    for bits in (4, 8):
        for rows in (1, 16, 32, 64, 128, 256):
            tile = default_tile(rows, torch.bfloat16, capability // 10)
            name = f"w{bits}-{rows}"
            cases.append(weight_only_case(name, tile, capability=capability, bits=bits))
    tile = default_tile(1, torch.bfloat16, capability // 10)
    zeros = weight_only_case("w4-1-zeros", tile, capability=capability, symmetric=False)
    half = weight_only_case("w4-1-fp16", tile, capability=capability, dtype="fp16")
    floats = [
        weight_only_case(
            f"{name}-{rows}",
            default_tile(rows, torch.bfloat16, capability // 10),
            capability=capability,
            group=group,
            scales=scales,
        )
        for name, group, scales in (("mxfp4", 32, "e8m0"), ("nvfp4", 16, "e4m3"))
        for rows in (1, 16, 128, 256)
    ]
    single = (*tile[:3], 1, *tile[4:])
    singles = [
        weight_only_case(f"w4-1-warp-{dtype}", single, capability=capability, dtype=dtype)
        for dtype in ("bf16", "fp16")
    ]
    wide = [
        weight_only_case(f"w4-1-wide-{dtype}", WIDE_TILE, capability=capability, dtype=dtype)
        for dtype in ("bf16", "fp16")
    ]
    return [*cases, zeros, half, *singles, *wide, *floats]


def sampler_cases() -> list[KernelCase]:
    """The kernels that sample from 64 rows of 16-bit logits.

    "-masked": with a grammar's bitmask; "-changed": with tables of what changes logits.
    A kernel with two loops works on the same tokens in each: counts or masses, a list or a draw.
    """
    from llmkit.kernels import sampling_triton as sampler

    arguments = (
        {"logits": "*bf16"}
        | dict.fromkeys(("temperature", "top_p", "min_p", "extremes", "masses"), "*fp32")
        | dict.fromkeys(("top_k", "seeds", "counters", "ids"), "*i64")
        | dict.fromkeys(("tokens", "counts", "candidates", "bitmask", "bitmask_rows"), "*i32")
        | {"slots": "*i64", "token_counts": "*i32", "bias": "*fp32", "factors": "*fp32"}
        | {"min_tokens": "*i64"}
        | dict.fromkeys(("rows", "row_stride", "vocab_size", "slice_size"), "i32")
    )
    splits = sampler.num_splits(64, 128_256)
    constants = {"SPLITS": splits, "WAYS": sampler.WAYS, "CANDIDATES": sampler.CANDIDATES}
    threads = 32 * sampler.NUM_WARPS
    masks = ("bitmask", "bitmask_rows")
    tables = ("slots", "token_counts", "bias", "factors", "min_tokens")
    variants = {"": masks + tables, "-masked": tables, "-changed": masks}
    cases = []
    for suffix, without in variants.items():
        choice_warps = sampler.CHOICE_WARPS
        if suffix == "-changed":
            choice_warps = sampler.CHANGED_CHOICE_WARPS
        count = {"THREADS": threads, "UNROLL": sampler.UNROLL}
        # The name, the kernel, its constants, the tokens of a turn, and the warps.
        kernels: list[tuple[str, Any, dict[str, int], int, int]] = [
            ("extremes", sampler._find_extremes_kernel, {}, sampler.TILE, sampler.NUM_WARPS),
            ("count", sampler._count_kernel, count | {"LEVEL": 0}, 0, sampler.NUM_WARPS),
            ("count-again", sampler._count_kernel, count | {"LEVEL": 1}, 0, sampler.NUM_WARPS),
            ("draw", sampler._draw_kernel, {}, sampler.TILE, sampler.NUM_WARPS),
            ("choose", sampler._choose_kernel, {}, sampler.CHOICE_TILE, choice_warps),
        ]
        for name, kernel, own, tile, num_warps in kernels:
            every: dict[str, object] = {**constants, **own, **dict.fromkeys(without)}
            if tile:
                every["TILE"] = tile
            cases.append(
                KernelCase(
                    f"sample-{name}{suffix}",
                    "sampling_triton",
                    kernel.__name__,
                    {
                        argument: arguments[argument]
                        for argument in kernel.arg_names
                        if argument in arguments and argument not in every
                    },
                    {key: every[key] for key in kernel.arg_names if key in every},
                    unit="512 tokens",
                    units=(tile or threads * sampler.UNROLL) / 512,
                    warps=num_warps,
                )
            )
    return cases


def attention_cases(capability: int) -> list[KernelCase]:
    """Decodes and prompts of a model with 4 query heads a KV head, by the dtype of its cache.

    "fp8" has a scale for each token, "fp8-static" those of a checkpoint.
    """
    import torch

    from llmkit.kernels import paged_attention as paged
    from llmkit.kernels.triton_support import multiplies_from_shared_memory

    group = 4
    dim = 128
    cases = []
    kinds = {
        "bf16": (torch.bfloat16, "*bf16", None),
        "fp8": (torch.float8_e4m3fn, "*fp8e4nv", 1),
        "fp8-static": (torch.float8_e4m3fn, "*fp8e4nv", 0),
        "int8": (torch.int8, "*i8", 1),
    }
    for name, (kv_dtype, pointer, dynamic) in kinds.items():
        is_large = multiplies_from_shared_memory(capability // 10) and not dynamic
        for step, rows in (("decode", 16), ("prefill", 128 if is_large else 64)):
            tokens, warps, stages, _ = paged.default_config(
                rows, dim, torch.bfloat16, kv_dtype, bool(dynamic), divmod(capability, 10)
            )
            split = step == "decode"
            arguments = {"q": "*bf16", "kv": pointer, "out": "*bf16", "scale": "fp32"}
            for names, kind in (
                (("block_table", "seq_lens", "query_start_loc", "units"), "*i32"),
                (("q_stride", "head_stride", "table_stride"), "i32"),
                (() if dynamic is None else ("scales",), "*fp32"),
                (("unit_out", "unit_lse") if split else (), "*fp32"),
                (() if split else ("unit_out",), "*bf16"),
            ):
                arguments |= dict.fromkeys(names, kind)
            constants: dict[str, object] = {
                "GROUP": group,
                "BLOCK_SIZE": 16,
                "HEAD_DIM": dim,
                "PADDED_DIM": dim,
                "ROWS": rows,
                "ROWS_USED": group if split else rows,
                "TOKENS": tokens,
                "WINDOW": 1 << 30,
                "SOFTCAP": 0.0,
                "DYNAMIC_SCALES": dynamic or 0,
                "LOG2E": paged.LOG2_E,
                "sinks": None,
            }
            constants |= {} if split else {"unit_lse": None}
            constants |= {"scales": None} if dynamic is None else {}
            cases.append(
                KernelCase(
                    f"attention-{step}-{name}",
                    "paged_attention",
                    "_paged_attention_kernel",
                    arguments,
                    constants,
                    unit="64 tokens",
                    units=tokens / 64,
                    warps=warps,
                    min_capability=89 if pointer == "*fp8e4nv" else 80,
                    options={"num_stages": stages},
                )
            )
    return cases


def all_cases(capability: int = 90) -> list[KernelCase]:
    """Every kernel that can be asked for. A part adds its entries here."""
    return [
        *weight_only_cases(capability),
        *sampler_cases(),
        *attention_cases(capability),
    ]


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel: the instructions of its body, by kind."""

    instructions: int  # of one warp in one turn
    kinds: dict[str, int]
    depth: int  # 1: in no other loop
    opcodes: dict[str, int]  # by full name, for those who look for one


@dataclass(frozen=True)
class KernelCode:
    """What the compiler made of a kernel."""

    name: str
    target: str
    registers: int
    spill_bytes: int  # of each thread
    shared_bytes: int
    warps: int
    loops: list[Loop]
    unit: str
    units: float

    @property
    def hottest(self) -> Loop | None:
        """The innermost loop with the most instructions."""
        return max(self.loops, key=lambda loop: (loop.depth, loop.instructions), default=None)

    def per_unit(self, kind: str | None = None) -> float:
        """Instructions of the hottest loop for a unit of work, of all warps of a program."""
        loop = self.hottest
        if loop is None:
            return 0.0
        count = loop.instructions if kind is None else loop.kinds.get(kind, 0)
        return count * self.warps / self.units


def kind_of(opcode: str) -> str:
    """The kind of an instruction, "other" for an unknown one."""
    return next((kind for kind, pattern in KINDS if re.match(pattern, opcode)), "other")


def instructions_of(sass: str) -> tuple[list[str], list[list[int]]]:
    """The opcodes in the order of the code, and the successors of each instruction."""
    opcodes: list[str] = []
    conditional: list[bool] = []
    targets: list[str | None] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L\w+):", line)
        if label:
            labels[label[1]] = len(opcodes)
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)([^;]*);", line)
        if found:
            opcodes.append(found[2])
            jump = re.search(r"`\((\.L\w+)\)", found[3])
            is_jump = found[2].startswith("BRA") and jump is not None
            targets.append(jump[1] if is_jump and jump else None)
            # A second predicate of the jump itself stands before its target.
            own_predicate = is_jump and re.search(r"!?U?P\d", found[3]) is not None
            conditional.append(bool(found[1]) or own_predicate)
    following: list[list[int]] = []
    for index, opcode in enumerate(opcodes):
        ends = opcode.startswith(("EXIT", "RET", "BRA")) and not conditional[index]
        after = [] if ends or index + 1 == len(opcodes) else [index + 1]
        target = targets[index]
        if target is not None and target in labels:
            after.append(labels[target])
        following.append(after)
    return opcodes, following


def loops_of(sass: str) -> list[Loop]:
    """The natural loops of a function, found by its backward branches."""
    opcodes, following = instructions_of(sass)
    starts = sorted({0, *(to for after in following if len(after) != 1 for to in after)}
                    | {to for i, after in enumerate(following) for to in after if to != i + 1}
                    | {i + 1 for i, after in enumerate(following) if after != [i + 1]})  # fmt: skip
    starts = [start for start in starts if start < len(opcodes)]
    block_of = {start: number for number, start in enumerate(starts)}
    ends = [*starts[1:], len(opcodes)]
    successors = [[block_of[to] for to in following[end - 1]] for end in ends]
    predecessors: list[list[int]] = [[] for _ in starts]
    for block, after in enumerate(successors):
        for to in after:
            predecessors[to].append(block)
    dominators = _dominators(predecessors)
    bodies: dict[int, set[int]] = {}
    for block, after in enumerate(successors):
        for head in after:
            # A block that only jumps to itself is the padding after the code's end.
            is_padding = head == block and ends[block] - starts[block] == 1
            if head in dominators[block] and not is_padding:
                body = bodies.setdefault(head, {head})
                waiting = [block]
                while waiting:
                    member = waiting.pop()
                    if member not in body:
                        body.add(member)
                        waiting += predecessors[member]
    loops = []
    for head, body in bodies.items():
        names = [name for block in body for name in opcodes[starts[block] : ends[block]]]
        depth = sum(head in other for other in bodies.values())
        kinds = Counter(map(kind_of, names))
        loops.append(Loop(len(names), dict(kinds.most_common()), depth, dict(Counter(names))))
    return loops


def _dominators(predecessors: list[list[int]]) -> list[set[int]]:
    """The blocks on every way from block 0 to each block."""
    everything = set(range(len(predecessors)))
    dominators = [{0}] + [set(everything) for _ in predecessors[1:]]
    changed = True
    while changed:
        changed = False
        for block in range(1, len(predecessors)):
            # Code that nothing reaches, such as a collective's way back, decides nothing.
            before = [dominators[other] for other in predecessors[block] if 0 in dominators[other]]
            found = (set.intersection(*before) if before else set()) | {block}
            if found != dominators[block]:
                dominators[block] = found
                changed = True
    # Code that nothing reaches has no loops.
    return [found if 0 in found else set() for found in dominators]


def compile_kernel(
    kernel: Any,
    arguments: Mapping[str, str],
    constants: Mapping[str, object],
    capability: int = 90,
    any_integer: Sequence[str] = (),
    **options: int,
) -> tuple[bytes, int]:
    """Compile a kernel for CUDA. Returns the code and the bytes of its shared memory.

    options: of Triton's compiler: num_warps, num_stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    signature = {name: signature[name] for name in kernel.arg_names if name in signature}
    multiples = [
        name for name, kind in arguments.items() if kind[0] in "*i" and name not in any_integer
    ]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(kernel, signature, dict(constants), aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
    return compiled.asm["cubin"], compiled.metadata.shared


def disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """What a program needs by cuobjdump's names (REG, STACK, LOCAL), and the SASS."""
    import triton

    nvidia = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run(  # noqa: S603
                [*command, path], check=True, capture_output=True, text=True
            ).stdout
            for command in (
                (nvidia.cuobjdump.path, "--dump-resource-usage"),
                (nvidia.nvdisasm.path, "-c"),
            )
        )
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}, sass


def kernel_code(case: KernelCase, target: str) -> KernelCode:
    """Compile a case for one of TARGETS and count its instructions."""
    module = importlib.import_module(f"llmkit.kernels.{case.module}")
    cubin, shared_bytes = compile_kernel(
        getattr(module, case.kernel),
        case.arguments,
        case.constants,
        TARGETS[target],
        case.any_integer,
        num_warps=case.warps,
        **case.options,
    )
    usage, sass = disassemble(cubin)
    return KernelCode(
        case.name,
        target,
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        shared_bytes,
        case.warps,
        loops_of(sass),
        case.unit,
        case.units,
    )


def table(codes: Sequence[KernelCode]) -> str:
    """One line a kernel, then the kinds of instructions in its hottest loop, for a unit of work."""
    rows = [("kernel", "target", "registers", "spills", "shared", "warps", "loop", "a unit",
             "conversions", "unit")]  # fmt: skip
    notes = []
    for code in codes:
        loop = code.hottest
        rows.append(
            (
                code.name,
                code.target,
                str(code.registers),
                str(code.spill_bytes),
                str(code.shared_bytes),
                str(code.warps),
                str(loop.instructions if loop else 0),
                f"{code.per_unit():.0f}",
                f"{code.per_unit('conversion') + code.per_unit('special'):.0f}",
                code.unit,
            )
        )
        kinds = loop.kinds if loop else {}
        notes.append(
            f"{code.name}: " + ", ".join(f"{kind} {code.per_unit(kind):.0f}" for kind in kinds)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index in (0, 1, len(row) - 1) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    legend = (
        "loop: instructions of one warp in a turn of the innermost loop with the most; "
        "a unit: of all warps, for a unit of work;\n"
        "conversions: on slow pipes, for a unit. Kinds, for a unit:"
    )
    return "\n".join([*lines, "", legend, *notes])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print registers, spills, shared memory and instructions of Triton kernels."""
    parser = argparse.ArgumentParser(
        prog="python -m llmkit.bench.gpu.kernel_code", description=main.__doc__
    )
    parser.add_argument("names", nargs="*", help="kernels, or beginnings of names (default: all)")
    parser.add_argument("--target", default="sm_90a", choices=list(TARGETS), help="default: sm_90a")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--list", action="store_true", help="print the names only")
    chosen = parser.parse_args(arguments)
    try:
        import triton  # noqa: F401  # before the kernels: they find it imported
    except ImportError:
        parser.error("triton is not installed: install llmkit[gpu]")
    cases = [
        case
        for case in all_cases(TARGETS[chosen.target])
        if not chosen.names or any(case.name.startswith(name) for name in chosen.names)
    ]
    if not cases:
        names = ", ".join(case.name for case in all_cases())
        parser.error(f"no kernel is called {' '.join(chosen.names)}. There are: {names}")
    if chosen.list:
        sys.stdout.write("\n".join(case.name for case in cases) + "\n")
        return 0
    codes = [
        kernel_code(case, chosen.target)
        for case in cases
        if case.min_capability <= TARGETS[chosen.target]
    ]
    text = table(codes)
    if chosen.json:
        text = json.dumps(
            [asdict(code) | {"instructions_a_unit": code.per_unit()} for code in codes], indent=1
        )
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
