"""Every bad input gets its code and its field, and the server goes on serving."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2

from tests.service.harness import Harness, running
from tests.service.stub_engine import VOCAB
from zllm.clients.request import build_request
from zllm.errors import InvalidRequest, UnknownModel, UnsupportedRequest
from zllm.v1 import generation_pb2, generation_pb2_grpc

NAN = math.nan


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def server() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def still_serves(server: Harness) -> bool:
    answer = await server.client.generate("abc", max_tokens=3)
    return answer.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("sampling.top_p", {"top_p": 0.0}),
        ("sampling.top_p", {"top_p": 2.0}),
        ("sampling.top_p", {"top_p": -0.5}),
        ("sampling.top_p", {"top_p": NAN}),
        ("sampling.temperature", {"temperature": NAN}),
        ("sampling.temperature", {"temperature": math.inf}),
        ("sampling.temperature", {"temperature": -1.0}),
        ("sampling.min_p", {"min_p": -0.1}),
        ("sampling.min_p", {"min_p": 1.1}),
        ("sampling.min_p", {"min_p": NAN}),
        ("sampling.top_k", {"top_k": 2**32 - 1}),
        ("sampling.num_sequences", {"num_sequences": 0}),
        ("stopping.max_tokens", {"max_tokens": 0}),
        ("stopping.max_tokens", {"max_tokens": 257}),
        ("stopping.max_tokens", {"max_tokens": 2**32 - 1}),
        ("stopping.min_tokens", {"min_tokens": 8, "max_tokens": 4}),
        ("stopping.min_tokens", {"min_tokens": 10_000}),
        ("stopping.stop_strings[0]", {"stop": [""]}),
        ("stopping.stop_strings[1]", {"stop": ["a", ""]}),
        ("stopping.stop_strings[0]", {"stop": ["x" * 1025]}),
        ("stopping.stop_strings", {"stop": ["x"] * 10_000}),
        ("stopping.stop_token_ids[1]", {"stop_token_ids": [1, VOCAB]}),
        ("stopping.stop_token_ids", {"stop_token_ids": [1] * 10_000}),
        ("stopping.time_limit", {"time_limit": -1.0}),
        ("stopping.time_limit", {"time_limit": 0.0}),
        ("queue_timeout", {"queue_timeout": -0.001}),
        ("output.logprobs", {"logprobs": 21}),
        ("output.min_tokens_per_delta", {"min_tokens_per_delta": 0}),
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": 0}),
        ("request_id", {"request_id": "x" * 1000}),
        ("cache.salt", {"cache_salt": "x" * 1000}),
    ],
)
async def test_a_value_out_of_range_is_invalid_and_named(
    server: Harness, field: str, options: dict[str, Any]
) -> None:
    for call in (server.client.generate, stream_all(server)):
        with pytest.raises(InvalidRequest) as caught:
            await call("abc", **options)
        assert caught.value.field == field
    assert await still_serves(server)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("sampling.presence_penalty", {"presence_penalty": 0.5}),
        ("sampling.frequency_penalty", {"frequency_penalty": -0.5}),
        ("sampling.repetition_penalty", {"repetition_penalty": 1.1}),
        ("sampling.repetition_penalty", {"repetition_penalty": NAN}),
        ("sampling.num_sequences", {"num_sequences": 2}),
        ("sampling.logit_bias", {"logit_bias": {1: 2.0}}),
        ("sampling.allowed_token_ids", {"allowed_token_ids": [1]}),
        ("beam_search", {"beam_search": generation_pb2.BeamSearch(width=2)}),
        ("constraint", {"constraint": generation_pb2.Constraint(regex="a+")}),
        ("output.prompt_logprobs", {"prompt_logprobs": 0}),
    ],
)
async def test_a_field_of_a_later_version_is_unimplemented_and_named(
    server: Harness, field: str, options: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedRequest) as caught:
        await server.client.generate("abc", **options)
    assert caught.value.field == field
    assert await still_serves(server)


async def test_a_later_field_that_asks_for_nothing_is_no_error(server: Harness) -> None:
    answer = await server.client.generate(
        "abc", max_tokens=2, presence_penalty=0.0, repetition_penalty=1.0, num_sequences=1
    )
    assert answer.finish_reason == "length"


async def test_an_unknown_model_is_not_found(server: Harness) -> None:
    with pytest.raises(UnknownModel) as caught:
        await server.client.generate("abc", model="nobody")
    assert caught.value.field == "model"
    assert "stub" in str(caught.value)
    assert await still_serves(server)


async def test_no_prompt_and_empty_prompts_are_invalid(server: Harness) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
    empty_chat = generation_pb2.GenerateRequest(chat=generation_pb2.Chat())
    cases = {
        "prompt": generation_pb2.GenerateRequest(),
        "text": build_request(""),
        "token_ids": build_request([]),
        "chat.messages": empty_chat,
    }
    cases["token_ids"].token_ids.SetInParent()
    for field, request in cases.items():
        assert await violations(stub.Generate(request)) == [field]
    assert await still_serves(server)


async def test_a_token_id_outside_the_vocabulary_is_named_by_its_place(server: Harness) -> None:
    for bad in (VOCAB, 2**32 - 1):
        with pytest.raises(InvalidRequest) as caught:
            await server.client.generate([1, 2, bad, 3])
        assert caught.value.field == "token_ids.ids[2]"
    assert await still_serves(server)


async def test_a_prompt_longer_than_the_context_is_invalid(server: Harness) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await server.client.generate([5] * 256)
    assert caught.value.field == "token_ids"
    assert "truncate_prompt_tokens" in str(caught.value)


async def test_both_limits_exceeded_are_both_named(server: Harness) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
    request = build_request([5] * 300, max_tokens=1000)
    assert await violations(stub.Generate(request)) == ["token_ids", "stopping.max_tokens"]


async def test_prompt_and_answer_must_fit_the_context_together(server: Harness) -> None:
    whole = await server.client.generate([5] * 200, max_tokens=56)
    assert whole.usage.completion_tokens == 56
    with pytest.raises(InvalidRequest) as caught:
        await server.client.generate([5] * 200, max_tokens=57)
    assert caught.value.field == "stopping.max_tokens"


async def test_all_violations_of_a_request_are_told_at_once(server: Harness) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
    request = build_request([VOCAB], top_p=7.0, stop=[""], temperature=-1.0)
    assert await violations(stub.Generate(request)) == [
        "sampling.temperature",
        "sampling.top_p",
        "stopping.stop_strings[0]",
        "token_ids.ids[0]",
    ]


async def test_more_violations_than_a_client_takes_are_told_in_part(server: Harness) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
    nameless = build_request([{"role": "", "content": "hi"}] * 4000, stop=["🙂" * 5000])
    told = await violations(stub.Generate(nameless))
    assert told[:2] == ["stopping.stop_strings[0]", "chat.messages[0].role"]
    assert 10 < len(told) < 4000
    with pytest.raises(UnknownModel, match="not served"):
        await server.client.generate("abc", model="🙂" * 5000)


@pytest.mark.parametrize(
    ("field", "request_bytes"),
    [
        ("text", b"\x1a\x02\xff\xfe"),
        ("model", b"\x12\x01\xc3\x1a\x01a"),
        ("stopping.stop_strings[1]", b"\x1a\x01a\x42\x06\x1a\x01b\x1a\x01\xff"),
        ("chat.messages[0].content", b"\x2a\x09\x0a\x07\x0a\x01u\x12\x02\xff\xff"),
        ("request", b"\xff\xff\xff"),
        ("request", b"\x1a\xff\xff\xff\xff\x0f"),
    ],
)
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
async def test_bytes_that_are_no_request_are_the_senders_fault(
    server: Harness, method: str, field: str, request_bytes: bytes
) -> None:
    path = f"/zllm.v1.GenerationService/{method}"
    if method == "Generate":
        call: Any = server.channel.unary_unary(path)(request_bytes)
    else:
        call = server.channel.unary_stream(path)(request_bytes)
    assert await violations(call) == [field]
    assert await still_serves(server)


async def test_a_chat_that_the_template_refuses_names_the_chat(server: Harness) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await server.client.generate([{"role": "wizard", "content": "hi"}])
    assert caught.value.field.startswith("chat")
    stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
    nameless = build_request([{"role": "", "content": "hi"}])
    assert await violations(stub.Generate(nameless)) == ["chat.messages[0].role"]
    assert await still_serves(server)


@pytest.mark.parametrize("tools", ["{", "{}", "[" * 100_000, "1"])
async def test_tools_that_are_no_json_array_are_invalid(server: Harness, tools: str) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
    request = build_request([{"role": "user", "content": "hi"}])
    request.chat.tools_json = tools
    assert await violations(stub.Generate(request)) == ["chat.tools_json"]
    assert await still_serves(server)


async def test_a_message_nested_too_deep_is_refused(server: Harness) -> None:
    bomb = b""
    for _ in range(200):
        # A Value that is a ListValue with one Value …
        bomb = b"\x0a" + varint(len(bomb)) + bomb
        bomb = b"\x32" + varint(len(bomb)) + bomb
    entry = b"\x0a\x01k\x12" + varint(len(bomb)) + bomb
    struct = b"\x0a" + varint(len(entry)) + entry
    chat = b"\x1a" + varint(len(struct)) + struct
    request = b"\x2a" + varint(len(chat)) + chat
    call = server.channel.unary_unary("/zllm.v1.GenerationService/Generate")(request)
    assert await violations(call) == ["request"]
    assert await still_serves(server)


async def test_a_request_over_the_size_limit_is_refused(server: Harness) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(build_request("x" * (17 * 1024 * 1024)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await still_serves(server)


async def test_unknown_fields_and_methods_do_no_harm(server: Harness) -> None:
    request = build_request("abc", max_tokens=1).SerializeToString() + b"\xfa\x3f\x02hi"
    answer = await server.channel.unary_unary("/zllm.v1.GenerationService/Generate")(request)
    assert generation_pb2.GenerateResponse.FromString(answer).usage.completion_tokens == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.channel.unary_unary("/zllm.v1.GenerationService/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert await still_serves(server)


def stream_all(server: Harness) -> Any:
    async def call(prompt: str, **options: Any) -> None:
        async for _ in server.client.stream(prompt, **options):
            pass

    return call


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


async def violations(call: Any) -> list[str]:
    """The fields of an INVALID_ARGUMENT answer's google.rpc.BadRequest."""
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT, await call.details()
    details = dict(await call.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    assert all(violation.description for violation in bad.field_violations)
    return [violation.field for violation in bad.field_violations]
