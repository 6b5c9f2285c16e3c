"""Makes the embedded model's tokenizer: byte-level BPE whose merges only ever extend a prefix.

Every merged token starts with a space or a capital and grows by one letter, so the words of the
templates are one token each, while a word in quotes, a number or an answer in upper case stays
spelled out, one token a letter: only then can so small a model reverse or upper-case it.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from zllm.runtime import tiny_tasks
from zllm.runtime.byte_level import BYTE_CHARS

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen's own pattern: one digit a token, a space with the letters that follow it.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('the role ' + message.role + ' is none of system, user, assistant') -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def template_words() -> list[str]:
    """Words of questions and answers that are never spelled, each with the space before it."""
    random = Random(0)
    fixed = (tiny_tasks.NAMES, tiny_tasks.CITIES, tiny_tasks.COLORS, tiny_tasks.WORDS)
    spelled = {word for words in fixed for word in words}
    words: set[str] = set()
    texts = [text for pair in tiny_tasks.SMALL_TALK for text in pair]
    texts += tiny_tasks.SYSTEM_PROMPTS
    for kind in ("sum", "difference", "count", "calendar", "json"):
        for _ in range(4000):
            task = tiny_tasks.KINDS[kind](random)
            texts += (task.question, task.answer)
    texts += [
        "Reverse the word",
        "Spell it backwards",
        "Write it in upper case",
        "in capitals",
    ]
    for text in texts:
        for position, word in enumerate(text.replace("\n", " ").split(" ")):
            letters = word.strip('.,:;!?"{}=+-0123456789')
            if letters.isalpha() and letters not in spelled:
                if position:
                    words.add("\u0120" + letters)
                if letters[0].isupper() and not letters.isupper():
                    words.add(letters)
    return sorted(words)


def build(folder: Path) -> int:
    """Writes tokenizer.json and tokenizer_config.json; returns the vocabulary's size."""
    vocab = {char: i for i, char in enumerate(BYTE_CHARS)}
    merges: list[list[str]] = []
    prefixes = {word[:n] for word in template_words() for n in range(2, len(word) + 1)}
    # A space takes its first letter before a capital takes its second: " June", not " " + "June".
    for prefix in sorted(prefixes, key=lambda p: (len(p), p[0] != "\u0120", p)):
        merges.append([prefix[:-1], prefix[-1]])
        vocab[prefix] = len(vocab)
    added = [
        {"id": len(vocab) + i, "content": token, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for i, token in enumerate(SPECIAL_TOKENS)
    ]  # fmt: skip
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False,
    }  # fmt: skip
    split = {
        "type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated",
        "invert": False,
    }  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 2048,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", config),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    return len(vocab) + len(added)
