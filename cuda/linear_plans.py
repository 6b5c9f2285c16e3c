"""How a product with few rows is cut, and where cutting it so beats cuBLAS: as measured.

The numbers are one H200's (docs/decisions/060-skinny-linear.md, 073-square-tiles.md); on another
GPU they are still right, and perhaps not the fastest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

SHARED_BYTES = 113 * 1024
"""What lets a block share its multiprocessor with one of the kernel that follows (228 KiB)."""
MOST_SHARED_BYTES = 220 * 1024
TILE_ROWS = (64, 96, *range(128, 225, 16), 256)
"""Rows of x that linear_wgmma.cu is compiled for."""
UNIT = 8
"""Rows in which linear_wgmma.cu divides: one pattern of its shared memory's swizzle."""
_MOST_COLUMNS = 192
_LIGHT = 7_000_000
"""Elements of a weight that is read before a deep ring is full."""
_LONG = 2048
"""k from which on it is divided where W is short."""


@dataclass(frozen=True)
class Skinny:
    """The macros of linear_skinny.cu."""

    mtiles: int
    ntiles: int
    warps_n: int
    warps_k: int
    slabs: int
    stages: int

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
        }


@dataclass(frozen=True)
class Tiled:
    """The macros of linear_wgmma.cu."""

    DEPTH = 64

    rows: int
    """Of x in a tile: a multiple of 64, swapped of 16."""
    columns: int
    """Rows of W in a tile: a multiple of 8, gated of 16, swapped of 64."""
    split: int
    """Blocks of a cluster, which divide k."""
    blocks_per_sm: int
    swapped: bool = False
    """Whether W is the M side of wgmma, and not x."""

    @property
    def _sides(self) -> tuple[int, int]:
        """Rows of the M side and of the N side."""
        return (self.columns, self.rows) if self.swapped else (self.rows, self.columns)

    @property
    def _warpgroups(self) -> int:
        long = self._sides[0]
        return 2 if long == 256 else long // 64

    @property
    def _pieces(self) -> int:
        """Of the N side: a product's sums must be fewer than the registers that a thread starts
        with."""
        return 2 if self._warpgroups > 2 and self._sides[1] > 200 else 1

    def cycles(self, m: int) -> float:
        """Of a block, for 16 of all k and m rows of x: what its tile moves through shared memory,
        128 bytes a cycle, or how long the tensor cores take (decision 073)."""
        long, short = self._sides
        read = long / 64 * (16 * self._pieces + short / 4)
        moved = (self.x_rows(m) + self.columns) / 4 + read
        return max(moved, long / 64 * short / 2) / self.split

    @property
    def threads(self) -> int:
        return 128 * (self._warpgroups + 1)

    def x_rows(self, m: int) -> int:
        """Of m rows of x, those in a tile."""
        tiles = _ceil(m, self.rows)
        return _ceil(_ceil(m, tiles), UNIT) * UNIT

    @property
    def _stage_bytes(self) -> int:
        return (self.rows + self.columns) * self.DEPTH * 2

    @property
    def stages(self) -> int:
        limit = MOST_SHARED_BYTES if self.blocks_per_sm == 1 else SHARED_BYTES
        return min(12, (limit - 4 * self.rows) // (self._stage_bytes + 16))

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the ring, its barriers and a factor of each row."""
        return self.stages * (self._stage_bytes + 16) + 4 * self.rows

    @property
    def chunk(self) -> int:
        """The columns whose partial sums fit the ring at once."""
        ring = self.stages * self._stage_bytes
        unit = 64 if self.swapped else 2 * UNIT if self.columns % (2 * UNIT) == 0 else UNIT
        parts = 1
        while self.columns % (unit * parts) or 4 * self.rows * (self.columns // parts + 4) > ring:
            parts += 1
        return self.columns // parts

    def parts(self, n: int) -> int:
        """Chunks in n rows of W."""
        return _ceil(n, self.columns) * (self.columns // self.chunk)

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        return _ceil(n, self.columns) * self.split, _ceil(m, self.rows), 1

    def macros(self) -> dict[str, int]:
        long, short = self._sides
        return {
            "SWAPPED": int(self.swapped),
            "WARPGROUPS": self._warpgroups,
            "TILES": long // (64 * self._warpgroups),
            "SHORT": short,
            "PIECES": self._pieces,
            "CHUNK": self.chunk,
            "STAGES": self.stages,
            "SPLIT": self.split,
            "BLOCKS": self.blocks_per_sm,
        }


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def is_head(n: int, num_sms: int) -> bool:
    """Whether n rows of W are a vocabulary's: far more than one tile for each multiprocessor."""
    return n > _MOST_COLUMNS * num_sms


def skinny_plan(m: int, n: int, num_sms: int) -> Skinny:
    """For up to 16 rows of x and n of W."""
    short = n <= 16 * num_sms
    if m <= 8:
        return Skinny(1, 1, 1, 8, 2, 4) if short else Skinny(2, 1, 1, 8, 1, 5)
    return Skinny(1, 2, 1, 8, 1, 6) if short else Skinny(2, 2, 2, 4, 1, 4)


def tiles_are_faster(m: int, n: int, k: int) -> bool:
    """Whether Hopper's tiles, all of 64 rows at least, beat the skinny kernel in a chain
    of products."""
    return m > 8 or n * k > _LIGHT


@cache
def tiled_plan(
    m: int, n: int, k: int, num_sms: int, clusters_of_4: int, gated: bool = False
) -> Tiled:
    """For 1 to TILE_ROWS[-1] rows of x and n of W, counted in W's rows also where two make one
    output. `clusters_of_4`: those that run at once, of blocks that have a multiprocessor each."""
    unit = 2 * UNIT if gated else UNIT
    long = k >= _LONG
    # What is read before a deep ring is full starts early instead, unless k is long; with more rows
    # that helps only where k is divided.
    light = n * k <= _LIGHT and k <= _LONG and m <= (128 if long else 64)
    blocks = {1: num_sms, 2: num_sms // 2, 4: num_sms // 8 * 2 if light else clusters_of_4}
    size = next(size for size in TILE_ROWS if m <= size)
    rows, high = _ceil(size, 64) * 64, 1

    def columns(split: int) -> int:
        return _ceil(_ceil(n, unit), max(blocks[split] // high, 1)) * unit

    enough, most = 48, 4
    if rows == 256 and columns(2) <= _MOST_COLUMNS:  # as many blocks as two rows of tiles leave
        rows, high, enough, most = 128, 2, 72, 2
    split = 1
    while long and columns(split) < enough and split < most:
        split *= 2
    wide = columns(split)
    if wide > _MOST_COLUMNS:
        return _head_plan(rows, n, long, num_sms)
    plan = Tiled(rows, wide, split, 2 if light else 1)
    swapped = _swapped_plan(size, n, k, blocks)
    return swapped if swapped and swapped.cycles(size) < plan.cycles(size) else plan


def _head_plan(rows: int, n: int, long: bool, num_sms: int) -> Tiled:
    """Tile after tile. A vocabulary's take many rounds: where k is short, two blocks hide how each
    other's tiles begin and end, or wide tiles are few."""
    if n < 6 * 128 * num_sms:
        return Tiled(rows, 64 if rows == 64 and long else 128, 1, 1)
    if rows == 64:
        return Tiled(64, 128, 1, 1 if long else 2)
    return Tiled(rows, 192 if rows == 128 and not long else 128, 1, 1)


@cache
def qkv_plan(m: int, n: int, k: int, num_sms: int) -> Tiled | None:
    """For m rows of x and n of W, which are heads of 128; None where two kernels are as fast."""
    heads, high = n // 128, _ceil(m, 64)
    if high == 1 and 2 * heads <= num_sms:
        return Tiled(64, 128, 2, 1)
    return Tiled(64, 128, 1, 1) if k < _LONG and high * heads <= num_sms else None


def _swapped_plan(size: int, n: int, k: int, blocks: dict[int, int]) -> Tiled | None:
    """For `size` rows of x, as few of W in a tile as keep all blocks at work at once. None where
    it was not faster in a chain, whatever the count of cycles."""
    tiles = _ceil(n, 64)
    split = 2 if tiles <= blocks[2] and k >= _LONG else 1
    plan = Tiled(size, _ceil(tiles, blocks[split]) * 64, split, 1, swapped=True)
    most_sums = 224 if plan.columns > 128 else 256  # of a column, in registers
    faster = size > 128 or (64 < size < 128 and split == 1)
    fits = size <= most_sums and plan.columns <= _MOST_COLUMNS
    return plan if faster and fits else None


def faster_than_cublas(m: int, n: int, k: int, num_sms: int, hopper: bool) -> bool:
    """Whether the plan for m rows beat cuBLAS where it was measured."""
    if m <= 8:
        return n >= num_sms
    if not hopper:
        return m <= 16 and n * k <= 20_000_000
    # Where cuBLAS is up to 10% faster alone (a 4B or 8B model's o, above 192 rows), one ordinary
    # launch in a chain of overlapping ones costs as much.
    return m <= (128 if is_head(n, num_sms) else TILE_ROWS[-1])
