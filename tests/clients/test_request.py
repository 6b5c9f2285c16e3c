"""Plain Python to the contract's messages, and back."""

from __future__ import annotations

import json
import math
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict

from zllm.clients.credentials import key_metadata
from zllm.clients.failures import to_error
from zllm.clients.request import build_request, deadline, detokenize_request, tokenize_request
from zllm.clients.results import Timing, Usage, read_delta, read_timing, read_usage
from zllm.clients.service_config import channel_options, service_config
from zllm.errors import (
    ConfigError,
    EngineError,
    InvalidRequest,
    Overloaded,
    RequestExists,
    Unavailable,
    UnknownModel,
    UnsupportedRequest,
    ZllmError,
)
from zllm.service.status import BadFields, code_of, details_of
from zllm.v1 import generation_pb2, types_pb2


def test_a_prompt_is_text_ids_or_chat() -> None:
    assert build_request("hi").text == "hi"
    assert list(build_request([1, 2]).token_ids.ids) == [1, 2]
    assert list(build_request((1,)).token_ids.ids) == [1]
    chat = build_request([{"role": "user", "content": "hi"}]).chat
    assert [(m.role, m.content) for m in chat.messages] == [("user", "hi")]


def test_each_option_goes_to_its_place_in_the_contract() -> None:
    request = build_request(
        [{"role": "user", "content": "hi"}],
        model="m",
        temperature=0.5,
        seed=7,
        logit_bias={3: 1.5},
        max_tokens=4,
        stop=["a", "b"],
        stop_token_ids=[5],
        time_limit=1.25,
        queue_timeout=2,
        logprobs=0,
        token_ids=True,
        text=False,
        cache_salt="s",
        bypass_cache=True,
        tools=[{"name": "t"}],
        template_kwargs={"enable_thinking": False},
        truncate_prompt_tokens=9,
        priority=-1,
    )
    assert MessageToDict(request, preserving_proto_field_name=True) == {
        "model": "m",
        "chat": {
            "messages": [{"role": "user", "content": "hi"}],
            "tools_json": '[{"name": "t"}]',
            "template_kwargs": {"enable_thinking": False},
        },
        "sampling": {"temperature": 0.5, "seed": "7", "logit_bias": {"3": 1.5}},
        "stopping": {
            "max_tokens": 4,
            "stop_strings": ["a", "b"],
            "stop_token_ids": [5],
            "time_limit": "1.250s",
        },
        "output": {"text": False, "token_ids": True, "logprobs": 0},
        "cache": {"bypass": True, "salt": "s"},
        "priority": -1,
        "queue_timeout": "2s",
        "truncate_prompt_tokens": 9,
    }


def test_none_leaves_a_field_to_the_server() -> None:
    request = build_request("hi", temperature=None, max_tokens=None, text=None, stop=None)
    assert request == generation_pb2.GenerateRequest(text="hi")


@pytest.mark.parametrize("message", [{}, {"role": "user"}, {"content": "hi"}])
def test_a_message_needs_role_and_content(message: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="role and content") as caught:
        build_request([message])
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("name", ["stop", "stop_strings"])
def test_one_stop_string_need_not_be_a_list(name: str) -> None:
    for given in ("end", ["end"]):
        assert list(build_request("hi", **{name: given}).stopping.stop_strings) == ["end"]


def test_a_prompt_of_ids_and_messages_is_refused_and_not_halved() -> None:
    with pytest.raises(TypeError, match="both"):
        build_request([1, {"role": "user", "content": "hi"}, 2])  # type: ignore[list-item]


def test_a_timeout_that_no_clock_holds_is_none() -> None:
    assert [deadline(each) for each in (None, 0.5, -1, math.inf, 1e12)] == [
        None, 0.5, -1, None, None,
    ]  # fmt: skip
    with pytest.raises(InvalidRequest, match="timeout"):
        deadline(math.nan)


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines", "a\x00"])
def test_a_key_that_no_header_holds_is_told_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="api_key") as caught:
        key_metadata(key)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "direct"),
    [
        ("127.0.0.1:50051", True),
        ("localhost", True),
        ("[::1]:50051", True),
        ("127.example.org:50051", False),
        ("10.0.0.1:50051", False),
    ],
)
def test_no_proxy_stands_before_the_loopback(target: str, direct: bool) -> None:
    assert (("grpc.enable_http_proxy", 0) in channel_options(target)) == direct


@pytest.mark.parametrize("options", [{"temprature": 1.0}, {"max_tokens": "four"}])
def test_an_unknown_name_or_type_fails_before_anything_is_sent(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        build_request("hi", **options)


@pytest.mark.parametrize("options", [{"tools": []}, {"template_kwargs": {"a": 1}}])
@pytest.mark.parametrize("prompt", ["text", [1, 2]])
def test_a_chats_options_need_a_chat(prompt: Any, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="messages"):
        build_request(prompt, **options)


@pytest.mark.parametrize("options", [{"top_k": -(2**40)}, {"seed": -1}, {"max_tokens": -1}])
def test_a_value_that_its_field_cannot_hold_names_the_field(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build_request("hi", **options)
    assert caught.value.field == next(iter(options))


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        build_request("\udcff")
    with pytest.raises(InvalidRequest, match="surrogates") as caught:
        build_request("hi", stop="\udcff")
    assert caught.value.field == "stop"
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        tokenize_request("\udcff", "", False)
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        detokenize_request([-1], "", False)


class Failure(grpc.RpcError):
    """What gRPC raises for a status."""

    def __init__(self, code: grpc.StatusCode, text: str, details: bytes | None) -> None:
        self._answer = (code, text, details)

    def code(self) -> grpc.StatusCode:
        return self._answer[0]

    def details(self) -> str:
        return self._answer[1]

    def trailing_metadata(self) -> list[tuple[str, bytes]]:
        details = self._answer[2]
        return [] if details is None else [("grpc-status-details-bin", details)]


def over_the_wire(error: ZllmError) -> Exception:
    details = details_of(error).SerializeToString()
    return to_error(Failure(code_of(error), str(error), details))


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("sampling.top_p", "2 is too much"),
        UnsupportedRequest("beam_search", "not yet"),
        UnknownModel("model", "nobody"),
        RequestExists("request_id", "one"),
    ],
)
def test_a_requests_error_comes_back_with_class_and_field(error: Any) -> None:
    back: Any = over_the_wire(error)
    assert type(back) is type(error)
    assert (back.field, back.reason) == (error.field, error.reason)


@pytest.mark.parametrize("error", [Overloaded("full", 2.5), Unavailable("draining", 0.25)])
def test_a_refusal_comes_back_with_its_time_to_retry(error: Any) -> None:
    back: Any = over_the_wire(error)
    assert type(back) is type(error)
    assert back.retry_after == error.retry_after


def test_several_violations_come_back_as_the_first() -> None:
    both = BadFields([InvalidRequest("a", "is bad"), InvalidRequest("b", "is worse")])
    back: Any = over_the_wire(both)
    assert (type(back), back.field, back.reason) == (InvalidRequest, "a", "is bad")
    assert len(details_of(both).details) == 1
    assert "b: is worse" in str(both)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, TimeoutError),
        (grpc.StatusCode.INTERNAL, EngineError),
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.CANCELLED, ZllmError),
    ],
)
def test_a_bare_status_maps_too(code: grpc.StatusCode, kind: type[Exception]) -> None:
    for details in (None, b"\xff not a status"):
        assert type(to_error(Failure(code, "why", details))) is kind


def test_a_delta_reads_as_plain_python() -> None:
    finish = generation_pb2.SequenceFinish(reason=2, stop_string="end")  # type: ignore[arg-type]
    delta = read_delta(
        generation_pb2.SequenceDelta(text="a", token_ids=[1], num_tokens=1, finish=finish)
    )
    assert (delta.text, delta.token_ids, delta.num_tokens) == ("a", (1,), 1)
    assert (delta.finish_reason, delta.stop) == ("stop", "end")
    assert read_delta(generation_pb2.SequenceDelta()).finish_reason is None


def test_usage_and_timing_read_as_numbers() -> None:
    usage = types_pb2.Usage(prompt_tokens=5, cached_tokens=3, completion_tokens=2)
    assert read_usage(usage) == Usage(prompt_tokens=5, cached_tokens=3, completion_tokens=2)
    timing = generation_pb2.Timing(
        queued=Duration(nanos=250_000_000),
        first_token=Duration(seconds=1),
        total=Duration(seconds=3),
    )
    assert read_timing(timing) == Timing(queued=0.25, first_token=1.0, total=3.0)


def test_only_refusals_are_tried_again() -> None:
    (method,) = json.loads(service_config(3))["methodConfig"]
    codes = method["retryPolicy"]["retryableStatusCodes"]
    assert sorted(codes) == ["RESOURCE_EXHAUSTED", "UNAVAILABLE"]


def test_one_attempt_means_no_retries() -> None:
    assert ("grpc.enable_retries", 0) in channel_options("host", 1)
    assert "grpc.service_config" not in dict(channel_options("host", 1))
    assert "UNAVAILABLE" in str(dict(channel_options("host", 3))["grpc.service_config"])
