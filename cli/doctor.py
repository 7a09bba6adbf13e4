"""`llmkit doctor`: the machine, the versions, and which fast paths are active, with reasons."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmkit.cli.output import Output
from llmkit.common.formatting import bytes_text
from llmkit.common.options import Option

if TYPE_CHECKING:
    from rich.console import Console

    from llmkit.bench.gpu.tune_kernels import TuningResult
    from llmkit.bench.peak_performance import PeakPerformance
    from llmkit.model.kernel_choice import KernelChoice

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "gguf",
    "datasets",
    "fastapi",
    "uvicorn",
    "uvloop",
    "msgspec",
    "pydantic",
    "aiohttp",
    "typer",
    "rich",
)


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """What `llmkit doctor` takes."""

    tune: Annotated[
        str | None,
        Option(
            "Measure which configurations of GPU kernels are fastest for this model's shapes, and "
            "keep them. A checkpoint, or without weights: a config.json, or a name such as "
            "Llama-3.1-8B.",
            metavar="MODEL",
            unset="none",
        ),
    ] = None
    peaks: Annotated[
        bool,
        Option(
            "Measure copy bandwidth and the rate of matrix products, for `llmkit bench`'s MBU and "
            "MFU."
        ),
    ] = False


def doctor(output: Output, arguments: DoctorArguments) -> None:
    """Show the machine, the dependencies, the GPU, and which fast paths are active."""
    if arguments.tune is not None:
        _tune(output, arguments.tune)
    elif arguments.peaks:
        _peaks(output)
    else:
        document = examine()
        output.result(document, lambda console: _show(console, document))


def examine() -> dict[str, Any]:
    """Everything `doctor` shows, as one JSON-ready document."""
    import psutil
    import torch

    from llmkit.common.version import version
    from llmkit.kernels.cpu import cpu_kernels
    from llmkit.runtime.gpu_sharing import gpu_sharing

    threads = cpu_kernels.use_threads()
    gpus = [
        {
            "name": torch.cuda.get_device_name(index),
            "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            "capability": list(torch.cuda.get_device_capability(index)),
        }
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    packages = {name: _package_version(name) for name in PACKAGES}
    machine = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "physical_cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "available_bytes": psutil.virtual_memory().available,
        "cpu_flags": {flag: flag in _cpu_flags() for flag in CPU_FLAGS},
    }
    return {
        "llmkit": version(),
        "python": platform.python_version(),
        "machine": machine,
        "packages": packages,
        "torch": {
            "cuda_build": torch.version.cuda,
            "threads": threads.count,
            "threads_why": threads.why,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": gpus,
        "gpu_sharing": gpu_sharing(),
        "paths": [
            *fast_paths(
                gpus,
                torch.version.cuda,
                torch.backends.cpu.get_cpu_capability(),
                packages["uvloop"],
                packages["triton"],
            ),
            _compiled_kernels(),
        ],
        "kernels": [asdict(choice) for choice in kernel_choices(packages["triton"] is not None)],
    }


def kernel_choices(has_triton: bool) -> list[KernelChoice]:
    """The kernel of each kind of work on the current GPU, or on the CPU of a machine without."""
    import torch

    from llmkit.kernels import flash_attention, humming_linear
    from llmkit.kernels.triton_support import device_capability, is_amd
    from llmkit.model.kernel_choice import Gpu, cpu_kernel_choices, gpu_kernel_choices

    if not torch.cuda.is_available():
        return cpu_kernel_choices()
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = Gpu(
        capability=device_capability("cuda"),
        is_amd=is_amd(),
        has_triton=has_triton,
        flash_attention=flash_attention.status(),
        w4a16_library=humming_linear.status(device) if has_triton else "",
    )
    return gpu_kernel_choices(gpu)


def _tune(output: Output, model: str) -> None:
    from llmkit.bench.gpu.tune_kernels import tune
    from llmkit.kernels.tuned_configs import user_file

    results = tune(model, output.message)
    document = {"file": str(user_file()), "tuned": [asdict(result) for result in results]}
    output.result(document, lambda console: _show_tuned(console, results))
    output.message(f"kept in {user_file()}")


def _peaks(output: Output) -> None:
    import torch

    from llmkit.bench.peak_performance import measure_peaks, peaks_file

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    peaks = [peak for device in devices for peak in measure_peaks(device)]
    document = {"file": str(peaks_file()), "peaks": [asdict(peak) for peak in peaks]}
    output.result(document, lambda console: _show_peaks(console, peaks))
    output.message(f"kept in {peaks_file()}")


def _show_peaks(console: Console, peaks: list[PeakPerformance]) -> None:
    from rich.table import Table

    table = Table("device", "dtype", "copy, GB/s", "matrix product, GFLOP/s")
    for peak in peaks:
        table.add_row(
            peak.device,
            peak.dtype,
            f"{peak.bytes_per_s / 1e9:,.1f}",
            f"{peak.flops_per_s / 1e9:,.1f}",
        )
    console.print(table)


def _show_tuned(console: Console, results: list[TuningResult]) -> None:
    from rich.table import Table

    from llmkit.kernels.humming_linear import CHOICES, LIBRARY

    table = Table("kernel", "shapes", "configuration", "ms", "default ms", "tried", "refused")
    for result in results:
        _, _, kernel, sizes = result.name.split("; ")
        numbers = " ".join(map(str, result.config))
        if kernel == LIBRARY.kernel:
            numbers = CHOICES[result.config[0]]
        before = "-" if result.safe_ms is None else f"{result.safe_ms:.4f}"
        table.add_row(
            kernel,
            sizes,
            numbers,
            f"{result.ms:.4f}",
            before,
            str(result.tried),
            str(result.refused),
        )
    console.print(table)


def fast_paths(
    gpus: list[dict[str, Any]],
    cuda_build: str | None,
    cpu_capability: str,
    uvloop: str | None,
    triton: str | None = None,
) -> list[dict[str, Any]]:
    """What can make llmkit fast on a machine: each path's name, whether it is active, and why.

    cpu_capability: as torch names it. uvloop, triton: the installed versions, None when absent.
    """
    if gpus:
        cuda = True
        why = f"{gpus[0]['name']}"
    elif cuda_build is None:
        cuda = False
        why = "this torch is a CPU build; install a CUDA build to use a GPU"
    else:
        cuda = False
        why = "torch sees no CUDA device; check the driver with nvidia-smi"
    paths = [{"name": "CUDA", "active": cuda, "why": why}]
    if triton is None:
        why = "triton is not installed; torch operators run instead"
    else:
        why = (
            f"triton {triton}"
            if gpus
            else "they need a CUDA device; compiled kernels or torch operators run instead"
        )
    paths.append(
        {"name": "Triton kernels", "active": bool(gpus) and triton is not None, "why": why}
    )
    vectors = cpu_capability != "DEFAULT"
    why = (
        f"torch computes with {cpu_capability}"
        if vectors
        else "torch found neither AVX2 nor AVX-512"
    )
    paths.append({"name": "vector operators on the CPU", "active": vectors, "why": why})
    loop = uvloop is not None
    why = f"uvloop {uvloop}" if loop else "uvloop is not installed; asyncio's own loop runs instead"
    paths.append({"name": "fast event loop in the server", "active": loop, "why": why})
    return paths


def _compiled_kernels() -> dict[str, Any]:
    from llmkit.kernels.cpu import cpu_kernels

    active = cpu_kernels.library is not None
    why = cpu_kernels.status().removeprefix("off, ")
    if active:
        others = [name for name in cpu_kernels.levels() if name != cpu_kernels.level()]
        products = "bfloat16 and int8" if cpu_kernels.has_bfloat16() else "int8"
        why = f"level {cpu_kernels.level()}, products in float32, {products}"
        if others:
            why += f"; {cpu_kernels.LEVEL_VARIABLE} may be {', '.join(others)}"
    return {
        "name": "compiled kernels on the CPU",
        "active": active,
        "why": why,
        "level": cpu_kernels.level(),
        "levels": cpu_kernels.levels(),
    }


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_info(key: str) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _processor() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set(_cpu_info("flags").split())


def sharing_rows(sharing: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows about MPS and MIG."""
    mps = sharing["mps"]
    text = f"does not run ({mps['pipe_directory']} has no control pipe)"
    if mps["running"]:
        percent = mps["active_thread_percentage"]
        share = f", {percent} % of the GPU's threads here" if percent else ""
        text = f"runs ({mps['pipe_directory']}){share}"
    rows = [("MPS", text)]
    for gpu in sharing["mig"]:
        if not gpu["enabled"]:
            rows.append((f"MIG of GPU {gpu['index']}", "off, or not possible"))
            continue
        names = [
            f"{one['name']}: CUDA_VISIBLE_DEVICES={one['uuid']}, {bytes_text(one['memory_bytes'])}"
            for one in gpu["instances"]
        ]
        rows.append((f"MIG of GPU {gpu['index']}", "; ".join(names) or "on, without an instance"))
    return rows


def _show(console: Console, document: dict[str, Any]) -> None:
    from rich.table import Table

    machine = document["machine"]
    facts = Table(show_header=False, box=None, padding=(0, 2))
    flags = [name for name, present in machine["cpu_flags"].items() if present]
    torch_build = (
        f"CUDA {document['torch']['cuda_build']}"
        if document["torch"]["cuda_build"]
        else "CPU build"
    )
    rows = [
        ("llmkit", f"{document['llmkit']} on Python {document['python']}, {machine['system']}"),
        ("processor", f"{machine['processor']}, {machine['cores']} cores usable"),
        ("CPU flags", ", ".join(flags) or "none of " + ", ".join(CPU_FLAGS)),
        (
            "memory",
            f"{bytes_text(machine['available_bytes'])} free of "
            f"{bytes_text(machine['memory_bytes'])}",
        ),
        (
            "torch",
            f"{document['packages']['torch']} ({torch_build}),"
            f" {document['torch']['threads']} threads ({document['torch']['threads_why']})",
        ),
        (
            "packages",
            ", ".join(
                f"{name} {v}" for name, v in document["packages"].items() if v and name != "torch"
            ),
        ),
    ]
    for gpu in document["gpus"]:
        capability = "{}.{}".format(*gpu["capability"])
        rows.append(
            (
                "GPU",
                f"{gpu['name']}, {bytes_text(gpu['memory_bytes'])}, compute capability "
                f"{capability}",
            )
        )
    if document["gpus"] or document["gpu_sharing"]["mig"]:
        rows += sharing_rows(document["gpu_sharing"])
    missing = [name for name, v in document["packages"].items() if v is None]
    if missing:
        rows.append(("not installed", ", ".join(missing)))
    for name, value in rows:
        facts.add_row(f"[bold]{name}[/]", value)
    console.print(facts)
    paths = Table("fast path", "active", "why")
    for path in document["paths"]:
        paths.add_row(
            path["name"], "[green]yes[/]" if path["active"] else "[yellow]no[/]", path["why"]
        )
    console.print(paths)
    kernels = Table("work", "kernel", "why")
    for choice in document["kernels"]:
        kernels.add_row(choice["work"], choice["kernel"], choice["why"])
    console.print(kernels)
