"""Added tokens: strings that become one id before any other rule sees the text.

The order is that of HF `tokenizers`: tokens with `normalized` false are found in the raw text;
what lies between is normalized, and the others are found in that.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Annotated, Any

import msgspec

_SPACES = frozenset(
    map(chr, (*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029,
              0x202F, 0x205F, 0x3000))
)  # fmt: skip
"""Unicode's White_Space. (str.isspace also takes U+001C to U+001F.)"""


class AddedToken(msgspec.Struct, frozen=True):
    """An entry of `added_tokens` in tokenizer.json."""

    id: Annotated[int, msgspec.Meta(ge=0)]
    content: str
    special: bool = False
    normalized: bool = True
    """It is looked for in the normalized text."""
    single_word: bool = False
    """It counts only where no word character touches it."""
    lstrip: bool = False
    """It takes the whitespace before it."""
    rstrip: bool = False


class AddedTokens:
    """Splits a text at its added tokens."""

    def __init__(self, tokens: Iterable[AddedToken], normalize: Callable[[str], str]) -> None:
        self.tokens = tuple(tokens)
        self.special_ids = frozenset(token.id for token in self.tokens if token.special)
        self._normalize = normalize
        self._raw = _Finder({t.content: t for t in self.tokens if not t.normalized})
        self._normalized = _Finder({normalize(t.content): t for t in self.tokens if t.normalized})

    def split(self, text: str) -> Iterator[str | int]:
        """The ids of added tokens, and normalized text between them, in order."""
        for part in self._raw.split(text):
            if isinstance(part, int):
                yield part
            else:
                yield from self._normalized.split(self._normalize(part))


class _Finder:
    """Finds the leftmost, among those the longest, of some tokens."""

    def __init__(self, tokens: dict[str, AddedToken]) -> None:
        self._tokens = {content: token for content, token in tokens.items() if content}
        contents = sorted(self._tokens, key=len, reverse=True)
        self._pattern: re.Pattern[str] | None = None
        if contents:
            self._pattern = re.compile("|".join(map(re.escape, contents)))

    def split(self, text: str) -> Iterator[str | int]:
        done = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            token, start, end = self._tokens[match[0]], *match.span()
            if token.single_word and (
                _is_word(text[start - 1 : start]) or _is_word(text[end : end + 1])
            ):
                continue
            # Step by step: a copy of what is left, for each token, is quadratic.
            while token.lstrip and start > done and text[start - 1] in _SPACES:
                start -= 1
            while token.rstrip and end < len(text) and text[end] in _SPACES:
                end += 1
            if start > done:
                yield text[done:start]
            yield token.id
            done = end
        if done < len(text):
            yield text[done:]


def _is_word(char: str) -> bool:
    r"""Unicode's \w for one character; false for none."""
    if not char:
        return False
    category = unicodedata.category(char)
    return char.isalnum() or category[0] == "M" or category == "Pc" or char in "\u200c\u200d"


def added_tokens_of(file: dict[str, Any], special: Container[str] = ()) -> list[AddedToken]:
    """The `added_tokens` of a parsed tokenizer.json. Raises msgspec.ValidationError.

    Those whose content is in `special` are special, whatever the file says of them.
    """
    tokens = msgspec.convert(file.get("added_tokens") or [], list[AddedToken])
    return [
        msgspec.structs.replace(token, special=token.special or token.content in special)
        for token in tokens
    ]
