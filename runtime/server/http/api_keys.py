"""API keys: the clients that hold them, and their limits."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.common.errors import InputError
from llmkit.runtime.process_channel import API_KEY_VARIABLE, ROUTER_KEY_VARIABLE
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.http.key_usage import KeyUsage
from llmkit.runtime.server.serve_options import ServeOptions

if TYPE_CHECKING:
    from llmkit.runtime.server.choice import Choice

_LIMITS = ("max_requests", "max_tokens_per_minute")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LIMIT = re.compile(r"[1-9][0-9]{0,11}")
_ADMIN = "admin"  # the word that lets a key change the server
_LINE_FORMAT = f"KEY [name=NAME] {' '.join(f'[{limit}=N]' for limit in _LIMITS)} [{_ADMIN}]"


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
    is_admin: bool = False  # it may let the server sleep and load other weights
    # The running requests of this process.
    admissions: set[Admission] = field(default_factory=set)
    usage: KeyUsage = field(default_factory=KeyUsage)
    # A router has admitted the request already, and counts it as one answer.
    is_behind_router: bool = False
    num_sockets: int = 0  # open WebSockets

    @staticmethod
    def of(key: str) -> Client:
        """Return a client with `key` and without limits."""
        return Client(hashlib.sha256(key.encode()).digest())

    def admit(self) -> Admission:
        """Admit a new request. Raises ApiError 429 when a limit is reached."""
        admission = Admission(self)
        with self.usage.locked():
            charged_tokens = self._charge()
            rate = self.max_tokens_per_minute
            if rate and charged_tokens >= rate and not self.is_behind_router:
                wait_s = max(1, math.ceil((charged_tokens - rate) * 60 / rate))
                raise _limit_reached(
                    f"This key has used its {rate} tokens of this minute.",
                    "tokens_per_minute_exceeded",
                    wait_s,
                )
            self._check_max_requests(admission.num_answers)
            self.admissions.add(admission)
            self._count_running()
        return admission

    def reserve(self, admission: Admission, choices: Sequence[Choice]) -> None:
        """Count the answers of an admitted request; see `Admission.reserve`."""
        with self.usage.locked():
            self._check_max_requests(admission.num_answers_of(choices) - admission.num_answers)
            admission.choices = choices
            self._count_running()

    def release(self, admission: Admission) -> None:
        """Remove a request that is complete or cancelled."""
        with self.usage.locked():
            self._charge()
            self.admissions.remove(admission)
            self._count_running()

    def hand_over(self, admission: Admission) -> Admission:
        """Return an admission for work that goes on after its request, in place of `admission`."""
        with self.usage.locked():
            self._charge()
            successor = admission.successor()
            self.admissions.add(successor)
            self._count_running()
        return successor

    def charge(self) -> None:
        """Count the tokens that the running requests have used so far."""
        if self.admissions and self.max_tokens_per_minute is not None:
            with self.usage.locked():
                self._charge()

    def take_settings(self, other: Client) -> None:
        """Take the name, limits and rights of the same key in a newer file."""
        self.name = other.name
        self.max_requests = other.max_requests
        self.max_tokens_per_minute = other.max_tokens_per_minute
        self.is_admin = other.is_admin

    @property
    def has_limits(self) -> bool:
        """Whether any limit is set."""
        return self.max_requests is not None or self.max_tokens_per_minute is not None

    @property
    def is_idle(self) -> bool:
        """Whether it has no running request and no used tokens that are not refilled."""
        with self.usage.locked():
            return not self.admissions and not self._charge()

    def _check_max_requests(self, num_new_answers: int) -> None:
        """Raise ApiError 429 when `num_new_answers` more would exceed `max_requests`."""
        if self.max_requests is None or num_new_answers <= 0:
            return
        num_answers = self._num_running + self.usage.running_elsewhere()
        if num_answers + num_new_answers > self.max_requests:
            raise _limit_reached(
                f"This key may have {self.max_requests} running answers, and has {num_answers}.",
                "too_many_requests",
                wait_s=1,
            )

    @property
    def _num_running(self) -> int:
        """The running answers of this process."""
        return sum(admission.num_answers for admission in self.admissions)

    def _count_running(self) -> None:
        if self.max_requests is not None:
            self.usage.set_running(self._num_running)

    def _charge(self) -> float:
        """Count the tokens used since the last call; return those that are not refilled."""
        if self.max_tokens_per_minute is None:
            return 0.0
        num_new_tokens = 0
        for admission in self.admissions:
            num_tokens = admission.num_tokens
            num_new_tokens += num_tokens - admission.num_charged_tokens
            admission.num_charged_tokens = num_tokens
        return self.usage.charge(num_new_tokens, self.max_tokens_per_minute)


class Admission:
    """One running request of a client, from its headers to the last byte of its response."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.num_charged_tokens = 0  # set by the client
        self.choices: Sequence[Choice] = ()  # set by the client
        self._has_successor = False
        self._num_counted_elsewhere = int(client.is_behind_router)  # answers

    def successor(self) -> Admission:
        """Return an admission that takes over what this one has reserved and is charged."""
        other = Admission(self.client)
        other.num_charged_tokens = self.num_charged_tokens
        other.choices = self.choices
        other._num_counted_elsewhere = 0  # the router's request ends before it
        self.choices = ()
        self.num_charged_tokens = 0
        self._has_successor = True
        return other

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
        self.client.reserve(self, choices)

    @property
    def num_answers(self) -> int:
        """The number of answers that this request counts as."""
        return 0 if self._has_successor else self.num_answers_of(self.choices)

    def num_answers_of(self, choices: Sequence[Choice]) -> int:
        """What `num_answers` is with these choices. A router counts the first answer itself."""
        return max(1, len(choices)) - self._num_counted_elsewhere

    @property
    def num_tokens(self) -> int:
        """The prompt and completion tokens so far."""
        return sum(
            len(choice.request.prompt_token_ids) + choice.completion_tokens
            for choice in self.choices
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

    Behind a router with shadows, the router itself is one more. Raises InputError for a wrong file.
    Its message never contains a key.
    """
    clients = _load_client_keys(options)
    router_key = os.environ.get(ROUTER_KEY_VARIABLE, "")
    if clients and router_key and options.behind_router:
        return (*clients, Client.of(router_key))
    return clients


def _load_client_keys(options: ServeOptions) -> tuple[Client, ...]:
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
        if name not in ("name", *_LIMITS) and word != _ADMIN:
            # The word may be a part of a key, so the message does not repeat it.
            raise InputError(
                f"{location}: word {word_number} is not a field", f"A line is {_LINE_FORMAT}"
            )
        if name in seen:
            raise InputError(f"{location}: {name} is given twice")
        seen.add(name)
        if word == _ADMIN:
            client.is_admin = True
        elif name == "name":
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
