"""What users talk to: the served models behind one gRPC listener."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry

from zllm.errors import ConfigError
from zllm.runtime.chat_template import ChatTemplate, load_chat_template
from zllm.runtime.messages import EngineReady, FinishReason
from zllm.runtime.tokenizer import Tokenizer, load_tokenizer
from zllm.service.auth import ApiKeys
from zllm.service.calls import Observer
from zllm.service.config import ServerConfig
from zllm.service.daemon_thread import in_daemon_thread
from zllm.service.engine_client import EngineClient
from zllm.service.generation import GenerationService
from zllm.service.health import Health
from zllm.service.listener import LAST_WRITES_S, listen, make_listener
from zllm.service.metrics import Metrics
from zllm.service.models import ModelService
from zllm.service.served_model import Models, ServedModel
from zllm.service.tls import server_credentials
from zllm.v1 import generation_pb2, models_pb2

LOOK_S = 0.05
"""Between two looks whether a model that is leaving still has streams."""


class Server:
    """Listens from start() to stop(). The engines are the caller's.

    `names` are the models that will be expected, the default first. Health is SERVING while any
    model's engine speaks, once all of `awaits` have been added. `observers` hear of users' calls,
    as `metrics` does.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        names: Collection[str] = (),
        awaits: Collection[str] = (),
        observers: Sequence[Observer] = (),
    ) -> None:
        self._config = config
        self._models = Models(dict.fromkeys(names))
        self._awaits = set(awaits)
        self._texts: dict[str, tuple[Tokenizer, ChatTemplate | None]] = {}
        self._health = Health()
        self.metrics = Metrics(self._models)
        for name in names:
            self.metrics.model_comes(name)
        self._draining = False
        self._refuses_at = 0.0
        self._cut_short = 0
        self._leaving: set[EngineClient] = set()
        self._generation = GenerationService(
            self._models, config.queue_timeout, config.max_prompt_tokens, slo=config.slo
        )
        keys = ApiKeys(config.api_keys, parts=config.frontends) if config.api_keys else None
        self._credentials: grpc.ServerCredentials | None = None
        if config.tls_cert:
            self._credentials = server_credentials(
                config.tls_cert, config.tls_key, config.tls_client_ca
            )
        services = [
            (generation_pb2.DESCRIPTOR.services_by_name["GenerationService"], self._generation),
            (models_pb2.DESCRIPTOR.services_by_name["ModelService"], ModelService(self._models)),
            (health_pb2.DESCRIPTOR.services_by_name["Health"], self._health),
        ]
        self._listener = make_listener(
            config,
            config.host,
            services,
            keys,
            [self.metrics, *observers],
            shares_port=config.frontends > 1,
        )
        self.port = 0

    @property
    def models(self) -> Sequence[ServedModel]:
        """Those whose engine has been ready, in the order of their loading."""
        return self._models.served

    @property
    def registry(self) -> CollectorRegistry:
        """Its metrics."""
        return self.metrics.registry

    @property
    def draining(self) -> bool:
        return self._draining

    async def start(self) -> None:
        """Listens. Raises ConfigError where the port is taken."""
        config = self._config
        self.port = listen(self._listener, config.host, config.port, "--port", self._credentials)
        self._follow()
        await self._listener.start()

    async def expect(self, name: str, folder: Path) -> None:
        """Requests to this model are UNAVAILABLE until add(). Raises ConfigError where its folder
        has no tokenizer, or a template that cannot be read, or cannot be read in time."""
        self._models.expect(name)
        self.metrics.model_comes(name)
        limit = self._config.load_timeout
        try:
            async with asyncio.timeout(limit):
                self._texts[name] = await in_daemon_thread(
                    lambda: (load_tokenizer(folder), load_chat_template(folder))
                )
        except TimeoutError:
            raise ConfigError(
                f"{folder} could not be read within {limit:g} s: see whether its disk or server "
                "answers, or raise --load-timeout"
            ) from None

    async def add(self, name: str, ready: EngineReady, engine: EngineClient) -> None:
        """Serves this model, or an engine in place of its last one; not one that is expected no
        more."""
        if name not in self._texts:
            return
        tokenizer, chat_template = self._texts[name]
        last = self._models.get(name)
        self._models.add(
            ServedModel(
                name=name,
                card=ready.card,
                tokenizer=tokenizer,
                chat_template=chat_template,
                engine=engine,
                max_context_tokens=ready.max_model_len,
                restarts=last.restarts + 1 if last is not None else 0,
            )
        )
        self._awaits.discard(name)
        engine.on_health = self._follow
        self._follow()

    def await_no_more(self, name: str) -> None:
        """The others' health waits no longer for this model, whose first engine was lost."""
        self._awaits.discard(name)
        self._follow()

    async def remove(self, name: str, grace: float = 0.0) -> None:
        """Requests to this model are NOT_FOUND from now on; those that run get `grace` seconds
        to finish, and the rest ends with FINISH_REASON_SHUTDOWN."""
        self._texts.pop(name, None)
        self._awaits.discard(name)
        model = self._models.remove(name)
        self._follow()
        if model is None:
            self.metrics.model_goes(name)
            return
        engine = model.engine
        engine.on_health = None
        self._leaving.add(engine)
        deadline = asyncio.get_running_loop().time() + grace
        while engine.live_streams and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(LOOK_S)
        engine.end_all(FinishReason.SHUTDOWN)
        self._leaving.discard(engine)
        self.metrics.model_goes(name)

    async def abort(self, request_ids: Iterable[str] | None) -> list[str]:
        """Ends these requests, or all; returns those that were waiting or running."""
        return self._generation.abort(request_ids)

    async def stop(self, grace: float, hurry: asyncio.Event | None = None) -> None:
        """Drains, and closes the listener."""
        await self.drain(grace, hurry)
        await self._listener.stop(LAST_WRITES_S)

    async def drain(self, grace: float, hurry: asyncio.Event | None = None) -> int:
        """NOT_SERVING for good; after `drain_delay` new work is refused; running requests get
        `grace` seconds or until `hurry`, and the rest ends with FINISH_REASON_SHUTDOWN. Returns
        how many those were, whichever of several drains ended them. No grace: no delay either."""
        now = asyncio.get_running_loop().time()
        if not self._draining:
            self._draining, self._refuses_at = True, now + self._config.drain_delay
        delay = max(self._refuses_at - now, 0.0) if grace > 0 else 0.0
        self._health.shut_down()
        hurried = asyncio.create_task((hurry or asyncio.Event()).wait())
        if delay:
            await asyncio.wait({hurried}, timeout=delay)
        self._generation.draining = True
        idle = asyncio.create_task(self._generation.idle())
        await asyncio.wait({hurried, idle}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        if not self._generation.drained:
            self._generation.drained, self._cut_short = True, self._generation.num_live
        for engine in {model.engine for model in self.models} | self._leaving:
            engine.end_all(FinishReason.SHUTDOWN)
        await asyncio.wait({idle}, timeout=LAST_WRITES_S)
        for task in (hurried, idle):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        return self._cut_short

    def _follow(self, _: bool = True) -> None:
        models = {model.name: model.engine.healthy for model in self._models.served}
        self._health.set(not self._awaits and any(models.values()), models)
