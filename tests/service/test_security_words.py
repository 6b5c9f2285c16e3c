"""What users are told, and operators: nothing of the machine, and no key."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.service.harness import running
from tests.service.stub_server import STUB, answers, serving
from zllm.errors import Unavailable
from zllm.service.config import ServerConfig
from zllm.v1 import admin_pb2

SECRET = "/secret/model.safetensors"
ONCE = """
import os, runpy, sys
from zllm.runtime import clients, messages
try:
    os.close(os.open({mark!r}, os.O_CREAT | os.O_EXCL))
except FileExistsError:
    engine = clients.Clients(sys.argv[-1])
    client, _ = engine.receive()
    engine.send(client, messages.EngineFailed("cannot read " + {secret!r}))
    engine.close(linger_s=5.0)
    sys.exit(1)
runpy.run_path({stub!r}, run_name="__main__")
"""
"""An engine that serves, and whose successors cannot and say why."""


async def test_why_an_engine_does_not_come_back_is_for_the_log_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = ONCE.format(mark=str(tmp_path / "mark"), stub=str(STUB), secret=SECRET)
    command = (sys.executable, "-c", program)
    async with serving(command, restart_backoff=0.1, max_restarts=100) as served:
        await answers(served.target)
        served.engine().kill()
        async with asyncio.timeout(20):
            while SECRET not in caplog.text:
                await asyncio.sleep(0.1)
        with pytest.raises(Unavailable) as caught:
            await answers(served.target)
        assert "secret" not in str(caught.value)


async def test_the_configuration_that_operators_see_holds_no_key(tmp_path: Path) -> None:
    key = "a-key-of-sixteen-or-more"
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [{"key": key, "tenant": "acme"}]}))
    config = ServerConfig(port=0, admin_port=0, api_keys=str(keys))
    async with running(config=config) as server:
        info = await server.admin.GetServerInfo(admin_pb2.GetServerInfoRequest())
    assert key not in info.config_json
    assert json.loads(info.config_json)["server"]["api_keys"] == str(keys)
