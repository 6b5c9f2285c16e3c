"""Byte-level BPE by tiktoken, from a parsed tokenizer.json.

tiktoken merges the pair whose concatenation has the lowest id; the file lists merges in order of
priority. Both give the same ids where ids rise with that order and the merges reach every token,
which is checked: a file that breaks it, or has a step that is not known here, raises
NotByteLevelBPEError.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import tiktoken
from tokenizers.models import BPE
from tokenizers.normalizers import NFC

from zllm.errors import InvalidRequest
from zllm.runtime.added_tokens import AddedToken, AddedTokens, added_tokens_of
from zllm.runtime.byte_level import BYTE_CHARS, decoded, to_bytes
from zllm.runtime.tokenizer import Tokenizer

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel splits with where use_regex is set."""

MAX_WHITESPACE_RUN = 500_000
"""The pattern engine backtracks over a run of whitespace, and panics on about a million."""

_WHITESPACE_RUN = re.compile(r"\s+")
_PROBE = "Ab1234 ?!x\n\n\t y  \u00e9\u4e2d\u0301 \U0001f600'll\r\n_"
"""A character of every kind: a pattern that lost one would lose text."""


class NotByteLevelBPEError(ValueError):
    """The file describes something that tiktoken cannot reproduce; the message says what."""


class TiktokenTokenizer(Tokenizer):
    def __init__(self, file: dict[str, Any], special: Container[str] = ()) -> None:
        """Added tokens whose content is in `special` are special, whatever the file says.

        Raises NotByteLevelBPEError, or KeyError and TypeError for a malformed file.
        """
        decoder = file.get("decoder")
        if [step["type"] for step in _steps(decoder, "decoders")] != ["ByteLevel"]:
            raise NotByteLevelBPEError(f"its decoder is {decoder}")
        normal_form = _normal_form(file.get("normalizer"))
        splitting = _splitting(file["pre_tokenizer"])
        added = added_tokens_of(file, special)
        ranks = _ranks(file["model"], added)
        self._prefix, self._suffix = _template(file.get("post_processor"))
        self._add_prefix_space = splitting.add_prefix_space
        self._added = AddedTokens(added, _nfc if normal_form else str)
        try:
            self._encoding = tiktoken.Encoding(
                "model", pat_str=splitting.pattern, mergeable_ranks=ranks, special_tokens={}
            )
            survives = self._encoding.decode(self._encoding.encode_ordinary(_PROBE)) == _PROBE
        except ValueError as error:
            raise NotByteLevelBPEError(f"its pattern does not compile: {error}") from None
        if not survives:
            raise NotByteLevelBPEError("its pattern leaves some text unmatched")
        vocab: dict[str, int] = file["model"]["vocab"]
        size = 1 + max([*vocab.values(), *(token.id for token in added)])
        tokens = [b""] * size
        for data, rank in ranks.items():
            tokens[rank] = data
        for written, token_id in vocab.items():
            if not tokens[token_id]:  # no text becomes this id, but a model may draw it
                tokens[token_id] = decoded(written)
        for token in added:
            tokens[token.id] = token.content.encode()
        super().__init__(tokens, self._added.special_ids)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) > MAX_WHITESPACE_RUN:
            _check_whitespace(text)
        ids: list[int] = []
        for part in self._added.split(text):
            if isinstance(part, int):
                ids.append(part)
            elif self._add_prefix_space and not part.startswith(" "):
                ids += self._encoding.encode_ordinary(" " + part)
            else:
                ids += self._encoding.encode_ordinary(part)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids


@dataclass(frozen=True)
class _Splitting:
    pattern: str
    add_prefix_space: bool


def _nfc(text: str) -> str:
    # The library's tables are of an older Unicode than Python's: marks that are newer keep their
    # order in it. Its own function gives its own ids; the check, which is C, spares most calls.
    return text if unicodedata.is_normalized("NFC", text) else str(NFC().normalize_str(text))


def _check_whitespace(text: str) -> None:
    for run in _WHITESPACE_RUN.finditer(text):
        if run.end() - run.start() > MAX_WHITESPACE_RUN:
            raise InvalidRequest(
                "text",
                f"{run.end() - run.start()} characters of whitespace follow each other; at most "
                f"{MAX_WHITESPACE_RUN} may",
            )


def _normal_form(normalizer: dict[str, Any] | None) -> bool:
    """Whether text is brought to NFC first."""
    steps = _steps(normalizer, "normalizers")
    if any(step["type"] != "NFC" for step in steps):
        raise NotByteLevelBPEError(f"its normalizer is {[step['type'] for step in steps]}")
    return bool(steps)


def _splitting(pre_tokenizer: dict[str, Any] | None) -> _Splitting:
    steps = _steps(pre_tokenizer, "pretokenizers")
    match [step["type"] for step in steps]:
        case ["ByteLevel"] if steps[0].get("use_regex", True):
            return _Splitting(GPT2_PATTERN, steps[0]["add_prefix_space"])
        case ["Split", "ByteLevel"]:
            split, byte_level = steps
            # Both say: the matches are the pieces.
            cut = (split["behavior"], split.get("invert", False))
            known = cut in (("Isolated", False), ("Removed", True))
            # A prefix space after the split would go before every piece.
            plain = not byte_level.get("use_regex", True) and not byte_level["add_prefix_space"]
            if known and plain and "Regex" in split["pattern"]:
                return _Splitting(split["pattern"]["Regex"], add_prefix_space=False)
    raise NotByteLevelBPEError(f"its pre-tokenizer is {pre_tokenizer}")


def _ranks(model: dict[str, Any], added: list[AddedToken]) -> dict[bytes, int]:
    """Every token that BPE can give, by its bytes."""
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or model.get("byte_fallback") or any(map(model.get, odd)):
        raise NotByteLevelBPEError("its model is not plain BPE")
    vocab: dict[str, int] = model["vocab"]
    if not all(char in vocab for char in BYTE_CHARS):
        raise NotByteLevelBPEError("its vocabulary lacks some of the 256 bytes")
    merges = [
        tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]
    ]
    merged = [left + right for left, right in merges]
    ids = [vocab[token] for token in merged]
    if any(a > b for a, b in pairwise(ids)):
        raise NotByteLevelBPEError("its ids do not rise with the order of its merges")
    # tiktoken merges any two that make a token. Where the listed pair never meets, as other merges
    # take its parts before, the token would be tiktoken's alone.
    listed = BPE(vocab=vocab, merges=merges)
    for token in merged:
        if len(listed.tokenize(token)) != 1:
            raise NotByteLevelBPEError(f"its merges do not reach the token {token!r}")
    made = {**{char: vocab[char] for char in BYTE_CHARS}, **dict(zip(merged, ids, strict=True))}
    if len({*made.values()}) < len(made):
        raise NotByteLevelBPEError("two of its tokens have the same id")
    if model.get("ignore_merges"):
        # A piece that is in the vocabulary is one token, merges or not. tiktoken would make that
        # token inside longer pieces, too. No piece is an added token: those are cut out before.
        cut_out = {t.content for t in added if not t.single_word and t.content.isascii()}
        if unmade := vocab.keys() - made.keys() - cut_out:
            raise NotByteLevelBPEError(
                f"its ignore_merges gives {min(unmade)!r}, which no merge makes"
            )
    return {to_bytes(token): rank for token, rank in made.items()}


def _template(post_processor: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """The ids that a template puts before and after one text."""
    before: list[int] = []
    after: list[int] = []
    for step in _steps(post_processor, "processors"):
        if step["type"] == "ByteLevel":
            continue  # changes offsets only
        if step["type"] != "TemplateProcessing" or before or after:
            raise NotByteLevelBPEError(f"its post-processor has a step {step['type']}")
        side = before
        for piece in step["single"]:
            if "Sequence" in piece:
                side = after
            else:
                side += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return before, after


def _steps(node: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    if node is None:
        return []
    return list(node[children]) if node["type"] == "Sequence" else [node]
