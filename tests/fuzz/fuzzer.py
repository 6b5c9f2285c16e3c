"""Throws random and damaged messages at every rpc of a running server.

    python -m tests.fuzz.fuzzer --seconds 300 [--seed 0] [--frontends 1]

What must hold: the server and its engine go on, every call ends with a code that its rpc documents,
no message tells of the machine, and once the calls have ended every block is free.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from grpc import StatusCode
from grpc_health.v1 import health_pb2

from tests.fuzz.messages import mutated, random_message
from tests.service.test_processes import Served, serving
from zllm.clients.request import build_request
from zllm.v1 import admin_pb2, generation_pb2, models_pb2

ANY = {
    StatusCode.OK,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.UNIMPLEMENTED,
    StatusCode.RESOURCE_EXHAUSTED,
    # The fuzzer's own: it cancels, and its calls have deadlines.
    StatusCode.CANCELLED,
    StatusCode.DEADLINE_EXCEEDED,
}
ALSO = {
    "GenerationService": {StatusCode.NOT_FOUND, StatusCode.ALREADY_EXISTS},
    "ModelService": {StatusCode.NOT_FOUND},
    "AdminService": {
        StatusCode.NOT_FOUND, StatusCode.ALREADY_EXISTS, StatusCode.FAILED_PRECONDITION,
    },
    "Health": {StatusCode.NOT_FOUND},
}  # fmt: skip
"""docs/operations.md says when. After Drain all of them may be UNAVAILABLE."""

AT_ONCE = 24
PATIENT = ("--engine-timeout", "60")
"""A machine that is busy elsewhere makes no engine look lost."""
DETAILS = "grpc-status-details-bin"
LEAKS = ("Traceback", "site-packages", str(Path.home()), str(Path(__file__).parents[2]), ".py")


@dataclass
class Findings:
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        methods: dict[str, dict[str, int]] = {}
        for (method, code), count in sorted(self.ends.items()):
            methods.setdefault(method, {})[code] = count
        return {"calls": self.ends.total(), "by_rpc": methods, "wrong": self.wrong}


class Fuzzer:
    def __init__(self, target: str, admin: str, seed: int) -> None:
        self._rng = random.Random(seed)
        self._channels = {"AdminService": grpc.aio.insecure_channel(admin)}
        self._public = grpc.aio.insecure_channel(target)
        self.findings = Findings()

    async def run(
        self, methods: list[MethodDescriptor], seconds: float, also: set[StatusCode]
    ) -> None:
        """Each method in its turn."""
        deadline = time.monotonic() + seconds
        turns = itertools.cycle(methods)

        async def work() -> None:
            while time.monotonic() < deadline:
                await self._call(next(turns), also)

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))

    async def close(self) -> None:
        for channel in (self._public, *self._channels.values()):
            await channel.close()

    async def _call(self, method: MethodDescriptor, also: set[StatusCode]) -> None:
        rng, service = self._rng, method.containing_service
        channel = self._channels.get(service.name, self._public)
        data = self._bytes(method)
        path = f"/{service.full_name}/{method.name}"
        timeout = rng.choice([0.01, 0.05, 0.2, 1.0])
        if method.server_streaming:
            call: Any = channel.unary_stream(path)(data, timeout=timeout)
        else:
            call = channel.unary_unary(path)(data, timeout=timeout)
        if rng.random() < 0.1:
            await asyncio.sleep(rng.random() * 0.1)
            call.cancel()
        try:
            if method.server_streaming:
                async for _ in call:
                    pass
            else:
                await call
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass
        code, words = await call.code(), await call.details() or ""
        self.findings.ends[path, code.name] += 1
        allowed = ANY | ALSO[service.name] | also
        if code is StatusCode.RESOURCE_EXHAUSTED and DETAILS not in dict(await _trailers(call)):
            allowed = set()  # not the server's word: more metadata than a client takes
        if code not in allowed or any(leak in words for leak in LEAKS):
            self.findings.wrong.append(f"{path} {code.name} {words!r} <- {data.hex()[:4000]}")

    def _bytes(self, method: MethodDescriptor) -> bytes:
        rng = self._rng
        message = message_factory.GetMessageClass(method.input_type)()
        if isinstance(message, generation_pb2.GenerateRequest) and rng.random() < 0.6:
            self._nearly_right(message)
        else:
            random_message(rng, message)
        if isinstance(message, admin_pb2.UnloadModelRequest):
            message.name += "?"  # the one model stays
        data = message.SerializeToString()
        if method.name == "UnloadModel":
            return data
        return mutated(rng, data) if rng.random() < 0.4 else data

    def _nearly_right(self, message: generation_pb2.GenerateRequest) -> None:
        """A request that the server takes, or would but for one part of it."""
        rng = self._rng
        prompts: list[Any] = [
            "Monday, ", [rng.randrange(896) for _ in range(rng.randint(1, 300))],
            [{"role": "user", "content": "What is 12 + 7?"}],
        ]  # fmt: skip
        options = {"max_tokens": rng.randint(1, 60), "ignore_eos": rng.random() < 0.3}
        message.CopyFrom(build_request(rng.choice(prompts), **options))
        if rng.random() < 0.6:
            part = rng.choice(["sampling", "stopping", "output", "cache", "chat", "queue_timeout"])
            inner: Message = getattr(message, part)
            inner.SetInParent()
            random_message(rng, inner)


async def _trailers(call: Any) -> Iterable[tuple[str, str | bytes]]:
    return await call.trailing_metadata() or ()


def rpcs() -> list[MethodDescriptor]:
    """Every rpc but Drain, after which the others are only refused."""
    files = (generation_pb2, models_pb2, admin_pb2, health_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    return [m for service in services for m in service.methods if m.name != "Drain"]


async def fuzz(served: Served, seconds: float, seed: int) -> Findings:
    (admin,) = [line.split()[-1] for line in served.lines if line.startswith("admin on ")]
    engine = served.engine()
    fuzzer = Fuzzer(served.target, admin, seed)
    try:
        await fuzzer.run(rpcs(), seconds * 0.95, set())
        served.until_idle()
        assert served.engine().pid == engine.pid, "the engine was restarted"
        drain = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].methods_by_name["Drain"]
        await fuzzer.run([drain, *rpcs()], seconds * 0.05, {StatusCode.UNAVAILABLE})
        served.until_idle()
        assert served.engine().pid == engine.pid, "the engine was restarted"
    finally:
        await fuzzer.close()
    assert served.process.poll() is None, "the server ended"
    return fuzzer.findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frontends", type=int, default=1)
    options = parser.parse_args()
    with serving(*PATIENT, "--frontends", str(options.frontends)) as served:
        findings = asyncio.run(fuzz(served, options.seconds, options.seed))
    print(json.dumps(findings.report(), indent=1))
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
