"""How GGUF files store the values of some modules in another order: each move with its reverse.

llama.cpp's converter moves rows so that its graphs need fewer steps. The reader takes `load` of
these functions, and the writer takes `store`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmkit.common.errors import InputError

if TYPE_CHECKING:
    import torch

# What moves. "rows": whole rows, so quantized blocks can be moved, too. "columns": the columns of
# each row. "values": anything else.
MoveKind = Literal["rows", "columns", "values"]


@dataclass(frozen=True)
class GgufMove:
    """The order of a checkpoint tensor's values in a file.

    store: from the checkpoint tensor to the tensors of the file, often one. load: the reverse.
    Both get tensors [rows, ...]; those of the kind "rows" take any columns.
    """

    kind: MoveKind
    store: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    load: Callable[..., torch.Tensor]


# From the fields of config.json to a move; None: nothing moves in this model.
MoveFunction = Callable[[Any], GgufMove | None]


def interleaved_halves(heads: str, is_partial: bool = False) -> MoveFunction:
    """RoPE's pairs of rows become neighbours in each head.

    RoPE rotates pairs of rows. In llama.cpp a pair is two neighbouring rows of a head; in Hugging
    Face it is one row of each half. heads: the field of config.json with their number.
    is_partial: only rows of the part of a head that rotates, which comes first, move.
    """

    def move(config: Any) -> GgufMove:
        num_heads = config[heads]
        part = config["partial_rotary_factor"] if is_partial else 1

        def moved(tensor: torch.Tensor, is_stored: bool) -> torch.Tensor:
            import torch  # keeps torch off the path that reads configs and tokenizers

            by_head = tensor.unflatten(0, (num_heads, -1))
            rotary_dim = int(by_head.shape[1] * part)
            pairs = by_head[:, :rotary_dim].unflatten(1, (-1, 2) if is_stored else (2, -1))
            rotated = pairs.transpose(1, 2).flatten(1, 2)
            return torch.cat((rotated, by_head[:, rotary_dim:]), dim=1).flatten(0, 1)

        return GgufMove(
            "rows", lambda tensor: (moved(tensor, False),), lambda tensor: moved(tensor, True)
        )

    return move


def added(offset: float) -> GgufMove:
    """Stored values are larger by an offset."""
    return GgufMove("values", lambda tensor: (tensor + offset,), lambda tensor: tensor - offset)


def negative_exponential(_: Any) -> GgufMove:
    """A_log is stored as A = -exp(A_log)."""
    return GgufMove("values", lambda tensor: (-tensor.exp(),), lambda tensor: tensor.neg().log())


def column(_: Any) -> GgufMove:
    """A vector [n] is stored as [n, 1]."""
    return GgufMove("values", lambda tensor: (tensor[:, None],), lambda tensor: tensor.flatten())


def grouped(groups: str) -> MoveFunction:
    """A vector [n] is stored as [groups, n / groups]. groups: the field of config.json."""

    def move(config: Any) -> GgufMove:
        return GgufMove(
            "values",
            lambda tensor: (tensor.unflatten(0, (config[groups], -1)),),
            lambda tensor: tensor.flatten(),
        )

    return move


def split_rows(*fields: str) -> MoveFunction:
    """Rows of several projections, each of which is a tensor of the file.

    fields: of config.json, with the rows of each.
    """

    def move(config: Any) -> GgufMove:
        import torch  # keeps torch off the path that reads configs and tokenizers

        sizes = [config[name] for name in fields]
        return GgufMove("rows", lambda tensor: tensor.split(sizes), lambda *parts: torch.cat(parts))

    return move


def by_key_head(config: Any) -> GgufMove:
    """Rows of queries, keys, values and gates of one key head after the other (Qwen3-Next).

    The file has queries, keys and values of all heads in one tensor, and gates in another.
    """
    import torch  # keeps torch off the path that reads configs and tokenizers

    heads = config["linear_num_key_heads"]
    keys = config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] // heads * config["linear_value_head_dim"]
    sizes = (keys, keys, values, values)

    def store(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *qkv, gate = tensor.unflatten(0, (heads, -1)).split(sizes, dim=1)
        return torch.cat([part.flatten(0, 1) for part in qkv]), gate.flatten(0, 1)

    def load(qkv: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        parts = [*qkv.split([heads * size for size in sizes[:3]]), gate]
        return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 1)

    return GgufMove("rows", store, load)


def latent_heads(config: Any) -> GgufMove:
    """The linear that makes keys and values of latents (DeepSeek's kv_b_proj), in two tensors.

    [heads * (keys + values), latent] is stored as keys [heads, latent, keys], with which llama.cpp
    multiplies queries, and values [heads, values, latent].
    """
    import torch  # keeps torch off the path that reads configs and tokenizers

    sizes = (config["qk_nope_head_dim"], config["v_head_dim"])

    def store(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        keys, values = tensor.unflatten(0, (-1, sum(sizes))).split(sizes, dim=1)
        return keys.mT, values

    def load(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.cat((keys.mT, values), dim=1).flatten(0, 1)

    return GgufMove("values", store, load)


def tiled_value_heads(part: Literal["qkv", "values", "columns", "heads"]) -> MoveFunction:
    """The first value head of each key head of a gated delta net, then the second ones, and so on.

    part: rows of queries, keys and values; of values; columns of values; a row for each value head.
    """

    def move(config: Any) -> GgufMove:
        key_heads = config["linear_num_key_heads"]
        value_heads = config["linear_num_value_heads"]
        size = 1 if part == "heads" else config["linear_value_head_dim"]
        first = 2 * key_heads * config["linear_key_head_dim"] if part == "qkv" else 0

        def tiled(tensor: torch.Tensor, is_stored: bool) -> torch.Tensor:
            import torch  # keeps torch off the path that reads configs and tokenizers

            values = tensor[first:]
            if len(values) != value_heads * size:
                raise InputError(
                    f"a linear attention has {len(values)} rows of values",
                    f"{value_heads} heads of {size} were expected",
                )
            per_key = value_heads // key_heads
            sizes = (per_key, key_heads, size) if is_stored else (key_heads, per_key, size)
            moved = values.unflatten(0, sizes).transpose(0, 1).flatten(0, 2)
            return torch.cat((tensor[:first], moved)) if first else moved

        def in_columns(tensor: torch.Tensor, is_stored: bool) -> torch.Tensor:
            return tiled(tensor.mT, is_stored).mT

        is_columns = part == "columns"
        change = in_columns if is_columns else tiled
        return GgufMove(
            "columns" if is_columns else "rows",
            lambda tensor: (change(tensor, False),),
            lambda tensor: change(tensor, True),
        )

    return move


def chained(first: MoveFunction, second: MoveFunction) -> MoveFunction:
    """Two moves of one tensor, in the order in which they are stored."""

    def move(config: Any) -> GgufMove | None:
        moves = first(config), second(config)
        if moves[0] is None or moves[1] is None:
            return moves[0] or moves[1]
        inner, outer = moves
        assert inner is not None and outer is not None
        return GgufMove(
            inner.kind if inner.kind == outer.kind else "values",
            lambda tensor: outer.store(*inner.store(tensor)),
            lambda *parts: inner.load(outer.load(*parts)),
        )

    return move
