"""Random load with every way in which a call can end, for soak.py.

    python benchmarks/soak_load.py TARGET SECONDS SEED

Prints how many calls ended how, as one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter

import grpc
import uvloop

from zllm.clients.request import Prompt, build_request
from zllm.v1 import generation_pb2, generation_pb2_grpc

WORKERS = 32
VOCAB = 800
"""Ids below it are text, none of them special."""


class Load:
    def __init__(self, target: str, seed: int) -> None:
        self._target = target
        self._rng = random.Random(seed)
        rng = self._rng
        self._shared = [
            [rng.randrange(VOCAB) for _ in range(rng.randint(20, 400))] for _ in "12345678"
        ]
        self.ends: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        """Returns when every call of the last second has ended too."""
        deadline = time.monotonic() + seconds
        await asyncio.gather(*(self._work(deadline) for _ in range(WORKERS)))

    async def _work(self, deadline: float) -> None:
        rng = self._rng
        while time.monotonic() < deadline:
            # A channel of its own, which is closed after a few calls, maybe amidst one.
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(self._target, options=options) as channel:
                stub = generation_pb2_grpc.GenerationServiceStub(channel)
                for _ in range(rng.randint(1, 20)):
                    if time.monotonic() > deadline:
                        return
                    await self._call(stub)
                if rng.random() < 0.3:
                    call = stub.StreamGenerate(self._request())
                    reading = asyncio.ensure_future(call.read())
                    await asyncio.sleep(rng.random())
                    await channel.close(None)
                    await asyncio.gather(reading, return_exceptions=True)
                    self.ends["connection closed"] += 1

    async def _call(self, stub: generation_pb2_grpc.GenerationServiceStub) -> None:
        rng = self._rng
        request = self._request()
        method = rng.choice([stub.StreamGenerate, stub.StreamGenerate, stub.Generate])
        timeout = rng.random() * 2 if rng.random() < 0.15 else None
        call = method(request, timeout=timeout)
        if rng.random() < 0.3:
            await asyncio.sleep(rng.expovariate(2.0))
            call.cancel()
        try:
            if method is stub.Generate:
                await call
            else:
                async for _ in call:
                    if rng.random() < 0.01:
                        await asyncio.sleep(0.5)  # a reader that is slow now and then
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass
        self.ends[(await call.code()).name] += 1

    def _request(self) -> generation_pb2.GenerateRequest:
        rng = self._rng
        options: dict[str, object] = {"max_tokens": rng.randint(1, 200)}
        options["temperature"] = rng.choice([0.0, 0.7, 1.5])
        options["ignore_eos"] = rng.random() < 0.5
        if rng.random() < 0.2:
            options["logprobs"] = rng.randint(0, 5)
        if rng.random() < 0.2:
            options["stop"] = ["the", "12"]
        if rng.random() < 0.1:
            options["queue_timeout"] = 0.5
        if rng.random() < 0.05:
            options["top_p"] = 2.0  # refused
        return build_request(self._prompt(), **options)

    def _prompt(self) -> Prompt:
        rng = self._rng
        kind = rng.random()
        if kind < 0.3:
            return [{"role": "user", "content": f"What is {rng.randint(1, 99)} + 7?"}]
        if kind < 0.4:
            return "Monday, " * rng.randint(1, 50)
        tail = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 300))]
        return rng.choice(self._shared) + tail


async def main(target: str, seconds: float, seed: int) -> None:
    load = Load(target, seed)
    await load.run(seconds)
    print(json.dumps(load.ends), flush=True)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
