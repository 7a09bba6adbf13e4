"""The `llmkit` program's first lines: Ctrl-C while the rest is still being imported ends it without a traceback."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Imports the program and runs it on sys.argv; exits."""
    for name in ("stdin", "stdout", "stderr"):  # None where whoever started us has closed it
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115 (for good)
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    from llmkit.cli.main import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
