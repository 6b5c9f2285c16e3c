"""LLM: the engine in the caller's process, without sockets."""

from __future__ import annotations

import reprlib
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zllm.errors import ConfigError, EngineError, InvalidRequest, Overloaded
from zllm.runtime.chat_template import ChatTemplate, load_chat_template
from zllm.runtime.config import EngineConfig
from zllm.runtime.detokenizer import Detokenizer
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.engine import Engine
from zllm.runtime.hub import resolve_model
from zllm.runtime.messages import (
    AddRequest,
    FinishReason,
    RequestRefused,
    Sampling,
    StepOutput,
    Stopping,
)
from zllm.runtime.model_config import ModelConfig
from zllm.runtime.outputs import CompletionOutput, RequestOutput
from zllm.runtime.sampling_params import SamplingParams
from zllm.runtime.tokenizer import Tokenizer, load_tokenizer

Prompt = str | Sequence[int]
_OFFLINE = {"interactive": False, "max_queued_requests": 1 << 40, "max_queued_tokens": 1 << 40}
"""Options of a caller who waits for all of the answers, and brings all of the prompts at once."""


@dataclass(slots=True)
class _Live:
    """A request that runs."""

    output: RequestOutput
    completion: CompletionOutput
    params: SamplingParams
    detokenizer: Detokenizer | None
    """None where the text can wait for the end: nothing in it can stop the request."""

    def hides_last(self, finish: int) -> bool:
        """The token that ended it is an id of the output, but no text of it."""
        ends = finish in (FinishReason.EOS, FinishReason.STOP)
        return ends and not self.params.include_stop_str_in_output


class LLM:
    """Offline inference.

        llm = LLM("Qwen/Qwen3-0.6B")
        outputs = llm.generate(["Hello"], SamplingParams(max_tokens=20))

    Options are the fields of EngineConfig. Raises ConfigError where the engine cannot start. A
    model folder without a tokenizer takes token ids alone. Threads that share one take turns, a
    whole call each.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        folder = resolve_model(EMBEDDED_MODEL if model is None else Path(model))
        self.model_config = ModelConfig.from_folder(folder)
        self.tokenizer: Tokenizer | None = None
        self.chat_template: ChatTemplate | None = None
        if (folder / "tokenizer.json").exists():
            self.tokenizer = load_tokenizer(folder)
            self.chat_template = load_chat_template(folder)
        try:
            config = EngineConfig(model=folder, **{**_OFFLINE, **options})
        except TypeError as error:
            raise ConfigError(f"{error}: options are the fields of EngineConfig") from error
        self.engine = Engine(config)
        self._next_id = 1
        self._live: dict[int, _Live] = {}
        self._closed = False
        # The engine is for one thread, and a call steps until no request is left.
        self._turn = threading.Lock()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Run the prompts (texts, or lists of token ids) to their ends, in one continuous batch.

        One SamplingParams for all, or one for each. Outputs stand in the order of the prompts; one
        whose logits are not finite ends with the finish_reason "error", and the others go on.
        Raises InvalidRequest, and Overloaded where the options bound the queue, also once others of
        the prompts run: then they are given up.
        """
        return self._generate(prompts, sampling_params, add_special_tokens=True)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """`generate` on conversations, rendered through the model's chat template. One may come
        without a list around it."""
        if self.chat_template is None:
            raise InvalidRequest("chat", "the model has no chat template: send text or token ids")
        given: list[Any] = list(messages)
        single = bool(given) and isinstance(given[0], Mapping)
        conversations = [given] if single else [list(one) for one in given]
        if not all(isinstance(message, Mapping) for one in conversations for message in one):
            raise InvalidRequest(
                "chat",
                f"is {reprlib.repr(messages)}: a conversation is a list of messages, "
                "{'role': ..., 'content': ...} each",
            )
        prompts = [
            self.chat_template.render(one, tools=tools, variables=chat_template_kwargs)
            for one in conversations
        ]
        # The template writes the special tokens itself.
        return self._generate(prompts, sampling_params, add_special_tokens=False)

    def close(self) -> None:
        """Release the device's memory, after the call that runs. Closing twice is no error."""
        with self._turn:
            if self._closed:
                return
            self._closed = True
            self.engine.close()
            if self.chat_template is not None:
                self.chat_template.close()

    def _generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        add_special_tokens: bool,
    ) -> list[RequestOutput]:
        many = _as_prompts(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(many)
        else:
            params = list(sampling_params)
        if len(params) != len(many):
            raise InvalidRequest(
                "sampling", f"{len(params)} for {len(many)} prompts: give one, or one for each"
            )
        for each in params:
            if not isinstance(each, SamplingParams):
                raise InvalidRequest("sampling", f"is {each!r}: each must be a SamplingParams")
        with self._turn:
            if self._closed:
                raise EngineError("the LLM is closed: make a new one")
            return self._run(many, params, add_special_tokens)

    def _run(
        self, prompts: list[Prompt], params: list[SamplingParams], add_special_tokens: bool
    ) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        room = self.engine.runner.max_num_batched_tokens
        try:
            for prompt, each in zip(prompts, params, strict=True):
                tokens = self._token_ids(prompt, each, add_special_tokens)
                live, request = self._request(prompt, tokens, each)
                outputs.append(live.output)
                self._live[request.request_id] = live
                self.engine.add(request)
                room -= len(tokens)
                if -len(tokens) < room <= 0:
                    self._step()  # the first step is full: it runs while the rest is read
            while self._live:
                self._step()
        finally:
            if self._live:  # interrupted or refused: nothing may go on behind the caller's back
                self.engine.abort(list(self._live))
                self._live.clear()
            while self.engine.has_work():
                self.engine.step()
        return outputs

    def _step(self) -> None:
        step = self.engine.step()
        if step is not None:
            self._take(step)

    def _request(
        self, prompt: Prompt, ids: npt.NDArray[np.int64], params: SamplingParams
    ) -> tuple[_Live, AddRequest]:
        defaults, eos = self.model_config.sampling, self.model_config.eos_token_ids
        request_id, self._next_id = self._next_id, self._next_id + 1
        completion = CompletionOutput(logprobs=None if params.logprobs is None else [])
        text = prompt if isinstance(prompt, str) else None
        given = list(prompt) if isinstance(prompt, list) else ids.tolist()
        output = RequestOutput(request_id, text, given, [completion])
        detokenizer = None
        if params.stop and self.tokenizer is not None:
            detokenizer = Detokenizer(
                self.tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                stop_strings=tuple(params.stop),
                include_stop_string=params.include_stop_str_in_output,
            )
        request = AddRequest(
            request_id=request_id,
            prompt=ids.astype(np.int32).tobytes(),
            sampling=Sampling(
                temperature=_first(params.temperature, defaults.temperature, 1.0),
                top_p=_first(params.top_p, defaults.top_p, 1.0),
                top_k=int(_first(params.top_k, defaults.top_k, 0)),
                min_p=_first(params.min_p, defaults.min_p, 0.0),
                seed=secrets.randbits(64) if params.seed is None else params.seed,
            ),
            stopping=Stopping(
                max_tokens=int(_first(params.max_tokens, self.engine.runner.max_model_len)),
                min_tokens=params.min_tokens,
                eos_token_ids=() if params.ignore_eos else eos,
                stop_token_ids=tuple(params.stop_token_ids),
            ),
            num_logprobs=-1 if params.logprobs is None else params.logprobs,
        )
        return _Live(output, completion, params, detokenizer), request

    def _token_ids(
        self, prompt: Prompt, params: SamplingParams, add_special_tokens: bool
    ) -> npt.NDArray[np.int64]:
        """The prompt's ids, checked beside its parameters."""
        if params.stop and self.tokenizer is None:
            raise InvalidRequest("stopping.stop_strings", "the model has no tokenizer")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequest("text", "the model has no tokenizer: send token ids")
            encoded = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
            ids = np.asarray(encoded, np.int64)
        else:
            ids = _as_ids(prompt)
        vocab = self.model_config.vocab_size
        if not ids.size:
            raise InvalidRequest("prompt", "has no tokens")
        wrong = ids[(ids < 0) | (ids >= vocab)]
        if wrong.size:
            raise InvalidRequest("token_ids", f"{wrong[0]} is outside the vocabulary [0, {vocab})")
        limit = self.engine.runner.max_model_len
        if len(ids) >= limit:
            raise InvalidRequest(
                "prompt", f"has {len(ids)} tokens: the context holds {limit}, one of them new"
            )
        return ids

    def _take(self, step: StepOutput) -> None:
        for refused in step.refused:
            self._refuse(refused)
        for started in step.started:
            if started.request_id in self._live:
                self._live[started.request_id].output.num_cached_tokens = started.cached_tokens
        ids = np.frombuffer(step.request_ids, np.int64).tolist()
        tokens = np.frombuffer(step.tokens, np.int32).tolist()
        for index, (request_id, token, finish) in enumerate(
            zip(ids, tokens, step.finishes, strict=True)
        ):
            live = self._live.get(request_id)
            if live is None:
                continue  # stopped by a stop string a step ago
            if token >= 0:
                live.completion.token_ids.append(token)
                if live.completion.logprobs is not None:
                    live.completion.logprobs.append(step.logprobs[index])
                if live.detokenizer is not None and not live.hides_last(finish):
                    live.completion.text += live.detokenizer.push(token)
                    if live.detokenizer.matched_stop is not None:
                        self.engine.abort([request_id])
                        self._finish(request_id, live, FinishReason.STOP)
                        continue
            if finish:
                self._finish(request_id, live, FinishReason(finish))

    def _finish(self, request_id: int, live: _Live, reason: FinishReason) -> None:
        del self._live[request_id]
        completion = live.completion
        ids = completion.token_ids
        if completion.logprobs is not None:
            completion.cumulative_logprob = sum(each.logprob for each in completion.logprobs)
        if live.detokenizer is not None:
            completion.text += live.detokenizer.flush()
            # The rest may be what completes a stop string: half a character becomes U+FFFD.
            if live.detokenizer.matched_stop is not None and reason is not FinishReason.ERROR:
                completion.stop_reason = live.detokenizer.matched_stop
                reason = FinishReason.STOP
        elif self.tokenizer is not None:
            shown = ids[:-1] if live.hides_last(reason) else ids
            skip = live.params.skip_special_tokens
            completion.text = self.tokenizer.decode(shown, skip_special_tokens=skip)
        if reason == FinishReason.STOP and completion.stop_reason is None and ids:
            completion.stop_reason = ids[-1]
        completion.finish_reason = reason.name.lower()

    def _refuse(self, refused: RequestRefused) -> None:
        if refused.field:
            raise InvalidRequest(refused.field, refused.message)
        raise Overloaded(refused.message)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    many: list[Any] = list(prompts)
    return [many] if many and isinstance(many[0], (int, np.integer)) else many


def _as_ids(prompt: Sequence[int]) -> npt.NDArray[np.int64]:
    """Told to make int64 of whatever comes, NumPy would cut 1.5 to 1 and read "12" as 12."""
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists of unequal length
        ids = np.empty((0, 0), np.object_)
    if ids.shape == (0,):
        return ids.astype(np.int64)  # an empty list has no integers either
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InvalidRequest(
            "prompt", f"is {reprlib.repr(prompt)}: it must be a text, or a list of integer ids"
        )
    return ids.astype(np.int64, copy=False)


def _first(*values: float | None) -> float:
    """The first value that is given."""
    return next(value for value in values if value is not None)
