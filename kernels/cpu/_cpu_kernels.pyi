"""The functions of the extension module (module.c).

Tensors are passed as addresses; strides are counted in elements. `cpu_kernels` describes the
arguments and checks them.
"""

def levels() -> list[str]: ...
def set_level(name: str, /) -> None: ...
def has_bfloat16() -> bool: ...
def has_compression() -> bool: ...
def set_num_threads(n: int, /) -> None: ...
def num_threads() -> int: ...
def shared_memory_bytes(num_ranks: int, /) -> int: ...
def stop_ranks(memory: int, /) -> None: ...
def all_reduce(memory: int, rank: int, num_ranks: int, x: int, size: int, /) -> None: ...
def all_gather(
    memory: int, rank: int, num_ranks: int, x: int, num_bytes: int, out: int, /
) -> None: ...
def program(calls: list[tuple[str, tuple[float, ...]]], /) -> bytes: ...
def run(program: bytes, /) -> None: ...
def linear(
    weight_type: int,
    inputs: int,
    scale_type: int,
    x: int,
    x_stride: int,
    weight: int,
    scales: int,
    scale_factors: int,
    offsets: int,
    bias: int,
    y: int,
    y_stride: int,
    rows: int,
    cols: int,
    depth: int,
    group_size: int,
    input_scale: int,
    /,
) -> None: ...
def measure_bf16(
    panels: int, num_panels: int, depth: int, top_exponents: int, num_uncompressed: int, /
) -> None: ...
def compress_bf16(
    panels: int,
    num_panels: int,
    depth: int,
    top_exponents: int,
    num_uncompressed: int,
    uncompressed_starts: int,
    to: int,
    /,
) -> None: ...
def head_linear(
    weight_type: int,
    x: int,
    x_stride: int,
    x_head_stride: int,
    weight: int,
    y: int,
    y_stride: int,
    y_head_stride: int,
    rows: int,
    cols: int,
    depth: int,
    num_heads: int,
    /,
) -> None: ...
def paged_attention(
    q: int,
    out: int,
    q_stride: int,
    kv_type: int,
    kv: int,
    scales: int,
    static_scales: int,
    head_stride: int,
    block_size: int,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    num_sequences: int,
    query_lens: int,
    seq_lens: int,
    block_tables: int,
    table_starts: int,
    window: int,
    sinks: int,
    scale: float,
    softcap: float,
    /,
) -> None: ...
def latent_attention(
    q: int,
    out: int,
    q_stride: int,
    kv_type: int,
    latents: int,
    block_size: int,
    head_dim: int,
    value_dim: int,
    num_heads: int,
    num_head_groups: int,
    num_sequences: int,
    query_lens: int,
    seq_lens: int,
    block_tables: int,
    table_starts: int,
    scale: float,
    /,
) -> None: ...
def norm(
    x: int,
    weight: int,
    bias: int,
    y: int,
    rows: int,
    hidden_size: int,
    subtract_mean: int,
    update: int,
    sum_: int,
    rounds: bool,
    eps: float,
    scale: float,
    /,
) -> None: ...
def norm_heads(
    x: int,
    x_stride: int,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    weight: int,
    weight_stride: int,
    subtract_mean: int,
    eps: float,
    /,
) -> None: ...
def add_residual(residual: int, update: int, y: int, size: int, scale: float, /) -> None: ...
def scale_tokens(x: int, x_stride: int, num_tokens: int, size: int, factors: int, /) -> None: ...
def apply_rotary_emb(
    x: int,
    x_stride: int,
    num_tokens: int,
    num_heads: int,
    head_stride: int,
    cos: int,
    sin: int,
    half: int,
    interleaved: int,
    /,
) -> None: ...
def store_kv(
    kv: int,
    kv_stride: int,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    slot_mapping: int,
    kv_type: int,
    cache: int,
    head_stride: int,
    scales: int,
    static_scales: int,
    /,
) -> None: ...
def act_and_mul(
    gate_up: int,
    y: int,
    rows: int,
    size: int,
    activation: int,
    limit: float,
    alpha: float,
    /,
) -> None: ...
def act(x: int, y: int, rows: int, size: int, activation: int, /) -> None: ...
def gated_mlp(
    x: int,
    x_stride: int,
    y: int,
    rows: int,
    linears: int,
    activation: int,
    x_is_rounded: bool,
    limit: float,
    alpha: float,
    /,
) -> None: ...
def argmax(x: int, x_stride: int, rows: int, cols: int, ids: int, is_finite: int, /) -> None: ...
def xielu(
    x: int, y: int, size: int, raw_alpha_p: int, raw_alpha_n: int, beta: int, eps: int, /
) -> None: ...
def apply_gate(
    x: int,
    gate: int,
    gate_stride: int,
    y: int,
    rows: int,
    size: int,
    per_row: int,
    activation: int,
    /,
) -> None: ...
def copy_rows(
    from_: int, from_stride: int, to: int, to_stride: int, rows: int, size: int, /
) -> None: ...
def select_experts(
    logits: int,
    correction_bias: int,
    expert_scales: int,
    weights: int,
    ids: int,
    n_tokens: int,
    n_experts: int,
    n_chosen: int,
    n_groups: int,
    topk_groups: int,
    sigmoid: int,
    normalize: int,
    group_max: int,
    softcap: float,
    scaling_factor: float,
    /,
) -> None: ...
def experts(
    x: int,
    y: int,
    ids: int,
    weights: int,
    n_tokens: int,
    n_chosen: int,
    hidden_size: int,
    intermediate_size: int,
    linears: int,
    n_experts: int,
    gated: int,
    activation: int,
    limit: float,
    alpha: float,
    /,
) -> None: ...
def causal_conv(
    x: int,
    x_stride: int,
    weight: int,
    bias: int,
    state: int,
    y: int,
    num_tokens: int,
    num_channels: int,
    width: int,
    silu: int,
    gated: int,
    num_sequences: int,
    query_lens: int,
    initial_rows: int,
    write_starts: int,
    write_ends: int,
    write_rows: int,
    /,
) -> None: ...
def mamba2_scan(
    xbc: int,
    xbc_stride: int,
    dt: int,
    dt_stride: int,
    A_log: int,
    D: int,
    dt_bias: int,
    state: int,
    y: int,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    state_size: int,
    n_groups: int,
    num_sequences: int,
    query_lens: int,
    initial_rows: int,
    write_starts: int,
    write_ends: int,
    write_rows: int,
    min_dt: float,
    max_dt: float,
    /,
) -> None: ...
def gated_group_rms_norm(
    x: int,
    gate: int,
    gate_stride: int,
    weight: int,
    y: int,
    rows: int,
    size: int,
    n_groups: int,
    weight_stride: int,
    norm_before_gate: int,
    eps: float,
    /,
) -> None: ...
def gated_delta_rule(
    qkv: int,
    qkv_stride: int,
    ba: int,
    ba_stride: int,
    A_log: int,
    dt_bias: int,
    out: int,
    state: int,
    row_stride: int,
    num_k_heads: int,
    num_v_heads: int,
    k_dim: int,
    v_dim: int,
    num_sequences: int,
    query_lens: int,
    initial_rows: int,
    write_starts: int,
    write_ends: int,
    write_rows: int,
    /,
) -> None: ...
