"""How the resident decoder (kernels/decoder.cu) is cut for a model and a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ROWS = (1, 2, 4, 8)
"""Rows of x that the kernel is compiled for; 8 are the columns of one matrix instruction."""
SLOT_BYTES = 4096
_CHUNK = 64
"""Columns of W in the 128 bytes of a row that lie together in a slot."""
_SMALL_LAYER = 20_000_000
"""Weights of a layer that is read in a few microseconds: those of a model below 1B."""
_X_BYTES = 64 * 1024
"""Of x in the shared memory, at most."""
_MIN_SLOTS, _MAX_SLOTS = 3, 8


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What of a decoder its kernel is compiled for."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool
    num_layers: int

    @property
    def regular(self) -> bool:
        """Whether the kernel's tiles fit the sizes."""
        depths = (self.hidden_size, self.attended, self.intermediate_size)
        return (
            self.head_dim in (64, 128) and self.group <= 16 and all(d % _CHUNK == 0 for d in depths)
        )

    @property
    def most_rows(self) -> int:
        """Rows up to which one grid was faster than one kernel after the other, as measured: where
        layers are long, the words of several rows' x cost more than the launches did."""
        return 4 if self.small else 1

    @property
    def small(self) -> bool:
        """Whether a layer is read in less time than its chain of waits takes."""
        layer = self.qkv_width + self.attended + 3 * self.intermediate_size
        return self.hidden_size * layer <= _SMALL_LAYER

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def attended(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class _Product:
    outputs: int
    depth: int
    gated: bool = False

    def rows(self, grid: int) -> int:
        """Rows of W that a thread block owns at most: pairs of outputs, all alike to one pair."""
        return 2 * -(-self.outputs // 2 // grid) * (2 if self.gated else 1)

    def slot_rows(self, grid: int, x_rows: int, warps: int) -> int:
        """Rows of a slot: of one row of x those whose slots are most alike, as the ring and the
        copies under way count slots; of several, which each group of W's rows may have to fetch
        again, those with the fewest groups."""
        rows, unit = self.rows(grid), 16 if self.gated else 8

        def alike(slot_rows: int) -> tuple[float, int, bool, int]:
            steps, columns = self.steps(slot_rows, warps)
            groups = -(-rows // slot_rows)
            largest = min(rows, slot_rows) * columns * warps
            share = rows * self.depth / (groups * steps * largest)
            # A matrix instruction has 16 rows.
            return -round(share, 2), groups * steps, slot_rows % 16 != 0, slot_rows

        def few(slot_rows: int) -> tuple[int, float, int]:
            groups = -(-rows // slot_rows)
            used = SLOT_BYTES // (2 * _CHUNK * slot_rows) * 2 * _CHUNK * rows
            return groups, 1 - used / (groups * SLOT_BYTES), -slot_rows

        most = min(SLOT_BYTES // (2 * _CHUNK), -(-rows // unit) * unit)
        sizes = range(unit, most + 1, unit)
        return min(sizes, key=alike) if x_rows == 1 else min(sizes, key=few)

    def steps(self, slot_rows: int, warps: int) -> tuple[int, int]:
        """Slots of a warp along k, and the columns of each."""
        chunks = -(-self.depth // (_CHUNK * warps))
        steps = -(-chunks // (SLOT_BYTES // (2 * _CHUNK * slot_rows)))
        return steps, -(-chunks // steps) * _CHUNK


@dataclass(frozen=True, slots=True)
class DecoderPlan:
    """The kernel's macros for steps of `rows` tokens on a grid of `grid` thread blocks."""

    shape: DecoderShape
    rows: int
    grid: int
    shared_limit: int
    """Bytes of shared memory that a thread block may have."""
    warps: int = 8
    producers: int = 4

    @property
    def threads(self) -> int:
        return 32 * (self.warps + self.producers)

    @property
    def slots(self) -> int:
        """Of each warp's ring: what the shared memory has room for."""
        slots = (self.shared_limit - self._fixed_bytes()) // (self.warps * (SLOT_BYTES + 16))
        return min(slots, _MAX_SLOTS)

    @property
    def copies(self) -> int:
        """Slots that a producer warp has under way, as measured. More stand in front of what the
        consumers read, shared memory included; fewer leave bandwidth unused."""
        return 1 if self.shape.small else 3

    @property
    def fits(self) -> bool:
        """Whether the shared memory holds enough of the weights' stream to be worth it."""
        return self.slots >= _MIN_SLOTS

    @property
    def shared_bytes(self) -> int:
        return self.slots * self.warps * (SLOT_BYTES + 16) + self._fixed_bytes()

    @property
    def mailbox_words(self) -> int:
        shape = self.shape
        widths = 2 * shape.hidden_size + shape.qkv_width + shape.attended + shape.intermediate_size
        pieces = max(self.grid, self.rows * shape.num_kv_heads)
        return self.rows * widths // 2 + pieces * shape.group * (shape.head_dim + 2)

    def macros(self) -> dict[str, str | int]:
        shape = self.shape
        qkv, output, gate_up, down = (each for _, each in self._slots_of_products())
        return {
            "SCALAR": "__nv_bfloat16",
            "KV_FP8": 0,
            "GRID": self.grid,
            "ROWS": self.rows,
            "LAYERS": shape.num_layers,
            "HIDDEN": shape.hidden_size,
            "INNER": shape.intermediate_size,
            "HEADS": shape.num_heads,
            "GROUP": shape.group,
            "HEAD_DIM": shape.head_dim,
            "QK_NORM": int(shape.qk_norm),
            "WARPS": self.warps,
            "PRODUCERS": self.producers,
            "COPIES": self.copies,
            "SLOTS": self.slots,
            "SLOT_BYTES": SLOT_BYTES,
            "X_BYTES": self._x_bytes(),
            "PARTIAL_ROWS": self._partial_rows(),
            "QKV_ROWS": qkv,
            "OUTPUT_ROWS": output,
            "GATE_UP_ROWS": gate_up,
            "DOWN_ROWS": down,
            "SHARED_BYTES": self.shared_bytes,
        }

    def _slots_of_products(self) -> list[tuple[_Product, int]]:
        """The products with the rows of their slots."""
        return [(p, p.slot_rows(self.grid, self.rows, self.warps)) for p in _products(self.shape)]

    def _x_bytes(self) -> int:
        """Of x that a warp holds: its k of every product for one row; for more rows that of the
        hidden size, which many groups of W's rows need, if it fits."""
        step = whole = hidden = 0
        for product, slot_rows in self._slots_of_products():
            steps, columns = product.steps(slot_rows, self.warps)
            step, whole = max(step, 2 * columns), max(whole, 2 * columns * steps)
            if product.depth == self.shape.hidden_size:
                hidden = max(hidden, 2 * columns * steps)
        room = _X_BYTES // (self.warps * self.rows) // 64 * 64
        return self.rows * max(step, min(whole, max(room // 2, min(room, hidden))))

    def _partial_rows(self) -> int:
        """Rows of W whose sums wait for one barrier: all of a product, or those of a slot."""
        slots = [(each, p.rows(self.grid)) for p, each in self._slots_of_products()]
        whole = max(-(-rows // each) * each for each, rows in slots)
        return whole if whole * self.rows <= 256 else max(each for each, _ in slots)

    def _fixed_bytes(self) -> int:
        """Of struct Shared beside the slots and their barriers."""
        shape = self.shape
        per_row = self._x_bytes() // self.rows
        pitch = per_row + 64 if per_row // 64 % 2 == 0 else per_row
        sizes = (
            shape.num_layers * 80,
            self.warps * self.rows * pitch,
            2 * self.warps * self.rows * (self._partial_rows() + 4) * 4,
            2 * self.warps * self.rows * 4,
            self.rows * -(-shape.hidden_size // 2 // self.grid) * 4,
            shape.group * (shape.head_dim + 8) * 2 + 2 * shape.head_dim * 2,
            self.warps * shape.group * ((shape.head_dim + 4) * 4 + 8),
            self.rows * 24 + 4,
        )
        return sum(sizes) + 1024  # and what alignment takes


def _products(shape: DecoderShape) -> Iterator[_Product]:
    yield _Product(shape.qkv_width, shape.hidden_size)
    yield _Product(shape.hidden_size, shape.attended)
    yield _Product(shape.intermediate_size, shape.hidden_size, gated=True)
    yield _Product(shape.hidden_size, shape.intermediate_size)


def grid_of(shape: DecoderShape, num_sms: int) -> int:
    """Thread blocks: one a multiprocessor, and each owns a pair of outputs of every product."""
    return min(num_sms, *(p.outputs // 2 for p in _products(shape)))
