"""How a failure ends: one line on stderr and an exit code."""

from __future__ import annotations

import errno
import sys
import traceback

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


def report(error: BaseException, command: str, debug: bool, resume: str = "") -> int:
    """Prints one line for an error of a command and returns the exit code.

    command: "quantize", or "" for llmkit itself. resume: the command line that resumes the work.
    """
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    message, code = _explain(error, debug)
    if isinstance(error, (Stopped, KeyboardInterrupt)) and resume:
        message += f" To resume: {resume}"
    program = f"llmkit {command}".rstrip()
    line = " ".join(message.split())
    sys.stderr.write(f"{program}: error: {line}\n")
    return code


def _explain(error: BaseException, debug: bool) -> tuple[str, int]:
    if isinstance(error, LlmkitError):
        return str(error), error.exit_code
    if isinstance(error, Stopped):
        return "stopped.", error.code
    if isinstance(error, KeyboardInterrupt):
        return "stopped.", INTERRUPTED
    if isinstance(error, OSError) and error.errno in SHORTAGES:
        path = f" ({error.filename})" if error.filename else ""
        return f"{SHORTAGES[error.errno]}{path}.", SHORTAGE
    if isinstance(error, OSError) and error.errno in WRONG_PATH and error.filename:
        return (
            f"{error.filename}: {error.strerror}. Another path was expected.",
            InputError.exit_code,
        )
    if is_out_of_memory(error):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"out of memory ({reason}).", SHORTAGE
    hint = "" if debug else " Run it again with --debug for the traceback."
    return f"{type(error).__name__}: {error}. This is a bug in llmkit.{hint}", BUG
