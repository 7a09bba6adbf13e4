"""The settings of `llmkit serve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llmkit.runtime.engine.types import EngineOptions


@dataclass(frozen=True)
class ServeOptions:
    """Everything `run_server` needs; see the help of `llmkit serve`. Sizes in bytes, times in seconds."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    engine: EngineOptions = field(default_factory=EngineOptions)
    served_model_name: str | None = None
    api_key_file: Path | None = None  # one key per line; LLMKIT_API_KEY otherwise
    drain_timeout: float = 30.0
    max_waiting: int = 1024  # requests beyond max_num_seqs before the answer is 429
    max_body_bytes: int = 8 * 1024 * 1024
    body_timeout: float = 30.0
    log_requests: bool = False  # a line of JSON for each, without its text
    debug: bool = False
