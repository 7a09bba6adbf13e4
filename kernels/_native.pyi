"""What native.c gives Python: functions of addresses, sizes and strides in elements; see native.py."""

def supported() -> bool: ...
def product(
    kind: int, x: int, ldx: int, w: int, scales: int, offsets: int, bias: int, y: int, ldy: int, m: int, n: int, k: int,
    group: int, /,
) -> None: ...  # fmt: skip
def product_integers(
    x: int, ldx: int, w: int, scales: int, bias: int, y: int, ldy: int, m: int, n: int, k: int, /
) -> None: ...
def attention(
    q: int, out: int, ldq: int, coded: int, kv: int, scales: int, stored: int, head: int, size: int, dim: int,
    heads: int, kv_heads: int, sequences: int, queries: int, contexts: int, tables: int, starts: int, window: int,
    scale: float, softcap: float, /,
) -> None: ...  # fmt: skip
def rms_norm(x: int, weight: int, y: int, rows: int, size: int, eps: float, /) -> None: ...
def rotate(x: int, ldx: int, tokens: int, heads: int, dim: int, cos: int, sin: int, half: int, /) -> None: ...
def store(
    kv: int, ldkv: int, tokens: int, heads: int, dim: int, slots: int, to: int, head: int, /
) -> None: ...
def gate(x: int, y: int, rows: int, size: int, gelu: int, /) -> None: ...
