"""Calls of AWS' API as data that can be shown, and made by boto3; its errors say what to do."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.common.errors import InputError, LlmkitError, ShortageError, UsageError

# A role, as IAM writes it.
ROLE_ARN = re.compile(r"arn:aws[a-z-]*:iam::[0-9]{12}:role/[\w+=,.@/-]+")
# A secret of Secrets Manager, maybe with a key of its JSON, or a parameter of Systems Manager.
SECRET_ARN = re.compile(
    r"arn:aws[a-z-]*:(secretsmanager:[a-z0-9-]+:[0-9]{12}:secret:|ssm:[a-z0-9-]+:[0-9]{12}:"
    r"parameter/)[\w/+=.@:-]+"
)
_MAX_REASON_CHARS = 400
_SERVER_ERROR = 500  # the HTTP status of AWS' own faults, and above
# What AWS answers where a permission is missing.
_DENIED = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"})
_SIGN_IN = "Sign in again: `aws sso login` or `aws configure`"
_BAD_CREDENTIALS = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)


@dataclass(frozen=True)
class AwsCall:
    """One call of AWS' API."""

    service: str  # "sagemaker", as boto3 and the AWS CLI name it
    operation: str  # "CreateModel"
    parameters: Mapping[str, Any]
    # Words of `aws SERVICE wait`, for what the next call needs.
    wait: tuple[str, ...] = ()

    def make(self, client: Any) -> Any:
        """Make the call by a boto3 client of its service; return AWS' answer."""
        return getattr(client, _snake_case(self.operation))(**self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """The call as a JSON value."""
        return {
            "service": self.service,
            "operation": self.operation,
            "parameters": dict(self.parameters),
        }

    def to_shell(self) -> str:
        """The call as a command of the AWS CLI."""
        operation = _snake_case(self.operation).replace("_", "-")
        parameters = shlex.quote(json.dumps(self.parameters, indent=2))
        command = f"aws {self.service} {operation} --cli-input-json {parameters}"
        if self.wait:
            command += f"\naws {self.service} wait {shlex.join(self.wait)}"
        return command


def shell_script(calls: Iterable[AwsCall]) -> str:
    """A script that makes the calls by the AWS CLI, in this order."""
    return "\n".join(["#!/bin/sh", "set -e", *(call.to_shell() for call in calls), ""])


def version_of(*documents: Mapping[str, Any]) -> str:
    """Eight letters and digits that differ where the documents do."""
    text = json.dumps(documents, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def new_client(service: str, region: str | None) -> Any:
    """A boto3 client. Raises ShortageError without boto3, UsageError without a region."""
    # Not a dependency of llmkit: the extra `aws` installs it.
    try:
        import boto3
    except ImportError:
        raise ShortageError(
            "boto3 is not installed", todo="Install it with `pip install 'llmkit[aws]'`"
        ) from None
    with aws_errors():
        return boto3.client(service, region_name=region)


@contextlib.contextmanager
def aws_errors() -> Iterator[None]:
    """Raise an LlmkitError for what boto3 raises within the context."""
    from botocore import exceptions

    try:
        yield
    except exceptions.NoRegionError:
        raise UsageError("no AWS region is set", todo="Give --region, or set AWS_REGION") from None
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
        raise ShortageError(
            "no AWS credentials were found",
            "boto3's usual places were searched: variables, ~/.aws, the machine's role",
            "Run `aws configure` or `aws sso login`, or set AWS_PROFILE",
        ) from None
    except (
        exceptions.SSOError,
        exceptions.TokenRetrievalError,
        exceptions.CredentialRetrievalError,
    ) as error:
        raise ShortageError(f"AWS credentials cannot be read: {error}", todo=_SIGN_IN) from None
    except exceptions.ProfileNotFound as error:
        raise UsageError(str(error), todo="Set AWS_PROFILE to one of ~/.aws/config") from None
    except exceptions.ParamValidationError as error:
        raise InputError(f"AWS' API does not take this: {' '.join(str(error).split())}") from None
    except exceptions.ClientError as error:
        raise _client_error(error) from None
    except exceptions.BotoCoreError as error:  # the network, a proxy, an endpoint
        raise ShortageError(f"AWS cannot be reached: {error}") from None


def error_code(error: Any) -> str:
    """The code of a botocore ClientError, such as "ValidationException"."""
    return str(error.response["Error"].get("Code", ""))


def error_message(error: Any) -> str:
    """The message of a botocore ClientError."""
    return str(error.response["Error"].get("Message", ""))


def require_arn(option: str, value: str, pattern: re.Pattern[str], example: str) -> None:
    """Raise UsageError unless `value` is an ARN like `example`.

    The error does not have the value, because it may be the secret itself.
    """
    if not pattern.fullmatch(value):
        raise UsageError(f"{option} is not an ARN of this kind", f"Write it like {example}")


def _client_error(error: Any) -> LlmkitError:
    code = error_code(error)
    # Some messages list all values that would be allowed.
    reason = error_message(error)
    if len(reason) > _MAX_REASON_CHARS:
        reason = f"{reason[:_MAX_REASON_CHARS]} …"
    what = f"AWS refused {error.operation_name} ({code}): {reason}"
    if code in _DENIED:
        return ShortageError(what, todo="Add this permission to the role or user that deploys")
    if code in _BAD_CREDENTIALS:
        return ShortageError(what, todo="Sign in again: `aws sso login` or `aws configure`")
    if "LimitExceeded" in code or "Throttling" in code:
        return ShortageError(what, todo="Ask AWS for a higher quota, or try again later")
    if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= _SERVER_ERROR:
        return ShortageError(what, todo="Try again later")
    return InputError(what)


def _snake_case(operation: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower()
