"""The real command with the embedded model: what its queue and its deadlines refuse."""

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


def test_with_slo_a_deadline_behind_a_queue_is_refused() -> None:
    with (
        serving("--max-num-seqs", "1", "--slo") as served,
        grpc.insecure_channel(served.target) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        queue = [stub.Generate.future(request_of([1 + i], 100)) for i in range(40)]
        for call in queue[:8]:
            assert call.code() is grpc.StatusCode.OK
        hasty = stub.Generate.future(request_of([99]), timeout=1.0)
        assert hasty.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "first token is expected in" in hasty.details()
        patient = stub.Generate.future(request_of([99], max_tokens=1), timeout=120)
        assert patient.code() is grpc.StatusCode.OK
        assert all(call.code() is grpc.StatusCode.OK for call in queue)
        served.until_idle()
