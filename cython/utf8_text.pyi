"""Token ids to text, some at a time."""

from collections.abc import Iterable

class Utf8Text:
    """A piece never ends inside a UTF-8 character; bytes that are no UTF-8 become U+FFFD."""

    def __init__(self, tokens: list[bytes], strip_leading_space: bool) -> None:
        """`tokens`: each id's bytes. The first text may lose one leading space."""
    def extend(self, token_ids: Iterable[int]) -> str:
        """The text that they make certain. An id outside the vocabulary has none."""
    def flush(self) -> str:
        """The rest, once the sequence is over: half a character becomes U+FFFD."""
