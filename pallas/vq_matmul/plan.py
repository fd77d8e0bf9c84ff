"""How one launch of the kernel divides its work: static decisions made from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from vptq_jax.format import Format
from vptq_jax.pallas.ptx import SHARED_MEMORY_BYTES
from vptq_jax.pallas.vq_matmul.packed import RESERVED_BYTES, ROW_BYTES, Order, UnitGrid, shares_tail

MAX_ROWS = 64
MAX_STAGED_ROWS = 4  # Every block reads all of x: worth a launch for 1 row, slower for 8 (measured).
MAX_NORMALIZED_ROWS = 8  # That saves more launches.
MAX_ROWS_SHARED_TAIL = 32  # Twice the sums take twice the registers.
PIECE_COLUMNS = 4  # Columns of which a thread loads index and scale at once.
_THREAD_PIECES = 4  # Most pieces a thread holds in registers.


@dataclasses.dataclass(frozen=True)
class Config:
    """What may be tuned without touching the stored order.

    Attributes:
        blocks: thread blocks, at most one a processor.
        column_warps: warps of a block that share output rows and split the columns (a divisor of
            the block's warps).
        prefetch: units whose indices are loaded ahead.
        replica_entries: a codebook is copied up to 8 times while copies times entries stay within this.
        cached_entries: entries of a codebook too large for shared memory that are kept there
            nevertheless, as far as they fit.
        stage_x: blocks permute and scale the activations they need, where that fits (`Plan.stage_x`);
            otherwise XLA does, in a launch of its own.
    """

    blocks: int = 132
    column_warps: int = 4
    prefetch: int = 1
    replica_entries: int = 4096
    cached_entries: int = 1 << 16
    stage_x: bool = True


@dataclasses.dataclass(frozen=True)
class Book:
    """Where one codebook lives during the launch.

    Attributes:
        entries: centroids.
        bits: bits of an index.
        shift: first bit of the index within an entry.
        cached: leading centroids that lie in shared memory; the others are gathered through L2.
        replicas: copies in shared memory.
        planes: byte offset in shared memory of each plane.
        ring: byte offset in shared memory of the buffer for centroids that come through L2.
    """

    entries: int
    bits: int
    shift: int
    cached: int
    replicas: int
    planes: tuple[int, ...]
    ring: int

    @property
    def streamed(self) -> bool:
        """Whether some centroids come through L2."""
        return self.cached < self.entries


@dataclasses.dataclass(frozen=True)
class Plan:
    """One launch: weights that share a format except for out_features, times `rows` activations.

    Slabs of `column_warps` units side by side are numbered part by part, group by group, row
    group by row group; block c runs slabs c * total // blocks to (c + 1) * total // blocks. A row
    group that falls to several blocks leaves one partial sum per block, in `slots`. With `offsets`
    the launch also multiplies x with each weight's offset, in `offset_chunks` shares. With `norm_eps`
    it normalizes x first, which it can where it stages x.
    """

    formats: tuple[Format, ...]
    order: Order
    rows: int
    kind: Literal["bf16", "f16"]
    config: Config
    offsets: bool = False
    norm_eps: float | None = None

    @property
    def offset_columns(self) -> int:
        """Columns whose share of the offset one block adds up."""
        return 64 * self.warps

    @property
    def offset_chunks(self) -> int:
        """Shares of the offset of one weight."""
        return -(-self.grid.format.in_features // self.offset_columns)

    @property
    def grids(self) -> tuple[UnitGrid, ...]:
        """The units of each weight."""
        return tuple(UnitGrid(format, self.order) for format in self.formats)

    @property
    def grid(self) -> UnitGrid:
        """The units of the first weight; what depends on columns and format holds for all."""
        return self.grids[0]

    @property
    def row_tiles(self) -> int:
        """Runs of 8 activations, the width of a tensor-core product."""
        return -(-self.rows // 8)

    @property
    def tile_rows(self) -> int:
        """Activations of a run."""
        return min(self.rows, 8)

    @property
    def warps(self) -> int:
        """Warps of a block; fewer when the sums of many rows need the registers."""
        sums = self.row_tiles * self.order.tiles * (2 if self.shared_tail else 1)
        return 16 if sums <= 8 else 8

    @property
    def column_warps(self) -> int:
        """Warps of a block that split the columns, such that they divide evenly if possible."""
        return math.gcd(self.config.column_warps, self.warps)

    @property
    def row_warps(self) -> int:
        """Warps of a block side by side down the output rows."""
        return self.warps // self.column_warps

    @property
    def slabs_per_row_group(self) -> int:
        """Slabs along the columns of a group."""
        return -(-self.grid.column_units // self.column_warps)

    @property
    def row_groups(self) -> tuple[int, ...]:
        """Row groups of each weight."""
        return tuple(-(-grid.row_units // self.row_warps) for grid in self.grids)

    @property
    def starts(self) -> tuple[int, ...]:
        """First slab of each weight, and the number of all slabs."""
        starts = [0]
        for groups in self.row_groups:
            starts.append(starts[-1] + self.grid.format.num_groups * groups * self.slabs_per_row_group)
        return tuple(starts)

    @property
    def total(self) -> int:
        """All slabs."""
        return self.starts[-1]

    @property
    def blocks(self) -> int:
        """Thread blocks; none is without work."""
        return min(self.config.blocks, self.total)

    def block_of(self, slab: int) -> int:
        """The block that runs a slab."""
        return ((slab + 1) * self.blocks - 1) // self.total

    @property
    def block_slabs(self) -> int:
        """Most slabs of a block."""
        return -(-self.total // self.blocks)

    @property
    def slots_per_group(self) -> int:
        """Most blocks that share one row group."""
        size = self.slabs_per_row_group
        return max(self.block_of(start + size - 1) - self.block_of(start) + 1 for start in range(0, self.total, size))

    @property
    def slots(self) -> int:
        """Partial sums of every output."""
        return self.grid.format.num_groups * self.slots_per_group

    @property
    def out_features(self) -> int:
        """Outputs of all weights together."""
        return sum(format.out_features for format in self.formats)

    @property
    def free_bytes(self) -> int:
        """Shared memory that the plan may divide."""
        return SHARED_MEMORY_BYTES - RESERVED_BYTES

    @property
    def scratch_bytes(self) -> int:
        """Shared memory ahead of the codebooks: through it the warps of a block add their sums."""
        return self.warps * self.grid.unit_rows * self.tile_rows * 4

    @property
    def ring_bytes(self) -> int:
        """Shared memory for the centroids that come through L2, for each codebook that has some."""
        return self.warps * self.order.entries * 32 * ROW_BYTES

    @property
    def shared_tail(self) -> bool:
        """Whether components 8.. of main and residual centroids share one table (`format.shares_tail`)."""
        return shares_tail(self.grid.format)

    @property
    def added(self) -> bool:
        """Whether main and residual centroids are added before the product instead of in its accumulator.

        The sum is rounded once more, but many rows then need half the products.
        """
        return bool(self.grid.format.num_res_centroids) and self.row_tiles > 1 and not self.shared_tail

    @property
    def books(self) -> tuple[Book, ...]:
        """Main codebook and, if there is one, residual codebook."""
        format, planes = self.grid.format, self.grid.planes
        sizes = [format.num_centroids, format.num_res_centroids][: 2 if format.num_res_centroids else 1]
        bits = [format.index_bits, format.res_index_bits]
        shifts = [0, format.index_bits]
        offset = self.scratch_bytes
        if self.shared_tail:
            tail = offset + sum(sizes) * ROW_BYTES
            heads = [offset, offset + sizes[0] * ROW_BYTES]
            return tuple(Book(size, bits[i], shifts[i], size, 1, (heads[i], tail), 0) for i, size in enumerate(sizes))
        free = self.free_bytes - offset
        row = planes * ROW_BYTES
        ring = self.ring_bytes
        resident = [size * row for size in sizes]
        streamed = [False] * len(sizes)
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # The largest leaves first.
            if sum(ring if s else r for s, r in zip(streamed, resident, strict=True)) > free:
                streamed[i] = True
        free -= sum(ring if s else r for s, r in zip(streamed, resident, strict=True))
        books = []
        for i, size in enumerate(sizes):
            replicas, cached = 1, size
            if streamed[i]:
                cached = max(0, min(size - 1, self.config.cached_entries, free // row))
                free -= cached * row
            else:
                while (
                    replicas < 8
                    and 2 * replicas * size <= self.config.replica_entries
                    and replicas * size * row <= free
                ):
                    free -= replicas * size * row
                    replicas *= 2
            plane_bytes = cached * replicas * ROW_BYTES
            offsets = tuple(offset + plane * plane_bytes for plane in range(planes))
            offset += planes * plane_bytes
            books.append(Book(size, bits[i], shifts[i], cached, replicas, offsets, offset))
            offset += ring if streamed[i] else 0
        return tuple(books)

    @property
    def offset_start(self) -> int:
        """Byte offset in shared memory of the warps' sums for the offset."""
        if self.shared_tail:
            tail = max(book.entries for book in self.books)
            return self.books[0].planes[1] + tail * ROW_BYTES
        last = self.books[-1]
        return last.ring + (self.ring_bytes if last.streamed else 0)

    @property
    def x_start(self) -> int:
        """Byte offset in shared memory of the activations as they come; behind them lie the staged ones."""
        return self.offset_start + (self.warps * self.rows * 4 if self.offsets else 0)

    @property
    def x_row_bytes(self) -> int:
        """A row of activations as it comes, and the normalization's weight."""
        return self.grid.format.in_features * 2

    @property
    def x_bytes(self) -> int:
        """The activations as they come."""
        return self.rows * self.x_row_bytes

    @property
    def norm_start(self) -> int:
        """Byte offset in shared memory of the normalization's weight."""
        return self.x_start + self.x_bytes

    @property
    def slab_columns(self) -> int:
        """Columns of a slab."""
        return self.column_warps * self.order.columns

    @property
    def staged_pieces(self) -> int:
        """Pieces of columns that a block stages: those of all its slabs."""
        return self.block_slabs * self.slab_columns // PIECE_COLUMNS

    @property
    def staged_start(self) -> int:
        """Byte offset in shared memory of the staged activations."""
        return self.norm_start + (0 if self.norm_eps is None else self.x_row_bytes)

    @property
    def _staged_end(self) -> int:
        return self.staged_start + self.block_slabs * self.slab_columns * self.rows * 2

    @property
    def stage_x(self) -> bool:
        """Whether blocks permute and scale the activations of their slabs themselves, through shared memory.

        Nothing else gives way to it. Copies of 16 bytes need rows of such.
        """
        return (
            self.config.stage_x
            and self.rows <= (MAX_STAGED_ROWS if self.norm_eps is None else MAX_NORMALIZED_ROWS)
            and self.grid.format.in_features % 8 == 0
            and self.staged_pieces <= _THREAD_PIECES * self.warps * 32
            and self._staged_end <= self.free_bytes
        )

    @property
    def x_ahead(self) -> bool:
        """Whether a warp loads activations from device memory a unit ahead of their use.

        One row is faster without, and more than 8 would take too many registers.
        """
        return self.row_tiles == 1 and self.rows > 1 and not self.stage_x

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self._staged_end if self.stage_x else self.x_start
