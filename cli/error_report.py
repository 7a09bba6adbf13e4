"""How a failure ends: one line on stderr, an exit code, and with --json a document on stdout."""

from __future__ import annotations

import contextlib
import errno
import sys
import traceback
from dataclasses import dataclass, replace
from typing import Any

from llmkit.cli.output import write_json
from llmkit.common.errors import InputError, LlmkitError, is_out_of_memory

# Exit codes that are not those of an LlmkitError class.
BUG = 70
INTERRUPTED = 130
TERMINATED = 143
SHORTAGE = 4

# Errors of the operating system that the environment causes, not llmkit.
SHORTAGES = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EMFILE: "too many open files",
    errno.ENOMEM: "out of memory",
}
# Errors of the operating system for a path that cannot be used as it is.
WRONG_PATH = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived; `code` is the exit code. Not an Exception, so that no `except
    Exception` swallows it.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class Failure:
    """An error as it is reported: the parts of an LlmkitError, its type and the exit code."""

    type: str  # the name of the exception's class
    exit_code: int
    what: str
    expected: str = ""
    todo: str = ""
    resume: str = ""  # the command line that resumes the work

    @property
    def line(self) -> str:
        """The text for stderr, on one line."""
        parts = (self.what, self.expected, self.todo)
        text = ". ".join(part.rstrip(".") for part in parts if part) + "."
        if self.resume:
            text += f" To resume: {self.resume}"
        return " ".join(text.split())

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document for stdout."""
        error = {
            "what": self.what,
            "expected": self.expected,
            "todo": f"To resume: {self.resume}" if self.resume else self.todo,
            "exit_code": self.exit_code,
            "type": self.type,
        }
        return {"error": error}


def report(
    error: BaseException, command: str, debug: bool, resume: str = "", as_json: bool = False
) -> int:
    """Prints one line for an error of a command on stderr and returns the exit code.

    command: "quantize", or "" for llmkit itself. resume: the command line that resumes the work.
    as_json: print the error as a JSON document on stdout, too.
    """
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    failure = _explain(error, debug)
    if isinstance(error, (Stopped, KeyboardInterrupt)) and resume:
        failure = replace(failure, resume=resume)
    program = f"llmkit {command}".rstrip()
    sys.stderr.write(f"{program}: error: {failure.line}\n")
    if as_json:
        with contextlib.suppress(OSError):  # the reader of stdout has gone
            write_json(failure.document)
    return failure.exit_code


def _explain(error: BaseException, debug: bool) -> Failure:
    name = type(error).__name__
    if isinstance(error, LlmkitError):
        return Failure(name, error.exit_code, error.what, error.expected, error.todo)
    if isinstance(error, Stopped):
        return Failure(name, error.code, "stopped")
    if isinstance(error, KeyboardInterrupt):
        return Failure(Stopped.__name__, INTERRUPTED, "stopped")
    if isinstance(error, OSError) and error.errno in SHORTAGES:
        path = f" ({error.filename})" if error.filename else ""
        return Failure(name, SHORTAGE, f"{SHORTAGES[error.errno]}{path}")
    if isinstance(error, OSError) and error.errno in WRONG_PATH and error.filename:
        return Failure(
            name,
            InputError.exit_code,
            f"{error.filename}: {error.strerror}",
            "Another path was expected",
        )
    if is_out_of_memory(error):
        reason = str(error).splitlines()[0] if str(error) else name
        return Failure(name, SHORTAGE, f"out of memory ({reason})")
    hint = "" if debug else "Run it again with --debug for the traceback"
    return Failure(name, BUG, f"{name}: {error}", "This is a bug in llmkit", hint)
