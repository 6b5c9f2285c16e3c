"""A gRPC server that does nothing but write what the service writes: gRPC's own share of a message.

Run by service.py in place of rate_service.py, with the same environment. Its event loop is the
service's, and gRPC's polling thread waits as it does there. It answers StreamGenerate with messages
made beforehand, one a stream at each tick of ZLLM_BENCH_STEP_S seconds; with 0 as fast as they go.
"""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import time
from typing import Any, BinaryIO, TypeAlias

import grpc
from rate_engine import DISTINCT

from zllm.service.event_loop import run_on_loop, spare_garbage_collection
from zllm.service.polling_thread import let_it_wait
from zllm.v1 import generation_pb2

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"


class Bare:
    def __init__(self, step_s: float, times: BinaryIO) -> None:
        self._step_s = step_s
        self._times = times
        self._messages = [_message(token) for token in range(DISTINCT)]
        self._waiting: list[asyncio.Future[bytes]] = []

    async def tick(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._waiting:
            await asyncio.sleep(self._step_s)
        due, step = loop.time(), 0
        while True:
            due = max(due, loop.time()) + self._step_s
            await asyncio.sleep(due - loop.time())
            waiting, self._waiting = self._waiting, []
            self._times.write(struct.pack("d", time.monotonic()))
            for future in waiting:
                future.set_result(self._messages[step % DISTINCT])
            step += 1

    async def answer(self, data: bytes, context: Context) -> None:
        loop = asyncio.get_running_loop()
        request = generation_pb2.GenerateRequest.FromString(data)
        for count in range(request.stopping.max_tokens):
            message = self._messages[count % DISTINCT]
            if self._step_s:
                due = loop.create_future()
                self._waiting.append(due)
                message = await due
            await context.write(message)
        end = generation_pb2.StreamGenerateResponse(finished=generation_pb2.GenerationFinished())
        await context.write(end.SerializeToString())


def _message(token: int) -> bytes:
    message = generation_pb2.StreamGenerateResponse()
    message.delta.num_tokens = 1
    message.delta.text = " a"
    message.delta.token_ids.append(token)
    return message.SerializeToString()


async def serve() -> int:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    step_s = float(os.environ["ZLLM_BENCH_STEP_S"])
    with open(os.environ["ZLLM_BENCH_TIMES"], "wb", buffering=0) as times:
        bare = Bare(step_s, times)
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "StreamGenerate": grpc.unary_stream_rpc_method_handler(bare.answer)
        }
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("zllm.v1.GenerationService", handlers),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        let_it_wait()
        spare_garbage_collection()
        ticking = asyncio.create_task(bare.tick()) if step_s else None
        print(f"listening on 127.0.0.1:{port}", flush=True)
        await stopped.wait()
        if ticking is not None:
            ticking.cancel()
        await server.stop(0.0)
    return 0


if __name__ == "__main__":
    run_on_loop(serve())
