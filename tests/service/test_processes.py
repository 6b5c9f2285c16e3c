"""The real command with the embedded model: it starts, answers, and ends in good order."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from zllm.clients.client import Client
from zllm.errors import InvalidRequest, Unavailable
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.v1 import admin_pb2, admin_pb2_grpc

SERVE = [
    sys.executable, "-m", "zllm", "serve", "--port", "0", "--admin-port", "0",
    "--metrics-port", "0", "--num-kv-blocks", "256", "--max-num-seqs", "16",
]  # fmt: skip


@dataclass
class Served:
    process: subprocess.Popen[str]
    target: str = ""
    lines: list[str] = field(default_factory=list)

    def engines(self) -> list[psutil.Process]:
        """The first started first, which is the first model's."""
        found = [
            child
            for child in psutil.Process(self.process.pid).children()
            if "zllm.runtime.engine_process" in child.cmdline()
        ]
        return sorted(found, key=lambda process: process.create_time())

    def engine(self) -> psutil.Process:
        (engine,) = self.engines()
        return engine

    @contextmanager
    def admin(self) -> Iterator[admin_pb2_grpc.AdminServiceStub]:
        (line,) = [line for line in self.lines if line.startswith("admin on ")]
        with grpc.insecure_channel(line.split()[-1]) as channel:
            yield admin_pb2_grpc.AdminServiceStub(channel)

    def loads(self) -> list[admin_pb2.Load]:
        with self.admin() as stub:
            return list(stub.GetLoad(admin_pb2.GetLoadRequest()).loads)

    def load(self) -> admin_pb2.Load:
        (load,) = self.loads()
        return load

    def until_idle(self) -> None:
        """Every block of every model is back and nothing runs or waits."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            loads = self.loads()
            if all(
                load.kv_blocks_free == load.kv_blocks_total == 256
                and load.running_requests == load.queued_requests == 0
                for load in loads
            ):
                return
            time.sleep(0.05)
        raise AssertionError(f"blocks or requests never came back: {loads}")

    def until_healthy(self, service: str = "") -> None:
        """The health service calls `service` SERVING."""
        with grpc.insecure_channel(self.target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=service)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                if stub.Check(request).status == health_pb2.HealthCheckResponse.SERVING:
                    return
                time.sleep(0.05)
        raise AssertionError(f"{service!r} was never SERVING again")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


@contextmanager
def serving(*arguments: str) -> Iterator[Served]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*SERVE, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    served = Served(process)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            served.lines.append(line.strip())
            if line.startswith("listening on "):
                served.target = line.split()[-1]
                break
        assert served.target, f"it never listened: {served.lines}"
        yield served
    finally:
        process.kill()
        process.wait()


def ask(target: str, question: str, model: str = "") -> str:
    with Client(target) as client:
        deltas = client.chat(question, model=model, temperature=0.0)
        return "".join(delta.text for delta in deltas)


def is_gone(process: psutil.Process) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:  # between the two looks
            return True
        time.sleep(0.02)
    return False


def test_a_server_says_what_it_serves_answers_and_ends_on_sigterm() -> None:
    with serving("--served-model-name", "little") as served:
        report = "\n".join(served.lines)
        assert "little" in report
        assert "256 blocks" in report
        assert served.lines[-1] == f"listening on {served.target}"
        engine = served.engine()
        with Client(served.target) as client:
            (model,) = client.models()
            assert model.name == "little"
            assert client.generate([{"role": "user", "content": "What is 12 + 7?"}]).text == (
                "12 + 7 = 19"
            )
            with pytest.raises(InvalidRequest):
                client.generate("x", top_p=2.0)
            assert client.detokenize(client.tokenize("Monday")) == "Monday"
        assert served.end() == 0
        assert is_gone(engine)


def test_cancels_vanished_clients_and_deadlines_give_every_block_back() -> None:
    endless = {"ignore_eos": True, "temperature": 0.0, "max_tokens": 1000}
    with serving() as served, Client(served.target, attempts=1) as client:
        streams = [client.chat(f"Count from {n} to 99.", **endless) for n in range(4)]
        iterators = [iter(stream) for stream in streams]
        assert all(next(iterator).num_tokens for iterator in iterators)
        assert served.load().kv_blocks_free < served.load().kv_blocks_total
        streams[0].cancel()
        streams[1].cancel()
        vanishing = Client(served.target, attempts=1)
        deltas = iter(vanishing.chat("Count from 5 to 95.", **endless))
        next(deltas)
        vanishing.close()
        with pytest.raises(TimeoutError):
            client.generate("Count", timeout=0.2, **endless)
        for stream in streams[2:]:
            stream.cancel()
        served.until_idle()
        assert ask(served.target, "What is 12 + 7?") == "12 + 7 = 19"


def test_a_limit_that_is_left_out_is_the_context() -> None:
    with serving("--max-model-len", "64") as served, Client(served.target) as client:
        for limit, finish in ((None, "context_limit"), (59, "length")):
            answer = client.generate([40] * 5, max_tokens=limit, ignore_eos=True)
            assert (answer.finish_reason, answer.usage.completion_tokens) == (finish, 59)


def test_many_requests_at_once_are_all_answered_rightly() -> None:
    sums = [(a, 3 * a % 50) for a in range(1, 41)]
    with serving("--max-num-batched-tokens", "64") as served:
        with ThreadPoolExecutor(16) as pool:
            questions = [f"What is {a} + {b}?" for a, b in sums]
            answers = list(pool.map(lambda question: ask(served.target, question), questions))
        assert answers == [f"{a} + {b} = {a + b}" for a, b in sums]
        served.until_idle()


def test_ctrl_c_ends_it_too() -> None:
    with serving() as served:
        assert ask(served.target, "What is 30 + 4?") == "30 + 4 = 34"
        assert served.end(signal.SIGINT) == 0


def test_sigterm_while_loading_ends_it_at_once() -> None:
    process = subprocess.Popen(SERVE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "zllm" in process.stdout.readline()
    assert "loading tiny" in process.stdout.readline()
    time.sleep(0.5)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    assert process.wait(3) == 0
    assert all(is_gone(child) for child in children)


def test_the_engine_dies_with_its_parent() -> None:
    with serving() as served:
        engine = served.engine()
        served.process.kill()
        assert is_gone(engine)


def test_a_dead_engine_fails_its_requests_and_ends_a_server_that_may_not_restart_it() -> None:
    with serving("--max-restarts", "0") as served, Client(served.target, attempts=1) as client:
        stream = client.chat("Count from 1 to 99.", ignore_eos=True, temperature=0.0)
        deltas = iter(stream)
        next(deltas)
        served.engine().kill()
        with pytest.raises(Unavailable, match="signal 9"):
            for _ in deltas:
                pass
        assert served.process.wait(20) == 3


def test_a_dead_engine_is_replaced() -> None:
    with serving("--restart-backoff", "0.1") as served:
        dead = served.engine()
        dead.kill()
        with Client(served.target, attempts=1) as client:
            deadline = time.monotonic() + 60
            while True:
                try:
                    answer = client.generate([{"role": "user", "content": "What is 12 + 7?"}])
                    break
                except Unavailable:
                    assert time.monotonic() < deadline, "it never came back"
                    time.sleep(0.1)
        assert answer.text == "12 + 7 = 19"
        assert served.engine().pid != dead.pid
        served.until_idle()
        assert served.end() == 0


def test_a_second_sigterm_ends_what_the_first_let_run() -> None:
    with serving() as served, Client(served.target, attempts=1) as client:
        endless = {"ignore_eos": True, "temperature": 0.0, "max_tokens": 1000}
        deltas = iter(client.chat("Count from 1 to 99.", **endless))
        next(deltas)
        served.process.send_signal(signal.SIGTERM)
        next(deltas)
        time.sleep(0.3)
        assert served.process.poll() is None
        assert served.end() == 0
        assert [delta.finish_reason for delta in deltas][-1] == "shutdown"


def test_a_template_that_loops_costs_one_request(tmp_path: Path) -> None:
    folder = copy_model(tmp_path)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    edit_json(folder / "tokenizer_config.json", chat_template=loop)
    with serving(str(folder)) as served, Client(served.target) as client:
        with pytest.raises(InvalidRequest) as caught:
            client.generate([{"role": "user", "content": "hi"}])
        assert caught.value.field == "chat"
        prompt = "<|im_start|>user\nWhat is 5 + 5?<|im_end|>\n<|im_start|>assistant\n"
        assert client.generate(prompt, temperature=0.0).text == "5 + 5 = 10"


def test_a_token_that_the_weights_do_not_have_costs_one_request(tmp_path: Path) -> None:
    folder = copy_model(tmp_path)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    # As where somebody adds tokens to a tokenizer, and leaves the model as it is.
    added.append({**added[-1], "id": 5000, "content": "<tool>"})
    edit_json(folder / "tokenizer.json", added_tokens=added)
    with serving(str(folder)) as served, Client(served.target, attempts=1) as client:
        engine = served.engine()
        for field, prompt in (
            ("text", "a <tool>"),
            ("chat", [{"role": "user", "content": "a <tool>"}]),
        ):
            with pytest.raises(InvalidRequest, match="5000, '<tool>', is outside") as caught:
                client.generate(prompt)
            assert caught.value.field == field
        assert client.generate("40 + 2 =", temperature=0.0).text == " 42"
        assert served.engine().pid == engine.pid


def fail_to_start(*arguments: str) -> str:
    """Runs `zllm serve`, which must end with 1; returns what it said of it."""
    done = subprocess.run([*SERVE, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    assert "listening" not in done.stdout
    return done.stderr


def copy_model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED_MODEL, folder)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_weights_are_said_to_be_missing(tmp_path: Path) -> None:
    folder = copy_model(tmp_path)
    (folder / "model.safetensors").unlink()
    assert "safetensors" in fail_to_start(str(folder))


def test_corrupt_weights_are_said_to_be_corrupt(tmp_path: Path) -> None:
    folder = copy_model(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "model.safetensors" in fail_to_start(str(folder))


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    folder = copy_model(tmp_path)
    edit_json(folder / "config.json", architectures=["GibberishForCausalLM"])
    assert "GibberishForCausalLM" in fail_to_start(str(folder))


def test_bad_arguments_are_named() -> None:
    assert "nowhere" in fail_to_start("./nowhere/to/be/found")
    assert "max_num_seqs" in fail_to_start("--max-num-seqs", "0")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_a_model_is_fetched_ends_it_in_good_order(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)  # nohup's children ignore what it ignores
    with socket.create_server(("127.0.0.1", 0)) as hub:  # which takes calls and never answers
        hub.settimeout(60)
        url = f"http://127.0.0.1:{hub.getsockname()[1]}"
        process = subprocess.Popen(
            [*SERVE, "--model", "zllm/no-such-model"],
            env={
                **os.environ,
                "HF_ENDPOINT": url,
                "HF_HUB_OFFLINE": "0",
                "NO_PROXY": "127.0.0.1",
            },
        )
        try:
            hub.accept()
            process.send_signal(number)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
