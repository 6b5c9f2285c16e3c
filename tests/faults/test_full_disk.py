"""What the server writes of itself may fail to be written: it serves on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time

import psutil
import pytest

from tests.service.test_processes import SERVE
from zllm.clients.client import Client
from zllm.errors import Unavailable

FULL = "/dev/full"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until_answered(client: Client, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 60
    while True:
        try:
            return client.generate("12 + 7 =", max_tokens=4, temperature=0.0).text
        except Unavailable:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "it never answered"
            time.sleep(0.1)


@pytest.mark.skipif(not os.path.exists(FULL), reason=f"no {FULL} here")
def test_a_server_whose_output_meets_a_full_disk_serves_and_restarts_its_engine() -> None:
    port = free_port()
    arguments = [*SERVE, "--port", str(port), "--restart-backoff", "0.1"]
    with open(FULL, "wb") as full:
        process = subprocess.Popen(arguments, stdout=full, stderr=full)
        try:
            with Client(f"127.0.0.1:{port}", attempts=1) as client:
                first = until_answered(client, process)
                (engine,) = psutil.Process(process.pid).children()
                engine.kill()
                engine.wait(10)
                assert until_answered(client, process) == first
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
