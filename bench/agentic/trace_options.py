"""The options of `llmkit bench trace`. Nothing heavy is imported: the command line imports them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmkit.common.option_values import TOKEN_RANGE, within
from llmkit.common.options import SEED, Option


@dataclass(frozen=True)
class TraceOptions:
    """What a generated trace holds. Ranges are lowest and highest; draws are uniform."""

    output: Annotated[Path, Option("The trace to write.", flags=("--output", "-o"), metavar="FILE")]
    sessions: Annotated[int, Option("Sessions, sub-agents not counted.", metavar="N", min=1)] = 100
    turns: Annotated[
        tuple[int, int],
        Option("Requests of a session.", metavar="N|LOW-HIGH", format=TOKEN_RANGE),
    ] = (3, 12)
    agents: Annotated[
        int,
        Option(
            "Kinds of agents; sessions of one kind share the system prompt.", metavar="N", min=1
        ),
    ] = 1
    tools: Annotated[
        int,
        Option("Tools of each agent; 0: nothing is called.", metavar="N", min=0, max=256),
    ] = 8
    system_tokens: Annotated[
        int, Option("Tokens of a system prompt, without tools.", metavar="N", min=1)
    ] = 1000
    user_tokens: Annotated[
        tuple[int, int],
        Option("Tokens of a user's message.", metavar="N|LOW-HIGH", format=TOKEN_RANGE),
    ] = (50, 400)
    result_tokens: Annotated[
        tuple[int, int],
        Option("Tokens of a tool's result.", metavar="N|LOW-HIGH", format=TOKEN_RANGE),
    ] = (50, 1000)
    output_tokens: Annotated[
        tuple[int, int],
        Option("Tokens of an answer.", metavar="N|LOW-HIGH", format=TOKEN_RANGE),
    ] = (30, 300)
    think_time: Annotated[
        float,
        Option(
            "Mean seconds from an answer to the next turn, exponentially distributed: tools run, "
            "people read.",
            metavar="SECONDS",
            check=within(0, 86_400),
        ),
    ] = 1.0
    rate: Annotated[
        float | None,
        Option(
            "Sessions per second, as timestamps with Poisson gaps.",
            metavar="R",
            check=within(0.000_001),
            unset="no timestamps",
        ),
    ] = None
    branches: Annotated[
        float,
        Option(
            "Share of turns, the last one of a session apart, that start a sub-agent.",
            metavar="SHARE",
            check=within(0, 1),
        ),
    ] = 0.0
    seed: Annotated[int, SEED] = 0
