"""What SageMaker's images start, as a process on a loopback address."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from support.free_ports import free_port
from support.router_process import LlmkitRouter

ENTRYPOINT = Path(__file__).parents[2] / "recipes/sagemaker/sagemaker-entrypoint.sh"


class SagemakerContainer(LlmkitRouter):
    """`docker run IMAGE serve` without Docker. variables: of the container."""

    def __init__(self, log: Path, variables: Mapping[str, str]) -> None:
        self.log = log
        self.key = None
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [ENTRYPOINT, "serve"],
                stdout=stream,
                stderr=stream,
                env=entrypoint_environment(Path(sys.executable).parent) | dict(variables),
            )


def entrypoint_environment(folder: Path) -> dict[str, str]:
    """The environment of the entry point: `llmkit` of `folder`, on a free loopback port."""
    return dict(os.environ) | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "LLMKIT_SERVE_HOST": "127.0.0.1",
        "SAGEMAKER_BIND_TO_PORT": str(free_port()),
    }
