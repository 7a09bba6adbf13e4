"""The settings of `llmkit serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServeOptions:
    """Everything `run_server` needs; see the help of `llmkit serve`. Sizes in bytes, times in seconds."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None  # None: the model's own limit, or what the KV cache can hold
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    kv_cache_memory: int | None = None  # bytes; None: planned from gpu_memory_utilization
    gpu_memory_utilization: float = 0.9
    served_model_name: str | None = None
    api_key_file: Path | None = None  # one key per line; LLMKIT_API_KEY otherwise
    drain_timeout: float = 30.0
    max_waiting: int = 1024  # requests beyond max_num_seqs before the answer is 429
    max_body_bytes: int = 8 * 1024 * 1024
    body_timeout: float = 30.0
    debug: bool = False
