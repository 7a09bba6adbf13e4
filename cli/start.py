"""The entry point of `llmkit`: Ctrl-C during the imports ends it without a traceback."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Imports the program and runs it on sys.argv; exits."""
    # A stream that the parent process has closed is None.
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    from llmkit.cli.main import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
