"""Made-up loads for the scheduler's simulator: arrivals in time, with tokens that repeat as real
ones do."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


@dataclass
class Turn:
    """One request. A chat's later turns arrive some time after the answer before them."""

    prompt: Tokens
    """Tokens of this turn alone; a chat's history goes before them."""
    max_tokens: int
    tenant: str
    kind: str
    """system, chat or giant."""
    arrival: float
    """Seconds from the start; for later turns of a chat, from the answer before."""
    later: list[Turn] = field(default_factory=list)


@dataclass(frozen=True)
class Mix:
    """How many of each kind, and how they come."""

    name: str
    seconds: float
    bursts: int
    """0: Poisson arrivals; else all requests come in so many bursts of half a second."""
    system_requests: int = 1000
    chats: int = 100
    giants: int = 5
    giant_tokens: int = 30000
    seed: int = 0


def poisson() -> Mix:
    return Mix("poisson", seconds=12.0, bursts=0)


def bursty() -> Mix:
    return Mix("bursty", seconds=16.0, bursts=4)


def make(mix: Mix) -> list[Turn]:
    """The mix's first turns, by arrival."""
    rng = np.random.default_rng(mix.seed)

    def tokens(count: int) -> Tokens:
        return rng.integers(1, 100000, count, dtype=np.int32)

    def arrival() -> float:
        if mix.bursts:
            burst = int(rng.integers(mix.bursts))
            return float(burst * mix.seconds / mix.bursts + rng.random() * 0.5)
        return float(rng.random() * mix.seconds)

    def length(median: int, largest: int) -> int:
        return int(np.clip(rng.lognormal(np.log(median), 0.8), 4, largest))

    system_prompts = [tokens(int(n)) for n in (300, 700, 1500, 2500)]
    turns = []
    for _ in range(mix.system_requests):
        # One tenant sends half of the load; the others share the rest.
        tenant = "loud" if rng.random() < 0.5 else f"quiet{rng.integers(3)}"
        system = system_prompts[int(rng.integers(len(system_prompts)))]
        prompt = np.concatenate([system, tokens(length(120, 2000))])
        turns.append(Turn(prompt, length(120, 800), tenant, "system", arrival()))
    for _ in range(mix.chats):
        later = [
            Turn(tokens(length(60, 500)), length(150, 600), "chats", "chat", 1.0 + 2 * rng.random())
            for _ in range(int(rng.integers(1, 5)))
        ]
        prompt = np.concatenate([system_prompts[0], tokens(length(60, 500))])
        first = Turn(prompt, length(150, 600), "chats", "chat", arrival(), later)
        turns.append(first)
    for _ in range(mix.giants):
        turns.append(Turn(tokens(mix.giant_tokens), 100, "giants", "giant", arrival()))
    return sorted(turns, key=lambda turn: turn.arrival)
