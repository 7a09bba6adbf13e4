"""The options of an engine. No torch here: the API process and the command line use them, too."""

from dataclasses import dataclass, field, replace
from typing import Annotated

from llmkit.common.errors import UsageError
from llmkit.common.option_values import (
    DTYPE,
    NEGATED,
    NUMBERS,
    SIZE,
    THREADS,
    count_or_auto,
    within,
)
from llmkit.common.options import (
    CPU_ACTIVATIONS,
    DEVICE,
    PERFORMANCE_PANEL,
    REQUIRE_NATIVE,
    CpuActivations,
    Option,
    ValueFormat,
)
from llmkit.runtime.engine.speculation import (
    SPECULATION,
    Speculation,
    check_speculation,
    parse_speculation,
)
from llmkit.runtime.engine.synthetic_acceptance import acceptance_rates

MODEL_PANEL = "Model"
MEMORY_PANEL = "Memory"
NO_KV_OFFLOAD = "off, the KV cache of a CPU is in host memory"  # what --kv-offload does there
DRAFT_TOKENS = 4  # of a draft model without --speculate


def parse_adapters(option: str, values: list[str]) -> dict[str, str]:
    """Directories of LoRA adapters by name, from NAME=DIR values. Raises UsageError."""
    adapters: dict[str, str] = {}
    for value in values:
        name, _, directory = value.partition("=")
        if not name or not directory:
            raise UsageError(
                f"{option} {value!r} is not NAME=DIR",
                "A name and a directory with an equals sign between them",
            )
        if name in adapters:
            raise duplicate_adapter(name, directory)
        adapters[name] = directory
    return adapters


def duplicate_adapter(name: str, directory: str) -> UsageError:
    """The error for an adapter with the name of another adapter or of the model itself."""
    return UsageError(
        f"--lora '{name}={directory}': the name {name!r} is given twice",
        "A name of its own for each model",
    )


ADAPTERS = ValueFormat(
    parse_adapters,
    lambda adapters: [f"{name}={directory}" for name, directory in adapters.items()],
    written_type=list[str],
)


@dataclass(frozen=True)
class EngineOptions:
    """The options of an engine. Sizes are in bytes; a size that is None is planned from the free
    memory.
    """

    device: Annotated[str, DEVICE] = "auto"
    dtype: Annotated[
        str,
        Option(
            "auto, float32, bfloat16 or float16; auto: the model's own. On a CPU it is the type of "
            "weights, inputs and keys: sums stay float32.",
            metavar="DTYPE",
            format=DTYPE,
        ),
    ] = "auto"
    require_native: Annotated[bool, REQUIRE_NATIVE] = False
    max_model_len: Annotated[
        int | None,
        Option(
            "Maximum tokens of a request; auto takes what the model and memory allow.",
            metavar="N|auto",
            format=count_or_auto(),
        ),
    ] = None
    max_num_seqs: Annotated[
        int,
        Option(
            "Maximum requests in one step.",
            metavar="N",
            check=within(1),
            panel=PERFORMANCE_PANEL,
        ),
    ] = 256
    max_num_batched_tokens: Annotated[
        int | None,
        Option(
            "Maximum tokens in one step.",
            metavar="N",
            unset="8192, on the CPU 512",
            check=within(1),
            panel=PERFORMANCE_PANEL,
        ),
    ] = None
    max_cudagraph_capture_size: Annotated[
        int | None,
        Option(
            "Most tokens of a step that runs as a CUDA graph; 0: none. Fewer shorten the start.",
            metavar="N",
            unset="those of --max-num-seqs requests",
            check=within(0),
            panel=PERFORMANCE_PANEL,
        ),
    ] = None
    threads: Annotated[int | None, THREADS] = None
    cpu_activations: Annotated[CpuActivations, CPU_ACTIVATIONS] = "auto"
    kv_cache_memory: Annotated[
        int | None,
        Option(
            "Memory of the KV cache, like 2GiB.",
            metavar="SIZE",
            format=SIZE,
            unset="from the free memory",
            panel=MEMORY_PANEL,
        ),
    ] = None
    kv_offload: Annotated[
        int,
        Option(
            "Host memory for blocks that leave the GPU's prefix cache, of all ranks and replicas "
            "together, like 32GiB; a CPU has no use for it.",
            metavar="SIZE",
            format=SIZE,
            unset="none",
            panel=MEMORY_PANEL,
        ),
    ] = 0
    state_cache_memory: Annotated[
        int | None,
        Option(
            "Memory of the recurrent states that are kept for cached prefixes, like 1GiB; for "
            "models with recurrent layers.",
            metavar="SIZE",
            format=SIZE,
            unset="an eighth of the free memory, on the CPU at most 512 MiB",
            panel=MEMORY_PANEL,
        ),
    ] = None
    kv_cache_dtype: Annotated[
        str,
        Option(
            "auto, float32, bfloat16, float16, int8 or fp8: the type of keys and values; auto: the "
            "one that the checkpoint has scales for, else that of --dtype; with --dtype auto on a "
            "CPU that multiplies bfloat16, bfloat16 for a model in it.",
            choices=("auto", "float32", "bfloat16", "float16", "int8", "fp8"),
            metavar="DTYPE",
            panel=MEMORY_PANEL,
        ),
    ] = "auto"
    gpu_memory_utilization: Annotated[
        float,
        Option(
            "Share of the GPU's memory that may be used.",
            metavar="SHARE",
            check=within(0.05, 1),
            panel=MEMORY_PANEL,
        ),
    ] = 0.9
    cpu_offload: Annotated[
        int,
        Option(
            "Weights that stay in host memory, for a model larger than the GPU.",
            metavar="SIZE",
            format=SIZE,
            unset="none",
            panel=MEMORY_PANEL,
        ),
    ] = 0
    tp: Annotated[
        int,
        Option(
            "Tensor-parallel ranks, a process each; a sharded MODEL has its own number.",
            flags=("--tp", "--tensor-parallel-size"),
            metavar="N",
            check=within(1),
        ),
    ] = 1
    pp: Annotated[
        int,
        Option(
            "Pipeline stages that the layers are divided into.",
            flags=("--pp", "--pipeline-parallel-size"),
            metavar="N",
            check=within(1),
            panel=PERFORMANCE_PANEL,
        ),
    ] = 1
    ep: Annotated[
        int,
        Option(
            "Groups of the --tp ranks that experts are divided over.",
            metavar="N",
            check=within(1),
            panel=PERFORMANCE_PANEL,
        ),
    ] = 1
    prefix_cache: Annotated[
        bool,
        Option(
            "Do not cache the prefixes of prompts for later requests.",
            flags=("--no-prefix-cache",),
            format=NEGATED,
            follows="pooling",
            panel=PERFORMANCE_PANEL,
        ),
    ] = True
    speculate: Annotated[
        int | str,
        Option(
            "Draft tokens ahead for each request and verify them in one step: how many, and how: "
            "ngram or suffix (from earlier text), or mtp (the model's own head), as in mtp:2.",
            metavar="N|HOW",
            format=SPECULATION,
            check=check_speculation,
            follows="response_cache",
            panel=PERFORMANCE_PANEL,
        ),
    ] = 0
    draft_model: Annotated[
        str | None,
        Option(
            "A small model or an EAGLE-3 head that drafts tokens for --speculate (4 tokens where "
            "that is not given).",
            metavar="MODEL",
            unset="tokens are looked up in the earlier text",
            follows="speculate",
            panel=PERFORMANCE_PANEL,
        ),
    ] = None
    synthetic_acceptance_rates: Annotated[
        tuple[float, ...],
        Option(
            "To measure speed only: accept this share of the draft tokens, or the share at each "
            "place of a draft, by a draw; the answers are not the model's.",
            flags=("--synthetic-accept-rates",),
            metavar="SHARE,...",
            format=NUMBERS,
            unset="the model accepts",
            follows="draft_model",
            panel=PERFORMANCE_PANEL,
        ),
    ] = ()
    synthetic_acceptance_length: Annotated[
        float | None,
        Option(
            "The same by the mean tokens of a step with drafts, the model's own included.",
            flags=("--synthetic-accept-length",),
            metavar="TOKENS",
            unset="the model accepts",
            follows="synthetic_accept_rates",
            panel=PERFORMANCE_PANEL,
        ),
    ] = None
    adapters: Annotated[
        dict[str, str],
        Option(
            "A LoRA adapter, served as model NAME; repeat for more.",
            flags=("--lora",),
            metavar="NAME=DIR",
            format=ADAPTERS,
            unset="none",
            follows="synthetic_accept_length",
            panel=MODEL_PANEL,
        ),
    ] = field(default_factory=dict)
    dp: Annotated[
        int,
        Option(
            "Replicas of the model on this machine, behind the one port.",
            metavar="N",
            check=within(1, 64),
            follows="lora_dir",
            panel=PERFORMANCE_PANEL,
        ),
    ] = 1

    def with_draft_tokens(self) -> "EngineOptions":
        """These options, with a number of draft tokens where only the draft model is given."""
        if self.draft_model is None or self.speculate:
            return self
        return replace(self, speculate=DRAFT_TOKENS)

    @property
    def speculation(self) -> Speculation:
        """What `speculate` means."""
        return parse_speculation(self.speculate)

    @property
    def acceptance_rates(self) -> tuple[float, ...]:
        """See `acceptance_rates`; () unless draft tokens are accepted by a draw.

        Raises UsageError for rates that do not fit the draft tokens.
        """
        return acceptance_rates(
            self.synthetic_acceptance_rates,
            self.synthetic_acceptance_length,
            self.speculation.num_tokens,
        )
