"""Which figures a target is going to have, and why it lacks others: known before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmkit.bench.gates import require_measured
from llmkit.bench.metrics import BOUNDS, CONDITIONAL, QUALITY, SPEED_METRICS, STARTUP, STARTUP_METRICS, TASK
from llmkit.bench.quality_url import Asked
from llmkit.bench.report import single_target
from llmkit.bench.startup import STAGES, stage_name
from llmkit.checkpoint.errors import UsageError

if TYPE_CHECKING:
    from llmkit.bench.plan import Plan, Target

_STARTING = {"served": ("ready_s", "peak_memory_bytes"), "offline": ("load_s", "peak_memory_bytes")}
_CLIENT = ("client_us", "client_busy", "client_late_ms")


def check_gates_can_be_measured(plan: Plan) -> None:
    """Refuse a gate before the work and not after it."""
    for target in [target for target in plan.targets if target.name != plan.baseline] or plan.targets:
        require_measured(plan.gates, measurable(plan, target), target.name)
    relative = [gate for gate in plan.gates if gate.of_baseline]
    if not relative:
        return
    if plan.baseline is None:
        raise UsageError(f"gate {relative[0].text!r} compares with a baseline", todo="Name one with --baseline")
    if plan.saved is not None:
        figures = list(single_target(plan.saved, plan.baseline).figures())
    else:
        figures = next(measurable(plan, target) for target in plan.targets if target.name == plan.baseline)
    require_measured(relative, figures, f"the baseline, {plan.baseline}")


def measurable(plan: Plan, target: Target) -> list[str]:
    """The metrics that a target is going to have."""
    names = list(target.report.metrics)
    if plan.options.quality and target.name in plan.scored:
        names += ("perplexity", "load_s") if target.checkpoint else ("perplexity",)
        names += _against(plan, target)
    if plan.tasks:
        names += plan.tasks.metrics
    if plan.starts:
        figures = (*STARTUP_METRICS, *map(stage_name, STAGES))
        names += ("peak_memory_bytes", *(f"{STARTUP}.{metric}" for metric in figures))
    elif plan.options.speed or plan.tasks:
        names += _STARTING.get(target.report.kind, ())
    if plan.options.speed and not plan.starts:
        if plan.sweeps:
            names += ("saturation_tps", "saturation_load")
        if target.checkpoint and plan.gpus.energy_j() is not None:
            names += ("peak_gpu_bytes",)
        wanted = [name for name in SPEED_METRICS if name not in CONDITIONAL or _conditions(plan, target, name)]
        names += [f"{scenario.name}.{metric}" for scenario in plan.scenarios for metric in wanted]
    return list(dict.fromkeys(names))


def _against(plan: Plan, target: Target) -> Sequence[str]:
    """The figures of quality against the baseline that a target is going to have."""
    ends = [plan.scored.get(name or "") for name in (plan.baseline, target.name)]
    if target.name == plan.baseline or None in ends or any(isinstance(e, Asked) and e.way != "ids" for e in ends):
        return ()
    return BOUNDS if any(isinstance(end, Asked) for end in ends) else QUALITY


def absent(plan: Plan, target: Target) -> dict[str, str]:
    """What a reader may look for and a target is not going to have, and why."""
    options, server = plan.options, target.server is not None
    have = {name if name.startswith(TASK) else name.rpartition(".")[2] for name in measurable(plan, target)}
    offline, cpu = target.report.kind == "offline", plan.device == "cpu"
    others = "of a server that runs already" if server else ""
    quality = "--no-quality" if not options.quality else "the server tells nothing of a prompt's tokens"
    speed = others or ("" if options.speed and not plan.starts else "no load was run")
    bound = "a server tells of the most probable tokens only" if have & set(BOUNDS) else ""
    base = "the baseline" if target.name == plan.baseline else "no baseline that tells of tokens"
    gpu = others or ("no GPU" if cpu else "NVML, of the extra gpu, does not tell")
    peaks = "on several ranks" if plan.peaks and not server else "llmkit doctor --peaks has not measured this machine"
    why = (
        (("checkpoint_bytes", "peak_memory_bytes"), others or "nothing was served"),
        (("ready_s",), others or ("--offline starts no server" if offline else "nothing was served")),
        (("load_s",), others or "measured with quality, or --offline"),
        (("mbu", "mfu"), speed or peaks),
        (("gpu_power_w", "energy_per_token_j", "peak_gpu_bytes"), speed or gpu),
        (("client_us", "client_busy", "client_late_ms"), "--offline has no client" if offline else speed),
        (("goodput",), speed if not options.speed else "no --slo"),
        (("cost_per_million",), speed if not options.speed else "no --price-per-hour"),
        (("perplexity",), quality),
        (QUALITY, quality if "perplexity" not in have else bound or base),
    )
    found = {", ".join(name for name in names if name not in have): reason for names, reason in why}
    return {names: reason for names, reason in found.items() if names}


def _conditions(plan: Plan, target: Target, metric: str) -> bool:
    """Whether a metric of CONDITIONAL is going to be there."""
    if metric in _CLIENT:
        return target.report.kind != "offline"
    if metric in ("mbu", "mfu"):
        return plan.counts(target)
    if metric in ("gpu_power_w", "energy_per_token_j"):
        return target.checkpoint is not None and plan.gpus.energy_j() is not None
    return bool(plan.slo) if metric == "goodput" else plan.options.price_per_hour is not None
