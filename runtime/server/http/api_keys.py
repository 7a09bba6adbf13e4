"""API keys: the clients that hold them, and their limits."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.common.errors import InputError
from llmkit.runtime.process_channel import API_KEY_VARIABLE
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.serve_options import ServeOptions

if TYPE_CHECKING:
    from llmkit.runtime.server.choice import Choice

_LIMITS = ("max_requests", "max_tokens_per_minute")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LIMIT = re.compile(r"[1-9][0-9]{0,11}")
_LINE_FORMAT = f"KEY [name=NAME] {' '.join(f'[{limit}=N]' for limit in _LIMITS)}"


@dataclass(eq=False)
class Client:
    """The holder of one API key, with its limits and its running requests.

    The key itself is not kept, only its SHA-256.
    """

    digest: bytes = b""
    name: str = ""
    # Concurrent answers: a request for three answers counts as three. None: no limit.
    max_requests: int | None = None
    # Prompt and completion tokens together. None: no limit.
    max_tokens_per_minute: int | None = None
    # The running requests.
    admissions: set[Admission] = field(default_factory=set)
    # A token bucket: the tokens used, minus the tokens that were refilled until `_charge_time`.
    _charged_tokens: float = 0.0
    _charge_time: float = 0.0  # time.monotonic() of the last update

    @staticmethod
    def of(key: str) -> Client:
        """Return a client with `key` and without limits."""
        return Client(hashlib.sha256(key.encode()).digest())

    def admit(self) -> Admission:
        """Admit a new request. Raises ApiError 429 when a limit is reached."""
        self._charge()
        rate = self.max_tokens_per_minute
        if rate and self._charged_tokens >= rate:
            wait_s = max(1, math.ceil((self._charged_tokens - rate) * 60 / rate))
            raise _limit_reached(
                f"This key has used its {rate} tokens of this minute.",
                "tokens_per_minute_exceeded",
                wait_s,
            )
        admission = Admission(self)
        self.check_max_requests(admission.num_answers)
        self.admissions.add(admission)
        return admission

    def release(self, admission: Admission) -> None:
        """Remove a request that is complete or cancelled."""
        self._charge()
        self.admissions.remove(admission)

    def check_max_requests(self, num_new_answers: int) -> None:
        """Raise ApiError 429 when `num_new_answers` more would exceed `max_requests`."""
        if self.max_requests is None:
            return
        num_answers = sum(admission.num_answers for admission in self.admissions)
        if num_answers + num_new_answers > self.max_requests:
            raise _limit_reached(
                f"This key may have {self.max_requests} running answers, and has {num_answers}.",
                "too_many_requests",
                wait_s=1,
            )

    def _charge(self) -> None:
        """Add the tokens used since the last call, and subtract those refilled since then."""
        if self.max_tokens_per_minute is None:
            return
        for admission in self.admissions:
            num_tokens = admission.num_tokens
            self._charged_tokens += num_tokens - admission.num_charged_tokens
            admission.num_charged_tokens = num_tokens
        now = time.monotonic()
        given_back = (now - self._charge_time) * self.max_tokens_per_minute / 60
        self._charged_tokens = max(0.0, self._charged_tokens - given_back)
        self._charge_time = now


class Admission:
    """One running request of a client, from its headers to the last byte of its response."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.num_charged_tokens = 0  # set by the client
        self._choices: Sequence[Choice] = ()

    def reserve(self, choices: Sequence[Choice]) -> None:
        """Reserve quota for `choices`.

        Raises ApiError 429 when they exceed the limit now, and 400 when they always would.
        """
        max_requests = self.client.max_requests
        if max_requests is not None and len(choices) > max_requests:
            message = (
                f"The request asks for {len(choices)} answers; "
                f"this key may have {max_requests} under way."
            )
            raise ApiError(400, message, code="too_many_prompts", param="prompt")
        self.client.check_max_requests(len(choices) - self.num_answers)
        self._choices = choices

    @property
    def num_answers(self) -> int:
        """The number of answers that this request counts as."""
        return max(1, len(self._choices))

    @property
    def num_tokens(self) -> int:
        """The prompt and completion tokens so far."""
        return sum(
            len(choice.request.prompt_token_ids) + choice.completion_tokens
            for choice in self._choices
        )


def find_client(clients: Sequence[Client], key: bytes) -> Client | None:
    """Return the client with `key`, or None.

    All keys are compared, each in constant time, so the response time reveals nothing about them.
    """
    digest = hashlib.sha256(key).digest()
    matches = [client for client in clients if hmac.compare_digest(digest, client.digest)]
    return matches[0] if matches else None


def load_api_keys(options: ServeOptions) -> tuple[Client, ...]:
    """Return the clients of the key file, else the one of LLMKIT_API_KEY, else none.

    Raises InputError for a wrong file. Its message never contains a key.
    """
    if options.api_key_file is None:
        key = os.environ.get(API_KEY_VARIABLE, "").strip()
        return (Client.of(key),) if key else ()
    path = Path(options.api_key_file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"the API key file cannot be read ({path}: {error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"the API key file is not UTF-8 ({path})") from None
    clients: list[Client] = []
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        client = _parse_line(line.split(), f"{path}:{line_number}")
        for earlier in clients:
            if earlier.digest == client.digest or (earlier.name and earlier.name == client.name):
                raise InputError(
                    f"{path}:{line_number}: the key or its name is in an earlier line, too"
                )
        clients.append(client)
    if not clients:
        raise InputError(f"the API key file has no keys ({path})", "One key a line is expected")
    return tuple(clients)


def _parse_line(words: list[str], location: str) -> Client:
    client = Client.of(words[0])
    seen: set[str] = set()
    for word_number, word in enumerate(words[1:], 2):
        name, _, value = word.partition("=")
        if name not in ("name", *_LIMITS):
            # The word may be a part of a key, so the message does not repeat it.
            raise InputError(
                f"{location}: word {word_number} is not a field", f"A line is {_LINE_FORMAT}"
            )
        if name in seen:
            raise InputError(f"{location}: {name} is given twice")
        seen.add(name)
        if name == "name":
            if not _NAME.fullmatch(value):
                raise InputError(
                    f"{location}: {name} is wrong ({value[:80]!r})",
                    "up to 64 of A-Z a-z 0-9 _ . - was expected",
                )
            client.name = value
        else:
            if not _LIMIT.fullmatch(value):
                raise InputError(
                    f"{location}: {name} is wrong ({value[:80]!r})",
                    "a whole number above 0 was expected",
                )
            setattr(client, name, int(value))
    return client


def _limit_reached(message: str, code: str, wait_s: int) -> ApiError:
    return ApiError(
        429, f"{message} Try again later.", code=code, headers={"retry-after": str(wait_s)}
    )
