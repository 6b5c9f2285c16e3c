"""GenerationService: text, chat or token ids in; one answer or a stream of deltas out."""

from __future__ import annotations

import asyncio
import uuid
from array import array
from collections.abc import Iterable

from zllm.errors import RequestExists, Unavailable
from zllm.native.delta_writer import DeltaWriter
from zllm.runtime.detokenizer import Detokenizer
from zllm.runtime.messages import AddRequest, FinishReason
from zllm.service.admission import check_deadline
from zllm.service.answers import Run, delta_encoder, finished, started, whole_answer
from zllm.service.calls import current_call
from zllm.service.prompts import prompt_ids
from zllm.service.rpc import Context, writes_bytes
from zllm.service.served_model import Models
from zllm.service.streams import Stream
from zllm.service.tenants import Caller, current_caller
from zllm.service.validation import MAX_REQUEST_ID_CHARS, check_options, fit_prompt
from zllm.v1 import generation_pb2


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
        self._live: dict[tuple[str, str], Run | None] = {}
        """By tenant and request id, as no tenant may learn of another's ids; None until the engine
        was sent it."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        """New requests are refused."""
        self.drained = False
        """So is what has not reached an engine yet."""

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
                run = await self._submit(request, request_id, context)
                try:
                    await run.stream.begun()
                    await _commit(context)
                    delta = await run.stream.take_whole()
                finally:
                    run.model.engine.release(run.engine_id)
                    _settle(run, caller)
            finally:
                self._unclaim(request_id)
        return whole_answer(run, delta)

    @writes_bytes
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
                    _settle(run, caller)
            finally:
                self._unclaim(request_id)

    def _note(self, request: generation_pb2.GenerateRequest) -> None:
        call = current_call()
        call.request = request
        # One that is too long is refused later on, and is not to fill the log before that.
        call.request_id = request.request_id[:MAX_REQUEST_ID_CHARS]
        visible = current_caller().visible(self._models)
        name = request.model or visible.default
        if name in self._models:
            call.model = name

    def _claim(self, request: generation_pb2.GenerateRequest) -> str:
        if self.draining:
            raise Unavailable("the server is draining", cause="draining")
        tenant = current_caller().tenant
        request_id = request.request_id or self._free_id(tenant)
        if (tenant, request_id) in self._live:
            raise RequestExists("request_id", f"{request_id[:200]!r} is that of a live request")
        self._live[tenant, request_id] = None
        self._idle.clear()
        current_call().request_id = current_call().request_id or request_id
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
    ) -> Run:
        caller = current_caller()
        model = caller.find(self._models, request.model)
        options = check_options(request, model, self._queue_timeout)
        prompt = await prompt_ids(request, model)
        if self.drained:
            raise Unavailable("the server is draining", cause="draining")
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
            min_tokens=options.min_tokens_per_delta,
            prompt_tokens=len(prompt),
            on_start=current_call().first_token,
        )
        current_call().prompt, current_call().stream = prompt, stream
        engine_id = model.engine.submit(
            AddRequest(
                request_id=0,  # the engine client's to give
                prompt=array("i", prompt).tobytes(),
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
        run = Run(
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


def _settle(run: Run, caller: Caller) -> None:
    """The prompt was charged when the request was sent to the engine."""
    if run.stream.refused:
        caller.refund(len(run.prompt))
    else:
        caller.charge(run.stream.produced_tokens)


async def _commit(context: Context) -> None:
    """Sends the response's headers: what has begun is not tried again by gRPC in the client, which
    would run a request that ends an engine on the next one too. What never began may be."""
    await context.send_initial_metadata(())


async def _write_stream(run: Run, context: Context) -> None:
    await run.stream.begun()
    # With the headers, as in _commit.
    await context.write(started(run).SerializeToString())
    writer = DeltaWriter(run.stream, delta_encoder(run), context.write, asyncio.get_running_loop())
    try:
        await writer.start(await run.stream.take())
    finally:
        writer.close()
    await context.write(finished(run).SerializeToString())
