"""Opens StreamGenerate calls on raw sockets and notes when each piece of their answers came.

    python benchmarks/raw_reader.py ADDRESS STREAMS TOKENS CONNECTIONS [TIMES]

Run by benchmarks/service.py. Just enough HTTP/2 (RFC 9113) and HPACK (RFC 7541) to cost next to
nothing, so that what is measured is the service. Prints JSON. TIMES is the file of rate_engine.py
that says when each step gave its tokens; without it the reader looks at its sockets every
millisecond: on loopback the sender pays for the wake-up of a reader that waits.
"""

from __future__ import annotations

import itertools
import json
import selectors
import socket
import statistics
import struct
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from rate_engine import DISTINCT

from zllm.v1 import generation_pb2

PATH = b"/zllm.v1.GenerationService/StreamGenerate"
PAUSE_S = 0.001
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
INITIAL_WINDOW_SIZE = 4
MAX_WINDOW = 2**31 - 1


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(name: bytes, value: bytes) -> bytes:
    """A header field without indexing; lengths below 127 are one byte."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


_REQUEST_HEADERS = b"\x83\x86" + b"".join(  # :method POST, :scheme http
    _literal(name, value)
    for name, value in (
        (b":path", PATH),
        (b":authority", b"bench"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    )
)
_OPENING = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + _frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, MAX_WINDOW))
    + _frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", MAX_WINDOW - 65535))
)


class Connection:
    """Some of the calls on one connection, all sent at once."""

    def __init__(self, address: tuple[str, int], streams: int, message: bytes) -> None:
        self.pieces: defaultdict[int, list[tuple[float, bytes]]] = defaultdict(list)
        """By stream: when, and bytes of its answer."""
        self.open = streams
        self.failed = 0
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        body = struct.pack(">BI", 0, len(message)) + message
        calls = b"".join(
            _frame(HEADERS, END_HEADERS, stream, _REQUEST_HEADERS)
            + _frame(DATA, END_STREAM, stream, body)
            for stream in range(1, 2 * streams, 2)
        )
        self.socket.sendall(_OPENING + calls)

    def read(self) -> None:
        data = self.socket.recv(1 << 18)
        now = time.monotonic()
        if not data:
            raise ConnectionError("the server closed a connection")
        data = self._buffer + data
        at, end = 0, len(data)
        while end - at >= 9:
            length = int.from_bytes(data[at : at + 3], "big")
            if end - at < 9 + length:
                break
            kind, flags = data[at + 3], data[at + 4]
            stream = int.from_bytes(data[at + 5 : at + 9], "big")
            payload = data[at + 9 : at + 9 + length]
            at += 9 + length
            if kind == DATA:
                self.pieces[stream].append((now, payload))
            elif kind == SETTINGS and not flags & ACK:
                self.socket.sendall(_frame(SETTINGS, ACK, 0, b""))
            elif kind == PING and not flags & ACK:
                self.socket.sendall(_frame(PING, ACK, 0, payload))
            elif kind == GOAWAY:
                raise ConnectionError("the server sent GOAWAY")
            if kind == RST_STREAM:
                self.failed += 1
                self.open -= 1
            elif kind in (DATA, HEADERS) and flags & END_STREAM:
                self.open -= 1
        self._buffer = data[at:]


def read_all(
    address: tuple[str, int],
    streams: int,
    tokens: int,
    connections: int,
    times: Path | None = None,
) -> dict[str, Any]:
    """Opens all streams at once, shared out over so many connections, and reads them to their
    ends."""
    request = generation_pb2.GenerateRequest(text="a")
    request.stopping.max_tokens = tokens
    request.stopping.ignore_eos = True
    request.output.token_ids = True
    message = request.SerializeToString()
    started = time.monotonic()
    shares = [len(range(first, streams, connections)) for first in range(connections)]
    opened = [Connection(address, share, message) for share in shares if share]
    selector = selectors.DefaultSelector()
    for connection in opened:
        selector.register(connection.socket, selectors.EVENT_READ, connection)
    while selector.get_map():
        for key, _ in selector.select(0 if times else None):
            key.data.read()
            if key.data.open == 0:
                selector.unregister(key.data.socket)
                key.data.socket.close()
        if times is None:
            time.sleep(PAUSE_S)
    return _summary(opened, started, times)


def _summary(connections: list[Connection], started: float, times: Path | None) -> dict[str, Any]:
    tokens: dict[int, list[tuple[float, int]]] = {}
    firsts: list[float] = []
    messages = finished = 0
    last = started
    for connection in connections:
        for pieces in connection.pieces.values():
            events = _events(pieces)
            messages += len(events)
            firsts.append(events[0][0] - started)
            last = max(last, events[-1][0])
            finished += events[-1][1].HasField("finished")
            tokens[len(tokens)] = [
                (when, token) for when, event in events for token in event.delta.token_ids
            ]
    summary = {
        "seconds": last - started,
        "messages": messages,
        "tokens": sum(map(len, tokens.values())),
        "finished": finished,
        "failed": sum(connection.failed for connection in connections),
        "first_s": statistics.median(firsts),
    }
    if times is not None:
        summary |= _latency(tokens, times)
    return summary


def _latency(arrivals: dict[int, list[tuple[float, int]]], times: Path) -> dict[str, float]:
    """Milliseconds from a step's end in the engine to its tokens' bytes at the reader; and by how
    much the time between two tokens of a stream differs from that in the engine."""
    steps = [when for (when,) in struct.iter_unpack("d", times.read_bytes())]
    if len(steps) > DISTINCT:
        raise ValueError(f"{len(steps)} steps have only {DISTINCT} distinct tokens: read fewer")
    late, jitter = [], []
    for stream in arrivals.values():
        delays = [(when - steps[token]) * 1e3 for when, token in stream]
        late += delays
        jitter += [abs(b - a) for a, b in itertools.pairwise(delays)]
    summary = {}
    for name, values in (("late", sorted(late)), ("jitter", sorted(jitter))):
        for share in (50, 90, 99):
            summary[f"{name}_p{share}_ms"] = values[len(values) * share // 100]
    return summary


def _events(
    pieces: list[tuple[float, bytes]],
) -> list[tuple[float, generation_pb2.StreamGenerateResponse]]:
    """gRPC's messages, each with the time of its last byte."""
    events = []
    waiting = b""
    for when, piece in pieces:
        waiting += piece
        while len(waiting) >= 5:
            size = 5 + int.from_bytes(waiting[1:5], "big")
            if len(waiting) < size:
                break
            message = generation_pb2.StreamGenerateResponse.FromString(waiting[5:size])
            events.append((when, message))
            waiting = waiting[size:]
    return events


def main() -> None:
    target, streams, tokens, connections, *times = sys.argv[1:]
    host, port = target.rsplit(":", 1)
    path = Path(times[0]) if times else None
    found = read_all((host, int(port)), int(streams), int(tokens), int(connections), path)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
