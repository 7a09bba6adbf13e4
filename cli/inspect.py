"""`llmkit inspect`: the facts about a checkpoint, and the memory it needs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Any

from llmkit.cli.command import MODEL
from llmkit.cli.output import Output, carried_text
from llmkit.common.formatting import bytes_text, count_text

if TYPE_CHECKING:
    from rich.console import Console

MIXER_NAMES = {
    "gated_delta_net": "gated delta net",
    "mamba2": "Mamba 2",
    "short_conv": "gated short convolution",
}
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
    sizes = dict(facts["weight_bytes"])
    if facts["quantization"]:
        carried_bytes = facts["carried"]["bytes"] if facts["carried"] else 0
        sizes["as stored"] = facts["disk_bytes"] - carried_bytes
    for precision, weights in sizes.items():
        cache = _cache_bytes(facts, tokens, "fp32" if precision == "fp32" else "bf16")
        memory.add_row(
            precision, bytes_text(weights), bytes_text(cache), bytes_text(weights + cache)
        )
    console.print(memory)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    quantization = facts["quantization"]
    layout = facts["layout"]
    active = (
        f", of which a token uses {facts['active_parameters'] / 1e6:,.1f} million"
        if facts["moe"]
        else ""
    )
    dtypes = ", ".join(
        f"{count} {dtype}" for dtype, count in sorted(facts["stored_dtypes"].items())
    )
    lines = [
        ("model", f"{facts['reference']} ({facts['kind']})"),
        (
            "architecture",
            f"{facts['architecture']}, {facts['parameters'] / 1e6:,.1f} million parameters{active}",
        ),
        ("runs", f"{facts['support']}: {facts['support_reason']}"),
        (
            "layers",
            f"{facts['layers']} of hidden {facts['hidden']:,}, MLP {facts['intermediate']:,}",
        ),
        *zip_longest(["attention"], _attention_lines(facts) or ["none"], fillvalue=""),
        *([("recurrent", _recurrent_text(facts["recurrent"]))] if facts["recurrent"] else []),
        *([("experts", _experts_text(facts["moe"], facts["layers"]))] if facts["moe"] else []),
        ("vocabulary", _vocabulary_text(facts)),
        ("context", f"{facts['max_positions']:,} tokens"),
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
    lines.append(("KV cache", _kv_cache_text(facts)))
    lines.append(("TP that works", ", ".join(map(str, facts["tp"]))))
    return lines


def _attention_lines(facts: dict[str, Any]) -> list[str]:
    """A line for each kind of attention layers."""
    lines = []
    for kind in facts["attention"]:
        is_everywhere = kind["layers"] == facts["layers"]
        layers = "" if is_everywhere else f"{count_text(kind['layers'], 'layers')}: "
        window = f", window of {kind['sliding_window']:,}" if kind["sliding_window"] else ""
        heads = f"{kind['heads']} query heads, {kind['kv_heads']} KV, of {kind['head_dim']}"
        if kind["latent_dim"]:
            size = f"{kind['latent_dim']} elements of each token are cached"
            heads = f"{kind['heads']} heads of {kind['head_dim']}, latent: {size}"
        lines.append(layers + heads + window)
    if facts["shared_kv_layers"]:
        layers = count_text(facts["shared_kv_layers"], "layers")
        lines.append(f"{layers} without keys and values: those of earlier layers are read")
    return lines


def _recurrent_text(recurrent: dict[str, Any]) -> str:
    """The layers with recurrent states, and the sizes of these."""
    text = f"{count_text(recurrent['layers'], 'layers')}: {MIXER_NAMES[recurrent['mixer']]}"
    if recurrent["heads"]:
        sizes = f"{recurrent['key_dim']} x {recurrent['value_dim']}"
        text += f", {recurrent['heads']} heads with states of {sizes}"
    return (
        f"{text}, convolution of {recurrent['conv_kernel_size']} tokens"
        f" over {recurrent['conv_channels']:,} channels"
    )


def _cache_bytes(facts: dict[str, Any], tokens: int, dtype: str) -> int:
    """The bytes of one sequence's keys, values and recurrent states."""
    itemsize = 4 if dtype == "fp32" else 2
    keys_and_values: int = sum(
        kind["kv_elements_per_token"] * min(tokens, kind["sliding_window"] or tokens) * itemsize
        for kind in facts["attention"]
    )
    states: int = facts["recurrent"]["bytes_per_sequence"][dtype] if facts["recurrent"] else 0
    return keys_and_values + states


def _kv_cache_text(facts: dict[str, Any]) -> str:
    text = f"{bytes_text(facts['kv_bytes_per_token']['bf16'])} a token in bf16"
    windows = [kind for kind in facts["attention"] if kind["sliding_window"]]
    if windows:
        in_windows = 2 * sum(kind["kv_elements_per_token"] for kind in windows)
        beyond = facts["kv_bytes_per_token"]["bf16"] - in_windows
        text += f", {bytes_text(beyond)} beyond the sliding windows"
    if facts["recurrent"]:
        states = facts["recurrent"]["bytes_per_sequence"]["bf16"]
        text += f", and {bytes_text(states)} of recurrent states a sequence"
    return text


def _experts_text(moe: dict[str, Any], num_layers: int) -> str:
    parts = [f"{moe['experts_per_token']} of {moe['experts']}, MLP {moe['intermediate']:,}"]
    if moe["shared_intermediate"]:
        parts.append(f"a shared one of {moe['shared_intermediate']:,}")
    if moe["layers"] < num_layers:
        parts.append(f"in {moe['layers']} of {num_layers} layers")
    router = f"{moe['router']} router"
    if moe["groups"] > 1:
        router += f", {moe['groups_per_token']} of {moe['groups']} groups"
    if moe["correction_bias"]:
        router += ", correction bias"
    return "; ".join([", ".join(parts), router])


def _vocabulary_text(facts: dict[str, Any]) -> str:
    parts = [f"{facts['vocab']:,}"]
    if facts["tied_embeddings"]:
        parts.append("embeddings tied")
    if facts["per_layer_input_size"]:
        parts.append(f"{facts['per_layer_input_size']:,} more embedding dimensions for each layer")
    return ", ".join(parts)
