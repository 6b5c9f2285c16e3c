"""Every tokenizer that is not byte-level BPE, by HF's `tokenizers`."""

from __future__ import annotations

import json
import re
from collections.abc import Container
from typing import Any

import tokenizers

from zllm.runtime.byte_level import to_bytes
from zllm.runtime.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"


class HFTokenizer(Tokenizer):
    def __init__(self, content: str, special: Container[str] = ()) -> None:
        """`content` is the text of tokenizer.json. Raises what `tokenizers` raises.

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
            tokens[token_id] = entry.content.encode()
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
    """What the file's decoder makes of one token, as bytes."""

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        steps = [] if decoder is None else decoder.get("decoders", [decoder])
        kinds = {step["type"]: step for step in steps}
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._word_piece = kinds.get("WordPiece")
        self._replacements = [
            (step["pattern"]["String"], step["content"])
            for step in steps
            if step["type"] == "Replace" and "String" in step["pattern"]
        ]
        metaspace = kinds.get("Metaspace")
        if metaspace is not None:
            self._replacements.append((metaspace.get("replacement", _METASPACE), " "))
        strip = kinds.get("Strip", {})
        self.strips_leading_space = (
            (strip.get("content") == " " and strip.get("start", 0) > 0)
            or (metaspace is not None and metaspace.get("prepend_scheme", "always") != "never")
            or self._word_piece is not None
        )

    def token_bytes(self, token: str) -> bytes:
        if self._byte_level:
            try:
                return to_bytes(token)
            except ValueError:
                return token.encode()
        if self._byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if self._word_piece is not None:
            prefix = self._word_piece["prefix"]
            return (
                token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"
            ).encode()
        for pattern, content in self._replacements:
            token = token.replace(pattern, content)
        return token.encode()
