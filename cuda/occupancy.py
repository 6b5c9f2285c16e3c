"""How many thread blocks a multiprocessor holds, by the shared memory that they ask for."""

from __future__ import annotations

_RESERVED = 1024
"""Bytes that each thread block costs besides (CUDA C++ Programming Guide, "Technical Specifications
per Compute Capability")."""


def bytes_for(blocks: int, sm_bytes: int) -> int:
    """The most shared memory of which `blocks` thread blocks fit a multiprocessor of `sm_bytes`."""
    return sm_bytes // blocks - _RESERVED


def bytes_for_at_most(blocks: int, sm_bytes: int) -> int:
    """The least shared memory of which no more than `blocks` thread blocks fit a multiprocessor
    of `sm_bytes`, to 16 bytes.

    Thread blocks that start early, beside the kernel before theirs, crowd on the multiprocessors
    that it leaves first. Where each has an equal share of the work, the crowded ones end last.
    """
    return bytes_for(blocks + 1, sm_bytes) + 16
