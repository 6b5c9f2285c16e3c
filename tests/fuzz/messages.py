"""Random protobuf messages of any type, sensible and absurd, and random damage to their bytes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

MAX_DEPTH = 6

_WORDS = [
    "", "a", "tiny", "user", "assistant", "system", "What is 12 + 7?", "<|im_end|>", "{{ 7 * 7 }}",
    "{% for i in range(10**9) %}x{% endfor %}", "../../etc/passwd", "\0", "\ud7ff\ue000", "🙂" * 50,
    "(a+)+$", "[{\"type\": \"function\"}]", "[" * 1200 + "]" * 1200, "[\"\\ud800\"]", "[1e999]",
    "[" * 990 + "]" * 990, "NaN", "/etc", "x" * 5000, "\n\r\t\x1b[31m",
    "messages", "enable_thinking", "%s%n", "-1", "a b " * 400,
]  # fmt: skip
_NUMBERS = [0, 1, 2, 15, 16, 17, 100, 255, 2047, 2048, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
_BIG = [2**53, 2**63 - 1, 2**63, 2**64 - 1]
_FLOATS = [0.0, -0.0, 1.0, 0.5, -1.0, 2.0, 1e-45, 1e38, math.inf, -math.inf, math.nan]


def random_message(rng: random.Random, message: Message, depth: int = 0) -> Message:
    """Sets some of the fields, in place."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() < (0.4 if depth < MAX_DEPTH else 0.05):
            _set(rng, message, field, depth)
    return message


def _set(rng: random.Random, message: Message, field: FieldDescriptor, depth: int) -> None:
    value = getattr(message, field.name)
    if _is_map(field):
        for _ in range(_count(rng, depth)):
            entry = field.message_type.fields_by_name
            key = _scalar(rng, entry["key"])
            if entry["value"].message_type is None:
                value[key] = _scalar(rng, entry["value"])
            elif depth < MAX_DEPTH:
                random_message(rng, value[key], depth + 1)
    elif field.is_repeated:
        for _ in range(_count(rng, depth)):
            if field.message_type is None:
                value.append(_scalar(rng, field))
            elif depth < MAX_DEPTH:
                random_message(rng, value.add(), depth + 1)
    elif field.message_type is not None:
        value.SetInParent()
        random_message(rng, value, depth + 1)
    else:
        setattr(message, field.name, _scalar(rng, field))


def _is_map(field: FieldDescriptor) -> bool:
    kind: Descriptor | None = field.message_type
    return kind is not None and bool(kind.GetOptions().map_entry)


def _count(rng: random.Random, depth: int) -> int:
    """Many only near the top: the deep ones multiply."""
    return rng.choice([0, 1, 2, 3, 70, 2000] if depth < 2 else [0, 1, 1, 2, 3])


def _scalar(rng: random.Random, field: FieldDescriptor) -> Any:
    makers: dict[int, Callable[[], Any]] = {
        FieldDescriptor.CPPTYPE_STRING: lambda: rng.choice(_WORDS),
        FieldDescriptor.CPPTYPE_BOOL: lambda: rng.random() < 0.5,
        FieldDescriptor.CPPTYPE_FLOAT: lambda: _float(rng),
        FieldDescriptor.CPPTYPE_DOUBLE: lambda: _float(rng),
        FieldDescriptor.CPPTYPE_UINT32: lambda: _integer(rng, 0, 2**32 - 1),
        FieldDescriptor.CPPTYPE_UINT64: lambda: _integer(rng, 0, 2**64 - 1),
        FieldDescriptor.CPPTYPE_INT32: lambda: _integer(rng, -(2**31), 2**31 - 1),
        FieldDescriptor.CPPTYPE_INT64: lambda: _integer(rng, -(2**63), 2**63 - 1),
        FieldDescriptor.CPPTYPE_ENUM: lambda: rng.randrange(4),
    }
    return makers[field.cpp_type]()


def _float(rng: random.Random) -> float:
    value = rng.choice(_FLOATS) if rng.random() < 0.4 else rng.uniform(0, 2)
    # Beyond single precision is refused by protobuf itself.
    return value


def _integer(rng: random.Random, low: int, high: int) -> int:
    value = rng.choice(_NUMBERS + _BIG) if rng.random() < 0.3 else rng.randrange(300)
    return max(low, min(value * rng.choice([1, 1, 1, -1]), high))


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The bytes with some damage: flipped, cut, doubled, shuffled, or none of these at all."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        where = rng.randrange(len(out) + 1)
        upto = min(len(out), where + rng.randint(1, 8))
        kind = rng.randrange(6)
        if kind == 0 and where < len(out):
            out[where] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[where:upto]
        elif kind == 2:
            out[where:where] = rng.randbytes(rng.randint(1, 8))
        elif kind == 3:
            out[where:where] = out[where:upto] * rng.randint(1, 50)
        elif kind == 4:
            del out[where:]
        else:
            # A length that promises more than there is.
            out[where:where] = b"\x0a" + rng.choice([b"\xff\xff\xff\xff\x0f", b"\x7f", b"\x80"])
    return bytes(out)
