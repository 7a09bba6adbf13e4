"""`quantize` under faults: killed, out of disk, with odd weights and activations.

It leaves a complete and finite output, or none and an error that says why.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import fault_injection as faults
from support import tiny_models as tiny

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.manifest import verify_manifest
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.tensor_reader import sha256_file
from llmkit.checkpoint.writer import CheckpointWriter
from llmkit.cli import main
from llmkit.common.errors import InputError, OutputError, ShortageError
from llmkit.common.progress import Progress, SilentProgress
from llmkit.model.families import model_spec
from llmkit.model.weight_loader import load_model, read_parameter
from llmkit.quant import calibration_text as text
from llmkit.quant import quantize_layers
from llmkit.quant import quantize_plan as plan
from llmkit.quant.algorithm import AutoRound
from llmkit.quant.auto_round import tune_rounding
from llmkit.quant.layer_stream import LayerStream
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.quantize_report import Report
from llmkit.quant.smoothing_mappings import apply_scales, find_mapping
from llmkit.runtime.generate import generate

Q = QuantizeOptions
BASE = Q("rtn", samples=4, seq_len=64, eval_windows=1, device="cpu")
METHODS = {
    "rtn": Q("rtn"),
    "gptq": Q("gptq"),
    "awq": Q("awq"),
    "int8-activations": Q("int8", activations=True),
    "fp8-static": Q("fp8", static_activations=True),
    "fp8-kv": Q("fp8", kv="fp8"),
    "gptq-max": Q("gptq", effort="max"),
    "awq-max": Q("awq", effort="max"),
    "target-bits": Q("gptq", target_bits=6.0),
}
CALIBRATED = [name for name in METHODS if name != "rtn"]


def first_methods(*slow: str) -> list[Any]:
    """All methods. `make test` leaves out the slow ones, whose parts others have, too."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in METHODS
    ]


WEIGHTS = "model.safetensors"
SILENT = SilentProgress()
Undisturbed = Callable[[str], dict[str, bytes]]


def tune_rounding_briefly(*arguments: Any) -> Any:
    given: list[Any] = [
        replace(one, steps=20) if isinstance(one, AutoRound) else one for one in arguments
    ]
    return tune_rounding(*given)


@pytest.fixture(scope="module", autouse=True)
def short_text_and_tuning() -> Iterator[None]:
    """A short text, few steps of learned rounding and no fsync: the rest would take too long.

    A killed process loses nothing that it has written, even without fsync.
    """
    with pytest.MonkeyPatch.context() as patch:
        short = text.builtin_text()[:24_000]
        patch.setattr(text, "builtin_text", lambda: short)
        patch.setattr(quantize_layers, "tune_rounding", tune_rounding_briefly)
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text.builtin_text()[:6000])
    return str(path)


def run(
    source: Path,
    out: Path,
    options: QuantizeOptions,
    progress: Progress = SILENT,
    **changes: object,
) -> Report:
    """With BASE's settings where `options` and `changes` have none."""
    given = {one.name: getattr(options, one.name) for one in fields(options)}
    given = {one.name: given[one.name] for one in fields(options) if given[one.name] != one.default}
    chosen = replace(BASE, **(given | changes))
    return quantize(
        str(source), str(out), chosen, progress, generate if chosen.calibration == "self" else None
    )


@pytest.fixture(scope="module")
def undisturbed(llama: Path, calibration_file: str) -> Undisturbed:
    """The weight files that each method gives, not evaluated."""

    @cache
    def made(method: str) -> dict[str, bytes]:
        out = llama.parent / method
        run(llama, out, METHODS[method], calibration=calibration_file, evaluate=False)
        return weights(out)

    return made


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(path.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def weights(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}


def changed(source: Path, path: Path, **values: Callable[[torch.Tensor], None]) -> Path:
    """A copy of a one-file checkpoint with some tensors edited in place.

    The tensors are given by the end of their names, with `_` for `.`.
    """
    shutil.copytree(source, path)
    loaded = load_file(path / WEIGHTS)
    for ending, edit in values.items():
        found = [
            name
            for name in loaded
            if name.removesuffix(".weight").replace(".", "_").endswith(ending)
        ]
        assert found, ending
        for name in found:
            edit(loaded[name])
    save_file(loaded, path / WEIGHTS, {"format": "pt"})
    return path


def assert_finite(path: Path) -> None:
    for name, tensor in tensors(path).items():
        assert not tensor.is_floating_point() or bool(tensor.float().isfinite().all()), name


def assert_good(path: Path, report: Report, kl: float | None = None) -> None:
    """The output is complete and finite, and its model is close to the source's.

    By default it is ten times closer than another random model.
    """
    assert verify_manifest(path) == []
    assert_finite(path)
    load_model(open_checkpoint(path), torch.float32)
    assert (
        0
        <= report["quality"]["mean_kl"]
        < (kl or {"int8": 0.002, "fp8": 0.02}.get(report["method"], 0.06))
    )


def beside(out: Path) -> set[str]:
    """What lies next to an output and belongs to it."""
    return {path.name for path in out.parent.glob(f"{out.name}*")}


# Killed


@pytest.mark.parametrize("method", first_methods("gptq-max", "awq-max", "fp8-static"))
def test_run_killed_at_any_operation_resumes_to_the_same_bytes(
    llama: Path, calibration_file: str, tmp_path: Path, undisturbed: Undisturbed, method: str
) -> None:
    """Two kills, one after another in the same output, each at a moment drawn from a seed."""
    out = tmp_path / "out"
    again = partial(
        run,
        source=llama,
        out=out,
        options=METHODS[method],
        calibration=calibration_file,
        evaluate=False,
    )
    total = faults.counted(tmp_path / "whole", partial(again, out=tmp_path / "whole"))
    draw = random.Random(f"{method} 7")
    statuses = [faults.killed_at(draw.randint(2, total - 8), out, again)]
    assert statuses == [faults.KILLED]
    assert not out.exists()
    statuses.append(faults.killed_at(draw.randint(2, total // 2), out, again))
    assert set(statuses) <= {faults.KILLED, 0}
    if statuses[-1]:
        assert not out.exists()
        again()
    assert weights(out) == undisturbed(method)
    assert verify_manifest(out) == []
    assert beside(out) == {"out"}


def test_killed_bit_search_resumes_to_the_same_bits(
    llama: Path, calibration_file: str, tmp_path: Path
) -> None:
    """With a target KL whole attempts are written and given up; each is evaluated."""
    options = replace(BASE, method="gptq", target_kl=0.005, calibration=calibration_file)
    whole = run(llama, tmp_path / "whole", options)
    assert len(whole["attempts"]) > 1
    out = tmp_path / "out"
    again = partial(run, llama, out, options)
    for operation in (30, 60, 75):
        assert faults.killed_at(operation, out, again) == faults.KILLED
        assert not out.exists()
    assert again()["attempts"] == whole["attempts"]
    assert weights(out) == weights(tmp_path / "whole")
    assert beside(out) == {"out"}


def test_output_is_absent_or_complete_when_killed_at_the_end(llama: Path, tmp_path: Path) -> None:
    source = llama
    complete = 0
    options = replace(METHODS["rtn"], layers="0", keep="self_attn")
    total = faults.counted(
        tmp_path / "whole", partial(run, source, tmp_path / "whole", options, evaluate=False)
    )
    for back in range(8):
        out = tmp_path / f"out-{back}"
        again = partial(run, source, out, options, evaluate=False)
        assert faults.killed_at(total - back, out, again) == faults.KILLED
        if out.exists():
            complete += 1
        else:
            again()
        assert weights(out) == weights(tmp_path / "whole")
        assert verify_manifest(out) == []
    assert 1 <= complete < 8


def command(source: Path, out: Path, calibration_file: str, method: str) -> list[str]:
    common = [
        "--samples",
        "4",
        "--seq-len",
        "64",
        "--no-eval",
        "--device",
        "cpu",
        "--calibration",
        calibration_file,
    ]
    return ["quantize", str(source), "-o", str(out), "--method", method, *common]


SLOW = """
import signal, time
# A background job of a shell inherits SIGINT as ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from llmkit.checkpoint.writer import CheckpointWriter
from llmkit.cli import main
commit, finish = CheckpointWriter.commit, CheckpointWriter.finish
CheckpointWriter.commit = lambda self: (commit(self), time.sleep(0.25))[0]
# The signal comes before that.
CheckpointWriter.finish = lambda self, *rest: (time.sleep(60), finish(self, *rest))[1]
main.main()
"""


def started(arguments: list[str], out: Path, seed: int) -> subprocess.Popen[str]:
    """A slowed process that has committed its first tensors.

    It has then worked for a random moment that `seed` decides.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stderr=subprocess.PIPE, text=True
    )
    journal = out.with_name(out.name + ".partial.journal")
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 0.2))
    return process


@pytest.mark.parametrize(
    ("number", "code", "method"),
    [
        (signal.SIGKILL, -signal.SIGKILL, "gptq"),
        pytest.param(signal.SIGTERM, 143, "awq", marks=pytest.mark.slow),
        (signal.SIGINT, 130, "rtn"),
    ],
)
def test_stopped_process_leaves_no_output_and_resumes(
    llama: Path,
    calibration_file: str,
    tmp_path: Path,
    undisturbed: Undisturbed,
    number: int,
    code: int,
    method: str,
) -> None:
    out = tmp_path / "out"
    line = command(llama, out, calibration_file, method)
    process = started(line, out, seed=number)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert not out.exists()
    if code > 0:
        assert said.endswith(
            f"llmkit quantize: error: stopped. To resume: llmkit {' '.join(line)} --resume\n"
        )
        assert beside(out) == {"out.partial", "out.partial.journal"}
    assert main.run([*line, "--resume"]) == 0
    assert weights(out) == undisturbed(method)
    assert beside(out) == {"out"}


class Stopping(SilentProgress):
    """Calls `act` once, when `units` units of a stage are done."""

    def __init__(self, stage: str, units: int, act: Callable[[], object]) -> None:
        self.stage = stage
        self.left = units
        self.act = act
        self.current = ""

    def start(self, stage: str, total: int, unit: str) -> None:
        self.current = stage

    def advance(self, n: int = 1, note: str = "") -> None:
        if self.current == self.stage and n:
            self.left -= n
            if self.left == 0:
                self.act()


class InterruptedRunError(Exception):
    pass


def interrupt() -> None:
    raise InterruptedRunError


@pytest.mark.parametrize(("stage", "method"), [("check", "gptq"), ("sensitivity", "target-bits")])
def test_printed_command_resumes_whenever_it_was_stopped(
    llama: Path, calibration_file: str, tmp_path: Path, stage: str, method: str
) -> None:
    """The line says `--resume`, also before anything of the output is there."""
    out = tmp_path / "out"
    with pytest.raises(InterruptedRunError):
        run(
            llama,
            out,
            METHODS[method],
            Stopping(stage, 1, interrupt),
            calibration=calibration_file,
            evaluate=False,
        )
    run(llama, out, METHODS[method], calibration=calibration_file, evaluate=False, resume=True)
    assert_finite(out)


def test_search_file_is_removed_by_a_run_with_another_method(
    llama: Path, calibration_file: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InterruptedRunError):
        run(
            llama,
            out,
            METHODS["target-bits"],
            Stopping("quantize", 1, interrupt),
            calibration=calibration_file,
            evaluate=False,
        )
    run(llama, out, METHODS["rtn"], evaluate=False)
    assert beside(out) == {"out"}


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("disk", "memory"),
        ("memory", "disk"),
    ],
)
def test_resume_may_change_where_hidden_states_lie(
    llama: Path,
    calibration_file: str,
    tmp_path: Path,
    undisturbed: Undisturbed,
    first: str,
    then: str,
) -> None:
    """`--offload auto` decides anew what fits when the run is resumed."""
    out = tmp_path / "out"
    options = METHODS["gptq-max"]
    with pytest.raises(InterruptedRunError):
        run(
            llama,
            out,
            options,
            Stopping("quantize", 1, interrupt),
            calibration=calibration_file,
            evaluate=False,
            offload=first,
        )
    run(llama, out, options, calibration=calibration_file, evaluate=False, offload=then)
    assert weights(out) == undisturbed("gptq-max")
    assert not (out / "hidden").exists()


def test_resume_reports_the_overflows_of_the_interrupted_run(llama: Path, tmp_path: Path) -> None:
    def large(weight: torch.Tensor) -> None:
        weight[0, 0] = 1e6

    source = changed(llama, tmp_path / "source", embed_tokens=large)
    whole = run(source, tmp_path / "whole", Q("fp16"), evaluate=False)
    with pytest.raises(InterruptedRunError):
        run(source, tmp_path / "out", Q("fp16"), Stopping("write", 5, interrupt), evaluate=False)
    resumed = run(source, tmp_path / "out", Q("fp16"), evaluate=False)
    assert whole["overflows"] == resumed["overflows"] == {"model.embed_tokens.weight": 1}


def test_overflow_of_a_calibrated_run_is_counted_once(
    llama: Path, calibration_file: str, tmp_path: Path
) -> None:
    """A float16 checkpoint with one norm in float32, which is stored in float16."""
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    loaded = {name: tensor.half() for name, tensor in load_file(source / WEIGHTS).items()}
    norm = "model.layers.0.input_layernorm.weight"
    loaded[norm] = loaded[norm].float()
    loaded[norm][3] = 1e6
    save_file(loaded, source / WEIGHTS, {"format": "pt"})
    report = run(
        source, tmp_path / "out", METHODS["gptq"], calibration=calibration_file, evaluate=False
    )
    assert report["overflows"] == {norm: 1}


# A full disk, no permission


@pytest.mark.parametrize(
    ("method", "named", "room"),
    [
        ("gptq", "", 100),
        ("gptq", "", 100_000),
        ("awq", WEIGHTS, 150_000),
        ("rtn", ".lock", 0),
        ("rtn", "journal", 0),
        ("fp8-kv", "journal", 900),
        ("gptq", "linears", 200),
        ("gptq-max", "hidden", 0),
        ("int8-activations", "hidden", 100_000),
        ("target-bits", "search", 30),
        ("rtn", "report", 50),
        ("awq", "llmkit.json", 1000),
    ],
)
def test_full_disk_is_a_shortage_and_resumes_with_room(
    llama: Path,
    calibration_file: str,
    tmp_path: Path,
    undisturbed: Undisturbed,
    method: str,
    named: str,
    room: int,
) -> None:
    offload = "disk" if named == "hidden" else "auto"
    again = partial(
        run,
        llama,
        tmp_path / "out",
        METHODS[method],
        calibration=calibration_file,
        evaluate=False,
        offload=offload,
    )
    with pytest.raises(ShortageError, match="The disk is full"), faults.disk_with_room(room, named):
        again()
    assert not (tmp_path / "out").exists()
    again()
    assert weights(tmp_path / "out") == undisturbed(method)
    assert verify_manifest(tmp_path / "out") == []
    assert beside(tmp_path / "out") == {"out"}


def test_interrupt_on_a_full_disk_is_still_an_interrupt(tmp_path: Path) -> None:
    """The error to tell is the one that came first, even if what is pending cannot be recorded."""

    def interrupted() -> None:
        tensor = TensorInfo("a.weight", "F32", (2, 2))
        with ExitStack() as full, CheckpointWriter(tmp_path / "out", {WEIGHTS: [tensor]}) as writer:
            writer.write("a.weight", torch.zeros(2, 2))
            full.enter_context(faults.disk_with_room(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


@pytest.mark.parametrize("method", ["rtn", ("target-bits")])
def test_read_only_folder_is_a_shortage(
    llama: Path, calibration_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    mkdir = os.mkdir

    def refuse(path: str | os.PathLike[str], *arguments: int) -> None:
        if str(path).startswith(str(tmp_path / "closed")):
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, *arguments)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(ShortageError, match=r"closed.* is not writable"):
        run(
            llama,
            tmp_path / "closed" / "out",
            METHODS[method],
            calibration=calibration_file,
            evaluate=False,
        )
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(ShortageError, match=r"is not writable.*Choose another output"):
            run(
                llama,
                tmp_path / "out",
                METHODS[method],
                calibration=calibration_file,
                evaluate=False,
            )
    assert list(tmp_path.iterdir()) == []


# Weights and activations


@pytest.mark.parametrize("method", CALIBRATED)
def test_nan_in_a_weight_names_tensor_and_count(
    llama: Path, calibration_file: str, tmp_path: Path, method: str
) -> None:
    def spoil(weight: torch.Tensor) -> None:
        weight[0, :3] = torch.nan

    source = changed(llama, tmp_path / "source", layers_1_mlp_up_proj=spoil)
    message = (
        r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds 3 NaN and 0 infinite values of 8192"
    )
    with pytest.raises(InputError, match=message) as caught:
        run(source, tmp_path / "out", METHODS[method], calibration=calibration_file, evaluate=False)
    assert caught.value.exit_code == 3
    assert beside(tmp_path / "out") == set()


@pytest.fixture(scope="module")
def overflowing(llama: Path) -> Path:
    """Finite weights of 1e38, whose products are infinite."""

    def huge(weight: torch.Tensor) -> None:
        weight[:4] = 1e38

    path = llama.parent / "overflowing"
    return changed(llama, path, layers_0_mlp_down_proj=huge, layers_0_mlp_up_proj=huge)


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("method", [name for name in CALIBRATED if name != "fp8"])
def test_overflowing_activations_are_an_error(
    overflowing: Path, calibration_file: str, tmp_path: Path, method: str, evaluate: bool
) -> None:
    """With every method that computes activations; nothing is left under the output's name."""
    with pytest.raises(InputError, match=r"float32 overflows|overflow float32") as caught:
        run(
            overflowing,
            tmp_path / "out",
            METHODS[method],
            calibration=calibration_file,
            evaluate=evaluate,
        )
    assert caught.value.exit_code == 3
    assert "finite activations were expected" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_overflowing_activations_do_not_matter_without_calibration(
    overflowing: Path, tmp_path: Path
) -> None:
    """Rounding computes no activations: its scales and figures are finite."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the report, which JSON does not have")

    run(overflowing, tmp_path / "out", METHODS["rtn"], evaluate=False)
    assert_finite(tmp_path / "out")
    text = (tmp_path / "out" / "llmkit_report.json").read_text()
    report = json.loads(text, parse_constant=refuse)
    down = next(entry for entry in report["linears"] if entry["name"] == "layers.0.mlp.down")
    assert 0 < down["error"] < 0.1


def zero(weight: torch.Tensor) -> None:
    weight[..., 5] = 0


@pytest.mark.parametrize("method", METHODS)
def test_channels_without_a_signal(
    llama: Path, calibration_file: str, tmp_path: Path, method: str
) -> None:
    source = changed(
        llama,
        tmp_path / "source",
        embed_tokens=zero,
        input_layernorm=zero,
        layers_1_post_attention_layernorm=zero,
    )
    report = run(source, tmp_path / "out", METHODS[method], calibration=calibration_file)
    assert_good(tmp_path / "out", report)


def odd_rows(weight: torch.Tensor) -> None:
    weight[1] = 0.25
    weight[2] = -0.375
    weight[3] = 0
    weight[4, 7] = 30.0


@pytest.mark.parametrize("method", METHODS)
def test_odd_rows_stay_finite(
    llama: Path, calibration_file: str, tmp_path: Path, method: str
) -> None:
    names = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    source = changed(llama, tmp_path / "source", **dict.fromkeys(names, odd_rows))
    report = run(source, tmp_path / "out", METHODS[method], calibration=calibration_file)
    assert_good(tmp_path / "out", report, kl=0.25)


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (METHODS["gptq"], 0.01),
        (METHODS["awq"], 0.01),
        (METHODS["fp8-kv"], 0.01),
        (METHODS["int8-activations"], 0.01),
        (Q("rtn", symmetric=False), 0.01),
        (Q("rtn"), 1 / 15),  # its 15 steps span [-c, c] and leave c half a step outside
    ],
)
def test_constant_rows_keep_their_value(
    tmp_path: Path, calibration_file: str, options: QuantizeOptions, least: float
) -> None:
    """In OLMo 2, where no norm comes before a projection that scales could apply_scales into."""
    source = changed(
        tiny.tiny_checkpoint(tmp_path / "olmo", "olmo2"), tmp_path / "source", q_proj=odd_rows
    )
    run(source, tmp_path / "out", options, calibration=calibration_file, evaluate=False)
    checkpoint = open_checkpoint(tmp_path / "out")
    for row in LayerStream.from_checkpoint(
        checkpoint, model_spec(checkpoint.config)
    ).layer_parameters(0):
        if row.module == "layers.0.attn.qkv":
            dense = read_parameter(checkpoint, row, torch.float32)
            assert ((dense[1] / 0.25 - 1).abs() <= least + 1e-3).all()
            assert ((dense[2] / -0.375 - 1).abs() <= least + 1e-3).all()
            assert not dense[3].any()


@pytest.mark.parametrize("method", METHODS)
def test_tied_embeddings_stay_tied(tmp_path: Path, calibration_file: str, method: str) -> None:
    source = tiny.tiny_checkpoint(
        tmp_path / "source", "llama", num_hidden_layers=1, tie_word_embeddings=True
    )
    report = run(source, tmp_path / "out", METHODS[method], calibration=calibration_file)
    assert_good(tmp_path / "out", report)
    assert not [name for name in tensors(tmp_path / "out") if "lm_head" in name]


# Algorithms and their originals


@pytest.fixture(scope="module")
def structured(llama: Path) -> Path:
    """A model whose inputs have structure: few directions carry most of the signal."""
    generator = torch.Generator().manual_seed(5)
    embedding = (
        torch.randn(tiny.VOCAB, 12, generator=generator)
        @ torch.randn(12, 64, generator=generator)
        * 0.3
    )

    def embed(weight: torch.Tensor) -> None:
        weight.copy_(embedding)

    def sharpen(weight: torch.Tensor) -> None:
        weight.mul_(3)

    return changed(llama, llama.parent / "structured", embed_tokens=embed, lm_head=sharpen)


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "gptq-max", pytest.param("awq-max", marks=pytest.mark.slow)]
)
def test_calibrated_methods_beat_rtn_and_leave_the_source_alone(
    structured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    opened = open_checkpoint(structured)
    monkeypatch.setattr(plan, "open_checkpoint", lambda *_, **__: opened)
    before = sha256_file(structured / WEIGHTS)
    runs = [
        run(structured, tmp_path / name, METHODS[method], samples=16, seq_len=128, eval_windows=4)
        for name in "ab"
    ]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert sha256_file(structured / WEIGHTS) == before
    rounded = run(structured, tmp_path / "rtn", Q("rtn", format=runs[0]["format"]), eval_windows=4)
    assert rounded["schemes"][0]["label"] == runs[0]["schemes"][0]["label"]
    assert (
        runs[0]["quality"]["mean_kl"]
        == runs[1]["quality"]["mean_kl"]
        < rounded["quality"]["mean_kl"]
    )


# A disturbed run


def edit_weights(source: Path) -> None:
    loaded = load_file(source / WEIGHTS)
    loaded["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(loaded, source / WEIGHTS, {"format": "pt"})


def edit_config(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["rope_theta"] = 5000.0
    (source / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("stage", "edit", "file"),
    [
        ("check", edit_config, "config.json"),  # after it was read and before it is hashed
        ("quantize", edit_config, "config.json"),
        ("quantize", edit_weights, WEIGHTS),
        ("evaluate", edit_weights, WEIGHTS),
    ],
)
def test_source_that_changes_during_the_run_is_an_error(
    llama: Path,
    calibration_file: str,
    tmp_path: Path,
    stage: str,
    edit: Callable[[Path], None],
    file: str,
) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    with pytest.raises(InputError, match=file.replace(".", r"\.")):
        run(
            source,
            tmp_path / "out",
            METHODS["gptq"],
            Stopping(stage, 1, partial(edit, source)),
            calibration=calibration_file,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("cut", "message"),
    [(Path.unlink, "cannot be read"), (lambda path: os.truncate(path, 9000), "ends at byte 9000")],
)
def test_source_that_vanishes_during_the_run_is_an_error(
    llama: Path, calibration_file: str, tmp_path: Path, cut: Callable[[Path], None], message: str
) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    stopping = Stopping("quantize", 1, partial(cut, source / WEIGHTS))
    with pytest.raises(InputError, match=rf"source/model\.safetensors {message}"):
        run(
            source,
            tmp_path / "out",
            METHODS["gptq"],
            stopping,
            calibration=calibration_file,
            evaluate=False,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("edit", [edit_weights, edit_config])
def test_resume_starts_over_when_the_source_changed(
    llama: Path, calibration_file: str, tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    options = METHODS["gptq"]
    with pytest.raises(InterruptedRunError):
        run(
            source,
            tmp_path / "out",
            options,
            Stopping("quantize", 1, interrupt),
            calibration=calibration_file,
            evaluate=False,
        )
    edit(source)
    run(source, tmp_path / "out", options, calibration=calibration_file, evaluate=False)
    run(source, tmp_path / "fresh", options, calibration=calibration_file, evaluate=False)
    assert weights(tmp_path / "out") == weights(tmp_path / "fresh")
    manifest = json.loads((tmp_path / "out" / "llmkit.json").read_text())
    assert manifest["source"]["files"] == {
        name: sha256_file(source / name) for name in ("config.json", WEIGHTS)
    }


@pytest.mark.parametrize("method", ["gptq", "target-bits"])
def test_second_run_with_the_same_output_is_refused_with_the_pid(
    llama: Path, calibration_file: str, tmp_path: Path, undisturbed: Undisturbed, method: str
) -> None:
    out = tmp_path / "out"
    options = METHODS[method]
    refusals = []

    def second() -> None:
        with pytest.raises(
            OutputError, match=rf"being written by another run \(process {first}\)"
        ) as caught:
            run(llama, out, options, calibration=calibration_file, evaluate=False, seed=1)
        assert caught.value.exit_code == 5

    def start() -> None:
        refusals.append(faults.forked(second))

    first = os.getpid()
    run(
        llama,
        out,
        options,
        Stopping("quantize", 1, start),
        calibration=calibration_file,
        evaluate=False,
    )
    assert refusals == [0]
    assert weights(out) == undisturbed(method)
    assert beside(out) == {"out"}


# Seeds


@pytest.mark.parametrize("method", CALIBRATED)
def test_seed_decides_the_bytes(
    llama: Path, calibration_file: str, tmp_path: Path, undisturbed: Undisturbed, method: str
) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        run(
            llama,
            tmp_path / name,
            METHODS[method],
            calibration=calibration_file,
            evaluate=False,
            seed=seed,
        )
    assert weights(tmp_path / "same") == undisturbed(method)
    assert weights(tmp_path / "other") != undisturbed(method)


def test_seed_decides_the_generated_calibration_text(llama: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        run(
            llama,
            tmp_path / name,
            METHODS["gptq"],
            calibration="self",
            evaluate=False,
            samples=2,
            seed=seed,
        )
    assert weights(tmp_path / "one") == weights(tmp_path / "same")
    assert weights(tmp_path / "one") != weights(tmp_path / "other")


# Architectures

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma2": {},
    "gemma3_text": {},
    "granite": {"residual_multiplier": 0.4},
    "olmo2": {},
    "mixtral": {},
    "qwen3_moe": {},
}
NUM_MAPPINGS = {"llama": 4, "olmo2": 2, "mixtral": 2 + 4, "qwen3_moe": 2 + 4}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("families")

    def made(architecture: str) -> Path:
        path = folder / architecture
        if not path.exists():
            tiny.tiny_checkpoint(
                path, architecture, num_hidden_layers=1, **ARCHITECTURES[architecture]
            )
        return path

    return made


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_apply_scales_does_not_change_the_layers_output(
    families: Callable[[str], Path], architecture: str
) -> None:
    checkpoint: Checkpoint = open_checkpoint(families(architecture))
    spec = model_spec(checkpoint.config)
    stream = LayerStream.from_checkpoint(checkpoint, spec)
    draw = torch.Generator().manual_seed(3)
    context = stream.batch_context(2, 24)
    hidden = torch.randn(48, spec.hidden_size, generator=draw)

    def update(layer: object) -> torch.Tensor:
        assert callable(layer)
        output: torch.Tensor = layer(hidden, context.cos_sin, context.batch, context.caches[0])
        return output - hidden

    together = stream.layer(0)
    wanted = update(together)
    mappings = [
        mapping
        for row in stream.layer_parameters(0)
        if row.is_linear and (mapping := find_mapping(together, row)) is not None
    ]
    assert len(mappings) == NUM_MAPPINGS.get(architecture, 4)
    for mapping in mappings:
        outputs = (
            spec.hidden_size
            if mapping.rows is None
            else len(together.linears[mapping.smooth_layer].weight[mapping.rows])
        )
        scales = torch.rand(outputs, generator=draw) * 1.5 + 0.5
        dtypes = dict.fromkeys(
            (f"{mapping.smooth_layer}.weight", f"{mapping.smooth_layer}.bias"), torch.float32
        )
        alone = stream.layer(0)
        for layer in (alone, together):
            weight = layer.linears[mapping.linear].weight.clone()
            used = apply_scales(layer, mapping, scales, dtypes)
            torch.testing.assert_close(layer.linears[mapping.linear].weight, weight * used)
            torch.testing.assert_close(used, mapping.repeat_kv(scales), rtol=1e-4, atol=1e-5)
            difference = (update(layer) - wanted).abs().max()
            assert difference <= 1e-4 * wanted.abs().max(), (mapping, difference)
    assert torch.equal(update(stream.layer(0)), wanted), "the source was edited"


STAYING_CLOSE = ("awq", "int8-activations", "gptq-max", "fp8-kv")


# `make test` takes one method for each architecture, in turn, and all for two.
@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        pytest.param(
            architecture,
            method,
            marks=[]
            if architecture in ("llama", "mixtral") or (row + column) % len(STAYING_CLOSE) == 0
            else [pytest.mark.slow],
        )
        for row, architecture in enumerate(ARCHITECTURES)
        for column, method in enumerate(STAYING_CLOSE)
    ],
)
def test_every_architecture_stays_close(
    families: Callable[[str], Path],
    tmp_path: Path,
    calibration_file: str,
    architecture: str,
    method: str,
) -> None:
    report = run(
        families(architecture), tmp_path / "out", METHODS[method], calibration=calibration_file
    )
    assert_good(tmp_path / "out", report)
