"""A caller: what its API key lets it do, and how much of that it has used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from zllm.errors import Forbidden, Overloaded
from zllm.service.served_model import Models, ServedModel


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What the key file grants to one key. None: no limit."""

    tenant: str
    max_concurrent_requests: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and outputs together."""
    models: frozenset[str] | None = None

    def divided(self, parts: int) -> Grant:
        """Each part's even share of the limits, and at least 1."""
        requests, tokens = self.max_concurrent_requests, self.tokens_per_minute
        return replace(
            self,
            max_concurrent_requests=None if requests is None else max(requests // parts, 1),
            tokens_per_minute=None if tokens is None else max(tokens // parts, 1),
        )


@dataclass
class Usage:
    """What one key has in use; it outlives a reload of the file."""

    running: int = 0
    debt: float = 0.0
    """Tokens used that the passing of time has not yet paid for."""
    paid_at: float = 0.0


@dataclass(frozen=True)
class Caller:
    """Without a grant, one who may do everything: a server without keys."""

    grant: Grant | None = None
    usage: Usage = field(default_factory=Usage)
    clock: Callable[[], float] = time.monotonic

    @property
    def tenant(self) -> str:
        return self.grant.tenant if self.grant else ""

    def salt(self, own: str) -> str:
        """The salt of the prefix cache: no tenant's prompt ever meets another's, whatever salt
        either sends. A tenant's name has no NUL, so that the parts cannot be mistaken."""
        return f"{self.grant.tenant}\0{own}" if self.grant else own

    def visible(self, models: Models) -> Models:
        """Those of the models that it may use."""
        if self.grant is None or self.grant.models is None:
            return models
        return models.only(self.grant.models)

    def find(self, models: Models, name: str, field: str = "model") -> ServedModel:
        """As Models.find among the visible. Raises Forbidden, whether or not the name is served."""
        visible = self.visible(models)
        if self.grant is not None and self.grant.models is not None:
            if name and name not in self.grant.models:
                raise Forbidden(f"{field}: this API key does not allow {name[:200]!r}")
            if models.served and not visible.default:
                raise Forbidden(f"{field}: this API key allows none of the models served")
        return visible.find(name, field)

    @contextmanager
    def request(self) -> Iterator[Caller]:
        """Counts a request as running. Raises Overloaded where a limit is reached."""
        grant, usage = self.grant, self.usage
        if grant is not None:
            most = grant.max_concurrent_requests
            if most is not None and usage.running >= most:
                raise Overloaded(
                    f"tenant {grant.tenant} has {most} requests running, its limit",
                    cause="tenant_requests",
                )
            if grant.tokens_per_minute is not None:
                self._check_tokens(grant.tokens_per_minute)
        usage.running += 1
        try:
            yield self
        finally:
            usage.running -= 1

    def charge(self, tokens: int) -> None:
        """A request that was let in may overdraw the minute's tokens; later ones wait for it."""
        if self.grant is not None and self.grant.tokens_per_minute is not None:
            self._pay(self.grant.tokens_per_minute)
            self.usage.debt += tokens

    def refund(self, tokens: int) -> None:
        """Takes back what a request was charged that was refused."""
        if self.grant is not None and self.grant.tokens_per_minute is not None:
            self._pay(self.grant.tokens_per_minute)
            self.usage.debt = max(self.usage.debt - tokens, 0.0)

    def _check_tokens(self, per_minute: int) -> None:
        self._pay(per_minute)
        over = self.usage.debt - per_minute
        if over >= 0:
            raise Overloaded(
                f"tenant {self.tenant} has used its {per_minute} tokens a minute",
                retry_after=(over + 1) * 60 / per_minute,
                cause="tenant_tokens",
            )

    def _pay(self, per_minute: int) -> None:
        now = self.clock()
        paid = (now - self.usage.paid_at) * per_minute / 60
        self.usage.debt = max(self.usage.debt - paid, 0.0)
        self.usage.paid_at = now


_ANYONE = Caller()
_current: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Whose call this task answers."""
    return _current.get(_ANYONE)


def set_caller(caller: Caller) -> None:
    """For the rest of this task: gRPC answers each call in a task of its own."""
    _current.set(caller)
