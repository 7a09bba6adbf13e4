"""The settings of `llmkit serve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.runtime.engine.types import EngineOptions, Pooling


def default_name(model: str) -> str:
    """What a model is called in the API when nobody says: the last part of its path, or its hub id."""
    path = Path(model)
    return path.resolve().name if path.exists() else model


@dataclass(frozen=True)
class ServeOptions:
    """Everything `run_server` needs; see the help of `llmkit serve`. Sizes in bytes, times in seconds."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    grpc_port: int | None = None  # of the Open Inference Protocol over gRPC; 0: any free one; None: off
    engine: EngineOptions = field(default_factory=EngineOptions)
    served_model_name: str | None = None
    aliases: tuple[str, ...] = ()  # further names of the model
    lora_dir: Path | None = None  # of adapters that clients may load
    api_key_file: Path | None = None  # one key per line, see `keys`; LLMKIT_API_KEY otherwise
    open_metrics: bool = False  # /metrics needs no key
    ssl_certfile: Path | None = None  # PEM, with the chain; None: plain HTTP
    ssl_keyfile: Path | None = None  # its key, where it is in another file
    ssl_ca_certs: Path | None = None  # one of these must vouch for a client
    drain_timeout: float = 30.0
    pooling: Pooling | None = None  # of /v1/embeddings; None: the checkpoint's
    max_waiting: int = 1024  # requests beyond max_num_seqs before the answer is 429
    max_waiting_tokens: int = 1 << 20  # of prompts that have no answer yet, before it is 429; 0: any number
    request_timeout: float | None = None  # that a request may take; its own `timeout` may be shorter
    engine_timeout: float = 60.0  # of an engine's silence while it has requests; 0: for ever
    restart: int = 0  # times in an hour that an engine process may be started again
    max_body_bytes: int = 8 * 1024 * 1024
    body_timeout: float = 30.0
    write_timeout: float = 30.0  # that a client may leave its answer unread
    prefix_cache_dir: Path | None = None  # of long shared prefixes
    prefix_cache_size: int = 10 << 30  # bytes of it
    response_cache: int = 0  # bytes of answers to deterministic requests
    otlp_traces_endpoint: str | None = None  # where spans are sent
    log_requests: bool = False  # a line of JSON for each, without its text
    debug: bool = False

    def as_document(self) -> dict[str, Any]:
        """These as JSON has them; see `of_document`."""
        import msgspec  # no part of `llmkit --help`

        document: dict[str, Any] = msgspec.to_builtins(self, enc_hook=str)
        return document

    @staticmethod
    def of_document(document: dict[str, Any]) -> ServeOptions:
        """The inverse of `as_document`. Raises msgspec.ValidationError for anything else."""
        import msgspec

        return msgspec.convert(document, ServeOptions, dec_hook=lambda kind, value: kind(value))
