"""Token ids to text, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

from zllm.native.utf8_text import Utf8Text
from zllm.runtime.stop_strings import StopStrings
from zllm.runtime.tokenizer import Tokenizer


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
        self._text = Utf8Text(
            tokenizer.tokens(skip_special_tokens=skip_special_tokens),
            tokenizer.strips_leading_space,
        )
        self._stop_strings = StopStrings(stop_strings) if stop_strings else None
        self._include_stop = include_stop_string

    @property
    def plain(self) -> Utf8Text | None:
        """What makes all of the text, where no stop string is looked for."""
        return None if self._stop_strings is not None else self._text

    def push(self, token_id: int) -> str:
        """The text that is now certain; often empty."""
        if self.matched_stop is not None:
            return ""
        return self._advance(self._text.extend((token_id,)))

    def extend(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """The pieces of push() for each of them, joined, and how many it took: up to the one that
        completed a stop string."""
        if self._stop_strings is None:
            # At once, which is several times as fast.
            return self._text.extend(token_ids), len(token_ids)
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
        text = self._advance(self._text.flush())
        if self._stop_strings is not None and self.matched_stop is None:
            text += self._stop_strings.flush()
        return text

    def _advance(self, text: str) -> str:
        if not text or self._stop_strings is None:
            return text
        text, self.matched_stop = self._stop_strings.push(text)
        if self.matched_stop is not None and self._include_stop:
            text += self.matched_stop
        return text
