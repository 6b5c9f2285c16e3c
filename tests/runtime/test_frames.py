"""Whole messages over a stream: cut nowhere, in order, and neither end waits for the other."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from zllm.runtime.frames import READ_BYTES, Frames


@pytest.fixture
def ends() -> Iterator[tuple[Frames, Frames]]:
    one, other = (Frames(end) for end in socket.socketpair())
    yield one, other
    one.close()
    other.close()


def pumped(sender: Frames, receiver: Frames, count: int) -> list[bytes]:
    """The next messages, while the sender sends as it has room."""
    messages: list[bytes] = []
    while len(messages) < count:
        sender.flush()
        messages += receiver.read()
    return messages


def test_messages_come_whole_and_in_order(ends: tuple[Frames, Frames]) -> None:
    one, other = ends
    sent = [b"", b"a", bytes(70_000), b"last"]
    for message in sent:
        one.write(message)
    assert pumped(one, other, len(sent)) == sent
    assert not one.waiting


def test_where_nothing_has_come_nothing_is_read(ends: tuple[Frames, Frames]) -> None:
    one, other = ends
    assert one.read() == []
    other.write(b"now")
    assert one.read() == [b"now"]
    assert one.read() == []


def test_a_peer_that_does_not_read_holds_up_nobody(ends: tuple[Frames, Frames]) -> None:
    one, other = ends
    sent = [bytes([n % 256]) * 1000 for n in range(2000)]
    for message in sent:
        one.write(message)
    assert one.waiting
    assert pumped(one, other, len(sent)) == sent
    assert not one.waiting


def test_a_message_larger_than_any_buffer_comes_in_one_piece(ends: tuple[Frames, Frames]) -> None:
    one, other = ends
    sent = [bytes(range(256)) * (READ_BYTES // 16), b"and the next"]
    for message in sent:
        one.write(message)
    assert pumped(one, other, 2) == sent


def test_a_message_that_comes_byte_by_byte_is_given_once_it_is_whole() -> None:
    sender, receiving = socket.socketpair()
    receiver = Frames(receiving)
    given = []
    for byte in b"\x03\0\0\0abc\x01\0\0\0d":
        sender.send(bytes([byte]))
        given.append(receiver.read())
    assert [n for n, messages in enumerate(given) if messages] == [6, 11]
    assert given[6] == [b"abc"]
    assert given[11] == [b"d"]
    sender.close()
    receiver.close()


def test_a_peer_that_has_gone_is_an_error_once_its_last_words_are_read(
    ends: tuple[Frames, Frames],
) -> None:
    one, other = ends
    one.write(b"last words")
    one.close()
    assert other.read() == [b"last words"]
    with pytest.raises(ConnectionError):
        other.read()
    with pytest.raises(ConnectionError):
        other.write(b"to nobody")
