"""How a product with few rows is cut, and where cutting it so beats cuBLAS: as measured.

The numbers are one H200's (docs/decisions/060-skinny-linear.md, 061-tall-tiles.md); on another GPU
they are still right, and perhaps not the fastest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SHARED_BYTES = 113 * 1024
"""What lets a block share its multiprocessor with one of the kernel that follows (228 KiB)."""
MOST_SHARED_BYTES = 220 * 1024
_MOST_ROWS = 192
TALL_ROWS = (16, 32, 64, 96, 128)
"""Rows of x that linear_wgmma.cu is compiled for."""
UNIT = 8
"""Rows of W in which linear_wgmma.cu divides: one pattern of its shared memory's swizzle."""


@dataclass(frozen=True)
class Skinny:
    """The macros of linear_skinny.cu."""

    mtiles: int
    ntiles: int
    warps_n: int
    warps_k: int
    slabs: int
    stages: int
    cluster: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_k

    def shared_bytes(self, norm: bool) -> int:
        """Dynamic shared memory: the rings, the partial sums and the sums of squares."""
        rows, columns = 16 * self.mtiles * self.warps_n, 8 * self.ntiles
        ring = self.stages * self.slabs * 64 * (rows + columns + norm)
        return self.warps_k * (ring + columns * (rows + 4) * 4 + columns * 4)

    def fit(self, limit: int) -> Skinny:
        """The same with as many stages fewer as `limit` bytes of shared memory ask for."""
        plan = self
        while plan.shared_bytes(norm=True) > limit:
            plan = replace(plan, stages=plan.stages - 1)
        return plan

    def macros(self) -> dict[str, int]:
        return {
            "MTILES": self.mtiles,
            "NTILES": self.ntiles,
            "WARPS_N": self.warps_n,
            "WARPS_K": self.warps_k,
            "SLABS": self.slabs,
            "STAGES": self.stages,
            "CLUSTER": self.cluster,
        }


@dataclass(frozen=True)
class Tall:
    """The macros of linear_wgmma.cu."""

    DEPTH = 64

    rows: int
    """Of W in a tile: a multiple of 8, gated of 16."""
    ntiles: int
    split: int
    shared_limit: int
    one_tile: bool
    """Whether a block's share of W is one tile, whose sums may then meet in the ring."""

    @property
    def warpgroups(self) -> int:
        return _ceil(self.rows, 64)

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups + 32

    @property
    def stages(self) -> int:
        return min(12, (self.shared_limit - self._tail_bytes) // (self._stage_bytes + 16))

    @property
    def _stage_bytes(self) -> int:
        return (self.rows + 8 * self.ntiles) * self.DEPTH * 2

    @property
    def _tail_bytes(self) -> int:
        """What the last warpgroup reads behind the last stage, as it reads 64 rows."""
        return max(64 * self.warpgroups * self.DEPTH * 2 - self._stage_bytes, 0)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the ring and its barriers."""
        return self.stages * (self._stage_bytes + 16) + self._tail_bytes

    @property
    def staged(self) -> bool:
        """Whether a tile's sums go through shared memory, and so to whole lines of the output."""
        sums = 8 * self.ntiles * (64 * self.warpgroups + 4) * 4
        return self.one_tile and sums <= self.stages * self._stage_bytes

    def owners(self, num_sms: int) -> int:
        """Clusters of the grid."""
        return _clusters(num_sms, self.split)

    def macros(self) -> dict[str, int]:
        return {
            "ROWS": self.rows,
            "NTILES": self.ntiles,
            "STAGES": self.stages,
            "SPLIT": self.split,
            "STAGED": int(self.staged),
        }


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _clusters(num_sms: int, blocks: int) -> int:
    """Clusters that run at once. A cluster lies within one group of multiprocessors, and those of
    16 and 18 hold as many of 4 or 8 blocks: two multiprocessors of the larger stay free."""
    return num_sms // blocks if blocks < 4 else num_sms // 8 * 8 // blocks


def skinny_plan(m: int, n: int, num_sms: int) -> Skinny:
    """For up to 16 rows of x and n of W."""
    short = n <= 16 * num_sms
    if m <= 8:
        return Skinny(1, 1, 1, 8, 2, 4) if short else Skinny(2, 1, 1, 8, 1, 5)
    return Skinny(1, 2, 1, 8, 1, 6) if short else Skinny(2, 2, 2, 4, 1, 4)


def tall_plan(m: int, n: int, k: int, num_sms: int, gated: bool = False) -> Tall:
    """For 9 to TALL_ROWS[-1] rows of x and n of W, counted in W's rows also where two make one
    output."""
    split = 1
    if n <= 32 * num_sms and k >= 2048:
        split = 2 if n > 16 * num_sms else 8 if n <= 8 * num_sms else 4
    unit = 2 * UNIT if gated else UNIT
    units = _ceil(_ceil(n, unit), _clusters(num_sms, split))
    tiles = _ceil(units * unit, _MOST_ROWS)
    rows = _ceil(units, tiles) * unit
    columns = next(size for size in TALL_ROWS if m <= size)
    long = 2 * n * k >= (30_000_000 if m <= 64 else 20_000_000)
    limit = MOST_SHARED_BYTES if rows > 128 or (m > 32 and long) else SHARED_BYTES
    return Tall(rows, columns // 8, split, limit, tiles == 1)


def faster_than_cublas(m: int, n: int, k: int, num_sms: int, hopper: bool) -> bool:
    """Whether the plan for m rows beat cuBLAS where it was measured."""
    if m <= 8:
        return n >= num_sms
    if not hopper:
        return m <= 16 and n * k <= 20_000_000
    # Where cuBLAS is up to 10% faster alone (a 4B or 8B model's o, from 48 rows on), one ordinary
    # launch in a chain of overlapping ones costs more than that.
    if n > _MOST_ROWS * num_sms:  # a head: tile after tile, and each reads x again
        return m <= 64
    return m <= (128 if n * k >= 8_000_000 else 96)
