"""How the memory of a device is divided: the weights, the workspace of a step, and the KV cache."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from llmkit.checkpoint.block_scales import realigned_scheme
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.common.errors import InputError, ShortageError, is_out_of_memory
from llmkit.common.formatting import bytes_text
from llmkit.common.option_values import format_size
from llmkit.kernels.cpu.cpu_kernels import DEPTH_MULTIPLE
from llmkit.kernels.fp4_expert import Fp4Expert
from llmkit.kernels.fp8_block_linear import GROUP_SIZES, Fp8BlockLinear
from llmkit.kernels.latent_attention import EXPANDED_BYTES
from llmkit.kernels.linear_kernel import LinearKernel
from llmkit.kernels.quantized_linear import Fp4Linear, WeightOnlyLinear
from llmkit.kernels.w4a4_linear import W4A4Linear
from llmkit.model.checkpoint_tensors import scheme_of
from llmkit.model.full_forward import hidden_states
from llmkit.model.language_model import LanguageModel
from llmkit.model.linear import (
    PackedLinear,
    gpu_capability,
    gpu_kernel_type,
    held_dtype,
    keeps_weights_packed,
)
from llmkit.model.mla import LatentLinear
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.model.weight_loader import can_stay_packed
from llmkit.runtime.engine.engine_config import GPU_STATE_CHUNK

__all__ = [
    "MemoryPlan",
    "StateMemory",
    "estimate_workspace",
    "free_bytes",
    "is_out_of_memory",
    "loaded_bytes",
    "measure_workspace",
    "plan_memory",
    "require_weights_fit",
    "weight_bytes",
]

# On a CPU, the KV cache gets at most this share of the memory that weights and workspace leave.
CPU_KV_CACHE_SHARE = 0.5
# On a CPU, the default size of the KV cache unless one request needs more. Unused pages take no
# memory.
CPU_KV_CACHE_BYTES = 640 << 20
# On a CPU, the default size of the recurrent states that are kept for cached prefixes.
CPU_STATE_CHECKPOINT_BYTES = 512 << 20
CHECKPOINTS_PER_REQUEST = 8  # recurrent states that are kept, at most, for each running request
EMPTY_CACHE_TOKENS = 1 << 22  # the size of a KV cache of a model without attention
# The shortest context that is chosen without --max-model-len: a chat template, a question and an
# answer of a few sentences.
MIN_CONTEXT_TOKENS = 512
MEBIBYTE = 1 << 20
# Keys and values of long prompts with latent attention, while they are made and read.
EXPANDED_WORKSPACE = 3 * EXPANDED_BYTES
# For each logit of a step while it is sampled. GPU: the model's dtype, two float32 copies for log
# probabilities, and the tables of logits processors. CPU: less, float32, its sorted copy and the
# int64 indices.
BYTES_PER_LOGIT = 20
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class MemoryPlan:
    """How the memory of a device is used, and how many tokens fit into the KV cache."""

    free_bytes: int  # available to the engine before anything is loaded
    weight_bytes: int
    workspace_bytes: int  # of the largest step
    num_blocks: int  # of the KV cache
    bytes_per_block: int
    block_size: int  # tokens
    max_model_len: int  # tokens of one request
    model_limit: int  # tokens of one request that the model itself allows
    cuda_graph_bytes: int = 0
    # Recurrent states; of models without recurrent layers they need no memory.
    max_num_seqs: int = 0  # requests that run at the same time; their states must fit
    bytes_per_state: int = 0  # over all layers
    num_state_rows: int = 0  # states in memory, checkpoints included
    num_state_snapshots: int = 0  # states at the ends of cached prefixes
    # Host memory for what leaves the prefix cache (--kv-offload)
    num_host_blocks: int = 0
    num_host_states: int = 0
    host_bytes: int = 0

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache."""
        return self.num_blocks * self.bytes_per_block

    def num_requests(self, num_tokens: int) -> int:
        """How many requests of `num_tokens` tokens fit into the KV cache at once."""
        return self.num_blocks // -(-num_tokens // self.block_size)

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """The plan as one JSON-ready document."""
        lengths = sorted({min(1024, self.max_model_len), self.max_model_len})
        return {
            "free_bytes": self.free_bytes,
            "weight_bytes": self.weight_bytes,
            "workspace_bytes": self.workspace_bytes,
            **({"cuda_graph_bytes": self.cuda_graph_bytes} if self.cuda_graph_bytes else {}),
            "kv_cache_bytes": self.kv_cache_bytes,
            "kv_blocks": self.num_blocks,
            "kv_block_tokens": self.block_size,
            "kv_bytes_per_token": self.bytes_per_block // self.block_size,
            "kv_cache_tokens": self.num_blocks * self.block_size,
            **self._states_as_dict(),
            "max_model_len": self.max_model_len,
            "model_limit": self.model_limit,
            "requests": {str(length): self.num_requests(length) for length in lengths},
        }

    def _states_as_dict(self) -> dict[str, int]:
        if not self.bytes_per_state:
            return {}
        return {
            "max_num_seqs": self.max_num_seqs,
            "state_bytes_per_request": self.bytes_per_state,
            "state_bytes": self.num_state_rows * self.bytes_per_state,
            "state_checkpoints": self.num_state_snapshots,
        }


@dataclass(frozen=True)
class StateMemory:
    """What an engine wants to keep of recurrent states."""

    bytes_per_state: int = 0  # over all layers; 0: the model has no recurrent layers
    states_per_request: int = 1  # one, and one more for each draft token
    checkpoint_bytes: int | None = None  # for cached prefixes; None: a share of the free memory


NO_STATES = StateMemory()


def plan_memory(
    spec: ModelSpec,
    device: str,
    *,
    free_bytes: int,
    weight_bytes: int,
    workspace_bytes: int,
    kv_bytes_per_token: int,
    max_model_len: int | None,
    max_num_seqs: int,
    kv_cache_memory: int | None,
    cuda_graph_bytes: int = 0,
    block_size: int = 16,
    states: StateMemory = NO_STATES,
) -> MemoryPlan:
    """Divide the free memory of a "cpu" or "cuda" device.

    Where the recurrent states of max_num_seqs requests need more than half of what the caches get,
    fewer requests run at the same time.

    kv_cache_memory: bytes of the KV cache; None: what is left on CUDA, a share of it on a CPU.
    max_model_len: None means the model's own limit, or the longest request that fits, but at least
    MIN_CONTEXT_TOKENS. Raises InputError for a length over the model's limit, and ShortageError
    when weights or workspace do not fit or the cache cannot hold one request of that length.
    """
    limit = spec.max_position_embeddings
    if max_model_len is not None and max_model_len > limit:
        raise InputError(
            f"--max-model-len {max_model_len} is over the model's limit",
            f"At most {limit} tokens (max_position_embeddings)",
            f"Use --max-model-len {limit}",
        )
    bytes_per_block = kv_bytes_per_token * block_size
    left_bytes = free_bytes - weight_bytes - workspace_bytes
    if left_bytes < 0:
        raise ShortageError(
            f"{_exact(workspace_bytes)} of a step's workspace do not fit on {device}",
            f"The weights leave {_exact(free_bytes - weight_bytes)}",
            "Use a smaller --max-num-batched-tokens or --max-num-seqs",
        )
    left_bytes -= cuda_graph_bytes
    if left_bytes < 0:
        raise ShortageError(
            f"{_exact(cuda_graph_bytes)} of CUDA graphs do not fit on {device}",
            f"Weights and workspace leave {_exact(left_bytes + cuda_graph_bytes)}",
            "Use a smaller --max-cudagraph-capture-size or --max-num-seqs",
        )
    if kv_cache_memory is not None and kv_cache_memory > left_bytes:
        raise ShortageError(
            f"--kv-cache-memory {_exact(kv_cache_memory)} does not fit on {device}",
            f"Weights and workspace leave {_exact(left_bytes)}",
            "Use a smaller one",
        )
    planned_seqs, num_checkpoints = _plan_states(
        states, device, left_bytes, kv_cache_memory, max_num_seqs
    )
    num_state_rows = planned_seqs * states.states_per_request + num_checkpoints
    left_bytes -= num_state_rows * states.bytes_per_state
    if kv_cache_memory is not None:
        cache_bytes = kv_cache_memory
    elif device == "cuda":
        cache_bytes = left_bytes
    else:
        one_request_bytes = -(-(max_model_len or limit) // block_size) * bytes_per_block
        wanted_bytes = max(CPU_KV_CACHE_BYTES, one_request_bytes)
        cache_bytes = min(wanted_bytes, int(left_bytes * CPU_KV_CACHE_SHARE))
    if bytes_per_block:
        num_blocks = cache_bytes // bytes_per_block
    else:  # without attention, blocks only name prefixes
        num_blocks = max(limit, EMPTY_CACHE_TOKENS) // block_size
    cache_tokens = num_blocks * block_size
    request_tokens = min(limit, cache_tokens) if max_model_len is None else max_model_len
    least_tokens = max_model_len or min(limit, MIN_CONTEXT_TOKENS)
    if cache_tokens < least_tokens:
        raise _too_small_cache(
            least_tokens,
            cache_tokens,
            -(-least_tokens // block_size) * bytes_per_block,
            cache_bytes,
            left_bytes,
            is_auto=max_model_len is None,
        )
    if kv_cache_memory is None:
        # No more than max_num_seqs requests of full length can use.
        num_blocks = min(num_blocks, planned_seqs * -(-request_tokens // block_size))
    return MemoryPlan(
        free_bytes=free_bytes,
        weight_bytes=weight_bytes,
        workspace_bytes=workspace_bytes,
        num_blocks=num_blocks,
        bytes_per_block=bytes_per_block,
        block_size=block_size,
        max_model_len=request_tokens,
        model_limit=limit,
        cuda_graph_bytes=cuda_graph_bytes,
        max_num_seqs=planned_seqs,
        bytes_per_state=states.bytes_per_state,
        num_state_rows=num_state_rows if states.bytes_per_state else 0,
        num_state_snapshots=num_checkpoints,
    )


def _plan_states(
    states: StateMemory,
    device: str,
    left_bytes: int,
    kv_cache_memory: int | None,
    max_num_seqs: int,
) -> tuple[int, int]:
    """How many requests can have their recurrent states in memory, and how many checkpoints.

    left_bytes: what weights and workspace leave. States get what the size of the KV cache leaves,
    and without such a size half of what the caches get.
    """
    if not states.bytes_per_state:
        return max_num_seqs, 0
    if kv_cache_memory is not None:
        state_bytes = left_bytes - kv_cache_memory
    else:
        share = 1 if device == "cuda" else CPU_KV_CACHE_SHARE
        state_bytes = int(left_bytes * share) // 2
    checkpoint_bytes = states.checkpoint_bytes
    if checkpoint_bytes is None:
        checkpoint_bytes = state_bytes // 4
        if device != "cuda":
            checkpoint_bytes = min(checkpoint_bytes, CPU_STATE_CHECKPOINT_BYTES)
    request_bytes = states.bytes_per_state * states.states_per_request
    if checkpoint_bytes + request_bytes > state_bytes:
        raise ShortageError(
            f"the recurrent states of one request ({_exact(request_bytes)}) and of cached prefixes "
            f"({_exact(checkpoint_bytes)}) do not fit on {device}",
            f"Weights, workspace and KV cache leave {_exact(state_bytes)}",
            "Use a smaller --state-cache-memory or --kv-cache-memory, or a smaller model",
        )
    planned_seqs = min(max_num_seqs, (state_bytes - checkpoint_bytes) // request_bytes)
    most_useful = CHECKPOINTS_PER_REQUEST * max_num_seqs
    return planned_seqs, min(most_useful, checkpoint_bytes // states.bytes_per_state)


def _too_small_cache(
    least_tokens: int,
    cache_tokens: int,
    needed_bytes: int,
    cache_bytes: int,
    left_bytes: int,
    is_auto: bool,
) -> ShortageError:
    """The error for a KV cache that cannot hold one request.

    least_tokens: the tokens of --max-model-len; with is_auto, the least that is useful.
    needed_bytes: for these tokens. left_bytes: what weights and workspace leave.
    """
    need = f"that needs {_exact(needed_bytes)} and there are {_exact(cache_bytes)}"
    size = -(-needed_bytes // MEBIBYTE) * MEBIBYTE
    ways = []
    if size <= left_bytes:
        ways.append(f"use --kv-cache-memory {format_size(size)}")
    if cache_tokens:
        short = " if so short a context is enough" if is_auto else ""
        ways.append(f"use --max-model-len {cache_tokens}{short}")
    todo = " or ".join(ways) or "free some memory or use a smaller model"
    todo = todo[0].upper() + todo[1:]
    if is_auto:
        return ShortageError(
            f"the KV cache is too small: it holds {cache_tokens} tokens",
            f"At least {least_tokens} for one request were expected; {need}",
            todo,
        )
    return ShortageError(
        f"the KV cache cannot hold one request of {least_tokens} tokens: {need}",
        f"At most {cache_tokens} tokens fit",
        todo,
    )


def weight_bytes(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    rows: Iterable[Parameter] | None = None,
    weight_dtype: torch.dtype | None = None,
) -> int:
    """Bytes of the weights in memory, or of those of some rows of the parameter table.

    Weights are dense in `dtype`, except where the kernels of the device compute with the packed
    weights of the checkpoint. weight_dtype: as for `load_model`.
    """
    on_cpu = device.type == "cpu"
    cpu_packs = on_cpu and keeps_weights_packed()
    total = 0
    for row in parameters(spec) if rows is None else rows:
        is_embedding = row.name == "embed.weight"
        is_table = is_embedding or row.name == "per_layer.embed.weight"
        keeps_small_dtype = cpu_packs and (row.is_linear or row.is_lm_head or is_table)
        gpu_packs = not on_cpu and can_stay_packed(device, row, checkpoint.quantization, dtype)
        # A tied embedding is held twice: as the embedding table and as the packed LM head.
        copies = 2 if keeps_small_dtype and spec.tie_word_embeddings and is_embedding else 1
        for tensor in row.source_names:
            scheme = scheme_of(row, tensor, checkpoint.quantization)
            shapes = [part.shape for part in row.sources if part.name == tensor]
            is_dequantized = row.name.endswith("attn.kv_b.weight")  # see mla.LatentLinear
            if checkpoint.quantization and scheme and not is_dequantized:
                stays_packed = cpu_packs or gpu_packs
                num_rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
                if stays_packed:
                    held = realigned_scheme(scheme, row.sources[0].start)
                    kernel = None
                    if not on_cpu:
                        capability = gpu_capability(device)
                        is_expert = row.expert is not None
                        kernel = gpu_kernel_type(held, row.shape, dtype, capability, is_expert)
                    total += _packed_bytes(held, num_rows, columns, kernel)
                    continue
            itemsize = dtype.itemsize
            if keeps_small_dtype and not scheme:
                stored = checkpoint.tensors[tensor].torch_dtype
                wanted = torch.float32 if row.is_float32 else weight_dtype or dtype
                itemsize = held_dtype(stored, wanted).itemsize
            total += copies * itemsize * sum(math.prod(shape) for shape in shapes)
    return total


def _packed_bytes(
    scheme: Scheme, rows: int, columns: int, kernel: type[LinearKernel] | None
) -> int:
    """Bytes that a kernel holds of a quantized weight [rows, columns].

    kernel: of a GPU; None: the compiled CPU kernels.
    """
    bits = 8 if scheme.bits > 4 else 4
    groups = scheme.groups(columns)
    if kernel is None:
        return _cpu_bytes(scheme, bits, rows, columns)
    if kernel is Fp4Linear:  # words of whole blocks, scales in a byte, and a factor for each row
        columns += -columns % (64 if scheme.group_size == 16 else 128)
        return rows * (columns // 2 + groups + 4)
    if kernel in (Fp4Expert, W4A4Linear):
        return rows * (columns // 2 + groups + (4 if scheme.scale_format == "e4m3" else 0))
    if kernel is WeightOnlyLinear:
        block = (32 if scheme.group_size % 64 == 32 else 64) * 16 // bits
        if columns % block:
            block = 32 * 16 // bits
        columns += -columns % block
    if kernel is Fp8BlockLinear and scheme.group_size == -1:
        groups = -(-columns // max(GROUP_SIZES))
    return rows * (columns * bits // 8 + 4 * groups)


def _cpu_bytes(scheme: Scheme, bits: int, rows: int, columns: int) -> int:
    """Bytes of a weight that `pack_weight` packs: whole words, scales and offsets.

    Both of the last are float32. Scales of other formats have a byte, and each row a factor.
    """
    size = columns if scheme.group_size == -1 else scheme.group_size
    if scheme.kind == "float":  # see `QuantizedWeight.with_even_groups`
        size = math.gcd(columns, size)
    if size != columns and (columns % size or size % (8 if bits == 4 else 4)):
        return 4 * rows * columns
    padded_columns = columns + -columns % DEPTH_MULTIPLE
    groups = columns // size
    scales = groups + 4 if scheme.scale_format != "float" else 4 * groups
    offsets = 0 if scheme.symmetric else 4 * groups
    return rows * (padded_columns * bits // 8 + scales + offsets)


def loaded_bytes(model: LanguageModel) -> int:
    """Bytes of the weights of a loaded model."""
    linears, others = model.weights()
    packed = sum(linear.kernel.nbytes for linear in linears if isinstance(linear, PackedLinear))
    latent = [linear for linear in linears if isinstance(linear, LatentLinear)]
    packed += sum(linear.projection.nbytes for linear in latent)
    without_weight = (PackedLinear, LatentLinear)
    dense = [linear.weight for linear in linears if not isinstance(linear, without_weight)]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*dense, *others)}
    return packed + sum(held.values())


def free_bytes(device: torch.device, utilization: float) -> int:
    """Bytes of a device that the engine may use.

    On CUDA the engine leaves a share of 1 - utilization unused.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - total * (1 - utilization)))
    return min(psutil.virtual_memory().available, _cgroup_bytes())


def _cgroup_bytes() -> int:
    """Bytes that the limit of a container leaves; the page cache counts as free."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        pages = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        if limit == "max":
            return UNLIMITED
        return max(0, int(limit) - used + int(pages.get("file", 0)))
    except (OSError, ValueError):
        return UNLIMITED


def require_weights_fit(
    weights: int, free: int, dtype: torch.dtype, device: torch.device, bfloat16_weights: int
) -> None:
    """Raises ShortageError when the weights alone do not fit. All sizes are in bytes.

    dtype: of `--dtype`. bfloat16_weights: the size of the weights with bfloat16.
    """
    if weights <= free:
        return
    if dtype != torch.bfloat16 and bfloat16_weights <= free:
        todo = "Use --dtype bfloat16"
    elif device.type == "cpu":
        todo = "Use a smaller model or a larger device"
    else:
        todo = (
            "Use a smaller model or a larger device, or --cpu-offload to keep some in host memory"
        )
    dtype_name = str(dtype).removeprefix("torch.")
    raise ShortageError(
        f"the weights need {_exact(weights)} in {dtype_name} and {device.type} has {_exact(free)}",
        todo=todo,
    )


def estimate_workspace(
    spec: ModelSpec,
    dtype: torch.dtype,
    step_tokens: int,
    max_num_seqs: int,
    gathers_logits: bool = False,
) -> int:
    """Bytes of a step besides weights and cache.

    Counted are its widest activations and the logits that it samples from. gathers_logits: whether
    a rank has those of the whole vocabulary, as on a GPU.
    """
    activations = activation_bytes(spec, dtype, step_tokens, EXPANDED_WORKSPACE)
    if spec.recurrent is not None:  # projections, and on a GPU the states between chunks
        heads, keys, values = spec.recurrent.state_shape
        projected = 2 * spec.recurrent.conv_channels + 2 * heads * values
        chunk_states = heads * keys * values // GPU_STATE_CHUNK
        mixed = step_tokens * (projected + chunk_states) * dtype.itemsize
        activations = max(activations, mixed)
    vocab_size = spec.full_model.vocab_size if gathers_logits else spec.vocab_size
    return activations + max_num_seqs * vocab_size * BYTES_PER_LOGIT


def activation_bytes(
    spec: ModelSpec, dtype: torch.dtype, num_tokens: int, expanded_latents_bytes: int = 0
) -> int:
    """Bytes of the widest activations of a step.

    expanded_latents_bytes: of the keys and values that latent attention makes of long prompts.
    """
    layers = [spec.for_layer(index) for index in range(len(spec.layers))]
    widest = max((layer.intermediate_size for layer in layers), default=spec.intermediate_size)
    if spec.moe is not None:
        widest = max(widest, spec.moe.num_experts_per_tok * spec.moe.intermediate_size)
    activations = num_tokens * (2 * spec.hidden_size + 3 * widest) * dtype.itemsize
    if spec.mla is not None:  # queries and outputs of both forms
        sizes = spec.mla.qk_head_dim + spec.mla.v_head_dim
        sizes += spec.mla.latent_dim + spec.mla.kv_lora_rank
        latents = num_tokens * spec.num_heads * sizes * dtype.itemsize
        activations = max(activations, latents + expanded_latents_bytes)
    return activations


@torch.inference_mode()
def measure_workspace(model: LanguageModel, step_tokens: int, max_num_seqs: int) -> int:
    """As `estimate_workspace`, but measured on CUDA with one step of prompts.

    Sampling does not run; its logits are counted as `estimate_workspace` does. May raise
    torch.OutOfMemoryError.
    """
    num_prompts = max(1, min(max_num_seqs, step_tokens))
    if model.spec.recurrent is not None:  # their kernels compute longer prompts in chunks
        num_prompts = max(1, min(num_prompts, step_tokens // (2 * GPU_STATE_CHUNK)))
    prompt = torch.zeros(step_tokens // num_prompts, dtype=torch.int64)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    hidden = hidden_states(model, [prompt] * num_prompts)
    model.logits(hidden[:num_prompts])
    torch.cuda.synchronize(model.device)
    peak = torch.cuda.max_memory_allocated(model.device) - before
    torch.cuda.empty_cache()
    if model.spec.mla is not None:  # these prompts are short
        peak += EXPANDED_WORKSPACE
    # The peak includes the float32 logits.
    other_logits = max_num_seqs - num_prompts
    counted = num_prompts * (BYTES_PER_LOGIT - 4) + max(0, other_logits) * BYTES_PER_LOGIT
    return peak + counted * model.spec.full_model.vocab_size


def _exact(count: int) -> str:
    return f"{count} bytes ({bytes_text(count)})" if count >= 1024 else f"{count} bytes"
