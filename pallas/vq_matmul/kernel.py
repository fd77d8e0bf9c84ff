"""The Mosaic GPU kernel: up to 64 rows of activations times packed weights, in one launch.

Each warp takes the indices of a unit into registers, gathers the centroids they name with
`ldmatrix` from shared memory straight into tensor-core operands, and accumulates in float32.
Vectors lie along the output rows, so a gathered block is a 16x16 piece of the weight; main and
residual centroid of a vector meet in the accumulator and need no addition of their own.
Centroids that do not fit shared memory come through L2, copied to a ring in shared memory one unit
ahead of their use.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vptq_jax.pallas import ptx
from vptq_jax.pallas.launch import launch
from vptq_jax.pallas.ptx import Int, Pointer
from vptq_jax.pallas.vq_matmul.packed import load_widths
from vptq_jax.pallas.vq_matmul.plan import PIECE_COLUMNS, Book, Plan


class Operands(NamedTuple):
    """The arrays of a launch, of all but x one for each weight; within the kernel, pointers to them.

    Attributes:
        words: packed indices, uint32 [G, row units, column units, words].
        tables: main and, if there are any, residual and tail table, [G, k, 8 or 16].
        x: the activations [m, in], if the plan stages them or wants offsets.
        norm: the weight [in] of the normalization, in the dtype of x, if the plan normalizes.
        columns: original column of each kernel column, int32, if the plan stages x or decodes; empty for the identity.
        column_scales: of each kernel column, float32, if the plan stages x or decodes.
        runs: the activations by runs of 32 kernel columns [runs, m, 32], if the plan does not stage x.
        offsets: float32 [in], if the plan wants them.
    """

    words: Sequence[Any]
    tables: Sequence[Sequence[Any]]
    x: Any = None
    norm: Any = None
    columns: Sequence[Any] = ()
    column_scales: Sequence[Any] = ()
    runs: Sequence[Any] = ()
    offsets: Sequence[Any] = ()


def partial_products(
    plan: Plan, operands: Operands
) -> tuple[Float[Array, "slots m out"], Float[Array, "weights chunks m"] | None]:
    """Partial sums of `x @ w.T` for the weights of a plan, side by side, and of x times their offsets.

    x is normalized first if the plan says so.

    The product is the sum over slots plus, for each weight, the sum over chunks.
    """
    arrays, structure = jax.tree.flatten(operands)
    outputs = [jax.ShapeDtypeStruct((plan.slots, plan.rows, plan.out_features), jnp.float32)]
    if plan.offsets:
        outputs.append(jax.ShapeDtypeStruct((len(plan.formats), plan.offset_chunks, plan.rows), jnp.float32))

    def emit(pointers: list[Pointer], shared: Int) -> None:
        operands = jax.tree.unflatten(structure, pointers[: len(arrays)])
        Emitter(plan, operands, pointers[len(arrays) :], shared).run()

    results = launch(emit, arrays, outputs, blocks=plan.blocks, warps=plan.warps, shared_bytes=plan.shared_bytes)
    return results[0], results[1] if plan.offsets else None


class Slab:
    """Where a slab lies: weight, group, row group, and the unit of the running warp, or of one beside it."""

    def __init__(self, emitter: Emitter, slab: Int, column_warp: Int | None = None):
        plan = emitter.plan
        self.index = slab
        self.after = [slab >= start for start in plan.starts[1:-1]]
        local = slab - self.of(plan.starts[:-1])
        flat = local // plan.slabs_per_row_group
        self.step = local - flat * plan.slabs_per_row_group
        row_groups = self.of(plan.row_groups)
        if plan.grid.format.num_groups == 1:
            self.group, self.row_group = ptx.constant(0), flat
        else:
            self.group = flat // row_groups
            self.row_group = flat - self.group * row_groups
        row_unit = self.row_group * plan.row_warps + emitter.row_warp
        row_units = self.of([grid.row_units for grid in plan.grids])
        self.row_valid = row_unit < row_units
        row_unit = row_unit.minimum(row_units - 1)  # The last row group may have warps without work of their own.
        self.row_unit = row_unit
        column_unit = self.step * plan.column_warps + (emitter.column_warp if column_warp is None else column_warp)
        self.column_valid = column_unit < plan.grid.column_units
        column_unit = column_unit.minimum(plan.grid.column_units - 1)
        self.unit = (self.group * row_units + row_unit) * plan.grid.column_units + column_unit
        self.column_run = (self.group * plan.grid.column_units + column_unit) * (plan.order.steps // 2)

    def of(self, values: Sequence[Any]) -> Any:
        """The value that belongs to this slab's weight."""
        chosen = values[0]
        for condition, value in zip(self.after, values[1:], strict=True):
            if isinstance(value, Pointer):
                chosen = ptx.choose(condition, value, chosen)
            else:
                chosen = ptx.select(condition, value, chosen)
        return ptx.constant(chosen) if isinstance(chosen, int) else chosen

    def table_set(self, plan: Plan) -> Int:
        """A number for the codebooks this slab needs."""
        part = self.of(range(len(plan.formats)))
        return part * plan.grid.format.num_groups + self.group


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Neighbouring kernel columns whose activations one thread stages.

    Attributes:
        target: address of the first row's.
        columns: original columns.
        scales: their scales.
        valid: whether the columns belong to a unit; None if all do.
    """

    target: Int
    columns: list[Int]
    scales: list[Any]
    valid: Any


class Emitter:
    """Emits the kernel; holds what every step needs. `outputs` are partial sums and, if any, offset shares."""

    def __init__(self, plan: Plan, operands: Operands, outputs: list[Pointer], shared: Int):
        self.plan, self.operands, self.outputs, self.shared = plan, operands, outputs, shared
        self.thread, self.threads = ptx.thread_index(), plan.warps * 32
        self.tables = list(zip(*operands.tables, strict=True))
        self.books = plan.books
        self.block = ptx.block_index()
        self.lane = self.thread & 31
        self.warp = self.thread >> 5
        self.row_warp = self.warp // plan.column_warps
        self.column_warp = self.warp % plan.column_warps
        grid = plan.grid
        # A thread's stream of entries, and the plane of its centroids that it gathers.
        if grid.planes == 1:
            self.stream, self.plane = self.lane, ptx.constant(0)
        else:
            self.stream, self.plane = (self.lane & 7) + ((self.lane >> 4) << 3), (self.lane >> 3) & 1
        self.x_offsets = [
            (((self.lane >> 2) + 8 * tile).minimum(plan.rows - 1)) * 64 + (self.lane & 3) * 16
            for tile in range(plan.row_tiles)
        ]
        self.first = self.block * plan.total // plan.blocks
        self.stop = (self.block + 1) * plan.total // plan.blocks
        self.bases = [self._lane_base(book) for book in self.books]
        self.rings = [
            shared + book.ring + self.warp * (plan.order.entries * 512) + self.lane * 16 if book.streamed else None
            for book in self.books
        ]

    def _lane_base(self, book: Book) -> Int:
        base = self.shared + book.planes[0]
        if len(book.planes) > 1:
            base = base + self.plane * (book.planes[1] - book.planes[0])
        return base + (self.lane & (book.replicas - 1)) * 16 if book.replicas > 1 else base

    def run(self) -> None:
        plan, first, stop = self.plan, self.first, self.stop
        ahead = self._units_ahead()
        start = Slab(self, first)
        following = [Slab(self, (first + i).minimum(stop - 1)) for i in range(1, ahead)]
        units = [self.load_words(slab) for slab in [start, *following]]
        x = self._load_x_unit(start) if plan.x_ahead else []
        pieces = self._load_pieces() if plan.stage_x else []
        share = self._load_offset_share(self.block.minimum(self._offset_shares - 1)) if plan.offsets else None
        self._start_tables(start)
        if share is not None:
            self._reduce_offset_share(share)
        self._finish_tables()
        inverse_rms = [] if plan.norm_eps is None else self._inverse_rms(plan.norm_eps)
        if share is not None:
            self._store_offset_shares(inverse_rms)
        if plan.stage_x:
            self._stage(pieces, inverse_rms)
            ptx.barrier()
        if any(book.streamed for book in self.books):
            self._start_unit(start, units[0], ptx.constant(0) < 1)
        sums = [ptx.float_constant(0.0)] * (4 * self._sums())
        several = len(plan.formats) * plan.grid.format.num_groups > 1
        tables = [start.table_set(plan)] if several else []
        sizes = [plan.grid.stream_words] * ahead + [len(x), len(tables)]
        integers = [word for words in [*units, x, tables] for word in words]

        def body(index: Int, carry: list) -> list:
            parts = iter(Int(value) for value in carry[len(sums) :])
            *units, x, current = [list(itertools.islice(parts, size)) for size in sizes]
            slab = Slab(self, index)
            following = Slab(self, (index + 1).minimum(stop - 1))
            far = following if ahead == 1 else Slab(self, (index + ahead).minimum(stop - 1))
            units.append(self.load_words(far))
            next_x = self._load_x_unit(following) if plan.x_ahead else []
            tables = []
            if several:
                tables = [slab.table_set(plan)]
                with ptx.when(ptx.differ(tables[0], current[0])):
                    ptx.barrier()
                    self.load_tables(slab)
            results = self._unit(slab, units, x, carry[: len(sums)], index + 1 < stop, following)
            ends_group = slab.step.equals(plan.slabs_per_row_group - 1)
            flush = ptx.either(ends_group, (index + 1).equals(stop))
            with ptx.when(flush):
                self._flush(slab, index, results, ends_group)
            zero = ptx.float_constant(0.0)
            results = [ptx.select(flush, zero, value) for value in results]
            return results + [word.value for words in [*units[1:], next_x, tables] for word in words]

        ptx.loop(first, stop, sums + [word.value for word in integers], body)

    @property
    def _offset_shares(self) -> int:
        return self.plan.offset_chunks * len(self.plan.formats)

    def _load_offset_share(self, share: Int) -> tuple[list, list[Int]]:
        """Two columns of a weight's offset, times the norm's weight, and of every row of x, for each thread."""
        plan, columns = self.plan, self.plan.grid.format.in_features
        part = share // plan.offset_chunks
        column = (share - part * plan.offset_chunks) * plan.offset_columns + self.thread * 2
        source = self.operands.offsets[0]
        for i, offset in enumerate(self.operands.offsets[1:], 1):
            source = ptx.choose(part >= i, offset, source)
        inside = column < columns
        column = column.minimum(columns - 2)
        pair = [ptx.as_float(word) for word in ptx.load_cached(source.at(column, 4), 2)]
        x = [ptx.load_cached(self.operands.x.at(column + row * columns, 2), 1)[0] for row in range(plan.rows)]
        if plan.norm_eps is not None:
            factors = ptx.unpack(ptx.load_cached(self.operands.norm.at(column, 2), 1)[0], plan.kind)
            pair = [ptx.multiply(value, factor) for value, factor in zip(pair, factors, strict=True)]
        return [ptx.select(inside, value, ptx.float_constant(0.0)) for value in pair], x

    def _reduce_offset_share(self, share: tuple[list, list[Int]]) -> None:
        """Leaves the sums of every warp in shared memory."""
        pair, x = share
        for row, word in enumerate(x):
            low, high = ptx.unpack(word, self.plan.kind)
            total = ptx.multiply_add(low, pair[0], ptx.multiply(high, pair[1]))
            total = _warp_sum(total)
            with ptx.when(self.lane < 1):
                ptx.store_shared_float(self._offset_place(row, self.warp), total)

    def _offset_place(self, row: Int | int, warp: Int | int) -> Int:
        return self.shared + self.plan.offset_start + (warp + row * self.plan.warps) * 4

    def _store_offset_shares(self, inverse_rms: list) -> None:
        """Writes this block's first share, then computes and writes the others, if shares outnumber blocks."""
        shares, blocks = self._offset_shares, self.plan.blocks
        with ptx.when(self.block < shares):
            self._store_offset_share(self.block, inverse_rms)
        for first in range(blocks, shares, blocks):
            share = self.block + first
            with ptx.when(share < shares):
                ptx.barrier()
                self._reduce_offset_share(self._load_offset_share(share))
                ptx.barrier()
                self._store_offset_share(share, inverse_rms)

    def _store_offset_share(self, share: Int, inverse_rms: list) -> None:
        with ptx.when(self.thread < self.plan.rows):
            total = ptx.load_shared_float(self._offset_place(self.thread, 0))
            for warp in range(1, self.plan.warps):
                total = ptx.add(total, ptx.load_shared_float(self._offset_place(self.thread, warp)))
            for row, inverse in enumerate(inverse_rms):
                total = ptx.select(self.thread.equals(row), ptx.multiply(total, inverse), total)
            ptx.store_global_float(self.outputs[1].at(share * self.plan.rows + self.thread, 4), total)

    def _units_ahead(self) -> int:
        return max(2 if any(book.streamed for book in self.books) else 1, self.plan.config.prefetch)

    def _sums(self) -> int:
        return self.plan.order.tiles * self.plan.row_tiles * (2 if self.plan.shared_tail else 1)

    def load_words(self, slab: Slab) -> list[Int]:
        grid = self.plan.grid
        pointer = slab.of(self.operands.words).at(slab.unit, 4 * grid.streams * grid.stream_words)
        words: list[Int] = []
        for width in load_widths(grid.stream_words):
            place = pointer.at(self.stream, 4 * width).offset(4 * grid.streams * len(words))
            words += ptx.load_stream(place, width)
        return words

    def load_tables(self, slab: Slab) -> None:
        """Copies the codebooks of a slab to shared memory and waits for them."""
        self._start_tables(slab)
        self._finish_tables()

    def _start_tables(self, slab: Slab) -> None:
        shared_tail = self.plan.shared_tail
        for i, book in enumerate(self.books):
            if book.replicas > 1:
                self._copy_replicas(slab, i, book)
            else:
                self._copy_table(slab, i, book.planes[:1] if shared_tail else book.planes, book.entries, book.cached)
        if shared_tail:
            rows = max(book.entries for book in self.books)
            self._copy_table(slab, -1, self.books[0].planes[1:], rows, rows)
        ptx.commit_copies()

    def _copy_table(self, slab: Slab, i: int, planes: Sequence[int], rows: int, kept: int) -> None:
        """Starts the copy of a table's first rows to where its planes lie; neighbouring threads take those of a row."""
        source = slab.of(self.tables[i]).at(slab.group, rows * len(planes) * 16)
        place, target = self.thread, self.shared + planes[0]
        if len(planes) == 2:
            place = self.thread >> 1
            target = target + (self.thread & 1) * (planes[1] - planes[0])
        self._copy_pieces(target + place * 16, source, kept * len(planes), len(planes))

    def _finish_tables(self) -> None:
        ptx.wait_copies(0)
        ptx.barrier()

    def _copy_pieces(self, target: Int, source: Pointer, count: int, planes: int = 1) -> None:
        """Starts copies of 16 bytes each from places side by side; `target` is that of the thread's first."""
        for start in range(0, count, self.threads):
            item = self.thread + start
            inside = None if start + self.threads <= count else item < count
            ptx.copy_async(target + start // planes * 16, source.at(item, 16), 16, inside)

    def _copy_replicas(self, slab: Slab, i: int, book: Book) -> None:
        """Through registers: asynchronous copies that several threads take from one place are slow."""
        row_bytes = len(book.planes) * 16
        source = slab.of(self.tables[i]).at(slab.group, book.entries * row_bytes)
        copies = book.cached * book.replicas
        for plane, offset in enumerate(book.planes):
            target, pieces = self.shared + offset, source.offset(plane * 16)
            items = [(self.thread + start).minimum(copies - 1) for start in range(0, copies, self.threads)]
            rows = [ptx.load_cached(pieces.at(item // book.replicas, row_bytes), 4) for item in items]
            for item, row in zip(items, rows, strict=True):  # A thread without an item repeats the last one.
                ptx.store_shared(target + item * 16, row)

    def _index(self, words: list[Int], entry: int, book: Book) -> Int:
        word, shift = divmod(entry * self.plan.grid.bits + book.shift, 32)
        if shift + book.bits <= 32:
            value = words[word] >> shift
        else:
            value = ptx.funnel_shift_right(words[word], words[word + 1], shift)
        return value if shift + book.bits == 32 else value & ((1 << book.bits) - 1)

    def _start_unit(self, slab: Slab, words: list[Int], condition: Any) -> None:
        for entry in range(self.plan.order.entries):
            self._start_entry(slab, words, entry, condition)

    def _start_entry(self, slab: Slab, words: list[Int], entry: int, condition: Any) -> None:
        """Starts the copies through L2 that an entry needs."""
        row = self.plan.grid.planes * 16
        for i, book in enumerate(self.books):
            ring = self.rings[i]
            if ring is None:
                continue
            source = slab.of(self.tables[i]).at(slab.group, book.entries * row)
            index = self._index(words, entry, book)
            place = source.at(index * self.plan.grid.planes + self.plane, 16)
            ptx.copy_async(ring + entry * 512, place, 16, ptx.both(condition, index >= book.cached))
        ptx.commit_copies()

    def _gather(self, i: int, words: list[Int], entry: int) -> list[Int]:
        book, ring = self.books[i], self.rings[i]
        index = self._index(words, entry, book)
        address = self.bases[i] + index * (16 * book.replicas)
        if ring is not None:
            address = ptx.select(index < book.cached, address, ring + entry * 512)
        return ptx.gather_transposed(address)

    def read(self, slab: Slab, i: int, words: list[Int], entry: int) -> list[Int]:
        """The thread's own centroid of an entry, 8 components (one plane) in 4 words, from codebook i."""
        book, planes = self.books[i], self.plan.grid.planes
        index = self._index(words, entry, book)
        if book.streamed:
            source = slab.of(self.tables[i]).at(slab.group, book.entries * planes * 16)
            return ptx.load_cached(source.at(index * planes + self.plane, 16), 4)
        return ptx.load_shared(self.bases[i] + index * (16 * book.replicas), 4)

    def _load_pieces(self) -> list[_Piece]:
        """Starts the copy of x to shared memory, and loads all that staging it takes besides."""
        plan = self.plan
        pieces = [self._load_piece(start) for start in range(0, plan.staged_pieces, self.threads)]
        self._copy_pieces(self.shared + plan.x_start + self.thread * 16, self.operands.x, plan.x_bytes // 16)
        if plan.norm_eps is not None:
            target = self.shared + plan.norm_start + self.thread * 16
            self._copy_pieces(target, self.operands.norm, plan.x_row_bytes // 16)
        return pieces

    def _load_piece(self, start: int) -> _Piece:
        plan = self.plan
        # A thread without a piece repeats the last one, a block without as many slabs its last one.
        piece = (self.thread + start).minimum(plan.staged_pieces - 1)
        number = piece // (plan.slab_columns // PIECE_COLUMNS)
        within = piece * PIECE_COLUMNS - number * plan.slab_columns
        warp = within // plan.order.columns
        slab = Slab(self, (self.first + number).minimum(self.stop - 1), warp)
        column = slab.column_run * 32 + (within - warp * plan.order.columns)
        columns = [column + i for i in range(PIECE_COLUMNS)]
        if self.operands.columns:
            columns = ptx.load_cached(slab.of(self.operands.columns).at(column, 4), PIECE_COLUMNS)
        scales = ptx.load_cached(slab.of(self.operands.column_scales).at(column, 4), PIECE_COLUMNS)
        run = piece * PIECE_COLUMNS // 32
        target = run * (plan.rows * 64) + (piece - run * (32 // PIECE_COLUMNS)) * (PIECE_COLUMNS * 2)
        return _Piece(
            self.shared + plan.staged_start + target,
            columns,
            [ptx.as_float(scale) for scale in scales],
            self._inside(slab),
        )

    def _inverse_rms(self, eps: float) -> list:
        """1 / rms of every row of x, which lies in shared memory."""
        plan, rows = self.plan, range(self.plan.rows)
        count = plan.x_row_bytes // 16
        totals = [ptx.float_constant(0.0)] * plan.rows
        for start in range(0, count, self.threads):
            piece = (self.thread + start).minimum(count - 1)
            for row in rows:
                total = totals[row]
                for word in ptx.load_shared(self.shared + plan.x_start + (piece + row * count) * 16, 4):
                    for value in ptx.unpack(word, plan.kind):
                        total = ptx.multiply_add(value, value, total)
                inside = None if start + self.threads <= count else self.thread + start < count
                totals[row] = total if inside is None else ptx.select(inside, total, totals[row])
        totals = [_warp_sum(total) for total in totals]
        with ptx.when(self.lane < 1):  # The sums of the product take this memory later.
            for row in rows:
                ptx.store_shared_float(self.shared + (self.warp + row * plan.warps) * 4, totals[row])
        ptx.barrier()
        inverse = []
        for row in rows:
            words = [ptx.load_shared(self.shared + (row * plan.warps + i) * 4, 4) for i in range(0, plan.warps, 4)]
            total = functools.reduce(ptx.add, [ptx.as_float(word) for part in words for word in part])
            mean = ptx.multiply(total, ptx.float_constant(1 / plan.grid.format.in_features))
            inverse.append(ptx.inverse_sqrt(ptx.add(mean, ptx.float_constant(eps))))
        return inverse

    def _stage(self, pieces: list[_Piece], inverse_rms: list) -> None:
        """Writes the activations of the block's slabs to shared memory, by runs of 32 kernel columns."""
        plan, rows = self.plan, range(self.plan.rows)
        for piece in pieces:
            places = [self.shared + plan.x_start + column * 2 for column in piece.columns]
            x = [self._load_columns(places, row * plan.x_row_bytes) for row in rows]
            scales = piece.scales
            if inverse_rms:
                norm = self._load_columns(places, plan.norm_start - plan.x_start)
                scales = [ptx.multiply(scale, factor) for scale, factor in zip(scales, norm, strict=True)]
            for row in rows:
                factors = [ptx.multiply(scale, inverse_rms[row]) for scale in scales] if inverse_rms else scales
                values = [ptx.multiply(value, factor) for value, factor in zip(x[row], factors, strict=True)]
                words = [ptx.pack(values[i], values[i + 1], plan.kind) for i in range(0, len(values), 2)]
                ptx.store_shared(piece.target + row * 64, self._cleared(words, piece.valid))

    def _load_columns(self, places: list[Int], offset: int) -> list:
        """The 16-bit floats in shared memory at these places, `offset` bytes further, as float32."""
        halves = [ptx.load_shared_half(place + offset) for place in places]
        pairs = [ptx.unpack(halves[i] | halves[i + 1] << 16, self.plan.kind) for i in range(0, len(halves), 2)]
        return [value for pair in pairs for value in pair]

    def _inside(self, slab: Slab) -> Any:
        """Whether a slab's unit exists, None if it surely does."""
        return slab.column_valid if self.plan.grid.column_units % self.plan.column_warps else None

    def _cleared(self, words: list[Int], valid: Any) -> list[Int]:
        return words if valid is None else [ptx.select(valid, word, ptx.constant(0)) for word in words]

    def _load_x_unit(self, slab: Slab) -> list[Int]:
        """Activations of a whole unit, for one run of rows."""
        return [word for pair in range(self.plan.order.steps // 2) for word in self._load_x(slab, pair)[0]]

    def _unit(
        self, slab: Slab, units: list[list[Int]], loaded: list[Int], sums: list, more: Any, following: Slab
    ) -> list:
        plan = self.plan
        tiles, row_tiles = plan.order.tiles, plan.row_tiles
        streamed = any(book.streamed for book in self.books)
        sums = list(sums)
        for pair in range(plan.order.steps // 2):
            x = [loaded[4 * pair : 4 * pair + 4]] if loaded else self._load_x(slab, pair)
            for half in (0, 1):
                step = 2 * pair + half
                for tile in range(tiles):
                    entry = step * tiles + tile
                    if streamed:
                        ptx.wait_copies(plan.order.entries - 1)
                        ptx.warp_barrier()
                    blocks = [self._gather(i, units[0], entry) for i in range(len(self.books))]
                    if plan.added:
                        blocks = [[ptx.add_packed(a, b, plan.kind) for a, b in zip(*blocks, strict=True)]]
                    for i, block in enumerate(blocks):
                        first = i * tiles * row_tiles if plan.shared_tail else 0
                        for n in range(row_tiles):
                            at = 4 * (first + tile * row_tiles + n)
                            b = x[n][2 * half : 2 * half + 2]
                            sums[at : at + 4] = ptx.mma(block, b, sums[at : at + 4], plan.kind)
                    if streamed:
                        ptx.warp_barrier()
                        self._start_entry(following, units[1], entry, more)
        return sums

    def _load_x(self, slab: Slab, pair: int) -> list[list[Int]]:
        """Activations of two steps of a unit, for each run of rows."""
        plan = self.plan
        pitch = plan.rows * 64
        if plan.stage_x:
            unit = (slab.index - self.first) * plan.column_warps + self.column_warp
            place = self.shared + plan.staged_start + unit * (plan.order.steps // 2 * pitch) + pair * pitch
            return [ptx.load_shared(place + offset, 4) for offset in self.x_offsets]
        unit = slab.of(self.operands.runs).at(slab.column_run, pitch)
        places = [unit.at(offset, 1).offset(pair * pitch) for offset in self.x_offsets]
        return [self._cleared(ptx.load_cached(place, 4), self._inside(slab)) for place in places]

    def _flush(self, slab: Slab, index: Int, sums: list, ends_group: Any) -> None:
        """Adds the sums of the warps that share output rows and writes them to this block's slot."""
        plan = self.plan
        first_slab = index - slab.step
        first_block = ((first_slab + 1) * plan.blocks - 1) // plan.total
        slot = self.block - first_block
        base_slot = slab.group * plan.slots_per_group
        out_features = slab.of([format.out_features for format in plan.formats])
        starts = [sum(format.out_features for format in plan.formats[:i]) for i in range(len(plan.formats))]
        column = slab.of(starts)
        rows, unit_rows = plan.tile_rows, plan.grid.unit_rows
        items = plan.row_warps * rows * unit_rows
        for n in range(plan.row_tiles):
            self._share_sums(sums, n)
            ptx.barrier()
            for start in range(0, items, self.threads):
                item = self.thread + start
                row_warp = item // (rows * unit_rows)
                within = item - row_warp * (rows * unit_rows)
                row = within // unit_rows
                out = within - row * unit_rows
                out_row = (slab.row_group * plan.row_warps + row_warp) * unit_rows + out
                valid = ptx.both(item < items, ptx.both(out_row < out_features, row + 8 * n < plan.rows))
                with ptx.when(valid):
                    source = self.shared + ((row_warp * (plan.column_warps * rows) + row) * unit_rows + out) * 4
                    value = ptx.load_shared_float(source)
                    for warp in range(1, plan.column_warps):
                        value = ptx.add(value, ptx.load_shared_float(source + warp * (rows * unit_rows * 4)))
                    place = self.outputs[0].at(
                        ((base_slot + slot) * plan.rows + row + 8 * n) * plan.out_features + column + out_row, 4
                    )
                    ptx.store_global_float(place, value)
                    for more in range(1, plan.slots_per_group):
                        # The last block of a row group clears the slots that no block fills.
                        with ptx.when(ptx.both(ends_group, slot + more < plan.slots_per_group)):
                            far = place.offset(more * plan.rows * plan.out_features * 4)
                            ptx.store_global_float(far, ptx.float_constant(0.0))
            ptx.barrier()

    def _share_sums(self, sums: list, n: int) -> None:
        """Writes the sums of one run of rows to shared memory, [warp][row][output]."""
        plan = self.plan
        length, planes, tiles = plan.grid.format.vector_len, plan.grid.planes, plan.order.tiles
        component = self.lane >> 2
        for tile in range(tiles):
            at = 4 * (tile * plan.row_tiles + n)
            values = list(sums[at : at + 4])
            if plan.shared_tail:
                residual = sums[at + 4 * tiles * plan.row_tiles :][:4]
                # Components 8.. of the residual sum lie four threads' rows further down.
                moved = [ptx.shuffle_xor(value, 16) for value in residual[2:]]
                values = [ptx.add(a, b) for a, b in zip(values, [*residual[:2], *moved], strict=True)]
            for i, value in enumerate(values):
                upper, odd = divmod(i, 2)
                row = (self.lane & 3) * 2 + odd
                if planes == 1:
                    out, limit = component + (2 * tile + upper) * length, length
                else:
                    out, limit = component + (tile * length + 8 * upper), length - 8 * upper
                valid = row < plan.tile_rows
                if limit < 8:
                    valid = ptx.both(valid, component < limit)
                place = self.shared + ((self.warp * plan.tile_rows + row) * plan.grid.unit_rows + out) * 4
                with ptx.when(valid):
                    ptx.store_shared_float(place, value)


def _warp_sum(value: Any) -> Any:
    """The sum of a float32 over the threads of the warp, in every one of them."""
    for mask in (16, 8, 4, 2, 1):
        value = ptx.add(value, ptx.shuffle_xor(value, mask))
    return value
