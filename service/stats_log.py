"""A line from time to time on what each engine does, while it does anything."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from zllm.runtime.messages import Load
from zllm.service.served_model import RunningModel

log = logging.getLogger(__name__)


class StatsLog:
    def __init__(self, models: Callable[[], Sequence[RunningModel]]) -> None:
        self._models = models
        self._last: dict[str, Load] = {}

    async def run(self, interval: float) -> None:
        """For ever; an interval of 0 tells nothing."""
        while interval > 0:
            await asyncio.sleep(interval)
            for model in self._models():
                if model.engine.healthy:
                    self._tell(model.name, model.engine.load, interval)

    def _tell(self, name: str, load: Load, seconds: float) -> None:
        last = self._last.get(name, Load())
        self._last[name] = load
        if load.steps < last.steps or load.generated_tokens < last.generated_tokens:
            last = Load()  # another engine: it counts from its start
        if load.steps == last.steps and not (load.running_requests or load.queued_requests):
            return
        prompt = load.prefix_query_tokens - last.prefix_query_tokens
        hits = load.prefix_hit_tokens - last.prefix_hit_tokens
        generated = load.generated_tokens - last.generated_tokens
        used = load.kv_blocks_total - load.kv_blocks_free
        log.info(
            "stats",
            extra={
                "model": name,
                "running": load.running_requests,
                "waiting": load.queued_requests,
                "prompt_tokens_per_s": round(prompt / seconds, 1),
                "generation_tokens_per_s": round(generated / seconds, 1),
                "kv_cache_usage_perc": round(used / max(load.kv_blocks_total, 1), 3),
                "prefix_cache_hit_rate": round(hits / prompt, 3) if prompt else 0.0,
                "preemptions": load.preemptions - last.preemptions,
            },
        )
