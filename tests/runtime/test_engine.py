"""The engine's own duties: what it refuses, publishes and checks."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from zllm.errors import EngineError, InvariantError
from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.engine import Engine
from zllm.runtime.messages import AddRequest, FinishReason, Sampling, Stopping


@pytest.fixture
def engine() -> Engine:
    return Engine(
        EngineConfig(
            model=EMBEDDED_MODEL,
            device="cpu",
            num_kv_blocks=64,
            max_num_seqs=4,
            max_queued_requests=8,
        )
    )


def request(number: int, length: int = 5, **changes: object) -> AddRequest:
    settings = {
        "request_id": number,
        "prompt": np.arange(40, 40 + length, dtype=np.int32).tobytes(),
        "sampling": Sampling(temperature=0.0),
        "stopping": Stopping(max_tokens=4),
    }
    return AddRequest(**{**settings, **changes})  # type: ignore[arg-type]


def run(engine: Engine) -> dict[int, tuple[list[int], int]]:
    """Tokens and finish by request."""
    found: dict[int, tuple[list[int], int]] = {}
    while engine.has_work():
        output = engine.step()
        if output is None:
            continue
        ids = np.frombuffer(output.request_ids, np.int64).tolist()
        tokens = np.frombuffer(output.tokens, np.int32).tolist()
        for request_id, token, finish in zip(ids, tokens, output.finishes, strict=True):
            so_far, _ = found.get(request_id, ([], 0))
            found[request_id] = (so_far + [token] * (token >= 0), finish)
    return found


def test_what_it_serves_is_what_it_loaded_whatever_becomes_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED_MODEL, folder)
    engine = Engine(EngineConfig(model=folder, device="cpu", num_kv_blocks=64))
    before = engine.ready()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 2000}))
    assert engine.ready() == before
    shutil.rmtree(folder)
    assert engine.ready() == before


def test_steps_and_times_between_tokens_are_counted(engine: Engine) -> None:
    for number in range(2):
        engine.add(request(number))
    run(engine)
    stats, load = engine.stats(), engine.load()
    assert sum(stats.step_seconds.counts) == sum(stats.step_tokens.counts) == load.steps
    assert stats.step_tokens.sum >= load.prefix_query_tokens + 2 * 3
    assert sum(stats.inter_token.counts) == 2 * 3
    assert 0 < stats.inter_token.sum < 2 * stats.step_seconds.sum
    for histogram in (stats.step_seconds, stats.step_tokens, stats.inter_token):
        assert len(histogram.counts) == len(histogram.bounds) + 1


def test_a_full_queue_refuses_without_a_field_and_goes_on(engine: Engine) -> None:
    for number in range(20):
        engine.add(request(number))
    output = engine.step()
    assert output is not None
    assert {refused.request_id for refused in output.refused} == set(range(8, 20))
    assert all(refused.field == "" for refused in output.refused)
    assert all(finish == FinishReason.LENGTH for _, finish in run(engine).values())


def test_a_request_that_can_never_run_names_the_field(engine: Engine) -> None:
    engine.add(request(1, length=64 * 16 + 1))
    assert engine.has_work(), "the refusal is not told yet"
    output = engine.step()
    assert output is not None
    (refused,) = output.refused
    assert refused.field
    assert not engine.has_work()


def test_who_waits_too_long_is_told_while_others_run(engine: Engine) -> None:
    for number in range(4):  # all rows
        engine.add(request(number, stopping=Stopping(max_tokens=200)))
    engine.step()
    engine.add(request(4, queue_timeout=1e-3))
    engine.add(request(5, stopping=Stopping(max_tokens=2, time_limit=1e-3)))
    engine.add(request(6))
    time.sleep(2e-3)
    finishes = {}
    for _ in range(2):
        output = engine.step()
        assert output is not None
        ids = np.frombuffer(output.request_ids, np.int64).tolist()
        finishes |= {n: f for n, f in zip(ids, output.finishes, strict=True) if f}
    assert finishes == {4: FinishReason.QUEUE_TIMEOUT, 5: FinishReason.TIME_LIMIT}
    assert engine.load().queued_requests == 1
    assert run(engine)[6][1] == FinishReason.LENGTH


def test_a_step_that_breaks_off_ends_the_engine_and_not_the_callers_wait(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.add(request(1))
    engine.step()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert not engine.has_work()
    for call in (engine.step, lambda: engine.add(request(2))):
        with pytest.raises(EngineError, match="make a new one"):
            call()
    engine.close()


def test_log_probabilities_come_for_those_who_asked(engine: Engine) -> None:
    engine.add(request(1, num_logprobs=2))
    engine.add(request(2))
    seen: dict[int, int] = {1: 0, 2: 0}
    while engine.has_work():
        output = engine.step()
        if output is None:
            continue
        ids = np.frombuffer(output.request_ids, np.int64).tolist()
        for index, found in output.logprobs.items():
            seen[ids[index]] += 1
            assert len(found.top_ids) == len(found.top_logprobs) == 2
            assert found.rank == 1
            assert found.logprob == pytest.approx(found.top_logprobs[0])
    assert seen == {1: 4, 2: 0}


def test_who_takes_a_number_again_gets_only_the_log_probabilities_it_asks_for(
    engine: Engine,
) -> None:
    engine.add(request(1, num_logprobs=2))
    run(engine)
    engine.add(request(1))
    engine.add(request(2, num_logprobs=2))
    seen = set()
    while engine.has_work():
        output = engine.step()
        if output is not None:
            ids = np.frombuffer(output.request_ids, np.int64).tolist()
            seen |= {ids[index] for index in output.logprobs}
    assert seen == {2}


def test_a_violation_is_logged_with_its_state_and_counted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert engine.check() is None

    class Broken:
        """The real scheduler, whose check fails."""

        def __init__(self, scheduler: object) -> None:
            self._scheduler = scheduler

        def __getattr__(self, name: str) -> object:
            return getattr(self._scheduler, name)

        def check(self) -> None:
            raise InvariantError("block 3 has 2 owners and 1 reference")

    monkeypatch.setattr(engine, "scheduler", Broken(engine.scheduler))
    with caplog.at_level(logging.ERROR):
        assert engine.check() == "block 3 has 2 owners and 1 reference"
    assert "block 3" in caplog.text
    assert "kv_blocks_total" in caplog.text
    assert engine.load().violations == 1
