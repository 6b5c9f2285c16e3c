"""Thread blocks of which no more may fit a multiprocessor than have a share of its work."""

from __future__ import annotations

import pytest

from zllm.cuda.occupancy import bytes_for, bytes_for_at_most


@pytest.mark.parametrize("sm_kib", [100, 164, 228])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_as_many_fit_and_not_one_more(sm_kib: int, blocks: int) -> None:
    each = bytes_for_at_most(blocks, sm_kib * 1024) + 1024
    assert blocks * each <= sm_kib * 1024 < (blocks + 1) * each
    assert (blocks + 1) * (each - 16) <= sm_kib * 1024


@pytest.mark.parametrize("sm_kib", [100, 164, 228])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_as_many_fit_and_fill_it(sm_kib: int, blocks: int) -> None:
    each = bytes_for(blocks, sm_kib * 1024) + 1024
    assert blocks * each <= sm_kib * 1024 < blocks * (each + 1)
