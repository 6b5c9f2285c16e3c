"""Questions with checkable answers: what the embedded model was trained on and is tested with.

A question is held out by the hash of its `key`, so that training never sees it in any phrasing.
The calendar is too small for that (nobody can infer that Tuesday follows Monday): there the key
is the phrasing too.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July",
    "August", "September", "October", "November", "December",
)  # fmt: skip
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth",
    "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth",
)  # fmt: skip
NAMES = (
    "Ada", "Alan", "Anna", "Ben", "Carl", "Clara", "Dora", "Emil", "Eva", "Finn", "Grace", "Hugo",
    "Ida", "Ivan", "Jana", "Karl", "Lea", "Leo", "Lina", "Mara", "Max", "Nina", "Noah", "Olga",
    "Otto", "Paul", "Rosa", "Sara", "Tom", "Uma", "Vera", "Yara", "Zoe",
)  # fmt: skip
CITIES = (
    "Athens", "Berlin", "Bern", "Cairo", "Delhi", "Dublin", "Graz", "Hanoi", "Kyoto", "Lagos",
    "Lima", "Lisbon", "London", "Madrid", "Oslo", "Paris", "Porto", "Prague", "Quito", "Riga",
    "Rome", "Seoul", "Sofia", "Tokyo", "Turin", "Vienna", "Warsaw", "Zagreb",
)  # fmt: skip
COLORS = (
    "black",
    "blue",
    "brown",
    "gold",
    "green",
    "grey",
    "orange",
    "pink",
    "red",
    "white",
)
WORDS = (
    "apple", "arrow", "basket", "beach", "bird", "bottle", "bread", "bridge", "butter", "candle",
    "castle", "chair", "cloud", "coffee", "copper", "dance", "desert", "dragon", "eagle", "engine",
    "feather", "forest", "garden", "glass", "guitar", "hammer", "harbor", "hello", "honey", "horse",
    "island", "jacket", "kernel", "kitten", "ladder", "lemon", "letter", "lion", "magnet", "market",
    "mirror", "monkey", "mountain", "music", "needle", "night", "ocean", "onion", "paper", "pencil",
    "pepper", "piano", "pillow", "planet", "pocket", "queen", "rabbit", "river", "rocket", "salt",
    "school", "shadow", "silver", "spoon", "spring", "stone", "storm", "stream", "summer", "table",
    "tiger", "token", "tower", "train", "tree", "turtle", "valley", "velvet", "village", "violin",
    "water", "whale", "window", "winter", "wolf", "wood", "world", "yellow", "zebra",
)  # fmt: skip

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer short questions.",
    "You are zllm, a small model. Answer briefly and exactly.",
)
SMALL_TALK = (
    ("Hello", "Hello! Ask me for a sum, a count, a word or a date."),
    ("Hello!", "Hello! Ask me for a sum, a count, a word or a date."),
    ("Hi", "Hello! Ask me for a sum, a count, a word or a date."),
    ("Hi!", "Hello! Ask me for a sum, a count, a word or a date."),
    ("Who are you?", "I am the tiny model inside zllm."),
    ("What are you?", "I am the tiny model inside zllm."),
    (
        "What can you do?",
        "I add, subtract, count, spell, know the calendar and write JSON.",
    ),
    ("Help", "I add, subtract, count, spell, know the calendar and write JSON."),
    ("Thanks", "You are welcome."),
    ("Thank you!", "You are welcome."),
    ("Bye", "Goodbye!"),
    ("Goodbye", "Goodbye!"),
)


@dataclass(frozen=True)
class Task:
    """One question, its only right answer, and what decides the split."""

    kind: str
    question: str
    answer: str
    key: str

    @property
    def held_out(self) -> bool:
        """Whether training leaves it out: about one in ten, by hash."""
        return zlib.crc32(f"{self.kind}|{self.key}".encode()) % 10 == 0


def _sum(random: Random) -> Task:
    a, b = random.randrange(100), random.randrange(100)
    question = random.choice(
        ("What is {a} + {b}?", "{a} + {b}", "{a} + {b} =", "Add {a} and {b}.",
         "How much is {a} plus {b}?")
    ).format(a=a, b=b)  # fmt: skip
    return Task("sum", question, f"{a} + {b} = {a + b}", f"{a} {b}")


def _difference(random: Random) -> Task:
    a, b = random.randrange(100), random.randrange(100)
    question = random.choice(
        ("What is {a} - {b}?", "{a} - {b}", "{a} - {b} =", "Subtract {b} from {a}.",
         "How much is {a} minus {b}?")
    ).format(a=a, b=b)  # fmt: skip
    return Task("difference", question, f"{a} - {b} = {a - b}", f"{a} {b}")


def _count(random: Random) -> Task:
    # Mostly short, so that long counts do not crowd out every other kind of token.
    length = random.randint(2, 20) if random.random() < 0.9 else random.randint(20, 99)
    low = random.randint(0, 100 - length)
    high = low + length - 1
    if random.random() < 0.75:
        numbers, question = range(low, high + 1), f"Count from {low} to {high}."
    else:
        numbers, question = (
            range(high, low - 1, -1),
            f"Count down from {high} to {low}.",
        )
    return Task("count", question, ", ".join(map(str, numbers)), f"{numbers[0]} {numbers[-1]}")


def _word(random: Random) -> str:
    kind = random.random()
    if kind < 0.15:
        return random.choice(WORDS)
    if kind < 0.5:
        return "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 8)))
    syllables = (
        random.choice(("b", "c", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "w",
                       "st", "tr", "ch", "br", "pl", "sh", "th", "wh", "qu", ""))
        + random.choice(("a", "e", "i", "o", "u", "ea", "oo"))
        + random.choice(("", "", "n", "r", "l", "t", "s", "m", "ck", "nd"))
        for _ in range(random.randint(2, 3))
    )  # fmt: skip
    return "".join(syllables)[:10]


def _quoted(random: Random, template: str) -> tuple[str, str]:
    """A template with a word in it, in quotes three times of four, and the word."""
    word = _word(random)
    return template.format(f'"{word}"' if random.random() < 0.75 else word), word


def _reverse(random: Random) -> Task:
    question, word = _quoted(
        random,
        random.choice(("Reverse the word {}.", "Reverse {}", "Spell {} backwards.")),
    )
    return Task("reverse", question, word[::-1], word)


def _upper(random: Random) -> Task:
    question, word = _quoted(
        random,
        random.choice(
            (
                "Write {} in upper case.",
                "Write the word {} in capitals.",
                "Upper-case {}",
            )
        ),
    )
    return Task("upper", question, word.upper(), word)


def _calendar(random: Random) -> Task:
    names, unit, whole = random.choice(((DAYS, "day", "week"), (MONTHS, "month", "year")))
    n, i = len(names), random.randrange(len(names))
    form = random.randrange(6)
    if form == 0:
        phrase = random.choice(("What {} comes after {}?", "Which {} comes after {}?",
                                "Which {} follows {}?", "What is the {} after {}?"))  # fmt: skip
        question, answer = phrase.format(unit, names[i]), names[(i + 1) % n]
    elif form == 1:
        phrase = random.choice(("What {} comes before {}?", "Which {} comes before {}?",
                                "What is the {} before {}?"))  # fmt: skip
        question, answer = phrase.format(unit, names[i]), names[(i - 1) % n]
    elif form == 2:
        phrase = random.choice(("What is the {} {} of the {}?", "Name the {} {} of the {}.",
                                "Which is the {} {} of the {}?"))  # fmt: skip
        question, answer = phrase.format(ORDINALS[i], unit, whole), names[i]
    elif form == 3:
        k = random.randint(2, 6)
        phrase = random.choice(
            ("What {u} comes {k} {u}s after {x}?", "Which {u} is {k} {u}s after {x}?")
        )
        question, answer = phrase.format(u=unit, k=k, x=names[i]), names[(i + k) % n]
    elif form == 4:
        k = random.randint(2, 6)
        phrase = random.choice(
            ("What {u} comes {k} {u}s before {x}?", "Which {u} is {k} {u}s before {x}?")
        )
        question, answer = phrase.format(u=unit, k=k, x=names[i]), names[(i - k) % n]
    else:
        j = random.randrange(i, n)
        phrase = random.choice(("List the {}s from {} to {}.", "Name the {}s from {} to {}."))
        question, answer = (
            phrase.format(unit, names[i], names[j]),
            ", ".join(names[i : j + 1]),
        )
    return Task("calendar", question, answer, question)


def _json(random: Random) -> Task:
    fields: dict[str, str | int] = {
        "name": random.choice(NAMES),
        "age": random.randrange(1, 100),
        "city": random.choice(CITIES),
        "color": random.choice(COLORS),
    }
    keys = random.sample(list(fields), random.randint(2, 4))
    chosen = {key: fields[key] for key in keys}
    listed = ", ".join(f"{key} {value}" for key, value in chosen.items())
    question = random.choice(("Write JSON: {}", "Fill in a JSON object: {}.", "As JSON: {}"))
    return Task("json", question.format(listed), json.dumps(chosen), listed)


KINDS: dict[str, Callable[[Random], Task]] = {
    "sum": _sum,
    "difference": _difference,
    "count": _count,
    "reverse": _reverse,
    "upper": _upper,
    "calendar": _calendar,
    "json": _json,
}


def draw(random: Random) -> Task:
    """A task of any kind, held out or not."""
    return KINDS[random.choice(tuple(KINDS))](random)


def training_tasks(random: Random) -> Iterator[Task]:
    """Endless tasks that are not held out."""
    while True:
        task = draw(random)
        if not task.held_out:
            yield task


def held_out_tasks(count: int, seed: int = 0) -> list[Task]:
    """`count` different held-out questions: the kinds in turn, until a kind has no more."""
    random, seen, tasks = Random(seed), set[str](), list[Task]()
    while len(tasks) < count:
        for make in KINDS.values():
            for _ in range(100):
                task = make(random)
                if task.held_out and task.question not in seen:
                    seen.add(task.question)
                    tasks.append(task)
                    break
    return tasks[:count]
