"""`llmkit inspect`: the facts about a checkpoint, and the memory it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from llmkit.cli.command import MODEL
from llmkit.cli.output import Output, carried_text
from llmkit.common.formatting import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

# Tokens of KV cache in the memory table.
CONTEXT_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """What `llmkit inspect` takes."""

    model: Annotated[str, MODEL]


def inspect(output: Output, arguments: InspectArguments) -> None:
    """Show a checkpoint's family, size, formats, memory at each precision and the TP sizes that
    work.
    """
    from llmkit.checkpoint.open_checkpoint import open_checkpoint
    from llmkit.model.checkpoint_tensors import check_checkpoint
    from llmkit.model.families import checkpoint_spec
    from llmkit.quant.inspect_checkpoint import inspect_checkpoint
    from llmkit.shard.valid_layouts import valid_tp

    checkpoint = open_checkpoint(arguments.model)
    spec = checkpoint_spec(checkpoint)
    if checkpoint.layout is None:
        check_checkpoint(checkpoint, spec)
    facts = inspect_checkpoint(checkpoint) | {"tp": valid_tp(spec, checkpoint.quantization)}
    output.result(facts, lambda console: _show(console, facts))


def _show(console: Console, facts: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in _lines(facts):
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)
    tokens = min(CONTEXT_TOKENS, facts["max_positions"])
    memory = Table(title=f"memory with {tokens:,} tokens of KV cache", title_justify="left")
    for column in ("precision", "weights", "KV cache", "together"):
        memory.add_column(column, justify="left" if column == "precision" else "right")
    for precision, weights in facts["weight_bytes"].items():
        cache = facts["kv_bytes_per_token"]["fp32" if precision == "fp32" else "bf16"] * tokens
        memory.add_row(
            precision, bytes_text(weights), bytes_text(cache), bytes_text(weights + cache)
        )
    console.print(memory)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    quantization = facts["quantization"]
    layout = facts["layout"]
    experts = f", {facts['experts']} experts" if facts["experts"] else ""
    window = f", sliding window {facts['sliding_window']:,}" if facts["sliding_window"] else ""
    dtypes = ", ".join(
        f"{count} {dtype}" for dtype, count in sorted(facts["stored_dtypes"].items())
    )
    lines = [
        ("model", f"{facts['reference']} ({facts['kind']})"),
        (
            "architecture",
            f"{facts['architecture']}, {facts['parameters'] / 1e6:,.1f} million "
            f"parameters{experts}",
        ),
        ("runs", f"{facts['support']}: {facts['support_reason']}"),
        (
            "layers",
            f"{facts['layers']} of hidden {facts['hidden']:,}, MLP {facts['intermediate']:,}",
        ),
        ("heads", f"{facts['heads']} query, {facts['kv_heads']} KV, of {facts['head_dim']}"),
        (
            "vocabulary",
            f"{facts['vocab']:,}{', embeddings tied' if facts['tied_embeddings'] else ''}",
        ),
        ("context", f"{facts['max_positions']:,} tokens{window}"),
        ("on disk", bytes_text(facts["disk_bytes"])),
        (
            "tensors",
            (dtypes or "in one file a rank") + (", dequantized" if facts["kind"] == "gguf" else ""),
        ),
    ]
    if facts["carried"]:
        lines.append(("does not run", carried_text(facts["carried"])))
    if quantization:
        schemes = [scheme["label"] for scheme in quantization["schemes"]]
        kv = [f"{quantization['kv'].upper()} KV cache"] if quantization["kv"] else []
        lines.append(("quantized", f"{'; '.join(schemes + kv)}; {quantization['format']} format"))
    if layout:
        lines.append(
            ("layout", ", ".join(f"{key} {layout[key]}" for key in ("tp", "pp") if key in layout))
        )
    if facts["written_by"]:
        lines.append(
            (
                "written by",
                f"{facts['written_by'].get('name')} {facts['written_by'].get('version')}",
            )
        )
    lines.append(("KV cache", f"{bytes_text(facts['kv_bytes_per_token']['bf16'])} a token in bf16"))
    lines.append(("TP that works", ", ".join(map(str, facts["tp"]))))
    return lines
