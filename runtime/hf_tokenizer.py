"""Every tokenizer that is not byte-level BPE, by HF's `tokenizers`."""

from __future__ import annotations

import json
import re
from collections.abc import Container
from typing import Any

import tokenizers

from zllm.errors import ModelLoadError
from zllm.runtime.byte_level import decoded
from zllm.runtime.tokenizer import Tokenizer

_KNOWN_STEPS = re.compile(r"ByteLevel |Metaspace |(Replace )*(ByteFallback )?(Fuse (Strip )?)?")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HFTokenizer(Tokenizer):
    def __init__(self, content: str, special: Container[str] = ()) -> None:
        """`content` is the text of tokenizer.json. Raises ModelLoadError for a decoder that is not
        supported, and what `tokenizers` raises.

        Added tokens whose content is in `special` are special, whatever the file says.
        """
        self._library = tokenizers.Tokenizer.from_str(content)
        self._library.no_truncation()
        self._library.no_padding()
        decoder = _Decoder(json.loads(content).get("decoder"))
        self.strips_leading_space = decoder.strips_leading_space
        vocab = self._library.get_vocab(with_added_tokens=True)
        tokens = [b""] * (1 + max(vocab.values()))
        for token, token_id in vocab.items():
            tokens[token_id] = decoder.token_bytes(token)
        added = self._library.get_added_tokens_decoder()
        for token_id, entry in added.items():
            tokens[token_id] = decoder.added_token_bytes(entry.content)
        special_ids = frozenset(
            token_id
            for token_id, entry in added.items()
            if entry.special or entry.content in special
        )
        super().__init__(tokens, special_ids)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._library.encode(text, add_special_tokens=add_special_tokens).ids
        return ids


class _Decoder:
    """What the file's decoder makes of one token, as bytes: the same wherever the token stands, but
    for one space that the text may lose at its start.

    Bytes that are no UTF-8 become U+FFFD as they are found; `tokenizers` replaces all bytes around
    them, too, with ByteFallback, and so changes text that was sent.
    """

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        steps = [] if decoder is None else decoder.get("decoders", [decoder])
        kinds = {step["type"]: step for step in steps}
        replaced = [step for step in steps if step["type"] == "Replace"]
        strip = kinds.get("Strip")
        if (
            not _KNOWN_STEPS.fullmatch("".join(f"{step['type']} " for step in steps))
            or not all("String" in step["pattern"] for step in replaced)
            or (strip and (strip["content"], strip["start"], strip["stop"]) != (" ", 1, 0))
        ):
            raise ModelLoadError(
                f"its decoder is {decoder}, which is not supported: use a tokenizer that decodes "
                "by ByteLevel, by Metaspace, or by Replace (a string), ByteFallback, Fuse and "
                "Strip (one space at the start), in this order"
            )
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._replacements = [(step["pattern"]["String"], step["content"]) for step in replaced]
        self._joint = " " if decoder is None else ""
        self._first_loses = ""  # a character, of which a text's first token keeps none
        if metaspace := kinds.get("Metaspace"):
            self._replacements = [(metaspace["replacement"], " ")]
            if metaspace.get("prepend_scheme") != "never":
                self._first_loses = metaspace["replacement"]
        self.strips_leading_space = bool(strip or self._joint or self._first_loses)

    def token_bytes(self, token: str) -> bytes:
        if self._byte_level:
            return decoded(token)
        if self._first_loses and (self._first_loses in token[1:] or token.startswith(" ")):
            raise ModelLoadError(
                f"its decoder Metaspace gives another text for the token {token!r} at the start: "
                'use a tokenizer whose decoder has the prepend_scheme "never"'
            )
        for pattern, content in self._replacements:
            token = token.replace(pattern, content)
        if self._byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return (self._joint + token).encode()

    def added_token_bytes(self, token: str) -> bytes:
        # `tokenizers` reads the "\u00e9" of such a token as the byte E9, which is no text.
        return token.encode() if self._byte_level else self.token_bytes(token)
