"""The sizes of an engine, after the memory plan."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


GPU_STATE_CHUNK = 64  # CHUNK_TOKENS of kernels/recurrent_state.py, which needs torch


@dataclass(frozen=True)
class EngineConfig:
    """The sizes of an engine, after the memory plan, and the features that are on."""

    max_model_len: int  # tokens of one request, prompt and output
    num_blocks: int  # KV cache blocks for full attention
    device: torch.device
    dtype: torch.dtype
    max_num_seqs: int = 256  # sequences that run at the same time
    max_num_batched_tokens: int = 8192  # tokens of one step
    block_size: int = 16  # tokens of one KV cache block
    # The attention windows of the model's layers, None for full attention. Each has its own block
    # tables. Set by Engine.
    sliding_windows: tuple[int | None, ...] = (None,)
    num_window_blocks: int | None = None  # KV cache blocks of each sliding window; None: num_blocks
    kv_cache_dtype: str | None = None  # a name in KV_CACHE_DTYPES; None: `dtype`
    # What `--dtype` says. None: `dtype`, which is that of hidden states (see `EnginePlan`).
    weight_dtype: torch.dtype | None = None
    enable_prefix_caching: bool = True
    # Host memory (`--kv-offload`) for what leaves the prefix cache. 0: none.
    num_host_blocks: int = 0  # KV cache blocks, of each attention window
    num_host_states: int = 0  # recurrent states at the ends of prefixes
    prefill_chunk_size: int = 2048  # tokens of one prompt in a step while other prompts wait
    async_scheduling: bool = False  # launch the next step before this one's tokens are known
    pipeline_parallel_size: int = 1  # stages, and the steps in flight; set by Engine
    num_speculative_tokens: int = 0  # draft tokens per sequence; not with async_scheduling
    # Where draft tokens come from without a draft model: "ngram", "suffix" or, of a model with an
    # MTP head, "mtp".
    draft_method: str = "ngram"
    # See `acceptance_rates`; (): a draft token is accepted when the model samples it.
    synthetic_acceptance_rates: tuple[float, ...] = ()
    enforce_eager: bool = False  # never replay decode steps from a graph
    # Recurrent states. Whether the model has any is set by Engine.
    has_recurrent_states: bool = False
    num_state_snapshots: int = 0  # rows for the states at the ends of cached prefixes
    # The most tokens of a CUDA graph; None: those of max_num_seqs sequences, drafts included.
    max_cudagraph_capture_size: int | None = None

    @property
    def dtype_name(self) -> str:
        """What `--dtype` says, without "auto"."""
        return str(self.weight_dtype or self.dtype).removeprefix("torch.")

    @property
    def receives_drafts(self) -> bool:
        """Whether draft tokens come with a step's results: those of the last stage's MTP head."""
        return self.pipeline_parallel_size > 1 and self.draft_method == "mtp"

    @property
    def state_alignment(self) -> int:
        """Prompts are cut, and recurrent states kept, after multiples of so many tokens.

        A GPU computes the recurrent layers of prompts in chunks of GPU_STATE_CHUNK tokens. A prompt
        that were cut within one would give slightly other results.
        """
        return lcm(self.block_size, GPU_STATE_CHUNK if str(self.device).startswith("cuda") else 1)

    @property
    def num_state_rows(self) -> int:
        """The rows of each layer's recurrent states: of running sequences, then snapshots.

        A sequence has one and, for each draft token that a step verifies, one more.
        """
        if not self.has_recurrent_states:
            return 0
        return self.max_num_seqs * (1 + self.num_speculative_tokens) + self.num_state_snapshots

    def num_blocks_for(self, window: int | None) -> int:
        """The number of KV cache blocks for the layers with this attention window."""
        if window is None or self.num_window_blocks is None:
            return self.num_blocks
        return self.num_window_blocks

    def num_cache_blocks(self, window: int | None) -> int:
        """The blocks of each of these layers: the null block, those that sequences get and, on a
        GPU, a last one for the unused tokens of CUDA graphs.
        """
        return 1 + self.num_blocks_for(window) + int(self.device.type == "cuda")
