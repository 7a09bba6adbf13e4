"""The options of `llmkit serve`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from llmkit.common.errors import ChatTemplateError, InputError, UsageError
from llmkit.common.option_values import SIZE, within, zero_or_at_least
from llmkit.common.options import PERFORMANCE_PANEL, Argument, Option
from llmkit.runtime.engine.engine_options import MODEL_PANEL, EngineOptions
from llmkit.runtime.engine.sampling_params import Pooling
from llmkit.runtime.server.http.hosts import check_allowed_host
from llmkit.runtime.server.http.origins import check_allowed_origin
from llmkit.runtime.server.text.dialect_detection import (
    REASONING_MARKS,
    check_reasoning_parser,
    check_tool_parser,
    dialect_names,
)

SERVER_PANEL = "Server"
RESPONSES_PANEL = "Stored responses"
SECURITY_PANEL = "Security"
# Options of servers of several kinds.
ALLOWED_HOSTS = Option(
    "Name in the Host header to accept, too; repeat for more, * accepts every one.",
    metavar="NAME",
    unset="loopback names; on other addresses every name",
    check=check_allowed_host,
    panel=SECURITY_PANEL,
)
ALLOWED_ORIGINS = Option(
    "Origin of web pages that may use the server; repeat for more, SCHEME://* or * accept many.",
    metavar="ORIGIN",
    unset="the server's own page",
    check=check_allowed_origin,
    panel=SECURITY_PANEL,
)


def default_name(model: str) -> str:
    """The model's name in the API by default: the last part of its path, or its hub id."""
    path = Path(model)
    return path.resolve().name if path.exists() else model


def _is_directory(option: str, path: Path) -> None:
    if not path.is_dir():
        raise InputError(
            f"{option} {path} is not a directory", "A directory of adapters was expected"
        )


def _compiles(option: str, path: Path) -> None:
    # Both import libraries that other starts do not need.
    from llmkit.checkpoint.tokenizer import read_chat_template
    from llmkit.common.chat_template import check_chat_template

    try:
        check_chat_template(read_chat_template(path))
    except ChatTemplateError as error:
        raise template_error(f"{option} {path}", error) from None


def _is_two_tokens(option: str, tokens: str) -> None:
    if len(tokens.split(",")) != 2 or not all(tokens.split(",")):
        raise UsageError(f"{option} is {tokens!r}", "Two tokens with a comma between them")


def template_error(what: str, error: Exception) -> InputError:
    """The error for the chat template `what`, which does not compile."""
    return InputError(
        f"{what} does not compile ({error})",
        "A Jinja2 template as transformers renders it was expected",
        "Mend it, or give another file with --chat-template",
    )


@dataclass(frozen=True)
class ServeOptions:
    """What `run_server` serves, and how. Sizes are in bytes, times in seconds."""

    model: Annotated[
        str,
        Argument(
            "A checkpoint: a directory, a hub id or a .gguf file; NAME=MODEL loads it when a "
            "request names it.",
            metavar="MODEL",
            completes_models=True,
        ),
    ]
    host: Annotated[
        str,
        Option("Address to listen on; any other than loopback needs an API key.", metavar="HOST"),
    ] = "127.0.0.1"
    port: Annotated[int, Option("Port to listen on; 0 takes a free one.", metavar="N")] = 8000
    grpc_port: Annotated[
        int | None,
        Option(
            "Port of the Open Inference Protocol over gRPC; 0 takes a free one.",
            metavar="N",
            unset="off",
            panel=SERVER_PANEL,
        ),
    ] = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    # The command line sets both from --served-model-name: the first name, and the others.
    served_model_name: str | None = None
    aliases: tuple[str, ...] = ()
    api_key_file: Annotated[
        Path | None,
        Option(
            "A file of API keys, one a line, with optional limits; clients must send one of them.",
            metavar="FILE",
            unset="LLMKIT_API_KEY, if set",
            panel=SECURITY_PANEL,
        ),
    ] = None
    ssl_certfile: Annotated[
        Path | None,
        Option(
            "Speak HTTPS with this certificate and chain (PEM).",
            metavar="FILE",
            unset="HTTP",
            panel=SECURITY_PANEL,
        ),
    ] = None
    ssl_keyfile: Annotated[
        Path | None,
        Option(
            "The certificate's key (PEM).",
            metavar="FILE",
            unset="in --ssl-certfile",
            panel=SECURITY_PANEL,
        ),
    ] = None
    ssl_ca_certs: Annotated[
        Path | None,
        Option(
            "Clients must show a certificate that one of these has signed (PEM).",
            metavar="FILE",
            unset="no certificate is required",
            panel=SECURITY_PANEL,
        ),
    ] = None
    allowed_hosts: Annotated[
        tuple[str, ...],
        ALLOWED_HOSTS,
    ] = ()
    allowed_origins: Annotated[
        tuple[str, ...],
        ALLOWED_ORIGINS,
    ] = ()
    open_metrics: Annotated[
        bool,
        Option(
            "Allow /metrics to be read without a key.",
            panel=SECURITY_PANEL,
        ),
    ] = False
    drain_timeout: Annotated[
        float,
        Option(
            "How long running requests may take after SIGTERM.",
            metavar="SECONDS",
            check=within(0),
            panel=SERVER_PANEL,
        ),
    ] = 30.0
    request_timeout: Annotated[
        float | None,
        Option(
            "How long a request may take; its own `timeout` may be shorter.",
            metavar="SECONDS",
            unset="no limit",
            check=within(0.001, 86_400),
            panel=SERVER_PANEL,
        ),
    ] = None
    max_waiting: Annotated[
        int,
        Option(
            "Requests that may wait beyond --max-num-seqs; more get 429.",
            metavar="N",
            check=within(0),
            panel=SERVER_PANEL,
        ),
    ] = 1024
    max_waiting_tokens: Annotated[
        int,
        Option(
            "Maximum tokens of all prompts without a response yet; 0: no limit.",
            metavar="N",
            check=within(0),
            panel=SERVER_PANEL,
        ),
    ] = 1 << 20
    engine_timeout: Annotated[
        float,
        Option(
            "Silence after which an engine with requests counts as hung; 5 times as long while it "
            "computes; 0: never.",
            metavar="SECONDS",
            check=zero_or_at_least(1),
            panel=SERVER_PANEL,
        ),
    ] = 60.0
    restart: Annotated[
        int,
        Option(
            "Restart an engine that died or hung, up to N times in an hour.",
            metavar="N",
            check=within(0),
            panel=SERVER_PANEL,
        ),
    ] = 0
    chat_template: Annotated[
        Path | None,
        Option(
            "A Jinja2 file to render chats with, in place of the checkpoint's chat template.",
            metavar="FILE",
            unset="the checkpoint's",
            check=_compiles,
            panel=MODEL_PANEL,
        ),
    ] = None
    tool_parser: Annotated[
        str | None,
        Option(
            f"How the model writes tool calls: {', '.join(dialect_names())}.",
            metavar="NAME",
            unset="found by response_template or the chat template",
            check=check_tool_parser,
            panel=MODEL_PANEL,
        ),
    ] = None
    reasoning_parser: Annotated[
        str | None,
        Option(
            f"How the model marks reasoning: {', '.join(sorted(REASONING_MARKS))}.",
            metavar="NAME",
            unset="found by response_template or the chat template",
            check=check_reasoning_parser,
            panel=MODEL_PANEL,
        ),
    ] = None
    pooling: Annotated[
        Pooling | None,
        Option(
            "last or mean: embeddings are the last token's hidden state or the mean of all "
            "tokens'.",
            metavar="KIND",
            unset="the checkpoint's, else last",
            panel=MODEL_PANEL,
        ),
    ] = None
    classifier_from_token: Annotated[
        str | None,
        Option(
            "The two tokens whose logits after a pair of texts score it in /score and /rerank, the "
            "negative one first, such as no,yes for Qwen3-Reranker.",
            metavar="NO,YES",
            unset="the checkpoint's",
            check=_is_two_tokens,
            panel=MODEL_PANEL,
        ),
    ] = None
    prefix_cache_dir: Annotated[
        Path | None,
        Option(
            "Keep long prefixes that requests share in this private folder, also over a restart.",
            metavar="DIR",
            unset="memory only",
            panel=PERFORMANCE_PANEL,
        ),
    ] = None
    prefix_cache_size: Annotated[
        int,
        Option(
            "Maximum size of --prefix-cache-dir; the prefixes used last stay.",
            metavar="SIZE",
            format=SIZE,
            panel=PERFORMANCE_PANEL,
        ),
    ] = 10 << 30
    response_cache: Annotated[
        int,
        Option(
            "Memory for responses to deterministic requests; the same request then gets its "
            "response at once.",
            metavar="SIZE",
            format=SIZE,
            unset="none",
            panel=PERFORMANCE_PANEL,
        ),
    ] = 0
    semantic_cache: Annotated[
        float | None,
        Option(
            "Answer a question with the answer to an earlier one whose embedding is this similar "
            "(cosine); read docs/semantic-cache.md first.",
            metavar="SIMILARITY",
            unset="off",
            check=within(0.01, 1),
            panel=PERFORMANCE_PANEL,
        ),
    ] = None
    semantic_cache_model: Annotated[
        str | None,
        Option(
            "A small model that embeds the questions, in a process of its own on the CPU.",
            metavar="MODEL",
            unset="the served model",
            panel=PERFORMANCE_PANEL,
        ),
    ] = None
    semantic_cache_requests: Annotated[
        Literal["asked", "all"],
        Option(
            "asked: only requests with semantic_cache: true or the header x-llmkit-semantic-cache: "
            "on use it; all: those of temperature 0, too.",
            metavar="WHICH",
            panel=PERFORMANCE_PANEL,
        ),
    ] = "asked"
    semantic_cache_size: Annotated[
        int,
        Option(
            "Memory for --semantic-cache; the answers used last stay.",
            metavar="SIZE",
            format=SIZE,
            panel=PERFORMANCE_PANEL,
        ),
    ] = 64 << 20
    semantic_cache_ttl: Annotated[
        float,
        Option(
            "How long an answer of --semantic-cache is used; 0: until memory is short.",
            metavar="SECONDS",
            check=within(0),
            panel=PERFORMANCE_PANEL,
        ),
    ] = 3600.0
    store_responses: Annotated[
        bool,
        Option(
            "Keep responses of /v1/responses in memory for previous_response_id, background and "
            "GET, unless a request says store: false.",
            panel=RESPONSES_PANEL,
        ),
    ] = False
    response_store: Annotated[
        Path | None,
        Option(
            "Keep them in SQLite files in this private folder, also over a restart.",
            metavar="DIR",
            unset="memory, with --store-responses",
            panel=RESPONSES_PANEL,
        ),
    ] = None
    response_store_size: Annotated[
        int,
        Option(
            "Maximum size of all stored responses; those used last stay.",
            metavar="SIZE",
            format=SIZE,
            panel=RESPONSES_PANEL,
        ),
    ] = 256 << 20
    response_store_ttl: Annotated[
        float,
        Option(
            "How long a response is stored; the default is 30 days.",
            metavar="SECONDS",
            check=within(1),
            panel=RESPONSES_PANEL,
        ),
    ] = 2_592_000.0
    lora_dir: Annotated[
        Path | None,
        Option(
            "Let clients load and unload the LoRA adapters of this folder while the server runs.",
            metavar="DIR",
            unset="none",
            check=_is_directory,
            panel=MODEL_PANEL,
        ),
    ] = None
    reload_dir: Annotated[
        Path | None,
        Option(
            "Let clients with an admin key load other weights of the model, from this folder.",
            metavar="DIR",
            unset="none",
            check=_is_directory,
            panel=MODEL_PANEL,
        ),
    ] = None
    enable_sleep_mode: Annotated[
        bool,
        Option(
            "Let clients with an admin key free the memory of the KV cache or of the engine, "
            "and get it again (/sleep, /wake_up).",
            panel=SERVER_PANEL,
        ),
    ] = False
    strict_fields: Annotated[
        bool,
        Option(
            "Refuse requests with unknown fields; without it these are ignored and named in the "
            "header x-llmkit-ignored.",
            panel=SERVER_PANEL,
        ),
    ] = False
    keep_client_nonce: Annotated[
        bool,
        Option(
            "Leave what Claude Code changes in each system prompt; without it, it is removed, so "
            "that prefixes are cached, and the header x-llmkit-ignored names it.",
            panel=SERVER_PANEL,
        ),
    ] = False
    sagemaker: Annotated[
        Literal["single-model", "multi-model"] | None,
        Option(
            "For a container of Amazon SageMaker, which sends no API key: other addresses than "
            "loopback need none. multi-model: MODEL is a folder of models, which requests to "
            "/models load and unload.",
            metavar="MODE",
            unset="off",
            panel=SERVER_PANEL,
        ),
    ] = None
    log_requests: Annotated[
        bool,
        Option(
            "Write a JSON line to stderr for each request, without its text.",
            panel=SERVER_PANEL,
        ),
    ] = False
    otlp_traces_endpoint: Annotated[
        str | None,
        Option(
            "Send a span for each request to this OpenTelemetry collector, by OTLP over HTTP.",
            metavar="URL",
            unset="none",
            panel=SERVER_PANEL,
        ),
    ] = None
    # Not on the command line.
    behind_router: bool = False  # only a router, which gives orders in headers, can connect
    usage_file: str | None = None  # of keys' limits, which the processes of a router share
    max_body_bytes: int = 8 * 1024 * 1024
    body_timeout: float = 30.0
    write_timeout: float = 30.0  # the longest time that a client may leave its answer unread
    stream_keep_alive: float = 10.0  # the longest time that a stream is silent
    debug: bool = False

    @property
    def label_tokens(self) -> tuple[str, ...]:
        """The tokens of `classifier_from_token`; (): it is not given."""
        return tuple(self.classifier_from_token.split(",")) if self.classifier_from_token else ()

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values; see `from_dict`."""
        import msgspec  # kept off the start of `llmkit --help`

        document: dict[str, Any] = msgspec.to_builtins(self, enc_hook=str)
        return document

    @staticmethod
    def from_dict(document: dict[str, Any]) -> "ServeOptions":
        """The inverse of `to_dict`. Raises msgspec.ValidationError for any other document."""
        import msgspec  # kept off the start of `llmkit --help`

        return msgspec.convert(document, ServeOptions, dec_hook=lambda kind, value: kind(value))
