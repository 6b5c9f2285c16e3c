"""Text a token at a time: never half a character, never a part of a stop string."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.test_tokenizer import sentencepiece_like
from tests.runtime.texts import generated_texts
from zllm.runtime.detokenizer import Detokenizer
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.hf_tokenizer import HFTokenizer
from zllm.runtime.stop_strings import StopStrings
from zllm.runtime.tokenizer import Tokenizer, load_tokenizer


@cache
def embedded() -> Tokenizer:
    """A tokenizer that spells most text, and so cuts most characters into bytes."""
    return load_tokenizer(EMBEDDED_MODEL)


def pieces(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def test_a_character_comes_whole_with_its_last_byte() -> None:
    detokenizer = Detokenizer(embedded())
    ids = embedded().encode("a😀é")
    assert [detokenizer.push(token) for token in ids] == ["a", "", "", "", "😀", "", "é"]
    assert detokenizer.flush() == ""


def test_half_a_character_at_the_end_is_replaced() -> None:
    detokenizer = Detokenizer(embedded())
    assert pieces(detokenizer, embedded().encode("a😀")[:-1]) == ["a", "", "", "", "\ufffd"]


def test_bytes_that_are_no_utf8_are_replaced_at_once() -> None:
    smile, a = embedded().encode("😀"), embedded().encode("a")
    assert pieces(Detokenizer(embedded()), [smile[1], *a, smile[0], *a]) == [
        "\ufffd", "a", "", "\ufffda", "",
    ]  # fmt: skip


def test_pieces_join_to_what_decode_gives() -> None:
    source = random.Random(0)
    for text in generated_texts(200, seed=2):
        ids = embedded().encode(text)
        cut = ids[source.randrange(3) : len(ids) - source.randrange(3)]
        for skip in (True, False):
            joined = "".join(pieces(Detokenizer(embedded(), skip_special_tokens=skip), cut))
            assert joined == embedded().decode(cut, skip_special_tokens=skip)


def test_special_tokens_are_shown_only_where_asked() -> None:
    ids = embedded().encode("hi<|im_end|>")
    assert "".join(pieces(Detokenizer(embedded()), ids)) == "hi"
    shown = Detokenizer(embedded(), skip_special_tokens=False)
    assert "".join(pieces(shown, ids)) == "hi<|im_end|>"


def test_an_id_outside_the_vocabulary_has_no_text() -> None:
    assert pieces(Detokenizer(embedded()), [embedded().vocab_size + 3]) == ["", ""]


def test_a_sentencepiece_kind_loses_its_first_space_only() -> None:
    reference = sentencepiece_like()
    tokenizer = HFTokenizer(reference.to_str())
    ids = tokenizer.encode("<s>hello hello é")
    assert "".join(pieces(Detokenizer(tokenizer), ids)) == "hello hello é"
    assert reference.decode(ids) == "hello hello é"


def with_stops(text: str, stops: Sequence[str], include: bool = False) -> tuple[str, str | None]:
    """The text of every byte of `text` pushed as a token of its own, and what matched."""
    detokenizer = Detokenizer(embedded(), stop_strings=stops, include_stop_string=include)
    out = "".join(pieces(detokenizer, embedded().encode(text)))
    return out, detokenizer.matched_stop


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["two"], ("one ", "two")),
        ("one two three", ["four"], ("one two three", None)),
        ("one tw", ["two"], ("one tw", None)),  # held back, then let go at the end
        ("aab", ["ab"], ("a", "ab")),
        ("abababc", ["ababc"], ("ab", "ababc")),
        ("xabcx", ["bcd", "abc"], ("x", "abc")),
        ("xabcx", ["abcx", "b"], ("xa", "b")),  # the one that is complete first
        ("xabcx", ["c", "abc"], ("x", "abc")),  # of those that end together, the longest
        ("a😀b", ["😀"], ("a", "😀")),
        ("stop", ["stop"], ("", "stop")),
        ("a\n\nb", ["\n\n"], ("a", "\n\n")),
    ],
)
def test_the_stop_string_that_is_complete_first_ends_the_text(
    text: str, stops: list[str], expected: tuple[str, str | None]
) -> None:
    assert with_stops(text, stops) == expected
    kept = expected[0] + (expected[1] or "")
    assert with_stops(text, stops, include=True) == (kept, expected[1])


def test_tokens_after_the_match_are_neither_text_nor_counted() -> None:
    detokenizer = Detokenizer(embedded(), stop_strings=["b"])
    assert detokenizer.extend(embedded().encode("abcd")) == ("a", 2)
    assert detokenizer.push(embedded().encode("e")[0]) == ""
    assert detokenizer.flush() == ""


def test_half_a_character_at_the_end_comes_after_what_was_held_back() -> None:
    detokenizer = Detokenizer(embedded(), stop_strings=["abc"])
    ids = embedded().encode("ab😀")[:-1]
    assert pieces(detokenizer, ids) == ["", "", "", "", "", "ab\ufffd"]
    assert detokenizer.matched_stop is None


def test_a_token_of_many_characters_may_hold_the_stop_string() -> None:
    (token,) = embedded().encode("What")
    detokenizer = Detokenizer(embedded(), stop_strings=["ha"])
    assert detokenizer.push(token) == "W"
    assert detokenizer.matched_stop == "ha"


def test_a_thousand_stop_strings_are_no_slower_to_follow_than_one() -> None:
    stops = StopStrings([f"end{n}" for n in range(1000)])
    assert stops.push("the en") == ("the ", None)
    assert stops.push("d99") == ("", "end9")


def reference_match(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("abc", max_size=6), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=5),
)
def test_however_the_text_is_cut_the_result_is_the_same(parts: list[str], stops: list[str]) -> None:
    matcher, out, matched = StopStrings(stops), "", None
    expected = reference_match("".join(parts), stops)
    for part in parts:
        piece, matched = matcher.push(part)
        out += piece
        assert expected[0].startswith(out)  # nothing of the stop string leaked
        if matched is not None:
            break
    else:
        out += matcher.flush()
    assert (out, matched) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=6),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_no_more_is_held_back_than_could_become_a_stop_string(
    parts: list[str], stops: list[str]
) -> None:
    matcher, seen, out = StopStrings(stops), "", ""
    for part in parts:
        piece, matched = matcher.push(part)
        if matched is not None:
            return
        seen, out = seen + part, out + piece
        possible = max(
            (n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0
        )
        assert out == seen[: len(seen) - possible]
