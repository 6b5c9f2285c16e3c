"""Finds stop strings in text that comes in pieces.

Aho and Corasick, "Efficient string matching: an aid to bibliographic search" (1975): one state a
character, whatever the number of strings. The state's depth is how much of the text's end could
still become a stop string: that much is held back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _State:
    depth: int
    next: dict[str, _State] = field(default_factory=dict)
    fallback: _State | None = None
    """The state of the longest proper suffix that is also a prefix of some string."""
    found: str | None = None
    """The longest stop string that ends here."""


class StopStrings:
    """Which of the strings is completed first decides; of those completed by the same character,
    the longest. So the result does not depend on how the text was cut into pieces."""

    def __init__(self, strings: Sequence[str]) -> None:
        """`strings`: none of them empty."""
        self._root = self._state = _State(depth=0)
        self._held = ""
        for string in strings:
            state = self._root
            for char in string:
                state = state.next.setdefault(char, _State(depth=state.depth + 1))
            state.found = string
        queue = deque([self._root])
        while queue:
            state = queue.popleft()
            for char, child in state.next.items():
                child.fallback = self._step(state.fallback, char)
                child.found = child.found or child.fallback.found
                queue.append(child)

    def _step(self, state: _State | None, char: str) -> _State:
        while state is not None:
            if char in state.next:
                return state.next[char]
            state = state.fallback
        return self._root

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is certainly before any stop string, and the stop string that ended it."""
        state, waiting = self._state, self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            state = self._step(state, char)
            if state.found is not None:
                self._state, self._held = self._root, ""
                return waiting[: end - len(state.found)], state.found
        self._state = state
        certain = len(waiting) - state.depth
        self._held = waiting[certain:]
        return waiting[:certain], None

    def flush(self) -> str:
        """What was held back, once nothing follows."""
        held, self._held, self._state = self._held, "", self._root
        return held
