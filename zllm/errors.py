"""The exceptions of zllm: one small hierarchy that every layer may raise.

A message names the field, the value and the remedy. `service/` maps each class to one gRPC
status code; nothing else does.
"""

from __future__ import annotations


class ZllmError(Exception):
    """Base of every error that zllm raises on purpose."""


class ConfigError(ZllmError):
    """A setting, a model folder or a machine that cannot work: raised before serving starts, and
    by LoadModel (FAILED_PRECONDITION)."""


class ModelLoadError(ConfigError):
    """A model's files are missing, corrupt or of an architecture that is not supported."""


class RequestError(ZllmError):
    """One request is at fault. `field` is its path in GenerateRequest, e.g. `sampling.top_p`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.reason = message

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, str]]:
        # By itself it would be made anew of the whole text alone, and a pool whose worker raised it
        # would break or wait forever.
        return type(self), (self.field, self.reason)


class InvalidRequest(RequestError):
    """A field's value is out of its range (INVALID_ARGUMENT)."""


class UnsupportedRequest(RequestError):
    """A field of the contract that this server does not implement (UNIMPLEMENTED)."""


class Unauthenticated(ZllmError):
    """The call has no API key, or one that is not known (UNAUTHENTICATED)."""


class Forbidden(ZllmError):
    """The API key does not allow this (PERMISSION_DENIED)."""


class UnknownModel(RequestError):
    """The `model` field names nothing that is served (NOT_FOUND)."""


class RequestExists(RequestError):
    """The `request_id` is that of a live request (ALREADY_EXISTS)."""


class WrongState(RequestError):
    """What it names is not in a state for this (FAILED_PRECONDITION)."""


class Overloaded(ZllmError):
    """No room now; try again after `retry_after` seconds (RESOURCE_EXHAUSTED). `cause` is one of
    service/metrics.py's."""

    def __init__(
        self, message: str, retry_after: float = 1.0, *, cause: str = "queue_full"
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.cause = cause


class Unavailable(ZllmError):
    """Loading, draining or restarting; try again after `retry_after` seconds (UNAVAILABLE).
    `cause` is one of service/metrics.py's."""

    def __init__(
        self, message: str, retry_after: float = 1.0, *, cause: str = "engine_unavailable"
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.cause = cause


class DeadlineExceeded(ZllmError):
    """The caller's deadline passed before the request could begin (DEADLINE_EXCEEDED)."""


class EngineError(ZllmError):
    """The engine failed a request it had accepted (INTERNAL)."""


class KernelError(ZllmError):
    """A CUDA kernel failed to compile, got an argument it cannot take, or could not launch."""


class InvariantError(ZllmError):
    """The scheduler's own books do not balance: a defect of zllm, never of a request."""
