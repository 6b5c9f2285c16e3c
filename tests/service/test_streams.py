"""One merged pending delta a stream: first token at once, later ones merged, nothing dropped."""

from __future__ import annotations

import asyncio

import pytest

from zllm.errors import Unavailable
from zllm.runtime.detokenizer import Detokenizer
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.messages import FinishReason, TokenLogprobs
from zllm.runtime.tokenizer import load_tokenizer
from zllm.service.streams import Stream

TOKENIZER = load_tokenizer(EMBEDDED_MODEL)
IDS = TOKENIZER.encode("one two three four five six", add_special_tokens=False)


def make(stop: tuple[str, ...] = (), **options: bool | int) -> Stream:
    return Stream(Detokenizer(TOKENIZER, stop_strings=stop), has_stop_strings=bool(stop), **options)


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


async def test_take_waits_until_something_comes() -> None:
    stream = make()
    waiting = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    stream.push(IDS[0], 0)
    assert (await waiting).token_ids == IDS[:1]


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


async def test_what_is_pending_is_bounded_by_the_answer_itself() -> None:
    stream = make()
    for _ in range(10_000):
        stream.push(IDS[0], 0)
    stream.push(-1, FinishReason.TIME_LIMIT)
    delta = await stream.take()
    assert len(delta.token_ids) == 10_000
    assert delta.text == TOKENIZER.decode([IDS[0]]) * 10_000
