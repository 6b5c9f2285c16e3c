"""The real command with the embedded model: what its queue refuses."""

from __future__ import annotations

import grpc

from tests.service.test_processes import serving
from zllm.v1 import generation_pb2, generation_pb2_grpc

ONE_AT_A_TIME = ("--max-num-seqs", "1", "--max-queued-tokens", "200")


def request_of(prompt: list[int], max_tokens: int = 200) -> generation_pb2.GenerateRequest:
    request = generation_pb2.GenerateRequest()
    request.token_ids.ids.extend(prompt)
    request.stopping.max_tokens = max_tokens
    request.stopping.ignore_eos = True
    return request


def test_uncached_tokens_fill_the_queue_and_cached_ones_do_not() -> None:
    with serving(*ONE_AT_A_TIME) as served, grpc.insecure_channel(served.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        known = [1 + i % 50 for i in range(150)]
        stub.Generate(request_of(known, max_tokens=1))
        running = stub.StreamGenerate(request_of(known, max_tokens=400))
        assert next(running).HasField("started")
        waiting = [stub.Generate.future(request_of(known, max_tokens=1)) for _ in range(5)]
        fresh = [stub.Generate.future(request_of([100 + i] * 150, 1)) for i in range(4)]
        codes = [call.code() for call in fresh]
        assert [call.code() for call in waiting] == [grpc.StatusCode.OK] * 5
        list(running)
        refused = [call for call in fresh if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]
        assert codes.count(grpc.StatusCode.OK) == 1
        assert len(refused) == 3
        for call in refused:
            assert int(dict(call.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        served.until_idle()
