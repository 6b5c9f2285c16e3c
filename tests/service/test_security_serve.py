"""The real command with TLS, keys and the embedded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.certificates import Authority
from tests.service.test_processes import SERVE, serving
from zllm.clients.client import Client
from zllm.clients.credentials import Tls

ACME, BETA = "acme-key-0123456789", "beta-key-0123456789"


def zllm(*arguments: str, key: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ZLLM_API_KEY": key}
    return subprocess.run(
        [sys.executable, "-m", "zllm", *arguments],
        capture_output=True, text=True, timeout=60, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_tls_keys_and_a_cache_of_ones_own(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.sign("server")
    keys = tmp_path / "keys.json"
    entries = [{"key": ACME, "tenant": "acme"}, {"key": BETA, "tenant": "beta"}]
    keys.write_text(json.dumps({"keys": entries}))
    flags = ["--tls-cert", cert, "--tls-key", key, "--api-keys", str(keys)]
    with serving(*flags) as served:
        tls, prompt = Tls(ca=authority.ca), list(range(100, 164))
        with (
            Client(served.target, api_key=ACME, tls=tls) as acme,
            Client(served.target, api_key=BETA, tls=tls) as beta,
        ):
            cached = [
                client.generate(prompt, max_tokens=1, cache_salt=salt).usage.cached_tokens
                for client, salt in [(acme, ""), (acme, ""), (beta, ""), (beta, "acme"), (beta, "")]
            ]
        assert cached[1] > 0
        assert cached[4] > 0
        assert [cached[0], cached[2], cached[3]] == [0, 0, 0]

        access = ["--target", served.target, "--tls-ca", authority.ca]
        answer = zllm("generate", "12 + 7 =", *access, "--max-tokens", "4", key=ACME)
        assert (answer.returncode, answer.stderr) == (0, "")
        load = ["--num-requests", "2", "--input-len", "8", "--output-len", "2", "--json"]
        file = tmp_path / "key"
        file.write_text(BETA + "\n")
        report = zllm("bench", *access, *load, "--api-key-file", str(file))
        assert json.loads(report.stdout)["failed"] == 0
        refused = zllm("generate", "a", *access, key="nobody")
        assert refused.returncode == 1
        assert "API key" in refused.stderr
        assert zllm("generate", "a", "--target", served.target, key=ACME).returncode == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "--insecure"),
        (["--tls-cert", "absent.pem", "--tls-key", "absent.key"], "--tls-cert absent.pem"),
        (["--api-keys", "absent.yaml"], "--api-keys absent.yaml"),
    ],
)
def test_what_cannot_be_safe_does_not_start(flags: list[str], words: str) -> None:
    ended = subprocess.run([*SERVE, *flags], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert words in ended.stderr
