"""A stream's deltas go out one after another, and merge while one is on its way."""

from __future__ import annotations

import asyncio

import pytest

from zllm.errors import Unavailable
from zllm.native.delta_writer import DeltaWriter
from zllm.native.pending import Delta
from zllm.runtime.detokenizer import Detokenizer
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.messages import FinishReason
from zllm.runtime.tokenizer import load_tokenizer
from zllm.service.streams import Stream

TOKENIZER = load_tokenizer(EMBEDDED_MODEL)
IDS = TOKENIZER.encode("one two three four five six", add_special_tokens=False)


class Wire:
    """In gRPC's place: a write that has begun ends when it is told to."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.ended: list[bytes] = []
        self.broken: list[bytes] = []
        self._leaving: asyncio.Future[None] | None = None

    async def write(self, message: bytes) -> None:
        assert self._leaving is None, "two writes at once"
        self.begun.append(message)
        self._leaving = asyncio.get_running_loop().create_future()
        try:
            await self._leaving
        except BaseException:
            self.broken.append(message)
            raise
        finally:
            self._leaving = None
        self.ended.append(message)

    async def end(self, error: Exception | None = None) -> None:
        assert self._leaving is not None, "no write has begun"
        if error is None:
            self._leaving.set_result(None)
        else:
            self._leaving.set_exception(error)
        await turns()


async def turns() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


def encode(delta: Delta) -> bytes:
    return ",".join(map(str, delta.token_ids)).encode()


class Case:
    """A stream that has had its first token, and the writer that is to write it."""

    def __init__(self) -> None:
        self.stream = Stream(Detokenizer(TOKENIZER))
        self.wire = Wire()
        self.writer = DeltaWriter(self.stream, encode, self.wire.write, asyncio.get_running_loop())

    async def start(self) -> asyncio.Future[None]:
        self.stream.push(IDS[0], 0)
        end = self.writer.start(await self.stream.take())
        await turns()
        return end


async def test_what_comes_while_a_write_is_on_its_way_is_one_delta() -> None:
    case = Case()
    end = await case.start()
    for token in IDS[1:3]:
        case.stream.push(token, 0)
    assert case.wire.begun == [b"%d" % IDS[0]]
    await case.wire.end()
    await case.wire.end()
    case.stream.push(IDS[3], FinishReason.LENGTH)
    await turns()
    assert not end.done()
    await case.wire.end()
    assert end.done()
    assert case.wire.ended == [b"%d" % IDS[0], b"%d,%d" % (IDS[1], IDS[2]), b"%d" % IDS[3]]
    case.writer.close()


async def test_a_failure_of_the_stream_comes_after_its_deltas() -> None:
    case = Case()
    end = await case.start()
    case.stream.push(IDS[1], 0)
    case.stream.fail(Unavailable("gone"))
    await case.wire.end()
    assert not end.done()
    await case.wire.end()
    with pytest.raises(Unavailable, match="gone"):
        await end
    case.writer.close()


async def test_a_failure_of_a_waiting_stream_comes_at_once() -> None:
    case = Case()
    end = await case.start()
    await case.wire.end()
    case.stream.fail(Unavailable("gone"))
    with pytest.raises(Unavailable, match="gone"):
        await end
    case.writer.close()


async def test_a_failure_of_a_write_ends_it() -> None:
    case = Case()
    end = await case.start()
    await case.wire.end(ConnectionError("left"))
    with pytest.raises(ConnectionError, match="left"):
        await end
    case.stream.push(IDS[1], 0)
    await turns()
    assert len(case.wire.begun) == 1
    case.writer.close()


async def test_a_write_that_cannot_begin_ends_it() -> None:
    async def refuse(message: bytes) -> None:
        raise ConnectionError("has left")

    case = Case()
    case.writer = DeltaWriter(case.stream, encode, refuse, asyncio.get_running_loop())
    end = await case.start()
    with pytest.raises(ConnectionError, match="has left"):
        await end
    case.writer.close()


async def test_a_delta_that_cannot_be_encoded_ends_it() -> None:
    def refuse(delta: Delta) -> bytes:
        if delta.token_ids[0] != IDS[0]:
            raise ValueError("no such message")
        return encode(delta)

    case = Case()
    case.writer = DeltaWriter(case.stream, refuse, case.wire.write, asyncio.get_running_loop())
    end = await case.start()
    await case.wire.end()
    case.stream.push(IDS[1], 0)
    with pytest.raises(ValueError, match="no such message"):
        await end
    case.writer.close()


async def test_closing_gives_up_the_write_that_is_on_its_way() -> None:
    case = Case()
    end = await case.start()
    end.cancel()
    case.writer.close()
    case.stream.push(IDS[1], 0)
    await turns()
    assert case.wire.broken == case.wire.begun == [b"%d" % IDS[0]]
    assert case.stream.waiter is None


async def test_closing_gives_up_a_write_that_has_not_begun() -> None:
    case = Case()
    end = await case.start()
    await case.wire.end()
    case.stream.push(IDS[1], 0)
    end.cancel()
    case.writer.close()
    await turns()
    assert len(case.wire.begun) == 1


async def test_a_write_may_end_between_the_cancellation_and_the_closing() -> None:
    case = Case()
    end = await case.start()
    case.stream.push(IDS[1], FinishReason.LENGTH)
    end.cancel()
    await case.wire.end()
    assert len(case.wire.begun) == 1
    case.writer.close()
