"""The engines of all models: each started, kept running, and ended by its model's name."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from zllm.errors import RequestExists, UnknownModel, WrongState
from zllm.runtime.config import EngineConfig
from zllm.runtime.messages import EngineReady
from zllm.service.at_once import both
from zllm.service.config import ServerConfig
from zllm.service.engine_client import EngineClient
from zllm.service.memory_shares import share_out
from zllm.service.restarts import KeptEngine
from zllm.service.supervisor import ENGINE_COMMAND

log = logging.getLogger(__name__)


class Front(Protocol):
    """Where users' requests come in: it hears of each model that comes, returns or goes."""

    async def expect(self, name: str, folder: Path) -> None: ...
    async def add(self, name: str, ready: EngineReady, engine: EngineClient) -> None: ...
    async def remove(self, name: str, grace: float = 0.0) -> None: ...


@dataclass
class _Model:
    config: EngineConfig
    engine: KeptEngine
    keeping: asyncio.Task[str] | None = None
    """None while it loads."""
    leaving: bool = False

    @property
    def last_words(self) -> str | None:
        """How it went, once it has been given up."""
        keeping = self.keeping
        if keeping is None or not keeping.done() or keeping.cancelled():
            return None
        return keeping.result()

    @property
    def effective(self) -> EngineConfig:
        """With what the engine made of it, once it has loaded."""
        ready = self.engine.ready
        if ready is None:
            return self.config
        return replace(
            self.config,
            max_model_len=ready.max_model_len,
            max_num_batched_tokens=ready.max_num_batched_tokens,
            num_kv_blocks=ready.num_kv_blocks,
        )

    @property
    def state(self) -> str:
        if self.keeping is None:
            return "loading"
        return "unloading" if self.leaving else "served"


class Engines:
    """One engine process a model. They load one after another, so that each finds as free what it
    may take. One that fails again and again is given up; the others go on."""

    def __init__(
        self,
        server: ServerConfig,
        front: Front,
        *,
        say: Callable[[str], None],
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._server = server
        self._front = front
        self._say = say
        self._command = command
        self._models: dict[str, _Model] = {}
        self._loading = asyncio.Lock()
        self._last_words: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def configs(self) -> list[EngineConfig]:
        return [model.config for model in self._models.values()]

    @property
    def effective(self) -> list[EngineConfig]:
        """With what each engine that has loaded made of them."""
        return [model.effective for model in self._models.values()]

    @property
    def healthy(self) -> bool:
        """Whether any engine could finish what it runs."""
        return any(model.engine.healthy for model in self._models.values())

    async def start(self, configs: Sequence[EngineConfig]) -> None:
        """Loads these, the first one first. Raises ConfigError where one cannot be loaded."""
        for model in [self._enter(config) for config in configs]:
            await self._load(model)

    async def load(self, config: EngineConfig) -> None:
        """Returns when the model is served. Raises ConfigError with the engine's own words, and
        RequestExists where the name is taken; then, as when cancelled, nothing of it is left."""
        self._check_free(config.served_model_name)
        (*_, config) = share_out([*self.configs, config])
        await self._load(self._enter(config))

    async def unload(self, name: str, grace: float) -> None:
        """Ends the model's engine, after `grace` seconds at most for what runs. Raises
        UnknownModel, and WrongState while it is loading or unloading."""
        model = self._models.get(name)
        if model is None:
            served = ", ".join(self._models) or "no model"
            raise UnknownModel("name", f"{name!r} is not served here; served: {served}")
        if model.keeping is None or model.leaving:
            raise WrongState("name", f"{name!r} is {model.state}: wait until that is done")
        model.leaving = True
        await self._end(model, grace)

    async def until_all_lost(self) -> str:
        """Until all models that are left have been given up; returns how one of them went."""
        return await asyncio.shield(self._last_words)

    def keep_no_longer(self) -> None:
        """From now on a lost engine is not replaced."""
        for model in self._models.values():
            if model.keeping is not None:
                model.keeping.cancel()

    async def stop(self) -> None:
        """Ends all engines, by force where it must."""
        await asyncio.gather(*(self._end(model, 0.0) for model in list(self._models.values())))

    def _enter(self, config: EngineConfig) -> _Model:
        name = config.served_model_name
        self._check_free(name)
        engine = KeptEngine(
            self._server,
            config,
            lambda ready, client: self._front.add(name, ready, client),
            loading=self._loading,
            command=self._command,
        )
        model = self._models[name] = _Model(config, engine)
        return model

    def _check_free(self, name: str) -> None:
        if name in self._models:
            raise RequestExists("name", f"{name!r} is {self._models[name].state} here")

    async def _load(self, model: _Model) -> None:
        name, folder, engine = model.config.served_model_name, model.config.model, model.engine
        try:
            self._say(f"loading {name} from {folder}")
            # A large tokenizer takes a second, in which the engine's process imports torch.
            _, (ready, client) = await both(self._front.expect(name, folder), engine.start())
            await self._front.add(name, ready, client)
            for line in ready.startup_report:
                self._say(line)
        except BaseException:
            await self._end(model, 0.0)
            raise
        model.keeping = asyncio.create_task(engine.keep())
        model.keeping.add_done_callback(self._note_end)

    async def _end(self, model: _Model, grace: float) -> None:
        name = model.config.served_model_name
        await self._front.remove(name, grace)
        if model.keeping is not None:
            model.keeping.cancel()
            await asyncio.wait({model.keeping})
        await model.engine.stop()
        self._models.pop(name, None)
        self._end_if_all_lost()

    def _note_end(self, keeping: asyncio.Task[str]) -> None:
        if keeping.cancelled():
            return
        for model in self._models.values():
            if model.keeping is keeping and not model.leaving:
                name = model.config.served_model_name
                log.error("model %s is given up: %s", name, keeping.result())
        self._end_if_all_lost()

    def _end_if_all_lost(self) -> None:
        words = [model.last_words for model in self._models.values() if not model.leaving]
        lost = [word for word in words if word is not None]
        if lost and lost == words and not self._last_words.done():
            self._last_words.set_result(lost[-1])
