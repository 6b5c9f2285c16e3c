"""Ten seconds of what `python -m tests.fuzz.fuzzer` does for as long as it is told."""

from __future__ import annotations

from tests.fuzz.fuzzer import PATIENT, fuzz, rpcs
from tests.service.test_processes import serving


async def test_random_and_damaged_messages_get_documented_codes_and_leak_nothing() -> None:
    with serving(*PATIENT) as served:
        findings = await fuzz(served, seconds=10, seed=1)
        assert not findings.wrong
        assert len({path for path, _ in findings.ends}) == len(rpcs()) + 1
