"""GenerationService: text, chat or token ids in; one answer or a stream of deltas out."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from google.protobuf.duration_pb2 import Duration

from zllm.errors import RequestExists, Unavailable
from zllm.native.pending import Delta
from zllm.runtime.detokenizer import Detokenizer
from zllm.runtime.messages import AddRequest, FinishReason, TokenLogprobs
from zllm.service.admission import check_deadline
from zllm.service.calls import current_call
from zllm.service.prompts import prompt_ids
from zllm.service.rpc import Context
from zllm.service.served_model import Models, ServedModel
from zllm.service.streams import WHOLE, Finish, Stream
from zllm.service.tenants import current_caller
from zllm.service.validation import MAX_REQUEST_ID_CHARS, check_options, fit_prompt
from zllm.v1 import generation_pb2, types_pb2


@dataclass
class _Run:
    """A request on its way: what the engine was sent, and the stream of what it gives."""

    request: generation_pb2.GenerateRequest
    request_id: str
    model: ServedModel
    prompt: list[int]
    stream: Stream
    engine_id: int
    wants_text: bool
    wants_token_ids: bool


class GenerationService:
    def __init__(
        self,
        models: Models,
        queue_timeout: float,
        max_prompt_tokens: int = 0,
        *,
        slo: bool = False,
    ) -> None:
        self._models = models
        self._queue_timeout = queue_timeout
        self._slo = slo
        self._max_prompt_tokens = max_prompt_tokens
        self._live: dict[tuple[str, str], _Run | None] = {}
        """By tenant and request id, as no tenant may learn of another's ids; None until the engine
        was sent it."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    async def idle(self) -> None:
        """Until no request is live."""
        await self._idle.wait()

    @property
    def num_live(self) -> int:
        return len(self._live)

    def abort(self, request_ids: Iterable[str] | None) -> list[str]:
        """Ends these requests, of every tenant, or all, with FINISH_REASON_ABORTED and what they
        have; returns those that were waiting or running in an engine."""
        wanted = None if request_ids is None else set(request_ids)
        aborted = []
        for (_, request_id), run in list(self._live.items()):
            if wanted is not None and request_id not in wanted:
                continue
            if run is not None and not run.stream.over:
                run.model.engine.end([run.engine_id], FinishReason.ABORTED)
                aborted.append(request_id)
        return aborted

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        self._note(request)
        with current_caller().request() as caller:
            request_id = self._claim(request)
            try:
                run = await self._submit(request, request_id, context, min_tokens=WHOLE)
                try:
                    delta = await run.stream.take_whole()
                finally:
                    run.model.engine.release(run.engine_id)
                    caller.charge(run.stream.completion_tokens)
            finally:
                self._unclaim(request_id)
        return _whole_answer(run, delta)

    async def StreamGenerate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> None:
        self._note(request)
        with current_caller().request() as caller:
            request_id = self._claim(request)
            try:
                run = await self._submit(request, request_id, context)
                try:
                    await _write_stream(run, context)
                finally:
                    # Cancelled, vanished, expired or done: what still runs is aborted.
                    run.model.engine.release(run.engine_id)
                    caller.charge(run.stream.completion_tokens)
            finally:
                self._unclaim(request_id)

    def _note(self, request: generation_pb2.GenerateRequest) -> None:
        call = current_call()
        call.request = request
        if not request.model or request.model in self._models.by_name:
            call.model = request.model or next(iter(self._models.by_name), "")

    def _claim(self, request: generation_pb2.GenerateRequest) -> str:
        if self.draining:
            raise Unavailable("the server is draining", cause="draining")
        tenant = current_caller().tenant
        request_id = request.request_id or self._free_id(tenant)
        if (tenant, request_id) in self._live:
            raise RequestExists("request_id", f"{request_id[:200]!r} is that of a live request")
        self._live[tenant, request_id] = None
        self._idle.clear()
        current_call().request_id = request_id
        return request_id

    def _free_id(self, tenant: str) -> str:
        """The metadata's x-request-id, or a new one: a proxy that tries again sends the same id
        while the first try may still be live."""
        given = current_call().metadata.get("x-request-id", "")
        usable = isinstance(given, str) and 0 < len(given) <= MAX_REQUEST_ID_CHARS
        return str(given) if usable and (tenant, given) not in self._live else uuid.uuid4().hex

    def _unclaim(self, request_id: str) -> None:
        self._live.pop((current_caller().tenant, request_id), None)
        if not self._live:
            self._idle.set()

    async def _submit(
        self,
        request: generation_pb2.GenerateRequest,
        request_id: str,
        context: Context,
        min_tokens: int | None = None,
    ) -> _Run:
        caller = current_caller()
        model = caller.find(self._models, request.model)
        options = check_options(request, model, self._queue_timeout)
        prompt = await prompt_ids(request, model)
        prompt, stopping = fit_prompt(
            request, prompt, options, model.max_context_tokens, self._max_prompt_tokens
        )
        check_deadline(model.engine, len(prompt), context.time_remaining(), slo=self._slo)
        output = request.output
        skip_special = not output.HasField("skip_special_tokens") or output.skip_special_tokens
        stream = Stream(
            Detokenizer(
                model.tokenizer,
                skip_special_tokens=skip_special,
                stop_strings=options.stop_strings,
                include_stop_string=request.stopping.include_stop_string,
            ),
            keep_stop=request.stopping.include_stop_string,
            min_tokens=min_tokens or options.min_tokens_per_delta,
            prompt_tokens=len(prompt),
            on_start=current_call().first_token,
        )
        current_call().prompt, current_call().stream = prompt, stream
        engine_id = model.engine.submit(
            AddRequest(
                request_id=0,  # the engine client's to give
                prompt=np.asarray(prompt, dtype="<i4").tobytes(),
                sampling=options.sampling,
                stopping=stopping,
                num_logprobs=options.num_logprobs,
                priority=request.priority,
                salt=caller.salt(request.cache.salt),
                bypass_cache=request.cache.bypass,
                queue_timeout=options.queue_timeout,
                tenant=caller.tenant,
            ),
            stream,
        )
        caller.charge(len(prompt))
        run = _Run(
            request,
            request_id,
            model,
            prompt,
            stream,
            engine_id,
            wants_text=output.text or not output.HasField("text"),
            wants_token_ids=output.token_ids,
        )
        self._live[caller.tenant, request_id] = run
        return run


async def _write_stream(run: _Run, context: Context) -> None:
    # The response's headers go out with the first message, so that a request which never
    # starts can still be retried by its client.
    delta = await run.stream.take()
    await context.write(
        generation_pb2.StreamGenerateResponse(
            started=generation_pb2.GenerationStarted(
                request_id=run.request_id, model=run.model.name, prompt=_prompt_info(run)
            )
        )
    )
    await context.write(_delta_message(run, delta))
    while delta.finish is None:
        delta = await run.stream.take()
        await context.write(_delta_message(run, delta))
    await context.write(
        generation_pb2.StreamGenerateResponse(
            finished=generation_pb2.GenerationFinished(usage=_usage(run), timing=_timing(run))
        )
    )


def _delta_message(run: _Run, delta: Delta) -> generation_pb2.StreamGenerateResponse:
    message = generation_pb2.StreamGenerateResponse()
    sequence = message.delta
    sequence.num_tokens = len(delta.token_ids)
    _fill(sequence, run, delta)
    return message


def _whole_answer(run: _Run, delta: Delta) -> generation_pb2.GenerateResponse:
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
    message: generation_pb2.SequenceDelta | generation_pb2.SequenceOutput, run: _Run, delta: Delta
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


def _prompt_info(run: _Run) -> generation_pb2.PromptInfo:
    return generation_pb2.PromptInfo(
        prompt_tokens=len(run.prompt),
        cached_tokens=run.stream.cached_tokens,
        token_ids=run.prompt if run.request.output.prompt_token_ids else (),
    )


def _usage(run: _Run) -> types_pb2.Usage:
    return types_pb2.Usage(
        prompt_tokens=len(run.prompt),
        cached_tokens=run.stream.cached_tokens,
        completion_tokens=run.stream.completion_tokens,
    )


def _timing(run: _Run) -> generation_pb2.Timing:
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
