"""Token ids to text, one token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from zllm.runtime.stop_strings import StopStrings
from zllm.runtime.tokenizer import Tokenizer

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """One sequence's text. The pieces of push() and flush() joined are Tokenizer.decode() of its
    ids, up to the first stop string.

    A piece never ends inside a UTF-8 character, nor holds a part of what may become a stop
    string. After a match `matched_stop` names it, and more tokens give no more text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        stop_strings: Sequence[str] = (),
        include_stop_string: bool = False,
    ) -> None:
        self.matched_stop: str | None = None
        self.num_tokens = 0
        """Tokens taken, the one that completed the stop string included."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._stop_strings = StopStrings(stop_strings) if stop_strings else None
        self._include_stop = include_stop_string
        self._decoder = _utf8_decoder("replace")
        self._strip_next = tokenizer.strips_leading_space

    def push(self, token_id: int) -> str:
        """The text that is now certain; often empty."""
        if self.matched_stop is not None:
            return ""
        self.num_tokens += 1
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        return self._advance(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def extend(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """The pieces of push() for each of them, joined, and how many it took: up to the one that
        completed a stop string."""
        if self._stop_strings is None:
            # At once, which is several times as fast.
            self.num_tokens += len(token_ids)
            data = self._tokenizer.bytes_of(token_ids, skip_special_tokens=self._skip_special)
            return self._advance(self._decoder.decode(data)), len(token_ids)
        pieces = []
        for taken, token_id in enumerate(token_ids, start=1):
            pieces.append(self.push(token_id))
            if self.matched_stop is not None:
                return "".join(pieces), taken
        return "".join(pieces), len(token_ids)

    def flush(self) -> str:
        """The rest, once the sequence is over: half a character becomes U+FFFD."""
        if self.matched_stop is not None:
            return ""
        text = self._advance(self._decoder.decode(b"", True))
        if self._stop_strings is not None and self.matched_stop is None:
            text += self._stop_strings.flush()
        return text

    def _advance(self, text: str) -> str:
        if not text:
            return ""
        if self._strip_next:
            text = text.removeprefix(" ")
            self._strip_next = False
        if self._stop_strings is None:
            return text
        text, self.matched_stop = self._stop_strings.push(text)
        if self.matched_stop is not None and self._include_stop:
            text += self.matched_stop
        return text
