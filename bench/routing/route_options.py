"""The options of `llmkit bench route`. Nothing heavy is imported: the command line imports them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmkit.common.errors import UsageError
from llmkit.common.option_values import NUMBERS, SHARE, within
from llmkit.common.options import DEVICE, SEED, Option

BUILTIN = "builtin"
AUTO = "auto"
MEASURES = ("exact", "likelihood", "embedding", "reference")
ROUTE_PANEL = "Route"


def _two_prices(option: str, prices: tuple[float, ...]) -> None:
    if len(prices) not in (0, 2) or any(price < 0 for price in prices):
        raise UsageError(
            f"{option} {','.join(map(str, prices))} is wrong",
            "Two prices of a million tokens were expected: the small tier's and the large one's",
        )


@dataclass(frozen=True)
class RouteBenchOptions:
    """How tiers are asked and a route is calibrated."""

    prompts: Annotated[
        str,
        Option(
            "Your prompts: a text file, one a line, or JSONL with `prompt` or `messages`, and "
            "`reference` for right answers; builtin: 171 short questions.",
            metavar="FILE|builtin",
            panel=ROUTE_PANEL,
        ),
    ] = BUILTIN
    agreement: Annotated[
        str,
        Option(
            "What makes an answer of the small tier good: the same text, its likelihood under the "
            "large tier, similar embeddings, or the references of --prompts.",
            metavar="MEASURE",
            choices=(AUTO, *MEASURES),
            panel=ROUTE_PANEL,
        ),
    ] = AUTO
    large_share: Annotated[
        float,
        Option(
            "Share of requests that the large tier may answer.",
            metavar="SHARE",
            format=SHARE,
            panel=ROUTE_PANEL,
        ),
    ] = 0.5
    tokens: Annotated[
        int,
        Option(
            "Tokens at the start of an answer that decide; streams are held back so long.",
            metavar="N",
            min=1,
            max=1024,
            panel=ROUTE_PANEL,
        ),
    ] = 16
    max_tokens: Annotated[
        int,
        Option("Tokens of an answer, at most.", metavar="N", min=1, panel=ROUTE_PANEL),
    ] = 48
    learned: Annotated[
        bool,
        Option(
            "Fit a router on the small tier's embeddings of prompts, too, and write it to the "
            "route.",
            panel=ROUTE_PANEL,
        ),
    ] = False
    name: Annotated[
        str,
        Option("The route's name in the file.", metavar="NAME", panel=ROUTE_PANEL),
    ] = "auto"
    route_file: Annotated[
        Path | None,
        Option(
            "Write the route here, for `llmkit serve --route-config`.",
            metavar="FILE",
            unset="none",
            panel=ROUTE_PANEL,
        ),
    ] = None
    prices: Annotated[
        tuple[float, ...],
        Option(
            "Prices of a million tokens, the small tier's and the large one's.",
            metavar="P,P",
            format=NUMBERS,
            unset="tokens count",
            check=_two_prices,
            panel=ROUTE_PANEL,
        ),
    ] = ()
    concurrency: Annotated[
        int,
        Option("Requests at the same time.", metavar="N", check=within(1, 1024), panel=ROUTE_PANEL),
    ] = 8
    gates: Annotated[
        tuple[str, ...],
        Option(
            "Fail unless this holds, such as route_gap>=0.9; may be repeated.",
            flags=("--gate",),
            metavar="CONDITION",
            unset="none",
            panel=ROUTE_PANEL,
        ),
    ] = ()
    device: Annotated[str, DEVICE] = "auto"
    seed: Annotated[int, SEED] = 0
