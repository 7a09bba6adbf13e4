"""The command line of the scripts that read checkpoints for interop_formats.py.

    python SCRIPT --jobs JOBS.json

JOBS.json has `tokens`, a list of token ids, and `jobs`: a list of {"model": DIR, "out": FILE}. For
each job either FILE is written (safetensors), or FILE.error with the text of the exception. All
jobs run in one process, because importing the reader takes longer than a tiny model.
"""

import argparse
import json
import traceback
from collections.abc import Callable
from pathlib import Path


def run_jobs(read: Callable[[Path, list[int], Path], None]) -> None:
    """Call `read` with the model, the tokens and the file to write of each job."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=Path, required=True)
    described = json.loads(parser.parse_args().jobs.read_text())
    for job in described["jobs"]:
        try:
            read(Path(job["model"]), described["tokens"], Path(job["out"]))
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())
            Path(job["out"] + ".error").write_text(f"{type(error).__name__}: {text}")
