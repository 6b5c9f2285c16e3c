"""Both clients and the command against a server: the same surface, the same errors."""

from __future__ import annotations

import asyncio
import io
import json
import math
from collections.abc import Callable
from contextlib import aclosing
from typing import TypeVar

import pytest

from tests.service.harness import Harness, running
from tests.service.stub_engine import EOS, StubEngine
from zllm.cli import main
from zllm.clients.aio import AsyncClient
from zllm.clients.bench import Sample, Workload, summarize
from zllm.clients.client import Client, Stream
from zllm.clients.health import ask
from zllm.errors import ConfigError, InvalidRequest, Unavailable, ZllmError
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.tokenizer import load_tokenizer
from zllm.service import models
from zllm.service.config import ServerConfig

ANSWER = "Monday, Tuesday"
Result = TypeVar("Result")


def speaking(**options: float) -> StubEngine:
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    return StubEngine(script=tokenizer.encode(ANSWER, add_special_tokens=False), **options)


async def with_client(server: Harness, work: Callable[[Client], Result]) -> Result:
    """Runs blocking work beside the server's event loop."""

    def run() -> Result:
        with Client(server.target, attempts=1) as client:
            return work(client)

    return await asyncio.to_thread(run)


async def command(server: Harness, *arguments: str) -> int:
    return await asyncio.to_thread(main, [*arguments, "--target", server.target])


async def test_the_synchronous_client_has_the_whole_surface() -> None:
    def work(client: Client) -> None:
        client.wait_ready(5)
        assert [model.name for model in client.models()] == ["stub"]
        ids = [*client.tokenize("Monday"), EOS]
        assert client.detokenize(ids) == "Monday<|im_end|>"
        assert client.detokenize(ids, skip_special_tokens=True) == "Monday"
        whole = client.generate("hi", token_ids=True)
        assert whole.text == ANSWER
        for stream in (client.stream("hi", token_ids=True), client.chat("hi", token_ids=True)):
            deltas = list(stream)
            assert "".join(delta.text for delta in deltas) == ANSWER
            assert tuple(i for delta in deltas for i in delta.token_ids) == whole.token_ids
            assert stream.usage is not None
            assert stream.usage.completion_tokens == len(whole.token_ids)
            assert stream.timing is not None
            assert stream.request_id
            assert stream.model == "stub"
        with pytest.raises(InvalidRequest) as caught:
            list(client.stream("hi", top_p=2.0))
        assert caught.value.field == "sampling.top_p"

    async with running(speaking()) as server:
        await with_client(server, work)


async def test_leaving_a_stream_ends_its_request() -> None:
    """Though it is still referred to, and its client goes on."""

    def work(client: Client) -> list[Stream]:
        with client.stream("abc") as left:
            next(iter(left))
        broken_off = client.stream("abc")
        for _ in broken_off:
            break
        return [left, broken_off]

    async with running(StubEngine(step_s=0.1)) as server:
        with Client(server.target, attempts=1) as client:
            kept = await asyncio.to_thread(work, client)
            await server.until_idle()
        assert len(kept) == 2


async def test_leaving_a_stream_of_the_asyncio_client_ends_its_request() -> None:
    async with running(StubEngine(step_s=0.1)) as server:
        async with server.client.stream("abc") as left:
            await anext(aiter(left))
        closed = server.client.stream("abc")
        async with aclosing(aiter(closed)) as deltas:
            await anext(deltas)
        await server.until_idle()


async def test_a_stream_that_is_dropped_before_it_is_read_ends_its_request() -> None:
    def work(client: Client) -> None:
        client.stream("abc")

    async with running(StubEngine(step_s=0.1)) as server:
        with Client(server.target, attempts=1) as client:
            await asyncio.to_thread(work, client)
            await server.until_idle()
        dropped = server.client.stream("abc")
        await server.until(lambda load: load.running_requests == 1, "it never ran")
        del dropped
        await server.until_idle()


async def test_a_passed_timeout_is_a_timeout_error() -> None:
    def work(client: Client) -> None:
        with pytest.raises(TimeoutError):
            client.generate("abc", timeout=0.1)
        with pytest.raises(TimeoutError):
            list(client.stream("abc", timeout=0.1))

    async with running(StubEngine(step_s=0.1)) as server:
        await with_client(server, work)
        await server.until_idle()


async def test_a_request_that_no_time_makes_fit_is_not_overload() -> None:
    def work(client: Client) -> None:
        with pytest.raises(InvalidRequest, match="max_message_bytes"):
            client.generate("a" * 2000)
        with pytest.raises(InvalidRequest, match="max_message_bytes"):
            list(client.stream("a" * 2000))

    async with running(config=ServerConfig(port=0, admin_port=0, max_message_bytes=1024)) as server:
        await with_client(server, work)
        with pytest.raises(InvalidRequest, match="max_message_bytes"):
            await server.client.generate("a" * 2000)


async def test_a_timeout_of_infinity_never_passes() -> None:
    def work(client: Client) -> None:
        client.wait_ready(math.inf)
        assert client.generate("abc", max_tokens=3, timeout=math.inf).text == "abc"

    async with running() as server:
        await with_client(server, work)
        await server.client.wait_ready(math.inf)
        answer = await server.client.generate("abc", max_tokens=3, timeout=math.inf)
        assert answer.text == "abc"


def test_a_closed_client_says_so() -> None:
    client = Client("127.0.0.1:1")
    client.close()
    client.close()
    for call in (client.models, lambda: client.stream("abc"), lambda: client.wait_ready(1)):
        with pytest.raises(ZllmError, match="closed"):
            call()


async def test_a_closed_asyncio_client_says_so() -> None:
    client = AsyncClient("127.0.0.1:1")
    await client.close()
    await client.close()
    with pytest.raises(ZllmError, match="closed"):
        await client.models()
    with pytest.raises(ZllmError, match="closed"):
        client.stream("abc")
    with pytest.raises(ZllmError, match="closed"):
        await client.wait_ready(1)


async def test_an_asyncio_client_goes_with_the_loop_that_uses_it() -> None:
    """Made where no loop runs, and used by one `asyncio.run` after the other."""
    async with running() as server:
        client = await asyncio.to_thread(AsyncClient, server.target, attempts=1)

        async def answer() -> str:
            streamed = [delta.text async for delta in client.stream("abc", max_tokens=3)]
            assert "".join(streamed) == (await client.generate("abc", max_tokens=3)).text
            return "".join(streamed)

        for _ in range(2):
            assert await asyncio.to_thread(asyncio.run, answer()) == "abc"
        await client.close()
        with pytest.raises(ZllmError, match="closed"):
            await asyncio.to_thread(asyncio.run, answer())


async def test_closing_the_client_fails_a_call_and_does_not_cancel_who_waits_for_it() -> None:
    async with running(StubEngine(step_s=0.1)) as server:
        client = AsyncClient(server.target, attempts=1)
        waiting = asyncio.create_task(client.generate("abc"))
        await server.until(lambda load: load.running_requests == 1, "it never ran")
        await client.close()
        with pytest.raises(ZllmError, match="CANCELLED"):
            await waiting
        await server.until_idle()


async def test_a_server_on_the_loopback_is_reached_though_a_proxy_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What listens on the loopback is no proxy's to reach, and this one is not there."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")

    def work(client: Client) -> None:
        assert client.generate("abc", max_tokens=3).text == "abc"
        assert ask(server.target) == "SERVING"

    async with running() as server:
        await with_client(server, work)


def test_without_a_server_calls_are_unavailable() -> None:
    with Client("127.0.0.1:1", attempts=1) as client:
        with pytest.raises(Unavailable):
            client.generate("abc")
        with pytest.raises(TimeoutError):
            client.wait_ready(0.1)


async def test_the_asyncio_client_waits_for_a_server_as_long_as_it_is_told() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(TimeoutError, match=r"no server answered within 0\.1 s"):
            await client.wait_ready(0.1)
    async with running() as server:
        await server.client.wait_ready(5)


async def test_a_tokenizer_that_takes_longer_than_it_may_is_a_timeout_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def take_long(*_: object) -> None:
        await asyncio.sleep(60)

    def work(client: Client) -> None:
        with pytest.raises(TimeoutError):
            client.tokenize("abc", timeout=0.1)
        with pytest.raises(TimeoutError):
            client.detokenize([1], timeout=0.1)

    monkeypatch.setattr(models, "_maybe_in_thread", take_long)
    async with running() as server:
        await with_client(server, work)
        with pytest.raises(TimeoutError):
            await server.client.tokenize("abc", timeout=0.1)
        with pytest.raises(TimeoutError):
            await server.client.detokenize([1], timeout=0.1)


async def test_the_generate_command_streams_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    async with running(speaking()) as server:
        assert await command(server, "generate", "hi", "--max-tokens", "50") == 0
        assert capsys.readouterr().out == ANSWER + "\n"
        assert await command(server, "generate", "hi", "--top-p", "2") == 1
        assert "sampling.top_p" in capsys.readouterr().err


async def test_the_chat_command_remembers_its_turns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = speaking()
    monkeypatch.setattr("sys.stdin", io.StringIO("first\n\nsecond\n"))
    async with running(engine) as server:
        assert await command(server, "chat", "--system", "Be brief.") == 0
    assert capsys.readouterr().out == f"{ANSWER}\n{ANSWER}\n"
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    first, second = (
        tokenizer.decode(memoryview(request.prompt).cast("i"), skip_special_tokens=False)
        for request in engine.seen
    )
    assert "Be brief." in first
    assert second.startswith(first + ANSWER)
    assert "second" in second


async def test_the_bench_command_measures_every_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = ("--num-requests", "12", "--input-len", "20", "--output-len", "8", "--json")
    async with running(StubEngine()) as server:
        for mode in (("--concurrency", "4"), ("--rate", "200", "--shared-len", "10")):
            assert await command(server, "bench", *load, *mode) == 0
            report = json.loads(capsys.readouterr().out)
            assert (report["requests"], report["failed"]) == (12, 0)
            assert report["output_tokens_per_s"] == pytest.approx(12 * 8 / report["seconds"])
            assert 0 < report["ttft_p50_ms"] <= report["ttft_p99_ms"] <= report["total_p99_ms"]
        await server.until_idle()


async def test_the_bench_command_lets_no_answer_end_early_and_times_its_first_token(
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = ("--num-requests", "2", "--input-len", "20", "--output-len", "20", "--json")
    async with running(StubEngine(script=[], step_s=0.03)) as server:
        assert await command(server, "bench", *load) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["output_tokens_per_s"] == pytest.approx(2 * 20 / report["seconds"])
    assert report["ttft_p99_ms"] < report["total_p50_ms"] / 2


def test_the_benchs_arithmetic() -> None:
    report = summarize([Sample(0.1, 1.0, 10), Sample(0.3, 1.2, 10), Sample(0, 0, 0, "no")], 2.0)
    assert (report["requests"], report["failed"], report["first_error"]) == (3, 1, "no")
    assert report["requests_per_s"] == 1.0
    assert report["output_tokens_per_s"] == 10.0
    assert report["ttft_p50_ms"] == pytest.approx(200)
    assert report["tpot_p50_ms"] == pytest.approx(100)


def test_wrong_usage_is_two_and_a_missing_server_is_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate"])
    assert caught.value.code == 2
    assert main(["generate", "hi", "--target", "127.0.0.1:1"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err


async def test_a_stream_that_is_cancelled_elsewhere_fails_and_its_reader_is_not_cancelled() -> None:
    async with running(StubEngine(step_s=0.02)) as server:
        stream = server.client.stream("abc", max_tokens=200, ignore_eos=True)

        async def read() -> None:
            async for _ in stream:
                pass

        reading = asyncio.create_task(read())
        await server.until(lambda load: load.running_requests == 1, "it never ran")
        stream.cancel()
        with pytest.raises(ZllmError, match="CANCELLED"):
            await reading
        await server.until_idle()

        reading = asyncio.create_task(read())
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("concurrency", 0),
        ("rate", -5.0),
        ("rate", 0.0),
        ("num_requests", 0),
        ("input_len", -5),
        ("shared_len", -1),
        ("shared_len", 128),
    ],
)
def test_a_workload_that_cannot_be_is_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        Workload(target="127.0.0.1:1", **{field: value})  # type: ignore[arg-type]
