"""Several models in one server: requests find theirs, and a failing one leaves the others."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.service.stub_server import STUB, answers, engines, serving
from tests.service.test_load_unload import administering, unload_request
from tests.service.test_processes import ask, copy_model, edit_json, fail_to_start, is_gone
from tests.service.test_processes import serving as serving_command
from zllm.clients.client import Client
from zllm.errors import Forbidden, Unavailable, UnknownModel
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.service.serve import ENGINE_LOST

TWO = (f"--model=a={EMBEDDED_MODEL}", f"--model=b={EMBEDDED_MODEL},max_model_len=512")
ENDLESS = {"ignore_eos": True, "temperature": 0.0, "max_tokens": 400}

MORTAL = """
import json, os, runpy, sys
line = b""
while not line.endswith(b"\\n"):
    line += os.read(0, 65536)
name = json.loads(line)["served_model_name"]
try:
    os.close(os.open({folder!r} + "/" + name, os.O_CREAT | os.O_EXCL))
except FileExistsError:
    if name in {names!r}:
        sys.exit(7)
runpy.run_path({stub!r}, run_name="__main__")
"""


def mortal(folder: Path, *names: str) -> tuple[str, ...]:
    """Stub engines, of which those of these models start once and never again."""
    return sys.executable, "-c", MORTAL.format(folder=str(folder), names=names, stub=str(STUB))


def test_requests_find_their_model_and_a_killed_engine_leaves_the_others() -> None:
    with serving_command(*TWO, "--restart-backoff", "0.1") as served:
        with Client(served.target, attempts=1) as client:
            models = {model.name: model for model in client.models()}
            assert list(models) == ["a", "b"]
            assert models["a"].max_context_tokens > models["b"].max_context_tokens == 512
            for model in ("", "a", "b"):
                assert ask(served.target, "What is 12 + 7?", model) == "12 + 7 = 19"
            with pytest.raises(UnknownModel, match="'c' is not served here; served: a, b"):
                client.generate("x", model="c")

            first, second = served.engines()
            streams = {
                name: iter(client.chat("Count from 1 to 99.", model=name, **ENDLESS))
                for name in ("a", "b")
            }
            for deltas in streams.values():
                next(deltas)
            second.kill()
            with pytest.raises(Unavailable, match="signal 9"):
                for _ in streams["b"]:
                    pass
            assert [delta.finish_reason for delta in streams["a"]][-1] == "length"
            assert is_gone(second)
            served.until_healthy("model/b")
            assert client.generate("12 + 7 =", model="b", max_tokens=3).text
        replaced = served.engines()
        assert first in replaced
        assert len(replaced) == 2
        served.until_idle()
        assert served.end() == 0
        assert all(is_gone(engine) for engine in replaced)


def test_a_key_reaches_the_models_that_it_is_allowed(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    secret = "a-key-of-16-letters"
    keys.write_text(json.dumps({"keys": [{"key": secret, "tenant": "t", "models": ["b"]}]}))
    with (
        serving_command(*TWO, "--api-keys", str(keys)) as served,
        Client(served.target, api_key=secret) as client,
    ):
        assert [model.name for model in client.models()] == ["b"]
        assert client.generate("12 + 7 =", max_tokens=3).model == "b"
        with pytest.raises(Forbidden):
            client.generate("12 + 7 =", model="a")


async def test_health_knows_each_model_by_name(tmp_path: Path) -> None:
    async with serving(mortal(tmp_path, "b"), ["a", "b"], max_restarts=0) as served:
        for name in ("a", "b"):
            await served.until_health(True, service=f"model/{name}")
        engines()[1].kill()
        await served.until_health(False, service="model/b")
        await served.until_health(True, service="model/a")
        await served.until_health(True)
        await answers(served.target, "a")


async def test_a_model_is_given_up_alone_and_the_last_one_ends_the_server(tmp_path: Path) -> None:
    limits = {"max_restarts": 1, "restart_backoff": 0.05}
    async with serving(mortal(tmp_path, "a", "b"), ["a", "b"], **limits) as served:
        a, b = engines()
        b.kill()
        await served.until_health(False, service="model/b")
        async with asyncio.timeout(20):
            while [engine.pid for engine in engines()] != [a.pid]:
                await asyncio.sleep(0.02)
        await answers(served.target)
        with pytest.raises(Unavailable):
            await answers(served.target, "b")
        a.kill()
        async with asyncio.timeout(20):
            assert await served.task == ENGINE_LOST == 3


async def test_a_server_ends_when_what_it_unloads_leaves_only_what_was_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"max_restarts": 1, "restart_backoff": 0.05}
    async with serving(mortal(tmp_path, "b"), ["a", "b"], **limits) as served:
        engines()[1].kill()
        async with asyncio.timeout(20):
            while "model b is given up" not in caplog.text:
                await asyncio.sleep(0.02)
        await answers(served.target, "a")
        async with administering(served) as (admin, _):
            await admin.UnloadModel(unload_request("a"))
        async with asyncio.timeout(20):
            assert await served.task == ENGINE_LOST


def test_a_model_that_cannot_load_ends_the_start(tmp_path: Path) -> None:
    folder = copy_model(tmp_path)
    edit_json(folder / "config.json", architectures=["GibberishForCausalLM"])
    assert "GibberishForCausalLM" in fail_to_start(TWO[0], f"--model=b={folder}")
