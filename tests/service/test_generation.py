"""What GenerationService answers, over real gRPC and against a scripted engine."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest
from msgspec.structs import replace

from tests.service.harness import Harness, running
from tests.service.stub_engine import EOS, StubEngine
from zllm.clients.aio import AsyncStream
from zllm.clients.request import build_request
from zllm.clients.results import Delta
from zllm.errors import EngineError, RequestExists
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.messages import EngineReady
from zllm.runtime.tokenizer import load_tokenizer
from zllm.v1 import generation_pb2, generation_pb2_grpc

TEXT = "Monday, Tuesday and naïve 日本 🙂 end"
TOKENIZER = load_tokenizer(EMBEDDED_MODEL)
SCRIPT = TOKENIZER.encode(TEXT, add_special_tokens=False)


def speaking(text: str = TEXT, **options: Any) -> StubEngine:
    """An engine that says `text` and ends its turn, whatever the prompt."""
    return StubEngine(script=TOKENIZER.encode(text, add_special_tokens=False), **options)


async def events(server: Harness, **options: Any) -> list[generation_pb2.StreamGenerateResponse]:
    stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
    request = build_request(options.pop("prompt", "hi"), **options)
    return [event async for event in stub.StreamGenerate(request)]


async def test_a_stream_is_started_then_deltas_then_finished() -> None:
    async with running(speaking()) as server:
        first, *deltas, last = await events(server, token_ids=True, prompt_token_ids=True)
    prompt = TOKENIZER.encode("hi", add_special_tokens=True)
    assert first.started.model == "stub"
    assert first.started.request_id
    assert list(first.started.prompt.token_ids) == prompt
    assert {event.WhichOneof("event") for event in deltas} == {"delta"}
    assert "".join(event.delta.text for event in deltas) == TEXT
    ids = [token_id for event in deltas for token_id in event.delta.token_ids]
    assert ids == [*SCRIPT, EOS]
    assert [event.delta.HasField("finish") for event in deltas[:-1]] == [False] * (len(deltas) - 1)
    assert deltas[-1].delta.finish.reason == generation_pb2.SequenceFinish(reason=1).reason
    usage = last.finished.usage
    assert usage.completion_tokens == len(ids) == sum(event.delta.num_tokens for event in deltas)
    assert usage.prompt_tokens == len(prompt)
    assert last.finished.timing.total.ToNanoseconds() > 0


async def test_no_delta_holds_half_a_character() -> None:
    async with running(speaking("日本🙂é")) as server:
        deltas = await events(server)
    assert "".join(event.delta.text for event in deltas) == "日本🙂é"
    assert not any("\ufffd" in event.delta.text for event in deltas)


async def test_the_whole_answer_is_what_the_stream_gives() -> None:
    async with running(speaking()) as server:
        whole = await server.client.generate("hi", token_ids=True, request_id="mine")
        stream = server.client.stream("hi", token_ids=True)
        deltas = [delta async for delta in stream]
    assert whole.text == "".join(delta.text for delta in deltas) == TEXT
    assert whole.token_ids == tuple(i for delta in deltas for i in delta.token_ids)
    assert whole.finish_reason == deltas[-1].finish_reason == "eos"
    assert whole.usage == stream.usage
    assert whole.request_id == "mine"


async def test_text_token_ids_and_chat_all_reach_the_engine_as_ids() -> None:
    engine = speaking()
    async with running(engine) as server:
        await server.client.generate("Monday")
        await server.client.generate([7, 8, 9])
        await server.client.generate([{"role": "user", "content": "hi"}])
    prompts = [as_ids(request.prompt) for request in engine.seen]
    assert prompts[0] == TOKENIZER.encode("Monday", add_special_tokens=True)
    assert prompts[1] == [7, 8, 9]
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[2] == TOKENIZER.encode(rendered, add_special_tokens=False)


async def test_truncation_keeps_the_last_prompt_tokens() -> None:
    engine = speaking()
    async with running(engine) as server:
        answer = await server.client.generate(list(range(500)), truncate_prompt_tokens=10)
    assert as_ids(engine.seen[0].prompt) == list(range(490, 500))
    assert answer.usage.prompt_tokens == 10


async def test_requests_reach_the_engine_with_the_models_defaults_filled_in() -> None:
    engine = speaking()
    async with running(engine) as server:
        await server.client.generate("hi")
        await server.client.generate(
            "hi", temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=2**64 - 1, priority=3,
            cache_salt="s", bypass_cache=True, max_tokens=9, min_tokens=2, queue_timeout=1.5,
            time_limit=2.5, stop_token_ids=[4, 5],
        )  # fmt: skip
        await server.client.generate("hi")
    plain, full, again = engine.seen
    assert (plain.sampling.temperature, plain.sampling.top_p, plain.sampling.top_k) == (1, 1, 0)
    assert plain.stopping.max_tokens == 256  # more than fits: it ends as the context does
    assert plain.stopping.eos_token_ids == (EOS,)
    assert plain.sampling.seed != again.sampling.seed
    assert full.sampling.temperature == 0.5
    assert full.sampling.top_p == pytest.approx(0.9)
    assert (full.sampling.top_k, full.sampling.seed) == (7, 2**64 - 1)
    assert (full.priority, full.salt, full.bypass_cache) == (3, "s", True)
    assert (full.stopping.max_tokens, full.stopping.min_tokens) == (9, 2)
    assert (full.queue_timeout, full.stopping.time_limit) == (1.5, 2.5)
    assert full.stopping.stop_token_ids == (4, 5)


class Cool(StubEngine):
    """Its model comes with sampling defaults of its own."""

    def ready(self) -> EngineReady:
        ready = super().ready()
        card = replace(ready.card, temperature=0.5, top_p=0.75, top_k=7, min_p=0.25)
        return replace(ready, card=card)


async def test_what_a_request_leaves_out_is_as_its_model_has_it() -> None:
    async with running(Cool()) as server:
        await server.client.generate("hi", max_tokens=1)
        await server.client.generate("hi", max_tokens=1, temperature=0.0, top_k=0)
    plain, own = (request.sampling for request in server.engine.seen)
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_p) == (0.5, 0.75, 7, 0.25)
    assert (own.temperature, own.top_p, own.top_k, own.min_p) == (0.0, 0.75, 0, 0.25)


async def test_ignore_eos_goes_on_to_the_limit() -> None:
    async with running(speaking()) as server:
        answer = await server.client.generate("hi", ignore_eos=True, max_tokens=len(SCRIPT) + 5)
    assert answer.finish_reason == "length"
    assert answer.usage.completion_tokens == len(SCRIPT) + 5


async def test_a_full_context_is_said_to_be_full() -> None:
    async with running() as server:
        answer = await server.client.generate([5] * 250)
    assert answer.finish_reason == "context_limit"
    assert answer.usage.completion_tokens == 6


@pytest.mark.parametrize("keep", [False, True])
async def test_a_stop_string_ends_the_text_and_never_leaks(keep: bool) -> None:
    async with running(speaking()) as server:
        stream = server.client.stream(
            "hi", stop=["zzz", "and na"], include_stop_string=keep, token_ids=True
        )
        deltas = [delta async for delta in stream]
        await server.until_idle()
    wanted = "Monday, Tuesday and na" if keep else "Monday, Tuesday "
    assert "".join(delta.text for delta in deltas) == wanted
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].stop == "and na"
    ids = [i for delta in deltas for i in delta.token_ids]
    assert stream.usage is not None
    assert stream.usage.completion_tokens == len(ids)
    assert "and na" in TOKENIZER.decode(ids)
    assert "and na" not in TOKENIZER.decode(ids[:-1])


async def test_a_stop_string_that_never_completes_is_given_in_the_end() -> None:
    async with running(speaking("Monday, Tue")) as server:
        answer = await server.client.generate("hi", stop="Tuesday")
    assert (answer.text, answer.finish_reason) == ("Monday, Tue", "eos")


@pytest.mark.parametrize("keep", [False, True])
async def test_a_stop_token_is_an_id_of_the_answer_but_text_only_if_kept(keep: bool) -> None:
    async with running(speaking()) as server:
        answer = await server.client.generate(
            "hi", stop_token_ids=[SCRIPT[3]], include_stop_string=keep, token_ids=True
        )
    assert answer.token_ids == tuple(SCRIPT[:4])
    assert answer.text == TOKENIZER.decode(SCRIPT[: 4 if keep else 3])
    assert (answer.finish_reason, answer.stop) == ("stop", SCRIPT[3])


async def test_special_tokens_are_skipped_unless_asked_for() -> None:
    async with running(speaking("a<|im_start|>b")) as server:
        plain = await server.client.generate("hi")
        full = await server.client.generate("hi", skip_special_tokens=False)
    assert plain.text == "ab"
    assert full.text == "a<|im_start|>b"


async def test_logprobs_come_with_bytes_ranks_and_the_likeliest() -> None:
    async with running(speaking("🙂")) as server:
        answer = await server.client.generate("hi", logprobs=2, token_ids=True, stop="zz")
        none = await server.client.generate("hi")
    assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)
    assert b"".join(entry.token for entry in answer.logprobs[:-1]) == "🙂".encode()
    for entry in answer.logprobs:
        assert (entry.rank, entry.logprob) == (1, -0.5)
        assert [top[1] for top in entry.top] == [-0.5, -1.5]
        assert entry.top[0][2] == entry.token
    assert answer.cumulative_logprob == pytest.approx(-0.5 * len(answer.token_ids))
    assert none.logprobs == ()
    assert none.cumulative_logprob is None


async def test_text_can_be_left_out() -> None:
    async with running(speaking()) as server:
        stream = server.client.stream("hi", text=False, token_ids=True)
        deltas = [delta async for delta in stream]
    assert {delta.text for delta in deltas} == {""}
    assert [i for delta in deltas for i in delta.token_ids] == [*SCRIPT, EOS]


async def test_min_tokens_per_delta_waits_for_that_many() -> None:
    async with running(speaking()) as server:
        stream = server.client.stream("hi", min_tokens_per_delta=4)
        sizes = [delta.num_tokens async for delta in stream]
    assert sum(sizes) == len(SCRIPT) + 1
    assert all(size >= 4 for size in sizes[:-1])
    assert len(sizes) <= math.ceil((len(SCRIPT) + 1) / 4)


async def test_a_time_limit_keeps_the_partial_text() -> None:
    async with running(StubEngine(step_s=0.01)) as server:
        stream = server.client.stream("abc", time_limit=0.1)
        deltas = [delta async for delta in stream]
        await server.until_idle()
    assert deltas[-1].finish_reason == "time_limit"
    text = "".join(delta.text for delta in deltas)
    assert text
    assert ("abc" * len(text)).startswith(text)


async def test_a_live_request_id_is_refused_and_free_again_afterwards() -> None:
    async with running(StubEngine(step_s=0.01)) as server:
        stream = server.client.stream("abc", request_id="one", max_tokens=200)
        async for _ in stream:
            with pytest.raises(RequestExists) as caught:
                await server.client.generate("abc", request_id="one", max_tokens=1)
            assert caught.value.field == "request_id"
            break
        stream.cancel()
        await server.until_idle()
        answer = await server.client.generate("abc", request_id="one", max_tokens=1)
    assert answer.request_id == "one"


async def test_a_request_that_the_engine_fails_is_internal_and_others_live_on() -> None:
    engine = StubEngine(fail_at=3)
    async with running(engine) as server:
        received: list[Delta] = []
        with pytest.raises(EngineError):
            await collect(server.client.stream("abc"), received)
        with pytest.raises(EngineError):
            await server.client.generate("abc")
        engine.fail_at = None
        answer = await server.client.generate("abc", max_tokens=5)
    assert sum(delta.num_tokens for delta in received) == 3
    assert answer.usage.completion_tokens == 5


async def test_an_unforeseen_error_tells_the_client_nothing_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def explode(*_: object) -> None:
        raise OSError("/secret/path is full")

    async with running() as server:
        monkeypatch.setattr("zllm.service.generation.prompt_ids", explode)
        with pytest.raises(EngineError) as caught:
            await server.client.generate("abc")
        assert "secret" not in str(caught.value)
        monkeypatch.undo()
        assert (await server.client.generate("abc", max_tokens=1)).text == "a"


async def test_headers_come_with_the_first_token_and_not_before() -> None:
    engine = StubEngine()
    async with running(engine) as server:
        engine.frozen.set()
        stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
        call: grpc.aio.UnaryStreamCall[Any, Any] = stub.StreamGenerate(
            build_request("abc", max_tokens=3), timeout=0.3
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not list(caught.value.initial_metadata())
        engine.frozen.clear()
        await server.until_idle()


async def collect(stream: AsyncStream, received: list[Delta]) -> None:
    async for delta in stream:
        received.append(delta)


def as_ids(prompt: bytes) -> list[int]:
    return memoryview(prompt).cast("i").tolist()
