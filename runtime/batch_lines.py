"""The lines of a batch in OpenAI's format: requests and results."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import msgspec

from llmkit.runtime.server.schemas.ignored_fields import HEADER as IGNORED_FIELDS_HEADER

URLS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
)
MAX_LINE_BYTES = 64 << 20
MAX_ID_CHARS = 512
_BOM = b"\xef\xbb\xbf"
_POSITION = re.compile(r"\.\d+(?=\.|$)")  # in a list, in the name of a field
_ID_PREFIX = re.compile(r"[a-z]+[-_]")  # of a response, such as "chatcmpl-"


class LineError(Exception):
    """Why a line is not sent. `code` is for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Line:
    """One line of the input. A line that cannot be sent has an `error` and no `url` and `body`."""

    number: int  # from 1; blank lines count
    end: int  # bytes of the input up to the end of this line
    custom_id: str | None
    url: str = ""
    body: bytes = b""
    error: LineError | None = None

    @property
    def id(self) -> str:
        """The id of its result, the same in every run."""
        return hashlib.sha256(f"{self.number} {self.custom_id}".encode()).hexdigest()[:24]


def read_lines(file: BinaryIO, model: str) -> Iterator[Line]:
    """The lines of `file` that are not blank. model: for requests that name none.

    It remembers about 100 bytes of each line, to find duplicate ids.
    """
    seen: set[bytes] = set()  # digests of custom ids
    number = 0
    end = 0
    while True:
        text = file.readline(MAX_LINE_BYTES + 1)
        if not text:
            return
        number += 1
        end += len(text)
        long = len(text) > MAX_LINE_BYTES
        while long and text and not text.endswith(b"\n"):  # skip the rest of the line
            text = file.readline(1 << 20)
            end += len(text)
        if number == 1:
            text = text.removeprefix(_BOM)
        if long:
            error = LineError("line_too_long", f"Line {number} has over {MAX_LINE_BYTES} bytes.")
            yield Line(number, end, None, error=error)
        elif text.strip():
            yield _line(number, end, text, model, seen)


def _line(number: int, end: int, text: bytes, model: str, seen: set[bytes]) -> Line:
    custom_id = None
    try:
        try:
            request = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise LineError("invalid_json_line", f"Line {number} is not JSON: {error}.") from None
        if not isinstance(request, dict):
            raise LineError("invalid_json_line", f"Line {number} is not a JSON object.")
        value = request.get("custom_id")
        if not isinstance(value, str) or not 0 < len(value) <= MAX_ID_CHARS:
            message = f"Line {number} has no custom_id, a text of 1 to {MAX_ID_CHARS} characters."
            raise LineError("invalid_custom_id", message)
        custom_id = value
        digest = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in seen:
            raise LineError(
                "duplicate_custom_id", f"Line {number} has the custom_id of an earlier line."
            )
        seen.add(digest)
        if request.get("method", "POST") != "POST":
            raise LineError("invalid_method", f"Line {number}: the method must be POST.")
        if request.get("url") not in URLS:
            raise LineError(
                "invalid_url", f"Line {number}: the url must be one of {', '.join(URLS)}."
            )
        body = request.get("body")
        if not isinstance(body, dict):
            raise LineError("invalid_body", f"Line {number}: the body must be a JSON object.")
        if body.get("stream"):
            raise LineError("invalid_body", f"Line {number}: nothing is streamed in a batch.")
        return Line(
            number, end, custom_id, request["url"], msgspec.json.encode({"model": model} | body)
        )
    except LineError as error:
        return Line(number, end, custom_id, error=error)


def error_result(line: Line, error: LineError) -> bytes:
    """The result of a line that was not sent, or whose response is unusable."""
    return _result(line, None, {"code": error.code, "message": str(error)})


def response_result(
    line: Line, status: int, content: bytes, created: int, ignored_fields: str = ""
) -> bytes:
    """The result of a line with the server's response.

    It is the same in every run: the response's id and `created` (Unix seconds) are replaced, and
    the number of cached tokens is left out. ignored_fields: the value of the response's header
    IGNORED_FIELDS_HEADER, which is kept if it is not empty.
    """
    try:
        body = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return error_result(
            line, LineError("invalid_answer", f"The server answered {status} and no JSON.")
        )
    if isinstance(body, dict):
        if isinstance(body.get("id"), str):
            prefix = _ID_PREFIX.match(body["id"])
            body["id"] = (prefix[0] if prefix else "") + line.id
        for name in {"created", "created_at"} & body.keys():
            body[name] = created
        usage = body.get("usage")
        if isinstance(usage, dict):
            for name in ("prompt_tokens_details", "input_tokens_details"):
                usage.pop(name, None)
    response = {"status_code": status, "request_id": f"req_{line.id}", "body": body}
    if ignored_fields:
        response["headers"] = {IGNORED_FIELDS_HEADER: ignored_fields}
    return _result(line, response, None)


def _result(line: Line, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    result = {
        "id": f"batch_req_{line.id}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
    return msgspec.json.encode(result) + b"\n"


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class _Error(msgspec.Struct):
    code: str | None = None


class _Body(msgspec.Struct):
    usage: _Usage | None = None
    error: _Error | None = None


class _Response(msgspec.Struct):
    status_code: int
    body: Any
    headers: dict[str, str] = {}


class Result(msgspec.Struct):
    """The parts of a written result that are counted."""

    custom_id: str | None
    response: _Response | None
    error: _Error | None


@dataclass
class Tally:
    """The counts of a batch."""

    requests: int = 0
    resumed: int = 0  # requests that an earlier run has done
    succeeded: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # by code
    # Requests by the field that had no effect in them; `*` is any position in a list.
    ignored_fields: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        """Requests without a good response."""
        return self.requests - self.succeeded

    def add(self, written: bytes) -> Result:
        """Count a line of the output. Raises msgspec.DecodeError for a damaged line."""
        result = msgspec.json.decode(written, type=Result)
        self.requests += 1
        response = result.response
        code = result.error.code if result.error else None
        if response is not None:
            header = response.headers.get(IGNORED_FIELDS_HEADER, "")
            self.ignored_fields.update({_POSITION.sub(".*", name) for name in _names(header)})
            try:
                body = msgspec.convert(response.body, _Body)
            except msgspec.ValidationError:
                body = _Body()
            if response.status_code == 200:
                usage = body.usage or _Usage()
                self.succeeded += 1
                self.prompt_tokens += usage.prompt_tokens or usage.input_tokens
                self.completion_tokens += usage.completion_tokens or usage.output_tokens
            else:
                code = (body.error.code if body.error else None) or f"http_{response.status_code}"
        if code is not None:
            self.errors[code] += 1
        return result


def _names(header: str) -> list[str]:
    """The names in the value of a header; what it only counts ("and 3 more") is no name."""
    return [name for name in header.split(", ") if name and " " not in name]
