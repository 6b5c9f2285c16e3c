"""The same ids as HF's `tokenizers`, whatever the file describes and whatever the text is."""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.runtime.texts import PHRASES, generated_texts
from zllm.errors import InvalidRequest, ModelLoadError
from zllm.runtime.byte_level import BYTE_CHARS
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.hf_tokenizer import HFTokenizer
from zllm.runtime.tiktoken_tokenizer import MAX_WHITESPACE_RUN, TiktokenTokenizer
from zllm.runtime.tokenizer import Tokenizer, load_tokenizer

QWEN3 = Path(__file__).parents[3] / "shared" / "data" / "qwen3"
needs_qwen3 = pytest.mark.skipif(not QWEN3.is_dir(), reason="no ../shared/data/qwen3")

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(
    pre_tokenizer: Any, *, normalizer: Any = None, size: int = 600, **bpe: Any
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer learnt from the phrases."""
    made = tokenizers.Tokenizer(models.BPE(**bpe))
    made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator(PHRASES * 3, trainer)
    return made


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def loaded(reference: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    reference.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def assert_same_ids(ours: Tokenizer, reference: tokenizers.Tokenizer, count: int) -> None:
    for text in generated_texts(count):
        for add_special_tokens in (False, True):
            expected = reference.encode(text, add_special_tokens=add_special_tokens).ids
            assert ours.encode(text, add_special_tokens=add_special_tokens) == expected, ascii(text)


@needs_qwen3
def test_qwen3_ids_are_those_of_tokenizers() -> None:
    ours = load_tokenizer(QWEN3)
    reference = tokenizers.Tokenizer.from_file(str(QWEN3 / "tokenizer.json"))
    assert isinstance(ours, TiktokenTokenizer)
    assert ours.encode("Hello world") == [9707, 1879]
    assert ours.vocab_size == reference.get_vocab_size()
    assert_same_ids(ours, reference, 3000)


@needs_qwen3
def test_qwen3_text_is_that_of_tokenizers() -> None:
    ours = load_tokenizer(QWEN3)
    reference = tokenizers.Tokenizer.from_file(str(QWEN3 / "tokenizer.json"))
    for text in generated_texts(300, seed=1):
        ids = ours.encode(text)
        for skip in (True, False):
            for cut in (ids, ids[1:], ids[:-1]):  # a cut may leave half a character
                assert ours.decode(cut, skip_special_tokens=skip) == reference.decode(
                    cut, skip_special_tokens=skip
                )


@needs_qwen3
def test_only_special_tokens_are_skipped() -> None:
    ours = load_tokenizer(QWEN3)
    ids = ours.encode("<think>\nyes</think><|im_end|>")
    assert ours.decode(ids) == "<think>\nyes</think>"
    assert ours.decode(ids, skip_special_tokens=False) == "<think>\nyes</think><|im_end|>"


def test_the_embedded_models_ids_are_those_of_tokenizers() -> None:
    ours = load_tokenizer(EMBEDDED_MODEL)
    reference = tokenizers.Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))
    assert isinstance(ours, TiktokenTokenizer)
    assert_same_ids(ours, reference, 2000)


@pytest.mark.parametrize(
    ("pre_tokenizer", "options"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), {}),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), {}),
        (split(LLAMA3_PATTERN), {}),
        (split(LLAMA3_PATTERN), {"normalizer": normalizers.NFC()}),
        (split(LLAMA3_PATTERN), {"ignore_merges": True}),
    ],
    ids=["gpt2", "gpt2-prefix-space", "llama3", "nfc", "ignore-merges"],
)
def test_byte_level_bpe_goes_to_tiktoken(
    pre_tokenizer: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    reference = trained(pre_tokenizer, **options)
    ours = loaded(reference, tmp_path)
    assert isinstance(ours, TiktokenTokenizer)
    assert_same_ids(ours, reference, 400)


@pytest.mark.parametrize(
    ("pre_tokenizer", "options"),
    [
        (split(r"\p{N}"), {}),  # leaves letters unmatched
        (split(LLAMA3_PATTERN), {"normalizer": normalizers.NFKC()}),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
            {},
        ),
    ],
    ids=["partial-pattern", "nfkc", "digits"],
)
def test_what_tiktoken_cannot_do_goes_to_tokenizers(
    pre_tokenizer: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    reference = trained(pre_tokenizer, **options)
    ours = loaded(reference, tmp_path)
    assert isinstance(ours, HFTokenizer)
    assert_same_ids(ours, reference, 200)


def test_merges_out_of_the_order_of_ids_go_to_tokenizers(tmp_path: Path) -> None:
    reference = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    file = json.loads(reference.to_str())
    file["model"]["merges"][:20] = reversed(file["model"]["merges"][:20])
    reference = tokenizers.Tokenizer.from_str(json.dumps(file))
    ours = loaded(reference, tmp_path)
    assert isinstance(ours, HFTokenizer)
    assert_same_ids(ours, reference, 200)


def test_a_token_that_no_merge_reaches_goes_to_tokenizers(tmp_path: Path) -> None:
    reference = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    file = json.loads(reference.to_str())
    # Somebody's own word, added by hand: "qx" is merged first, so "jq" and "x" never meet.
    for left, right in (("q", "x"), ("j", "q"), ("jq", "x")):
        file["model"]["vocab"][left + right] = len(file["model"]["vocab"])
        file["model"]["merges"].append([left, right])
    reference = tokenizers.Tokenizer.from_str(json.dumps(file))
    ours = loaded(reference, tmp_path)
    assert isinstance(ours, HFTokenizer)
    assert ours.encode("jqx") == reference.encode("jqx").ids
    assert len(ours.encode("jqx")) == 2


def with_entries(
    reference: tokenizers.Tokenizer, *entries: str, **model: Any
) -> tokenizers.Tokenizer:
    """The same with vocabulary entries that no merge makes, and other settings of its model."""
    file = json.loads(reference.to_str())
    for token_id, entry in enumerate(entries, start=reference.get_vocab_size()):
        file["model"]["vocab"][entry] = token_id
    file["model"] |= model
    return tokenizers.Tokenizer.from_str(json.dumps(file))


def test_tokens_of_one_id_go_to_tokenizers(tmp_path: Path) -> None:
    # tiktoken panics, and its exception is no Exception.
    reference = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    file = json.loads(reference.to_str())
    vocab = file["model"]["vocab"]
    vocab[BYTE_CHARS[200]] = max(vocab.values())
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, HFTokenizer)
    assert_same_ids(ours, tokenizers.Tokenizer.from_str(json.dumps(file)), 100)


def test_an_entry_that_no_merge_makes_has_its_text(tmp_path: Path) -> None:
    gpt2 = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    # The last two are not written in bytes.
    reference = with_entries(gpt2, "qzx", "\u0120qzx", "a b", "\u4e2d")
    reference.add_special_tokens(["<|end|>"])
    ours = loaded(reference, tmp_path)
    assert isinstance(ours, TiktokenTokenizer)
    assert ours.vocab_size == reference.get_vocab_size()
    for token_id in range(ours.vocab_size):
        for skip in (True, False):
            expected = reference.decode([token_id], skip_special_tokens=skip)
            assert ours.decode([token_id], skip_special_tokens=skip) == expected
    assert ours.encode("qzx qzx") == reference.encode("qzx qzx").ids


def test_an_entry_that_only_ignore_merges_gives_goes_to_tokenizers(tmp_path: Path) -> None:
    reference = with_entries(trained(split(LLAMA3_PATTERN)), "qzx", ignore_merges=True)
    ours = loaded(reference, tmp_path)
    assert isinstance(ours, HFTokenizer)
    assert ours.encode("qzx") == reference.encode("qzx").ids == [reference.token_to_id("qzx")]
    assert ours.encode("qzxa") == reference.encode("qzxa").ids
    assert len(ours.encode("qzxa")) == 4


@pytest.mark.parametrize(("single_word", "kind"), [(False, TiktokenTokenizer), (True, HFTokenizer)])
def test_ignore_merges_may_give_an_added_token_that_is_not_always_cut_out(
    single_word: bool, kind: type[Tokenizer], tmp_path: Path
) -> None:
    reference = with_entries(trained(split(LLAMA3_PATTERN)), "qzx", ignore_merges=True)
    reference.add_tokens([tokenizers.AddedToken("qzx", single_word=single_word)])
    ours = loaded(reference, tmp_path)
    assert isinstance(ours, kind)
    for text in ("qzx", "1qzx", "qzxa", " qzx "):
        assert ours.encode(text) == reference.encode(text).ids


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["plain", "nfc"])
def test_added_tokens_keep_their_flags(flag: str, normalizer: Any, tmp_path: Path) -> None:
    reference = trained(split(LLAMA3_PATTERN), normalizer=normalizer)
    settings = {"normalized": False, flag: True}
    reference.add_tokens(
        [
            tokenizers.AddedToken("<mask>", **settings),
            tokenizers.AddedToken("<mask>s", **settings),  # the longer of two is found
            tokenizers.AddedToken("caf\u00e9", **settings),
        ]
    )
    ours = loaded(reference, tmp_path)
    assert isinstance(ours, TiktokenTokenizer)
    for text in (
        "a <mask> b", "a<mask>b", " \t<mask>\n\n<mask>  ", "<mask>", "x <mask>s.", "<mask>sx",
        "un caf\u00e9!", "cafe\u0301", "caf\u00e9s", "(caf\u00e9)\u3000<mask>\u00a0", "_<mask>_",
        "a\u0301<mask>", "<mask>\u0301",
    ):  # fmt: skip
        assert ours.encode(text) == reference.encode(text).ids, ascii(text)


def test_the_template_adds_its_tokens_only_when_asked(tmp_path: Path) -> None:
    reference = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    bos, eos = (reference.token_to_id(token) for token in ("<s>", "</s>"))
    reference.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    ours = loaded(reference, tmp_path)
    assert isinstance(ours, TiktokenTokenizer)
    plain = ours.encode("hello", add_special_tokens=False)
    assert bos not in plain
    assert ours.encode("hello") == [bos, *plain, eos] == reference.encode("hello").ids


def sentencepiece_like() -> tokenizers.Tokenizer:
    """Llama 2's kind: BPE over characters, "▁" for a space, bytes for what is unknown."""
    letters = [*"\u2581abcdefghijklmnopqrstuvwxyz", "he", "ll", "hell", "hello", "\u2581hello"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u2581", "hello")]
    made = tokenizers.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)}, merges,
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<s>", "</s>"])
    return made


def test_a_sentencepiece_kind_gives_its_bytes_and_text(tmp_path: Path) -> None:
    reference = sentencepiece_like()
    ours = loaded(reference, tmp_path)
    assert isinstance(ours, HFTokenizer)
    assert [ours.token_bytes(i) for i in ours.encode("hello \u00e9")] == [
        b" hello", b" ", b"\xc3", b"\xa9",
    ]  # fmt: skip
    for text in ("hello", "hello hello", " two spaces", "\u00e9\u4e2d\U0001f600 z", "<s>hello</s>"):
        ids = ours.encode(text)
        assert ids == reference.encode(text).ids
        for skip in (True, False):
            expected = reference.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_decoding_gives_the_text_back(text: str) -> None:
    tokenizer = load_tokenizer_once()
    ids = tokenizer.encode(text)
    # The library's Unicode may be older than Python's, and then composes less.
    expected = {unicodedata.normalize("NFC", text), str(normalizers.NFC().normalize_str(text))}
    assert tokenizer.decode(ids, skip_special_tokens=False) in expected
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() in expected


@cache
def load_tokenizer_once() -> Tokenizer:
    return load_tokenizer(EMBEDDED_MODEL)


def test_an_unused_id_has_no_text() -> None:
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(-1) == b""
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""


def test_half_a_surrogate_pair_is_refused_by_its_place() -> None:
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    with pytest.raises(InvalidRequest, match=r"text: character 2 is U\+D83D"):
        tokenizer.encode("ab\ud83d")


def test_a_run_of_whitespace_that_the_pattern_cannot_take_is_refused() -> None:
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    with pytest.raises(InvalidRequest, match="characters of whitespace"):
        tokenizer.encode(" " * (2 * MAX_WHITESPACE_RUN))
    assert len(tokenizer.encode("a " * MAX_WHITESPACE_RUN)) >= MAX_WHITESPACE_RUN


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json.*save_pretrained"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', '"\xff"'])
def test_a_corrupt_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_file_on_which_the_library_panics_is_named(tmp_path: Path) -> None:
    file = json.loads(trained(pre_tokenizers.ByteLevel()).to_str())
    file["model"]["continuing_subword_prefix"] = "##"  # longer than what its merges join
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is no tokenizer that can be used"):
        load_tokenizer(tmp_path)


def test_an_added_token_with_a_negative_id_is_refused(tmp_path: Path) -> None:
    """It would replace the text of the last one."""
    file = json.loads(trained(pre_tokenizers.ByteLevel()).to_str())
    file["added_tokens"] = [{"id": -1, "content": "<x>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json.*>= 0"):
        load_tokenizer(tmp_path)
