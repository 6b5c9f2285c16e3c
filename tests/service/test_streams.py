"""One merged pending delta a stream: first token at once, later ones merged, nothing dropped."""

from __future__ import annotations

import asyncio
import gc
import struct
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zllm.errors import Unavailable
from zllm.native.pending import route
from zllm.native.utf8_text import Utf8Text
from zllm.runtime.detokenizer import Detokenizer
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.messages import FinishReason, RequestStarted, TokenLogprobs
from zllm.runtime.tokenizer import load_tokenizer
from zllm.service.streams import Finish, Stream

TOKENIZER = load_tokenizer(EMBEDDED_MODEL)
IDS = TOKENIZER.encode("one two three four five six", add_special_tokens=False)


def make(stop: tuple[str, ...] = (), **options: bool | int) -> Stream:
    return Stream(Detokenizer(TOKENIZER, stop_strings=stop), **options)


async def test_the_first_token_goes_out_alone_and_later_ones_merge() -> None:
    stream = make()
    stream.push(IDS[0], 0)
    first = await stream.take()
    for token in IDS[1:-1]:
        stream.push(token, 0)
    stream.push(IDS[-1], FinishReason.LENGTH)
    rest = await stream.take()
    assert first.token_ids == IDS[:1]
    assert rest.token_ids == IDS[1:]
    assert first.text + rest.text == "one two three four five six"
    assert rest.finish is not None
    assert rest.finish.reason is FinishReason.LENGTH
    assert stream.completion_tokens == len(IDS)


async def test_a_stream_whose_error_nobody_takes_is_gone_at_once() -> None:
    """Its client leaves in the turn in which it fails. Without a garbage collection: what a request
    holds would stay until one."""
    stream = make()
    gone = weakref.ref(stream)
    waiting = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    gc.disable()
    try:
        stream.fail(Unavailable("the engine restarts"))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        del stream, waiting
        await asyncio.sleep(0)  # the loop's turn that woke this test holds the task
        assert gone() is None
    finally:
        gc.enable()


async def test_take_waits_until_something_comes() -> None:
    stream = make()
    waiting = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    stream.push(IDS[0], 0)
    assert (await waiting).token_ids == IDS[:1]


async def test_a_stream_has_begun_with_its_first_token_or_at_its_end() -> None:
    started = RequestStarted(1, 0, 0.0)
    for go_on in (lambda s: s.start(started), lambda s: s.push(-1, FinishReason.ABORTED)):
        stream = make(min_tokens=3)
        waiting = asyncio.create_task(stream.begun())
        await asyncio.sleep(0)
        assert not waiting.done()
        go_on(stream)
        await waiting
        await stream.begun()


async def test_a_failure_before_it_began_is_raised_and_one_after_it_is_not_yet() -> None:
    stream = make()
    waiting = asyncio.create_task(stream.begun())
    await asyncio.sleep(0)
    stream.fail(Unavailable("gone"))
    with pytest.raises(Unavailable, match="gone"):
        await waiting
    stream = make()
    stream.start(RequestStarted(1, 0, 0.0))
    stream.fail(Unavailable("gone"))
    await stream.begun()
    with pytest.raises(Unavailable, match="gone"):
        await stream.take()


async def test_min_tokens_hold_a_delta_back_but_not_the_last() -> None:
    stream = make(min_tokens=3)
    waiting = asyncio.create_task(stream.take())
    for token in IDS[:2]:
        stream.push(token, 0)
        await asyncio.sleep(0)
        assert not waiting.done()
    stream.push(IDS[2], 0)
    assert (await waiting).token_ids == IDS[:3]
    stream.push(IDS[3], FinishReason.LENGTH)
    assert (await stream.take()).token_ids == IDS[3:4]


async def test_push_tells_of_a_stop_string_though_nobody_reads() -> None:
    stream = make(stop=("two",))
    told = []
    for token in IDS:
        told.append(stream.push(token, 0))
        if told[-1]:
            break
    assert told[-1]
    delta = await stream.take()
    assert delta.text == "one "
    assert delta.finish is not None
    assert delta.finish.stop_string == "two"
    assert "two" in TOKENIZER.decode(delta.token_ids)


async def test_tokens_after_a_stop_string_are_dropped() -> None:
    stream = make(stop=("two",))
    logprobs = TokenLogprobs(-1.0, 1, [], [])
    for token in IDS:
        stream.push(token, 0, logprobs)
    delta = await stream.take()
    assert delta.text == "one "
    assert len(delta.token_ids) == len(delta.logprobs) == stream.completion_tokens < len(IDS)
    assert stream.cumulative_logprob == pytest.approx(-len(delta.token_ids))


async def test_a_failure_comes_after_the_tokens_before_it() -> None:
    stream = make()
    stream.push(IDS[0], 0)
    stream.fail(Unavailable("gone"))
    assert (await stream.take()).token_ids == IDS[:1]
    with pytest.raises(Unavailable, match="gone"):
        await stream.take()


async def test_a_failure_after_the_end_changes_nothing() -> None:
    for end in (lambda s: s.push(IDS[1], FinishReason.EOS), lambda s: s.push(-1, 7)):
        stream = make()
        stream.push(IDS[0], 0)
        end(stream)
        stream.fail(Unavailable("gone"))
        delta = await stream.take()
        assert delta.finish is not None
        assert delta.text == "one"[: len(delta.text)]


async def test_an_answer_ends_when_the_engine_ends_it_however_late_it_is_read() -> None:
    stream = make()
    stream.push(IDS[0], FinishReason.LENGTH)
    ended = stream.ended_at
    assert ended > 0
    await stream.take()
    assert stream.ended_at == ended


async def test_what_is_pending_is_bounded_by_the_answer_itself() -> None:
    stream = make()
    for _ in range(10_000):
        stream.push(IDS[0], 0)
    stream.push(-1, FinishReason.TIME_LIMIT)
    delta = await stream.take()
    assert len(delta.token_ids) == 10_000
    assert delta.text == TOKENIZER.decode([IDS[0]]) * 10_000


def entries(*each: tuple[int, int, int]) -> tuple[bytes, bytes, bytes]:
    """Of (id, token, finish), as a step has them."""
    ids, tokens, finishes = zip(*each, strict=True)
    return (
        struct.pack(f"<{len(each)}q", *ids),
        struct.pack(f"<{len(each)}i", *tokens),
        bytes(finishes),
    )


async def test_a_steps_entries_go_to_their_streams_and_ended_ones_leave() -> None:
    plain, stopping, scored = make(), make(stop=("two",)), make()
    streams = {1: plain, 1 << 41: stopping, 3: scored}
    one, *others = IDS
    logprobs = {3: TokenLogprobs(-1.0, 1, [], [])}
    step = entries((1, one, 0), (9, one, 0), (1 << 41, one, 0), (3, one, 0))
    assert route(streams, *step, logprobs) == []
    deltas = [await stream.take() for stream in (plain, scored)]
    assert [delta.token_ids for delta in deltas] == [[one], [one]]
    assert [delta.logprobs for delta in deltas] == [[], [logprobs[3]]]
    stopped = route(streams, *entries(*((1 << 41, token, 0) for token in others)), {})
    assert stopped == [1 << 41]
    assert list(streams) == [1, 3]
    end = entries((1, one, FinishReason.LENGTH), (3, -1, FinishReason.ABORTED))
    assert route(streams, *end, {}) == []
    assert not streams
    assert (await plain.take()).finish == Finish(FinishReason.LENGTH)
    assert (await scored.take()).token_ids == []


def test_a_step_whose_arrays_differ_in_length_is_refused() -> None:
    ids, tokens, finishes = entries((1, 1, 0), (2, 2, 0))
    for step in ((ids[8:], tokens, finishes), (ids, tokens[4:], finishes), (ids, tokens, b"")):
        with pytest.raises(ValueError, match="length"):
            route({}, *step, {})


@given(st.lists(st.lists(st.sampled_from(range(TOKENIZER.vocab_size + 3)))), st.booleans())
def test_text_in_pieces_is_the_text_of_the_whole(pieces: list[list[int]], strips: bool) -> None:
    text = Utf8Text(TOKENIZER.tokens(skip_special_tokens=True), strips)
    joined = "".join([*map(text.extend, pieces), text.flush()])
    whole = TOKENIZER.decode([token for piece in pieces for token in piece])
    assert joined == (whole.removeprefix(" ") if strips else whole)
