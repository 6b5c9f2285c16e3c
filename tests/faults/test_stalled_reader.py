"""A client that stops reading costs bounded memory, no blocks, and nobody else's answers."""

from __future__ import annotations

import asyncio
import string

from tests.faults.http2 import Connection
from tests.faults.ledger import assert_given_back, holdings
from tests.service.harness import Harness, running
from tests.service.stub_engine import StubEngine
from zllm.v1 import generation_pb2

STALLED, STALLED_TOKENS = 10, 20_000
LIVE, LIVE_TOKENS = 200, 100
BYTES_A_TOKEN = 100
"""Of one that waits for its reader: an id in a list, its text, its place in a message."""
BUFFERS_MIB = 24
"""What gRPC and both sockets hold for a connection whose window is full."""


async def test_two_hundred_live_readers_beside_a_stalled_one() -> None:
    # The embedded tokenizer's first ids are the bytes.
    text = (string.ascii_lowercase * STALLED_TOKENS)[:STALLED_TOKENS]
    script = list(text.encode())
    engine = StubEngine(script, step_s=0.0, num_blocks=100_000, max_model_len=2 * STALLED_TOKENS)
    request = generation_pb2.GenerateRequest(text="a")
    request.stopping.max_tokens = STALLED_TOKENS
    async with running(engine) as server:
        await live(server, text)
        await server.until_idle()
        before = holdings()

        stalled = await Connection.open(server.target)
        streams = {stalled.call(request) for _ in range(STALLED)}
        await stalled.until_answered(streams)
        stalled.reading.clear()
        await live(server, text)
        # The engine is done with the stalled ones too: they hold no block.
        await server.until_idle()
        assert not any(finished(stalled, stream) for stream in streams)
        bound = BUFFERS_MIB + STALLED * STALLED_TOKENS * BYTES_A_TOKEN / 2**20
        assert holdings().memory_mib - before.memory_mib < bound

        stalled.reading.set()
        await stalled.until_ended(streams)
        for stream in streams:
            deltas = [message.delta for message in stalled.messages(stream)]
            assert sum(delta.num_tokens for delta in deltas) == STALLED_TOKENS
            assert "".join(delta.text for delta in deltas) == text
        await stalled.close()
        await assert_given_back(before, bound)


async def live(server: Harness, text: str) -> None:
    answers = (server.client.generate("a", max_tokens=LIVE_TOKENS) for _ in range(LIVE))
    for answer in await asyncio.gather(*answers):
        assert answer.text == text[:LIVE_TOKENS]


def finished(connection: Connection, stream: int) -> bool:
    return any(message.HasField("finished") for message in connection.messages(stream))
