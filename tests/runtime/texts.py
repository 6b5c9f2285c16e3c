"""Generated text for the tokenizer's tests: many scripts, emoji, code and special tokens."""

from __future__ import annotations

from random import Random

PHRASES = (
    "The quick brown fox jumps over the lazy dog.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "いろはにほへと ちりぬるを わかよたれそ つねならむ",
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。",  # noqa: RUF001 - is a Chinese comma
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ إِذ بَزَغَت",
    "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "Trăm năm trong cõi người ta, chữ tài chữ mệnh khéo là ghét nhau",
    "աբգդ ქართული ድምፅ ខ្មែរ ພາສາລາວ தமிழ் తెలుగు ಕನ್ನಡ മലയാളം සිංහල မြန်မာ བོད་ཡིག",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇯🇵 🤷🏾‍♂️ ❤️ 1️⃣ \U0001fae8",
    "e\u0301 a\u0308o\u0323\u0302 n\u0303 \u1100\u1161\u11a8 \u212b \ufb01 ½ ² Ⅷ ﷽",
    "I'll we've DON'T they'd 'S 'Re it\u2019s '\u017f",
    "x = [i**2 for i in range(10) if i % 3 == 0]\n\tprint(f'{x!r:>20}')\n\n",
    "#include <stdio.h>\r\nint main(void) { return 0xFF & ~1; }\r\n",
    'SELECT * FROM "users" WHERE id >= 12345678901234567890;-- ok',
    '{"key": [1, 2.5e-3, null, true], "b": "\\u00e9\\n"}',
    "https://example.org/a/b?c=d&e=%20f#g user.name+tag@example.com",
    "   leading, trailing   ", "\n\n\n", "\t \t", " \n \r\n  x", "\u3000\u00a0\u2028\u200b\ufeff",
    "1234567890 3.14159 1,000,000 ١٢٣ 四二", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\x00\x01\x1c\x7f\x85", "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>",
    "<think>\n\n</think>\n\n", "<tool_call>\n{}\n</tool_call>", "<|im_start", "|im_end|>",
    "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>", "<<|im_end|>>", " <|im_end|> ",
)  # fmt: skip

_RANGES = (
    (0x20, 0x7F), (0xA0, 0x250), (0x250, 0x700), (0x700, 0x1200), (0x1200, 0x2000),
    (0x2000, 0x3000), (0x3000, 0xA000), (0xA000, 0xD800), (0xE000, 0x10000),
    (0x10000, 0x11000), (0x1F000, 0x1FB00), (0x20000, 0x20200),
)  # fmt: skip


def generated_texts(count: int, seed: int = 0) -> list[str]:
    """Phrases cut and joined, and random characters of every block."""
    random = Random(seed)
    texts = list(PHRASES)
    while len(texts) < count:
        pieces = []
        for _ in range(random.randint(1, 6)):
            phrase = random.choice(PHRASES)
            start = random.randrange(len(phrase))
            pieces.append(phrase[start : start + random.randint(1, 40)])
            if random.random() < 0.4:
                low, high = random.choice(_RANGES)
                pieces.append("".join(chr(random.randrange(low, high)) for _ in range(5)))
        texts.append(random.choice(("", " ", "\n", "")).join(pieces))
    return texts
