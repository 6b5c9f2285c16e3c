"""The holes that other servers had: each is refused before it costs anything.

Keys and tenants are in test_security_keys.py, TLS in test_security_tls.py, the values of single
fields in test_bad_input.py, hostile templates in tests/runtime/test_chat_template.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from tests.service.harness import Harness, running
from tests.service.stub_engine import StubEngine
from zllm.clients.request import build_request
from zllm.errors import InvalidRequest
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.tokenizer import load_tokenizer
from zllm.service import prompts, validation
from zllm.v1 import admin_pb2, generation_pb2, models_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
HI = [{"role": "user", "content": "hi"}]
MILLION = 1_000_000


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def server() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def refused(server: Harness, request: Message, *codes: grpc.StatusCode) -> str:
    """The field at fault, which must be refused with one of the codes and without the engine."""
    path = "GenerationService/Generate"
    if not isinstance(request, generation_pb2.GenerateRequest):
        path = f"ModelService/{request.DESCRIPTOR.name.removesuffix('Request')}"
    seen = len(server.engine.seen)
    call = server.channel.unary_unary(f"/zllm.v1.{path}")(request.SerializeToString())
    assert await call.code() in codes, await call.details()
    assert len(server.engine.seen) == seen
    details = dict(await call.trailing_metadata())["grpc-status-details-bin"]
    bad = error_details_pb2.BadRequest()
    assert status_pb2.Status.FromString(details).details[0].Unpack(bad)
    assert (await server.client.generate("abc", max_tokens=3)).text == "abc"
    return bad.field_violations[0].field


async def test_a_huge_number_of_sequences_is_refused(server: Harness) -> None:
    for count in (1_000_000, 2**32 - 1):
        request = build_request("abc", num_sequences=count)
        assert await refused(server, request, INVALID, UNIMPLEMENTED) == "sampling.num_sequences"
        beams = build_request("abc", beam_search=generation_pb2.BeamSearch(width=count))
        field = await refused(server, beams, INVALID, UNIMPLEMENTED)
        assert field.startswith("beam_search")


LISTS: dict[str, Any] = {
    "token_ids.ids": {"ids": [5] * 2 * MILLION},
    "stopping.stop_token_ids": {"stop_token_ids": [5] * MILLION},
    "stopping.stop_strings": {"stop": ["a"] * MILLION},
    "sampling.allowed_token_ids": {"allowed_token_ids": [5] * MILLION},
    "sampling.logit_bias": {"logit_bias": dict.fromkeys(range(100_000), 1.0)},
    "chat": {"messages": MILLION},
    "chat.messages": {"messages": 5000},
}


@pytest.mark.parametrize("field", LISTS)
async def test_a_huge_list_is_refused_by_its_length_alone(server: Harness, field: str) -> None:
    options = dict(LISTS[field])
    request = build_request(options.pop("ids", "abc"))
    for _ in range(options.pop("messages", 0)):
        request.chat.messages.add()
    request.MergeFrom(build_request("", **options) if options else generation_pb2.GenerateRequest())
    assert await refused(server, request, INVALID, UNIMPLEMENTED) == field


async def test_a_huge_text_is_refused_before_it_is_tokenized_or_rendered(
    server: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("this costs time")

    chat = build_request(HI)
    chat.chat.messages[0].content = "a " * MILLION
    tools = build_request(HI)
    tools.chat.tools_json = "[" + "{}," * MILLION + "{}]"
    variables = build_request(HI)
    variables.chat.template_kwargs.update({"a": [1.0] * 200_000})
    cases = [
        ("text", build_request("a " * MILLION)),
        ("text", build_request("a " * MILLION, truncate_prompt_tokens=1)),
        ("text", models_pb2.TokenizeRequest(text="a " * MILLION)),
        ("ids", models_pb2.DetokenizeRequest(ids=[5] * 2 * MILLION)),
        ("chat", chat),
        ("chat", tools),
        ("chat", variables),
    ]
    for field, request in cases:
        with monkeypatch.context() as patch:
            patch.setattr(prompts, "encode_text", never)
            patch.setattr(prompts, "_render", never)
            call = server.channel.unary_unary(
                "/zllm.v1.GenerationService/Generate"
                if isinstance(request, generation_pb2.GenerateRequest)
                else f"/zllm.v1.ModelService/{request.DESCRIPTOR.name.removesuffix('Request')}"
            )(request.SerializeToString())
            assert await call.code() is INVALID
        assert await refused(server, request, INVALID) == field


async def test_what_a_chat_is_rendered_to_has_the_same_limit(
    server: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_render", lambda *_: "a" * (validation.MAX_CHARS + 1))
    with pytest.raises(InvalidRequest) as caught:
        await server.client.generate(HI)
    assert caught.value.field == "chat"


HOSTILE_TEXT = "{{ 7 * 7 }}{% for i in range(10**9) %}x{% endfor %}{{ self.__init__.__globals__ }}"


async def test_what_users_say_is_no_template() -> None:
    engine = StubEngine()
    async with running(engine) as server:
        await server.client.generate(
            [{"role": "user", "content": HOSTILE_TEXT}],
            max_tokens=1,
            tools=[{"name": HOSTILE_TEXT}],
        )
        await server.client.generate(
            HI,
            max_tokens=1,
            template_kwargs={"chat_template": HOSTILE_TEXT, "system": HOSTILE_TEXT},
        )
        tokenizer = load_tokenizer(EMBEDDED_MODEL)
        said, plain = (
            tokenizer.decode(memoryview(seen.prompt).cast("i"), skip_special_tokens=False)
            for seen in engine.seen
        )
    assert HOSTILE_TEXT in said
    assert plain == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["messages", "tools", "raise_exception"])
async def test_no_variable_replaces_a_part_of_the_conversation(server: Harness, name: str) -> None:
    request = build_request(HI, template_kwargs={name: "x"})
    assert await refused(server, request, INVALID) == "chat.template_kwargs"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_variables_that_json_cannot_say_are_invalid(server: Harness, value: float) -> None:
    request = build_request(HI, template_kwargs={"a": value})
    assert await refused(server, request, INVALID) == "chat.template_kwargs"


@pytest.mark.parametrize("depth", [600, 900, 990, 2000])
async def test_tools_nested_too_deep_are_invalid_or_served_and_never_an_error_of_ours(
    server: Harness, depth: int
) -> None:
    request = build_request(HI, max_tokens=1)
    request.chat.tools_json = "[" * depth + "]" * depth
    call = server.channel.unary_unary("/zllm.v1.GenerationService/Generate")
    code = await call(request.SerializeToString()).code()
    assert code in (grpc.StatusCode.OK, INVALID)


@pytest.mark.parametrize(
    "constraint",
    [
        generation_pb2.Constraint(regex="((a{1,9999}){1,9999}){1,9999}"),
        generation_pb2.Constraint(regex="(a+)+" * 100_000),
        generation_pb2.Constraint(grammar="start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
        generation_pb2.Constraint(json_schema='{"$ref": "#"}'),
        generation_pb2.Constraint(json_schema='{"allOf":[' * 5000 + "{}" + "]}" * 5000),
        generation_pb2.Constraint(choice=generation_pb2.Choices(values=["a"] * MILLION)),
    ],
    ids=["counts", "stars", "parentheses", "itself", "nested", "choices"],
)
async def test_a_bomb_for_the_grammar_compiler_is_refused(
    server: Harness, constraint: generation_pb2.Constraint
) -> None:
    request = build_request("abc", constraint=constraint)
    field = await refused(server, request, INVALID, UNIMPLEMENTED)
    assert field.startswith("constraint")


async def test_many_small_headers_are_as_bad_as_a_large_one(server: Harness) -> None:
    call = server.channel.unary_unary("/zllm.v1.ModelService/ListModels")
    many = tuple((f"x-{index}", "a" * 20) for index in range(2000))
    assert await call(b"", metadata=many).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    odd = (("authorization", "Bearer ~"), ("x-bin", b"\xff" * 100), ("traceparent", "0" * 99))
    assert await call(b"", metadata=odd).code() is grpc.StatusCode.OK


@pytest.mark.parametrize(
    "data",
    [b"\x7b" * 50_000, b"\x7b" * 50_000 + b"\x7c" * 50_000, b"\x2a\x80\x80\x80\x80\x08", b"\x07"],
    ids=["open groups", "closed groups", "a length beyond the end", "an unknown wire type"],
)
async def test_bytes_made_to_exhaust_a_parser_are_the_senders_fault(
    server: Harness, data: bytes
) -> None:
    call = server.channel.unary_unary("/zllm.v1.GenerationService/Generate")(data)
    assert await call.code() is INVALID
    assert (await server.client.generate("abc", max_tokens=3)).text == "abc"


async def test_a_million_unknown_ids_abort_nothing(server: Harness) -> None:
    request = admin_pb2.AbortRequestsRequest(request_ids=[str(n) for n in range(MILLION)])
    assert not (await server.admin.AbortRequests(request)).aborted_request_ids
