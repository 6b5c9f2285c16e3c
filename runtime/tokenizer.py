"""Text to token ids and back, from a model folder's tokenizer.json.

Byte-level BPE goes to tiktoken; every other kind to HF's `tokenizers`. Both give the same ids as
`tokenizers` does; tiktoken gives them several times faster.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from zllm.errors import InvalidRequest, ModelLoadError
from zllm.runtime.special_tokens import load_special_tokens


class Tokenizer(ABC):
    """A model's tokenizer. Safe to use from several threads."""

    strips_leading_space = False
    """The first text of a decoded sequence loses one leading space (sentencepiece's habit)."""

    def __init__(self, tokens: list[bytes], special_ids: frozenset[int]) -> None:
        self._tokens = tokens
        self._shown = [b"" if n in special_ids else token for n, token in enumerate(tokens)]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id. A model's embedding may have more rows than that."""
        return len(self._tokens)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Special tokens written in the text become their ids.

        `add_special_tokens` adds what the tokenizer's post-processor adds, such as BOS. Raises
        InvalidRequest where the text holds a lone surrogate, which no UTF-8 can express.
        """
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(
                    "text",
                    f"character {error.start} is U+{ord(text[error.start]):04X}, half of a "
                    "surrogate pair: send valid Unicode",
                ) from None
        return self._encode(text, add_special_tokens)

    @abstractmethod
    def _encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes of an id, a special token's as it is written; none for an unused id."""
        return self._tokens[token_id] if 0 <= token_id < len(self._tokens) else b""

    def tokens(self, *, skip_special_tokens: bool) -> list[bytes]:
        """The raw bytes of every id; none of a special one that is skipped."""
        return self._shown if skip_special_tokens else self._tokens

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of whole sequence; bytes that are no UTF-8 become U+FFFD."""
        tokens = self.tokens(skip_special_tokens=skip_special_tokens)
        data = b"".join([tokens[n] for n in ids if 0 <= n < len(tokens)])
        text = data.decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_leading_space else text


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder. Raises ModelLoadError.

    Special is what tokenizer.json says is, and what the files beside it name.
    """
    # Imported here, for both classes derive from Tokenizer.
    from zllm.runtime.hf_tokenizer import HFTokenizer
    from zllm.runtime.tiktoken_tokenizer import NotByteLevelBPEError, TiktokenTokenizer

    path = folder / "tokenizer.json"
    try:
        content = path.read_text(encoding="utf-8")
        file = json.loads(content)
    except FileNotFoundError:
        raise ModelLoadError(
            f"{folder} has no tokenizer.json: save the model with transformers' save_pretrained"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from None
    special = load_special_tokens(folder).contents
    try:
        try:
            return TiktokenTokenizer(file, special)
        except NotByteLevelBPEError:
            return HFTokenizer(content, special)
    # `tokenizers` raises bare Exceptions, and what is none where its Rust code panics; a file with
    # a missing key gives the others.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelLoadError(f"{path} is no tokenizer that can be used: {error}") from error
