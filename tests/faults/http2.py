"""A gRPC client that speaks HTTP/2 by hand, so that its calls can end in ways no library allows."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import defaultdict

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from zllm.v1 import generation_pb2

STREAM = "/zllm.v1.GenerationService/StreamGenerate"


class Connection:
    """One TCP connection. While `reading` is cleared, nothing is taken off the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._http.initiate_connection()
        # The client's own window: as much as a client that is in no hurry allows.
        self._http.increment_flow_control_window(2**24)
        self._received: defaultdict[int, bytearray] = defaultdict(bytearray)
        self._ended: set[int] = set()
        self.reading = asyncio.Event()
        self.reading.set()
        self._flush()
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, target: str) -> Connection:
        host, _, port = target.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    def call(self, message: generation_pb2.GenerateRequest) -> int:
        """Sends a StreamGenerate; returns the HTTP/2 stream's number."""
        stream = self._http.get_next_available_stream_id()
        headers = [
            (":method", "POST"), (":scheme", "http"), (":path", STREAM),
            (":authority", "localhost"), ("content-type", "application/grpc"), ("te", "trailers"),
        ]  # fmt: skip
        self._http.send_headers(stream, headers)
        body = message.SerializeToString()
        self._http.send_data(stream, struct.pack(">BI", 0, len(body)) + body, end_stream=True)
        self._flush()
        return stream

    async def until_answered(self, streams: set[int]) -> None:
        """Until each of the streams has got data."""
        async with asyncio.timeout(20):
            while not streams <= self._received.keys():
                await asyncio.sleep(0.005)

    async def until_ended(self, streams: set[int]) -> None:
        """Until the server has ended each of the streams."""
        async with asyncio.timeout(60):
            while not streams <= self._ended:
                await asyncio.sleep(0.005)

    def messages(self, stream: int) -> list[generation_pb2.StreamGenerateResponse]:
        """What came for the stream up to now."""
        data, found = memoryview(self._received[stream]), []
        while len(data) >= 5 and len(data) >= 5 + (length := int.from_bytes(data[1:5])):
            found.append(generation_pb2.StreamGenerateResponse.FromString(data[5 : 5 + length]))
            data = data[5 + length :]
        return found

    def reset_stream(self, stream: int) -> None:
        """RST_STREAM, unless the server has ended the stream first."""
        with contextlib.suppress(h2.exceptions.StreamClosedError):
            self._http.reset_stream(stream)
            self._flush()

    async def reset(self) -> None:
        """A TCP RST: what was sent and not yet read is lost at once."""
        linger = struct.pack("ii", 1, 0)
        self._writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, linger
        )
        await self.close()

    async def close(self) -> None:
        """A TCP FIN, without HTTP/2's goodbye."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._writer.transport.abort()
        # The socket itself closes in the loop's next round.
        await asyncio.sleep(0)

    def _flush(self) -> None:
        self._writer.write(self._http.data_to_send())

    async def _read(self) -> None:
        while True:
            await self.reading.wait()
            data = await self._reader.read(65536)
            if not data:
                return
            try:
                events = self._http.receive_data(data)
            except h2.exceptions.ProtocolError:
                return  # a frame behind the server's goodbye
            for event in events:
                if isinstance(event, h2.events.DataReceived):
                    self._received[event.stream_id] += event.data
                    if event.flow_controlled_length:
                        self._http.acknowledge_received_data(
                            event.flow_controlled_length, event.stream_id
                        )
                elif isinstance(event, h2.events.StreamEnded):
                    self._ended.add(event.stream_id)
            self._flush()
