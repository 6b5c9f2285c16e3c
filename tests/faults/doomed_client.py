"""A client process for a test to kill: `TARGET COUNT` streams, and a line once all of them run."""

from __future__ import annotations

import asyncio
import sys

import grpc

from zllm.v1 import generation_pb2, generation_pb2_grpc


async def main(target: str, count: int) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        request = generation_pb2.GenerateRequest(text="a prompt of some blocks" * 3)
        request.stopping.ignore_eos = True
        calls = [stub.StreamGenerate(request) for _ in range(count)]
        for call in calls:
            await call.read()
        print("all run", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
