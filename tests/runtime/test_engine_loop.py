"""The loop around the engine: what it does once a service has left, and once nothing is left."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.runtime.test_engine_clients import Peer
from zllm.runtime.clients import Clients
from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.engine import Engine
from zllm.runtime.engine_process import EngineLoop
from zllm.runtime.messages import (
    AddRequest,
    Attach,
    EngineReady,
    Heartbeat,
    Load,
    Sampling,
    Shutdown,
    StepOutput,
    Stopping,
)

IMPORTED = """
import gc, sys, types
from zllm.runtime import engine_process

def tell(config):
    print(gc.isenabled(), gc.get_freeze_count() > 100_000, flush=True)
    sys.exit()

sys.modules["zllm.runtime.engine"] = types.SimpleNamespace(Engine=tell)
engine_process.main(sys.argv[1])
"""


class Counting(Engine):
    """A real engine that counts how often its books are checked."""

    checks = 0

    def check(self) -> str | None:
        self.checks += 1
        return super().check()


@pytest.fixture
def engine() -> Counting:
    return Counting(EngineConfig(model=EMBEDDED_MODEL, device="cpu", num_kv_blocks=64))


@pytest.fixture
def peers(engine: Engine, tmp_path: Path) -> Iterator[list[Peer]]:
    """Two services of the engine, whose loop runs in a thread."""
    path = str(tmp_path / "engine.sock")
    clients = Clients(path)
    thread = threading.Thread(target=EngineLoop(engine, clients).run, daemon=True)
    thread.start()
    peers = [Peer(path, number) for number in (1, 2)]
    for peer in peers:
        peer.send(Attach(peer.number))
        assert isinstance(peer.heard(), EngineReady)
    yield peers
    peers[1].send(Shutdown())
    thread.join(5)
    assert not thread.is_alive()
    clients.close()
    for peer in peers:
        peer.socket.close()


def begin(peer: Peer, max_tokens: int) -> None:
    stopping = Stopping(max_tokens=max_tokens)
    peer.send(AddRequest(peer.request(1), b"\1\0\0\0", Sampling(), stopping))


def once_idle(peer: Peer, generated: int) -> Load:
    """What a heartbeat tells once nothing runs and at least so many tokens were generated."""
    while True:
        message = peer.heard()
        if not isinstance(message, Heartbeat) or message.load.running_requests:
            continue
        if message.load.generated_tokens >= generated:
            return message.load


def test_requests_of_a_service_that_leaves_end(peers: list[Peer]) -> None:
    leaves, stays = peers
    begin(leaves, max_tokens=1000)
    while not isinstance(leaves.heard(), StepOutput):
        pass
    leaves.socket.close()
    load = once_idle(stays, generated=1)
    assert load.generated_tokens < 1000
    assert load.kv_blocks_free == load.kv_blocks_total


def test_the_books_are_checked_when_the_engine_falls_idle_but_not_every_time(
    engine: Counting, peers: list[Peer]
) -> None:
    for count in (1, 2):
        begin(peers[0], max_tokens=3)
        once_idle(peers[0], generated=3 * count)
    assert engine.checks == 1


def test_what_is_imported_is_spared_by_the_garbage_collector(tmp_path: Path) -> None:
    config = msgspec.json.encode(EngineConfig(model=EMBEDDED_MODEL), enc_hook=str) + b"\n"
    command = [sys.executable, "-c", IMPORTED, str(tmp_path / "engine.sock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(config)
        process.stdin.flush()
        assert process.stdout.readline() == b"True True\n"
