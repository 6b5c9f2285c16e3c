"""The printable alphabet in which byte-level BPE files write bytes (GPT-2's table)."""

from __future__ import annotations


def _byte_chars() -> tuple[str, ...]:
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(b) if b in printable else chr(next(others)) for b in range(256))


BYTE_CHARS = _byte_chars()
"""The character that stands for each byte."""

_TO_BYTES = {ord(char): byte for byte, char in enumerate(BYTE_CHARS)}


def to_bytes(written: str) -> bytes:
    """The bytes that a token of the file stands for. Raises ValueError outside the alphabet."""
    try:
        # Latin-1 maps code points below 256 to the same bytes, in C.
        return written.translate(_TO_BYTES).encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(f"{written!r} is not written in the byte-level alphabet") from None


def decoded(token: str) -> bytes:
    """What a ByteLevel decoder makes of a token: one outside the alphabet stands for itself."""
    try:
        return to_bytes(token)
    except ValueError:
        return token.encode()
