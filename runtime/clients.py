"""The engine's end of its socket: one ROUTER for every service process that sends it requests.

A client's number is its routing id and the high bits of its requests' ids. So ids of several
clients never meet, and a step's tokens find their way without a table.
"""

from __future__ import annotations

import msgspec
import numpy as np
import zmq

from zllm.runtime.messages import CLIENT_SHIFT, FromEngine, StepOutput, ToEngine, routing_id

_decode = msgspec.msgpack.Decoder(ToEngine).decode
_encode = msgspec.msgpack.Encoder().encode


class Clients:
    """Not safe for use by several threads at once."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._live: dict[int, set[int]] = {}
        """The requests of each attached client that have not ended."""
        self._orphans: list[int] = []

    def poll(self, timeout_ms: int) -> bool:
        """Whether a message waits, after `timeout_ms` at most."""
        return bool(self._socket.poll(timeout_ms))

    def receive(self) -> tuple[int, ToEngine]:
        """Who says what; waits for it."""
        sender, data = self._socket.recv_multipart()
        return int.from_bytes(sender[1:], "big"), _decode(data)

    def attach(self, client: int, greeting: FromEngine) -> None:
        """From now on it hears every broadcast. One that comes again has forgotten its requests."""
        self._orphans.extend(self._live.get(client, ()))
        self._live[client] = set()
        self.send(client, greeting)

    def began(self, client: int, request_id: int) -> bool:
        """A request that is the client's, until a step ends it; False where the client has gone,
        for its last messages may come after that."""
        if client not in self._live:
            return False
        self._live[client].add(request_id)
        return True

    def take_orphans(self) -> list[int]:
        """Requests whose client has gone since the last call."""
        orphans, self._orphans = self._orphans, []
        return orphans

    def broadcast(self, message: FromEngine) -> None:
        for client in list(self._live):
            self.send(client, message)

    def publish(self, step: StepOutput) -> None:
        """To each client what the step gave its requests."""
        self._forget_ended(step)
        if len(self._live) == 1:
            self.broadcast(step)
            return
        for client in list(self._live):
            part = _part(step, client)
            if part is not None:
                self.send(client, part)

    def send(self, client: int, message: FromEngine) -> None:
        """A client that is gone leaves its requests as orphans."""
        try:
            self._socket.send_multipart([routing_id(client), _encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._orphans.extend(self._live.pop(client, ()))

    def _forget_ended(self, step: StepOutput) -> None:
        ended = np.flatnonzero(np.frombuffer(step.finishes, np.uint8))
        ids = np.frombuffer(step.request_ids, "<i8")[ended].tolist()
        for request_id in [*ids, *(refused.request_id for refused in step.refused)]:
            self._live.get(request_id >> CLIENT_SHIFT, set()).discard(request_id)


def _part(step: StepOutput, client: int) -> StepOutput | None:
    """What of a step is this client's, if anything."""
    ids = np.frombuffer(step.request_ids, "<i8")
    chosen = np.flatnonzero(ids >> CLIENT_SHIFT == client)
    refused = [r for r in step.refused if r.request_id >> CLIENT_SHIFT == client]
    if not (len(chosen) or refused):
        return None
    return StepOutput(
        request_ids=ids[chosen].tobytes(),
        tokens=np.frombuffer(step.tokens, "<i4")[chosen].tobytes(),
        finishes=np.frombuffer(step.finishes, np.uint8)[chosen].tobytes(),
        started=[s for s in step.started if s.request_id >> CLIENT_SHIFT == client],
        refused=refused,
        logprobs={
            index: step.logprobs[old]
            for index, old in enumerate(chosen.tolist())
            if old in step.logprobs
        },
        load=step.load,
    )
