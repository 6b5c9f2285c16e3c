"""Several processes as one, as an alert on descriptors needs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from zllm.service.process_metrics import ProcessMetrics

HOLDER = "files = [open('/dev/null') for _ in range({})]; print('open', flush=True); input()"
BUSY = "import time\nwhile time.process_time() < 0.5: pass\nprint('done', flush=True); input()"


@contextmanager
def holding(count: int) -> Iterator[int]:
    """A process with so many files open."""
    command = [sys.executable, "-c", HOLDER.format(count)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


def values(*others: int) -> dict[str, float]:
    metrics = ProcessMetrics(lambda: others).collect()
    return {sample.name: sample.value for metric in metrics for sample in metric.samples}


def test_memory_and_time_are_sums_and_descriptors_the_most_that_one_has() -> None:
    alone = values()
    assert alone["process_open_fds"] <= psutil.Process().num_fds() + 1
    with holding(300) as many, holding(200) as some:
        together = values(many, some)
        held = sum(psutil.Process(pid).memory_info().rss for pid in (many, some))
    assert 300 < together["process_open_fds"] < 400
    assert (
        together["process_resident_memory_bytes"]
        > 0.9 * held + 0.5 * psutil.Process(os.getpid()).memory_info().rss
    )
    assert together["process_cpu_seconds_total"] >= alone["process_cpu_seconds_total"]
    for own in ("process_max_fds", "process_start_time_seconds"):
        assert together[own] == alone[own]


def test_one_that_has_ended_counts_for_nothing() -> None:
    with holding(300) as pid:
        pass
    assert values(pid)["process_open_fds"] < 300


def test_the_time_of_one_that_has_ended_stays_as_a_counter_never_falls() -> None:
    living: list[int] = []
    metrics = ProcessMetrics(lambda: living)

    def seconds() -> float:
        found = (metric.samples[0] for metric in metrics.collect())
        return next(each.value for each in found if each.name == "process_cpu_seconds_total")

    alone = seconds()
    command = [sys.executable, "-c", BUSY]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        living.append(process.pid)
        together = seconds()
        assert together > alone + 0.4
        process.stdin.close()
    assert seconds() >= together  # ended, and not yet noticed
    living.clear()
    assert seconds() >= together
