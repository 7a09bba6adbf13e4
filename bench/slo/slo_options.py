"""The options of `--mode slo`. Nothing heavy is imported: the command line imports them."""

from dataclasses import dataclass
from typing import Annotated

from llmkit.common.option_values import within
from llmkit.common.options import Option

SLO = "slo"  # the mode, and the scenario at the load that was found
SLO_PANEL = "Most load under an SLO"


@dataclass(frozen=True)
class SloOptions:
    """How `--mode slo` searches."""

    search: Annotated[
        str,
        Option(
            "What --mode slo raises: rate (requests a second, Poisson) or concurrency (clients).",
            choices=("rate", "concurrency"),
            metavar="LOAD",
            panel=SLO_PANEL,
        ),
    ] = "rate"
    attained: Annotated[
        float,
        Option(
            "Share of the requests that must keep the bounds of --slo.",
            metavar="SHARE",
            check=within(0.01, 0.9999),
            panel=SLO_PANEL,
        ),
    ] = 0.99
    precision: Annotated[
        float,
        Option(
            "Width of the interval of the load at which the search ends, as a share.",
            metavar="SHARE",
            check=within(0.005, 1),
            panel=SLO_PANEL,
        ),
    ] = 0.05
    max_probes: Annotated[
        int,
        Option("Loads that are probed in full, at most.", metavar="N", min=2, panel=SLO_PANEL),
    ] = 16
