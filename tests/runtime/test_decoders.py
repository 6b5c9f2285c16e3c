"""The same text as HF's `tokenizers` for any ids, at once and token by token, or none at all."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models

from tests.runtime.test_tokenizer import LLAMA3_PATTERN, split, trained
from zllm.errors import ModelLoadError
from zllm.runtime.detokenizer import Detokenizer
from zllm.runtime.hf_tokenizer import HFTokenizer
from zllm.runtime.tokenizer import Tokenizer, load_tokenizer

WORDS = (
    "a", ".", "!", "\u4e2d", "\u2581", "\u2581b", "##d", "e</w>", "\u0120g", "<0x0A>", "<0x4a>",
)  # fmt: skip
SPACED = (" f", "\u2581\u2581", "h\u2581")
CHARACTER_IN_BYTES = ("<0xE4>", "<0xB8>", "<0xAD>")


def with_decoder(decoder: Any, *more: str) -> tokenizers.Tokenizer:
    words = ["<unk>", *WORDS, *CHARACTER_IN_BYTES, *more]
    made = tokenizers.Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, "<unk>"))
    if decoder is not None:
        made.decoder = decoder
    made.add_special_tokens(["<s>", "<\uff5cend\uff5c>"])
    made.add_tokens(["<x y>"])
    return made


def loaded(reference: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    reference.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def assert_same_text(ours: Tokenizer, reference: tokenizers.Tokenizer) -> None:
    random = Random(0)
    in_bytes = [reference.token_to_id(token) for token in CHARACTER_IN_BYTES]
    alone = [[n] for n in range(reference.get_vocab_size() + 1) if n not in in_bytes]
    for _ in range(2000):
        ids = [*chain(*random.choices([*alone, in_bytes], k=random.randint(0, 6)))]
        for skip in (True, False):
            expected = reference.decode(ids, skip_special_tokens=skip)
            streamed = Detokenizer(ours, skip_special_tokens=skip)
            pieces = [*map(streamed.push, ids), streamed.flush()]
            assert ours.decode(ids, skip_special_tokens=skip) == expected, ids
            assert "".join(pieces) == expected, ids


REPLACE = decoders.Replace("\u2581", " ")
BYTES, FUSE, STRIP = decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.ByteLevel(),
        decoders.Metaspace(prepend_scheme="never"),
        decoders.Sequence([REPLACE, BYTES, FUSE, STRIP]),
        decoders.Sequence([REPLACE, BYTES, FUSE]),
        decoders.Sequence([REPLACE, decoders.Replace("a", "<0x42>"), BYTES]),
        decoders.Sequence([FUSE, STRIP]),
        decoders.Sequence([]),
    ],
    ids=str,
)
def test_text_is_that_of_tokenizers(decoder: Any, tmp_path: Path) -> None:
    reference = with_decoder(decoder, *SPACED)
    reference.add_tokens(["<\u2581y>"])
    assert_same_text(loaded(reference, tmp_path), reference)


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_metaspace_drops_the_space_of_the_first_token(scheme: str, tmp_path: Path) -> None:
    reference = with_decoder(decoders.Metaspace(prepend_scheme=scheme))
    assert_same_text(loaded(reference, tmp_path), reference)


@pytest.mark.parametrize("token", SPACED)
def test_metaspace_is_refused_where_it_drops_other_than_one_space(
    token: str, tmp_path: Path
) -> None:
    match = f"Metaspace .*{re.escape(repr(token))}.*: use .*prepend_scheme"
    with pytest.raises(ModelLoadError, match=match):
        loaded(with_decoder(decoders.Metaspace(), token), tmp_path)


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.WordPiece(), "WordPiece"),
        (decoders.CTC(), "CTC"),
        (STRIP, "Strip"),
        (decoders.Sequence([FUSE, decoders.Strip(" ", 0, 1)]), "Strip"),
        (decoders.Sequence([FUSE, decoders.Strip("_", 1, 0)]), "Strip"),
        (decoders.Sequence([FUSE, REPLACE]), "Replace"),
        (decoders.Sequence([BYTES, REPLACE]), "Replace"),
        (decoders.Replace(tokenizers.Regex("a+"), ""), "Regex"),
        (decoders.Sequence([decoders.ByteLevel(), STRIP]), "ByteLevel"),
    ],
    ids=str,
)
def test_a_decoder_whose_text_would_differ_is_refused(
    decoder: Any, name: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=rf"tokenizer\.json.*its decoder is .*{name}.*: use "):
        loaded(with_decoder(decoder), tmp_path)


def test_an_added_token_in_a_byte_level_file_is_not_read_as_bytes() -> None:
    reference = with_decoder(decoders.ByteLevel())
    reference.add_tokens(["caf\u00e9"])
    ours = HFTokenizer(reference.to_str())
    assert ours.decode([reference.token_to_id("caf\u00e9")]) == "caf\u00e9"


@pytest.mark.parametrize("decoder", [None, {"type": "Fuse"}], ids=["none", "Fuse"])
def test_a_byte_level_bpe_without_its_decoder_is_for_tokenizers(
    decoder: dict[str, Any] | None, tmp_path: Path
) -> None:
    reference = trained(split(LLAMA3_PATTERN))
    file = {**json.loads(reference.to_str()), "decoder": decoder}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    reference = tokenizers.Tokenizer.from_str(json.dumps(file))
    ours = load_tokenizer(tmp_path)
    ids = reference.encode(" the world is", add_special_tokens=False).ids
    assert ours.encode(" the world is", add_special_tokens=False) == ids
    assert ours.decode(ids) == reference.decode(ids) != " the world is"
