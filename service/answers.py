"""What GenerationService says: a run's messages."""

from __future__ import annotations

import time
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from zllm.native.delta_encoder import DeltaEncoder
from zllm.native.pending import Delta
from zllm.runtime.messages import TokenLogprobs
from zllm.service.served_model import ServedModel
from zllm.service.streams import Finish, Stream
from zllm.v1 import generation_pb2, types_pb2

_EVENT = generation_pb2.StreamGenerateResponse.DESCRIPTOR.fields_by_name
_DELTA = generation_pb2.SequenceDelta.DESCRIPTOR.fields_by_name


@dataclass
class Run:
    """A request on its way: what the engine was sent, and the stream of what it gives."""

    request: generation_pb2.GenerateRequest
    request_id: str
    model: ServedModel
    prompt: list[int]
    stream: Stream
    engine_id: int
    wants_text: bool
    wants_token_ids: bool


def started(run: Run) -> generation_pb2.StreamGenerateResponse:
    return generation_pb2.StreamGenerateResponse(
        started=generation_pb2.GenerationStarted(
            request_id=run.request_id, model=run.model.name, prompt=_prompt_info(run)
        )
    )


def delta_encoder(run: Run) -> DeltaEncoder:
    """Makes a delta's message. Nearly all hold text and ids alone, for which protobuf's class costs
    more than all else that the service does (decision 038); their fields' numbers are its own."""
    return DeltaEncoder(
        delta=_EVENT["delta"].number,
        text=_DELTA["text"].number if run.wants_text else 0,
        token_ids=_DELTA["token_ids"].number if run.wants_token_ids else 0,
        num_tokens=_DELTA["num_tokens"].number,
        encode_rest=lambda delta: delta_message(run, delta).SerializeToString(),
    )


def finished(run: Run) -> generation_pb2.StreamGenerateResponse:
    return generation_pb2.StreamGenerateResponse(
        finished=generation_pb2.GenerationFinished(usage=_usage(run), timing=_timing(run))
    )


def delta_message(run: Run, delta: Delta) -> generation_pb2.StreamGenerateResponse:
    message = generation_pb2.StreamGenerateResponse()
    sequence = message.delta
    sequence.num_tokens = len(delta.token_ids)
    _fill(sequence, run, delta)
    return message


def whole_answer(run: Run, delta: Delta) -> generation_pb2.GenerateResponse:
    output = generation_pb2.SequenceOutput()
    _fill(output, run, delta)
    if run.request.output.HasField("logprobs"):
        output.cumulative_logprob = run.stream.cumulative_logprob
    return generation_pb2.GenerateResponse(
        request_id=run.request_id,
        model=run.model.name,
        prompt=_prompt_info(run),
        outputs=[output],
        usage=_usage(run),
        timing=_timing(run),
    )


def _fill(
    message: generation_pb2.SequenceDelta | generation_pb2.SequenceOutput, run: Run, delta: Delta
) -> None:
    """The fields that both have, as far as they were asked for. In place: half the time."""
    if run.wants_text:
        message.text = delta.text
    if run.wants_token_ids:
        message.token_ids.extend(delta.token_ids)
    if delta.logprobs:
        message.logprobs.extend(
            _logprob(run.model, token_id, entry)
            for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=True)
        )
    if delta.finish is not None:
        message.finish.CopyFrom(_finish(delta.finish))


def _finish(finish: Finish) -> generation_pb2.SequenceFinish:
    message = generation_pb2.SequenceFinish(reason=int(finish.reason))  # type: ignore[arg-type]
    if finish.stop_string is not None:
        message.stop_string = finish.stop_string
    elif finish.stop_token_id is not None:
        message.stop_token_id = finish.stop_token_id
    return message


def _logprob(model: ServedModel, token_id: int, entry: TokenLogprobs) -> types_pb2.TokenLogprob:
    token_bytes = model.tokenizer.token_bytes
    return types_pb2.TokenLogprob(
        token_id=token_id,
        logprob=entry.logprob,
        rank=entry.rank,
        token=token_bytes(token_id),
        top=[
            types_pb2.TopLogprob(token_id=top_id, logprob=logprob, token=token_bytes(top_id))
            for top_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
        ],
    )


def _prompt_info(run: Run) -> generation_pb2.PromptInfo:
    return generation_pb2.PromptInfo(
        prompt_tokens=len(run.prompt),
        cached_tokens=run.stream.cached_tokens,
        token_ids=run.prompt if run.request.output.prompt_token_ids else (),
    )


def _usage(run: Run) -> types_pb2.Usage:
    return types_pb2.Usage(
        prompt_tokens=len(run.prompt),
        cached_tokens=run.stream.cached_tokens,
        completion_tokens=run.stream.completion_tokens,
    )


def _timing(run: Run) -> generation_pb2.Timing:
    stream = run.stream
    return generation_pb2.Timing(
        queued=_duration(stream.queued_s),
        first_token=_duration(stream.first_token_at - stream.arrived),
        total=_duration(time.monotonic() - stream.arrived),
    )


def _duration(seconds: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message
