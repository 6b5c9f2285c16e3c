"""A recorded point is waited for, and nobody else waits with it."""

from __future__ import annotations

import threading
import time

import pytest
import torch

pytestmark = pytest.mark.gpu
CYCLES = 400_000_000
"""Of a kernel that does nothing: a fifth of a second and more."""


def test_waits_for_all_that_stood_before_it() -> None:
    from zllm.cuda.event import Event

    x = torch.zeros(1, device="cuda")
    pinned = torch.zeros(1, pin_memory=True)
    event = Event(torch.cuda.current_device())
    for value in (1.0, 2.0):
        torch.cuda._sleep(CYCLES)
        x.fill_(value)
        pinned.copy_(x, non_blocking=True)
        event.record()
        assert pinned.item() != value, "the host was not ahead: nothing is shown"
        event.synchronize()
        assert pinned.item() == value


def test_other_threads_run_while_one_waits() -> None:
    from zllm.cuda.event import Event

    event = Event(torch.cuda.current_device())
    beats: list[float] = []
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.01):
            beats.append(time.monotonic())

    thread = threading.Thread(target=beat)
    torch.cuda._sleep(CYCLES)
    event.record()
    thread.start()
    started = time.monotonic()
    event.synchronize()
    waited = time.monotonic() - started
    over.set()
    thread.join()
    during = [at for at in beats if started < at < started + waited]
    assert waited > 0.05
    assert len(during) >= 3, "the waiting thread kept the interpreter's lock"
