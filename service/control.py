"""What the supervisor and a frontend say to each other, over a pair of sockets.

msgspec structs in msgpack, each after its length in four bytes. Every call of the supervisor gets
one answer, but for those that say otherwise; answers may come in another order.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import TypeVar

import msgspec

from zllm.service.config import ServerConfig

COUNTS = "PROMETHEUS_MULTIPROC_DIR"
"""The variable that tells prometheus_client, and a frontend, where all frontends count."""


class _Message(msgspec.Struct, frozen=True, tag=True):
    pass


class Begin(_Message, frozen=True):
    """The first call: be this frontend. Answered, and refused, before it listens."""

    config: ServerConfig
    version: str
    number: int
    """Of its requests' ids (runtime/messages.py)."""
    names: list[str]
    """The models that it will hear of, the default first."""
    awaits: list[str]
    """Those without which it is not SERVING."""


class Listen(_Message, frozen=True):
    """Take requests, on the port of the config."""


class Expect(_Message, frozen=True):
    """As Server.expect."""

    name: str
    folder: Path


class Add(_Message, frozen=True):
    """Serve this model by the engine that listens there. The answer may take as long as a step."""

    name: str
    address: str


class Lose(_Message, frozen=True):
    """The model's engine is gone or silent: fail what it runs. No answer."""

    name: str
    why: str


class Remove(_Message, frozen=True):
    """As Server.remove."""

    name: str
    grace: float


class Abort(_Message, frozen=True):
    """As Server.abort; answered by the ids."""

    request_ids: list[str] | None


class Drain(_Message, frozen=True):
    """As Server.drain; answered by how many were ended."""

    grace: float


class Ping(_Message, frozen=True):
    """Answer, as long as the event loop turns."""


class Hurry(_Message, frozen=True):
    """End the drain now. No answer."""


class End(_Message, frozen=True):
    """The last one: no frontend is wanted any more, and the supervisor lives."""


Order = Begin | Listen | Expect | Add | Lose | Remove | Abort | Drain | Hurry | Ping | End


class Call(msgspec.Struct, frozen=True):
    number: int
    order: Order


class Answer(msgspec.Struct, frozen=True):
    """To the call of that number: what it gave, or why not."""

    number: int
    ids: list[str] = []
    count: int = 0
    error: str = ""


Kind = TypeVar("Kind")


class Channel:
    """One end of the pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, end: socket.socket) -> Channel:
        return cls(*await asyncio.open_connection(sock=end))

    def send(self, message: Call | Answer) -> None:
        """At once, or in order when the other end reads. To one that is gone: dropped."""
        data = msgspec.msgpack.encode(message, enc_hook=str)
        if not self._writer.is_closing():
            self._writer.write(len(data).to_bytes(4, "big") + data)

    async def receive(self, kind: type[Kind]) -> Kind | None:
        """The next message; None when the other end has gone."""
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "big")
            data = await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return msgspec.msgpack.decode(data, type=kind, dec_hook=lambda wanted, text: wanted(text))

    def close(self) -> None:
        self._writer.close()
