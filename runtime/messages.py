"""What service and engine say to each other: msgspec structs, in msgpack (frames.py).

Every message is an array on the wire whose first item is its tag, and decodes to plain data; flat
numbers travel as the raw bytes of little-endian numpy arrays.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

CLIENT_SHIFT = 40
"""A request's id is its client's number, shifted by so many bits, and the client's own count."""


class FinishReason(IntEnum):
    """Why a sequence ended. The numbers are those of zllm.v1.FinishReason, and from 100 on
    the engine's own."""

    NONE = 0
    EOS = 1
    STOP = 2
    LENGTH = 3
    CONTEXT_LIMIT = 4
    TIME_LIMIT = 5
    ABORTED = 6
    SHUTDOWN = 7
    QUEUE_TIMEOUT = 100
    """Never started: its queue_timeout passed (RESOURCE_EXHAUSTED)."""
    ERROR = 101
    """The engine could not go on with it, e.g. non-finite logits (INTERNAL)."""


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How to choose a token. Already checked, defaults filled in."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    seed: int = 0
    """Unsigned 64 bits; the service draws one where the request names none."""


class Stopping(msgspec.Struct, frozen=True, array_like=True):
    """When to stop. Stop strings are the detokenizer's business, not the engine's."""

    max_tokens: int
    min_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    """Empty under ignore_eos."""
    stop_token_ids: tuple[int, ...] = ()
    time_limit: float = 0.0
    """Seconds after arrival; 0: none."""


class Attach(_Message, frozen=True, tag="attach"):
    """A client's first message; EngineReady or EngineFailed answers it, once that is known."""

    client: int
    """Its number, which no other client of this engine ever has."""


class AddRequest(_Message, frozen=True, tag="add"):
    """A request that passed validation."""

    request_id: int
    """63 bits as CLIENT_SHIFT says, unique among live requests of this engine."""
    prompt: bytes
    """int32 token ids, at least one."""
    sampling: Sampling
    stopping: Stopping
    num_logprobs: int = -1
    """-1: none; 0: the chosen token's; N: also the N most likely."""
    priority: int = 0
    salt: str = ""
    bypass_cache: bool = False
    queue_timeout: float = 0.0
    """Seconds after arrival; 0: none."""
    tenant: str = ""


class AbortRequests(_Message, frozen=True, tag="abort"):
    request_ids: list[int]
    """An unknown id is no error."""


class FlushCache(_Message, frozen=True, tag="flush"):
    """Drop the prefix-cache blocks that nothing uses; answered by CacheFlushed, in order."""


class Shutdown(_Message, frozen=True, tag="shutdown"):
    """Finish nothing, release everything, exit."""


class ModelCard(msgspec.Struct, frozen=True, array_like=True):
    """What the model's files say, for a service that never loads torch."""

    architectures: tuple[str, ...]
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    weight_format: str
    """As stored: bfloat16, float16, float32, or a quantization's name."""
    temperature: float | None = None
    """This and the next: generation_config.json's defaults; None where it is silent."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None


class EngineReady(_Message, frozen=True, tag="ready"):
    """The engine's first message to a client: this is what it serves."""

    max_model_len: int
    """This and the next two: of the settings of that name, what they came to."""
    max_num_batched_tokens: int
    num_kv_blocks: int
    startup_report: list[str]
    """Lines for the operator: device, weights' memory, KV blocks, full-length requests."""
    card: ModelCard
    gpu: str = ""
    """The UUID of the GPU it runs on, as NVML knows it; empty: none."""


class EngineFailed(_Message, frozen=True, tag="failed"):
    """The engine could not start; `message` says what to do. Its process exits after this."""

    message: str


class RequestStarted(msgspec.Struct, frozen=True, array_like=True):
    """Goes out in the step that gives a request's first token."""

    request_id: int
    cached_tokens: int
    queued_s: float
    """Until its first step was planned."""
    prefill_s: float = 0.0
    """From there to its first token."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """One chosen token's log-probability, its rank (1 is best) and the N most likely."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class RequestRefused(msgspec.Struct, frozen=True, array_like=True):
    """The scheduler did not take the request."""

    request_id: int
    message: str
    field: str = ""
    """The field at fault (INVALID_ARGUMENT); empty: the queue had no room (RESOURCE_EXHAUSTED)."""


class Load(msgspec.Struct, frozen=True, array_like=True):
    """The scheduler as it stands."""

    running_requests: int = 0
    queued_requests: int = 0
    queued_tokens: int = 0
    """Of their prompts, those that the prefix cache did not hold when they came."""
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    """Blocks that a new request could take: empty, or cached with no user."""
    prefix_hit_tokens: int = 0
    """Since start, as all counters below."""
    prefix_query_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    violations: int = 0
    """Checks of the scheduler's books that failed: a defect of zllm."""
    admitted_requests: int = 0
    """Sequences that left the queue to run, each time they did."""


class StepOutput(_Message, frozen=True, tag="step"):
    """What one step gave: parallel arrays with one entry a token or finish.

    An entry with token -1 carries a finish alone (abort, time limit, queue timeout, error).
    """

    request_ids: bytes
    """int64."""
    tokens: bytes
    """int32."""
    finishes: bytes
    """uint8 FinishReason; 0 while the sequence goes on."""
    started: list[RequestStarted]
    refused: list[RequestRefused]
    logprobs: dict[int, TokenLogprobs]
    """By index into the arrays."""
    load: Load


class Histogram(msgspec.Struct, frozen=True, array_like=True):
    """Values counted by size, since start."""

    bounds: tuple[float, ...] = ()
    """Ascending."""
    counts: tuple[int, ...] = (0,)
    """Values up to each bound and above the one before; the last: above all bounds."""
    sum: float = 0.0


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """What an engine counts apart from its scheduler's Load."""

    inter_token: Histogram = Histogram()
    """Seconds between two tokens of one sequence."""
    step_seconds: Histogram = Histogram()
    step_tokens: Histogram = Histogram()
    """Tokens computed in a step: of prompts, and one for each decode."""


class CacheFlushed(_Message, frozen=True, tag="flushed"):
    blocks: int
    """How many were dropped."""


class Heartbeat(_Message, frozen=True, tag="heartbeat"):
    """Sent at least once a second: the step loop turns, or its step is within its time limit.
    Carries the load and the counts as they were before that step."""

    load: Load
    stats: EngineStats = EngineStats()


ToEngine = Attach | AddRequest | AbortRequests | FlushCache | Shutdown
FromEngine = EngineReady | EngineFailed | StepOutput | CacheFlushed | Heartbeat
