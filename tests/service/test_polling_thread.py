"""gRPC's polling thread waits for the event loop; nobody else's turn changes."""

from __future__ import annotations

import os
import threading

import pytest

from tests.service.harness import running
from zllm.service.polling_thread import GRPC_TARGET

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="has no SCHED_BATCH")


async def test_a_server_has_grpcs_polling_thread_wait() -> None:
    async with running():
        policies = {
            thread.name: os.sched_getscheduler(thread.native_id)
            for thread in threading.enumerate()
            if thread.native_id is not None
        }
    polling = {name for name in policies if GRPC_TARGET in name}
    assert polling, "gRPC calls its thread by another name now"
    for name, policy in policies.items():
        assert policy == (os.SCHED_BATCH if name in polling else os.SCHED_OTHER), name
