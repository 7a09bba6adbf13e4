"""API keys: who a client is, and how much of the server it may have."""

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

from llmkit.checkpoint.errors import InputError
from llmkit.runtime.channel import API_KEY_VARIABLE
from llmkit.runtime.server.http.errors import ApiError
from llmkit.runtime.server.options import ServeOptions

if TYPE_CHECKING:
    from llmkit.runtime.server.generation import Choice

_LIMITS = ("max_requests", "max_tokens_per_minute")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LIMIT = re.compile(r"[1-9][0-9]{0,11}")
_WHAT = f"KEY [name=NAME] {' '.join(f'[{limit}=N]' for limit in _LIMITS)}"


@dataclass(eq=False)
class Client:
    """Whoever has one key. `digest` is the key's SHA-256: the key itself is kept nowhere."""

    digest: bytes = b""
    name: str = ""
    max_requests: int | None = None  # answers under way: a request for three counts as three
    max_tokens_per_minute: int | None = None  # of prompts and answers
    visits: set[Visit] = field(default_factory=set)
    _spent: float = 0.0  # tokens that time has not made up for yet
    _settled: float = 0.0  # monotonic seconds

    @staticmethod
    def of(key: str) -> Client:
        """Whoever has `key`, without limits."""
        return Client(hashlib.sha256(key.encode()).digest())

    def enter(self) -> Visit:
        """A request has come. ApiError 429 when the client has used up what it may."""
        self._settle()
        if (rate := self.max_tokens_per_minute) and self._spent >= rate:
            wait_s = max(1, math.ceil((self._spent - rate) * 60 / rate))
            raise _over(f"This key may use {rate} tokens a minute, and has.", "tokens_per_minute_exceeded", wait_s)
        visit = Visit(self)
        self.check_room(visit.size)
        self.visits.add(visit)
        return visit

    def leave(self, visit: Visit) -> None:
        """A request is answered, or its sender has gone away."""
        self._settle()
        self.visits.remove(visit)

    def check_room(self, answers: int) -> None:
        """ApiError 429 when there cannot be so many more."""
        most = self.max_requests
        if most is not None and (now := sum(visit.size for visit in self.visits)) + answers > most:
            raise _over(f"This key may have {most} answers under way, and has {now}.", "too_many_requests", 1)

    def _settle(self) -> None:
        if self.max_tokens_per_minute is None:
            return
        for visit in self.visits:
            self._spent += visit.tokens - visit.charged
            visit.charged = visit.tokens
        now = time.monotonic()
        self._spent = max(0.0, self._spent - (now - self._settled) * self.max_tokens_per_minute / 60)
        self._settled = now


class Visit:
    """One request of a client, from its headers to the last byte of its answer."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.charged = 0  # of `tokens`
        self._choices: Sequence[Choice] = ()

    def take(self, choices: Sequence[Choice]) -> None:
        """It turns out to ask for these. ApiError 429, or 400 when there could never be so many."""
        most = self.client.max_requests
        if most is not None and len(choices) > most:
            message = f"The request asks for {len(choices)} answers; this key may have {most} under way."
            raise ApiError(400, message, code="too_many_prompts", param="prompt")
        self.client.check_room(len(choices) - self.size)
        self._choices = choices

    @property
    def size(self) -> int:
        """How many answers it counts as."""
        return max(1, len(self._choices))

    @property
    def tokens(self) -> int:
        """That it has used by now."""
        return sum(len(choice.request.prompt) + choice.completion_tokens for choice in self._choices)


def known_client(clients: Sequence[Client], given: bytes) -> Client | None:
    """Whose key is `given`. Every key is compared, in constant time each: time tells nothing about any of them."""
    digest = hashlib.sha256(given).digest()
    matches = [client for client in clients if hmac.compare_digest(digest, client.digest)]
    return matches[0] if matches else None


def api_keys(options: ServeOptions) -> tuple[Client, ...]:
    """Those of the key file, else the one of LLMKIT_API_KEY, else none. InputError, which never holds a key."""
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
    for number, line in enumerate(lines, 1):
        if line.strip():
            clients.append(_client(line.split(), f"{path}:{number}"))
            for one in clients[:-1]:
                if one.digest == clients[-1].digest or (one.name and one.name == clients[-1].name):
                    raise InputError(f"{path}:{number}: the key or its name is in an earlier line, too")
    if not clients:
        raise InputError(f"the API key file has no keys ({path})", "One key a line is expected")
    return tuple(clients)


def _client(words: list[str], where: str) -> Client:
    client, seen = Client.of(words[0]), set[str]()
    for place, word in enumerate(words[1:], 2):
        field_, _, value = word.partition("=")
        if field_ not in ("name", *_LIMITS):  # it may be a part of a key, so it is not repeated
            raise InputError(f"{where}: word {place} is no field", f"A line is {_WHAT}")
        if field_ in seen:
            raise InputError(f"{where}: {field_} is given twice")
        seen.add(field_)
        if not (_NAME if field_ == "name" else _LIMIT).fullmatch(value):
            kind = "up to 64 of A-Z a-z 0-9 _ . -" if field_ == "name" else "a whole number above 0"
            raise InputError(f"{where}: {field_} is wrong ({value[:80]!r})", f"{kind} was expected")
        setattr(client, field_, value if field_ == "name" else int(value))
    return client


def _over(message: str, code: str, wait_s: int) -> ApiError:
    return ApiError(429, f"{message} Try again later.", code=code, headers={"retry-after": str(wait_s)})
