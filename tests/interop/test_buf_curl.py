"""`buf curl` knows nothing of zllm but what reflection tells it."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2

from tests.service.certificates import Authority
from tests.service.harness import Harness, running
from zllm.service.config import ServerConfig

BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
pytestmark = pytest.mark.skipif(BUF is None, reason="no buf here")


async def curl(url: str, request: dict[str, Any], *flags: str) -> tuple[int, list[Any], str]:
    """The exit code, the messages that came, and what it wrote of an error."""
    command = [BUF or "", "curl", "--protocol", "grpc", *flags, "-d", json.dumps(request), url]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, error = await process.communicate()
    decoder, text, messages = json.JSONDecoder(), out.decode().strip(), []
    while text:
        message, end = decoder.raw_decode(text)
        messages.append(message)
        text = text[end:].strip()
    return await process.wait(), messages, error.decode()


async def plain(
    server: Harness, method: str, request: dict[str, Any]
) -> tuple[int, list[Any], str]:
    return await curl(
        f"http://{server.target}/zllm.v1.{method}", request, "--http2-prior-knowledge"
    )


async def test_it_streams_by_reflection_alone() -> None:
    request = {"text": "abc", "stopping": {"maxTokens": 6}, "output": {"tokenIds": True}}
    async with running() as server:
        code, messages, error = await plain(server, "GenerationService/StreamGenerate", request)
        assert (code, error) == (0, "")
        started, *deltas, finished = messages
        assert started["started"]["model"] == "stub"
        assert "".join(message["delta"].get("text", "") for message in deltas) == "abcabc"
        assert finished["finished"]["usage"]["completionTokens"] == 6


async def test_an_error_names_its_field_in_the_details() -> None:
    request = {"text": "abc", "sampling": {"topP": 7}}
    async with running() as server:
        code, messages, error = await plain(server, "GenerationService/Generate", request)
        assert code != 0
        assert messages == []
        failure = json.loads(error)
        assert failure["code"] == "invalid_argument"
        (detail,) = failure["details"]
        assert detail["type"] == "google.rpc.BadRequest"
        bad = error_details_pb2.BadRequest.FromString(base64.b64decode(detail["value"] + "=="))
        assert [violation.field for violation in bad.field_violations] == ["sampling.top_p"]


async def test_it_goes_through_tls_with_a_key(tmp_path: Path) -> None:
    authority, key = Authority(tmp_path), "a-key-of-sixteen-or-more"
    cert, private = authority.sign("server")
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [{"key": key, "tenant": "acme"}]}))
    config = ServerConfig(port=0, admin_port=0, tls_cert=cert, tls_key=private, api_keys=str(keys))
    async with running(config=config) as server:
        url = f"https://{server.target}/zllm.v1.ModelService/ListModels"
        ca = ("--cacert", authority.ca)
        code, messages, _ = await curl(url, {}, *ca, "-H", f"authorization: Bearer {key}")
        assert code == 0
        assert messages[0]["models"][0]["name"] == "stub"
        code, _, error = await curl(url, {}, *ca)
        assert code != 0
        assert json.loads(error)["code"] == "unauthenticated"
