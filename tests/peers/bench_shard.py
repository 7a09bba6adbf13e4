"""`make bench-shard`: time and memory of `llmkit shard` on Llama-3-8B's shape, beside `cp`.

    python tests/peers/bench_shard.py [--work DIR] [--layers 32] [--vocab 128256] [--tp 4]
        [--rounds 3]

`cp` and `shard` take turns on the same disk. Each begins with the source out of the page cache and
ends when its output is on the disk (`shard` syncs by itself, `cp` is followed by `sync`). `reshard`
doubles the ranks of the sharded output, and `merge` merges it. The ratio is the time of cp over the
time of the command, the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench_memory import generate

from common import table

MIN_RATIO = 0.7
MAX_BYTES = 600 * 2**20
GB = 10**9


def forget(folder: Path) -> None:
    """Put a folder's files out of the page cache."""
    for file in folder.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def timed(command: list[str], source: Path, out: Path) -> tuple[float, float, int]:
    """Seconds until `command` has made `out` of `source`, of processors too, and its peak resident
    memory in bytes.
    """
    shutil.rmtree(out, ignore_errors=True)
    forget(source)
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    if command[0] == "cp":
        subprocess.run(["sync", *map(str, out.iterdir())], check=True)
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(".bench-shard"))
    parser.add_argument("--generate", action="store_true", help="only write the checkpoint")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", default=["shard"], choices=("shard", "reshard", "merge")
    )
    arguments = parser.parse_args()
    work = arguments.work
    tp = arguments.tp
    source, copy, ranks, out = (work / name for name in ("source", "copy", "ranks", "out"))
    if arguments.generate:
        generate(source, arguments.layers, vocab_size=arguments.vocab)
        return
    work.mkdir(parents=True, exist_ok=True)
    need = 2 * (
        436_224_000 * arguments.layers + 4 * 4096 * arguments.vocab
    )  # the source and one output
    need += need // 2 * (arguments.only != ["shard"]) + GB
    have = shutil.disk_usage(work).free
    if need > have:
        raise SystemExit(f"{work} needs {need / GB:.0f} GB of disk and has {have / GB:.0f} GB")
    try:
        # In a process of its own: a child's peak begins with that of its parent.
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--generate"], check=True)
        total = sum(file.stat().st_size for file in source.iterdir())
        llmkit = [sys.executable, "-m", "llmkit.cli.main", "shard"]
        runs = {
            "shard": ([*llmkit, str(source), "--tp", str(tp), "--quiet", "-o"], source, ranks),
            "reshard": ([*llmkit, str(ranks), "--tp", str(2 * tp), "--quiet", "-o"], ranks, out),
            "merge": ([*llmkit, "merge", str(ranks), "--quiet", "-o"], ranks, out),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ("cp", *arguments.only)}
        processors: dict[str, list[float]] = {name: [] for name in seconds}
        peaks = dict.fromkeys(seconds, 0)
        if "shard" not in arguments.only:
            timed(*runs["shard"])
        for _ in range(arguments.rounds):
            for name in seconds:
                # cp reads the source, and there is room for one more output at a time.
                command, reads, writes = runs.get(name, (["cp", "-r", str(source)], source, copy))
                taken, processor, peak = timed(command, reads, writes)
                seconds[name].append(taken)
                processors[name].append(processor)
                peaks[name] = max(peaks[name], peak)
                if writes != ranks or arguments.only == ["shard"]:
                    shutil.rmtree(writes)
    finally:
        for folder in (source, copy, ranks, out):
            shutil.rmtree(folder, ignore_errors=True)
    figures = {
        name: {
            "seconds": seconds[name],
            "cpu_seconds": processors[name],
            "gb_per_s": total / GB / statistics.median(seconds[name]),
            "ratio": statistics.median(
                c / s for c, s in zip(seconds["cp"], seconds[name], strict=True)
            ),
            "peak_bytes": peaks[name],
        }
        for name in seconds
    }
    print(json.dumps({"bytes": total, "tp": tp, "runs": figures}, indent=2))
    rows = [
        [name, f"{f['gb_per_s']:.2f}", f"{f['ratio']:.2f}", f"{f['peak_bytes'] / 2**20:.0f}"]
        for name, f in figures.items()
    ]
    print(table(("", "GB/s", "of cp", "peak, MiB"), rows))
    wrong = [
        name
        for name in arguments.only
        if figures[name]["ratio"] < MIN_RATIO or figures[name]["peak_bytes"] > MAX_BYTES
    ]
    if wrong:
        raise SystemExit(
            f"below {MIN_RATIO:.0%} of cp or over {MAX_BYTES // 2**20} MiB: {', '.join(wrong)}"
        )


if __name__ == "__main__":
    main()
