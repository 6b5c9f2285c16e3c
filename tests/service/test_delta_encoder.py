"""What is written without protobuf's class is what protobuf writes, byte for byte."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zllm.native.pending import Delta
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.messages import FinishReason, TokenLogprobs
from zllm.runtime.tokenizer import load_tokenizer
from zllm.service.answers import Run, delta_encoder, delta_message
from zllm.service.streams import Finish
from zllm.v1 import generation_pb2

TOKENIZER = load_tokenizer(EMBEDDED_MODEL)

# A delta's text comes from a decoder, which makes no surrogates.
texts = st.text(st.characters(exclude_categories=("Cs",))) | st.sampled_from(
    ["", "a" * 127, "é" * 64]
)
token_ids = st.lists(st.integers(0, 2**31 - 1) | st.sampled_from([0, 127, 128, 16383, 16384]))
logprobs = st.builds(
    TokenLogprobs,
    st.floats(-100, 0, width=32),
    st.integers(1, 1000),
    st.just([1, 2]),
    st.just([-0.5, -1.5]),
)
finishes = st.builds(
    Finish,
    st.sampled_from([reason for reason in FinishReason if 0 < reason < 100]),
    st.none() | st.integers(0, 895),
    st.none() | texts,
)


def a_run(*, text: bool, ids: bool) -> Run:
    model: Any = Mock(tokenizer=TOKENIZER)
    request = generation_pb2.GenerateRequest()
    stream: Any = None
    return Run(request, "id", model, [1], stream, 0, wants_text=text, wants_token_ids=ids)


@given(texts, token_ids, st.booleans(), st.booleans())
def test_a_plain_delta_has_protobufs_own_bytes(
    text: str, ids: list[int], wants_text: bool, wants_ids: bool
) -> None:
    run = a_run(text=wants_text, ids=wants_ids)
    delta = Delta(text, ids, [], None)
    encoded = delta_encoder(run)(delta)
    assert encoded == delta_message(run, delta).SerializeToString()
    read = generation_pb2.StreamGenerateResponse.FromString(encoded)
    assert read.WhichOneof("event") == "delta"
    assert read.delta.num_tokens == len(ids)
    assert read.delta.text == (text if wants_text else "")
    assert list(read.delta.token_ids) == (ids if wants_ids else [])


@given(texts, st.lists(st.tuples(st.integers(0, 895), logprobs)), st.none() | finishes)
def test_what_is_more_than_text_and_ids_is_left_to_protobuf(
    text: str, tokens: list[tuple[int, TokenLogprobs]], finish: Finish | None
) -> None:
    run = a_run(text=True, ids=True)
    delta = Delta(text, [t for t, _ in tokens], [entry for _, entry in tokens], finish)
    encoded = delta_encoder(run)(delta)
    assert encoded == delta_message(run, delta).SerializeToString()


def test_the_message_has_no_field_that_the_encoder_does_not_know_of() -> None:
    """A field that is added to the contract has to be added there, or to what is left to it."""
    fields = set(generation_pb2.SequenceDelta.DESCRIPTOR.fields_by_name)
    unused = {"index"}  # of num_sequences, which are refused
    assert fields - unused == {"text", "token_ids", "num_tokens", "logprobs", "finish"}


def test_an_id_below_zero_is_refused_as_protobuf_does() -> None:
    run = a_run(text=True, ids=True)
    delta = Delta("a", [-1], [], None)
    for encode in (delta_encoder(run), lambda delta: delta_message(run, delta)):
        with pytest.raises((OverflowError, ValueError)):
            encode(delta)
