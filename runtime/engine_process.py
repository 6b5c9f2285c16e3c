"""The engine's own process: an inbox and an outbox around Engine, so that no GIL is shared.

service/supervisor.py starts it as `python -m zllm.runtime.engine_process SOCKET` and writes the
EngineConfig as one line of JSON to its stdin. Stdin then stays open for as long as the parent
lives: its end, like the parent's death, ends this process.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import threading
import time
from typing import Protocol

import msgspec

from zllm.errors import ZllmError
from zllm.runtime.clients import Clients
from zllm.runtime.config import EngineConfig
from zllm.runtime.messages import (
    AbortRequests,
    AddRequest,
    Attach,
    CacheFlushed,
    EngineFailed,
    EngineReady,
    EngineStats,
    FlushCache,
    Heartbeat,
    Load,
    Shutdown,
    StepOutput,
)

HEARTBEAT_S = 0.5
"""Between two heartbeats at most, while the step loop turns."""
STEP_LIMIT_S = {"cpu": 60.0, "cuda": 2.0}
"""A step that runs longer hangs, and the heartbeat stops. On a CPU one of 2,048 prompt tokens may
take half a minute. On a GPU this and the service's timeout together leave five seconds, ten times
what a full step of a large model or the first use of a kernel takes."""
BURST = 64
"""Where so many messages come at one turn, more may wait at a sender, for lack of room."""
BURST_S = 0.01
"""How long they are taken in then, at most, before the next step."""
CHECK_S = 10.0
"""Between two checks of the scheduler's books, which happen when the engine falls idle."""


class Steppable(Protocol):
    """What the loop needs of an Engine."""

    def ready(self) -> EngineReady: ...
    def add(self, request: AddRequest) -> None: ...
    def abort(self, request_ids: list[int]) -> None: ...
    def step(self) -> StepOutput | None: ...
    def has_work(self) -> bool: ...
    def load(self) -> Load: ...
    def stats(self) -> EngineStats: ...
    def check(self) -> str | None: ...
    def flush_cache(self) -> int: ...
    def close(self) -> None: ...


class EngineLoop:
    """Takes requests in, steps the engine, sends what each step gave. While a step runs, a thread
    sends the heartbeat, up to `step_limit_s`."""

    def __init__(self, engine: Steppable, clients: Clients, *, step_limit_s: float = 60.0) -> None:
        self._engine = engine
        self._clients = clients
        self._step_limit_s = step_limit_s
        self._step_began = 0.0
        self._load = Load()
        self._stats = EngineStats()
        # Whoever holds it owns the socket: the loop, except while a step runs.
        self._socket_lock = threading.Lock()
        self._ended = threading.Event()
        self._last_beat = 0.0
        self._last_check = 0.0

    def run(self) -> None:
        """Until Shutdown comes."""
        beat = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        beat.start()
        with self._socket_lock:
            self._turn()
        self._ended.set()
        beat.join()
        self._engine.close()

    def _turn(self) -> None:
        engine = self._engine
        running = True
        while running:
            busy = engine.has_work()
            heard, running = self._take_inbox(0 if busy else int(HEARTBEAT_S * 1000))
            orphans = self._clients.take_orphans()
            if orphans:
                engine.abort(orphans)
            output = self._step() if engine.has_work() else None
            if output is not None:
                self._load = output.load
                self._clients.publish(output)
            idle_again = (heard or busy) and not engine.has_work()
            if idle_again and time.monotonic() - self._last_check > CHECK_S:
                self._last_check = time.monotonic()
                engine.check()
            if idle_again or time.monotonic() - self._last_beat > HEARTBEAT_S:
                self._load, self._stats = engine.load(), engine.stats()
                self._send_heartbeat()

    def _step(self) -> StepOutput | None:
        self._step_began = time.monotonic()
        self._socket_lock.release()
        try:
            return self._engine.step()
        finally:
            self._socket_lock.acquire()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with self._socket_lock:
                now = time.monotonic()
                within = now - self._step_began < self._step_limit_s
                if within and now - self._last_beat > HEARTBEAT_S and not self._ended.is_set():
                    self._send_heartbeat()

    def _take_inbox(self, timeout_ms: int) -> tuple[bool, bool]:
        """Whether anything came, and whether to go on."""
        heard = 0
        began = 0.0
        while self._clients.poll(timeout_ms):
            client, message = self._clients.receive()
            heard += 1
            if heard == 1:
                began = time.monotonic()
            in_burst = heard >= BURST and time.monotonic() - began < BURST_S
            timeout_ms = 1 if in_burst else 0
            if isinstance(message, AddRequest):
                if self._clients.began(client, message.request_id):
                    self._engine.add(message)
            elif isinstance(message, AbortRequests):
                self._engine.abort(message.request_ids)
            elif isinstance(message, FlushCache):
                self._clients.send(client, CacheFlushed(self._engine.flush_cache()))
            elif isinstance(message, Attach):
                self._clients.attach(client, self._engine.ready())
            elif isinstance(message, Shutdown):
                return True, False
        return heard > 0, True

    def _send_heartbeat(self) -> None:
        self._clients.broadcast(Heartbeat(self._load, self._stats))
        self._last_beat = time.monotonic()


def _die_with_parent() -> None:
    """SIGKILL from the kernel where it can (Linux), the end of stdin elsewhere and for races."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def _read_line() -> bytes:
    """One line of stdin, unbuffered: the rest of it belongs to the parent watch."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 65536)
        if not piece:
            os._exit(1)
        line += piece
    return line


def main(address: str) -> int:
    # Ctrl-C reaches the whole terminal group, and a service manager's SIGTERM every process: the
    # service decides when the engine ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    config = msgspec.json.decode(_read_line(), type=EngineConfig, dec_hook=lambda t, v: t(v))
    _die_with_parent()
    clients = Clients(address)
    try:
        # Imported here so that a torch that cannot load reaches the parent as EngineFailed too.
        # What they leave stays: never looked through, it makes them a sixth faster, and later
        # collections, like the one before CUDA graphs are captured, 60 ms shorter.
        gc.disable()
        import torch

        from zllm.runtime.engine import Engine

        gc.freeze()
        gc.enable()
        engine = Engine(config)
    except (ZllmError, ImportError, OSError, MemoryError, RuntimeError) as error:
        client, _ = clients.receive()
        clients.send(client, EngineFailed(str(error) or type(error).__name__))
        clients.close(linger_s=5.0)
        return 1
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    EngineLoop(engine, clients, step_limit_s=STEP_LIMIT_S["cuda" if on_gpu else "cpu"]).run()
    clients.close(linger_s=1.0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
