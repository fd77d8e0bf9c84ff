"""The Mosaic GPU kernel that decodes one weight for the dense product of many rows.

Warps side by side down the output rows form a team. They decode 16 columns at a time into shared
memory, where the team's outputs of a column lie in one run, and write the runs to device memory as
full lines: vectors alone would reach it as pieces of a few bytes, and their number, not their
bytes, would take the time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from vptq_jax.pallas import ptx
from vptq_jax.pallas.launch import launch
from vptq_jax.pallas.ptx import Int, Pointer
from vptq_jax.pallas.vq_matmul.kernel import Emitter, Operands, Slab
from vptq_jax.pallas.vq_matmul.plan import Config, Plan

_STEP_COLUMNS = 16  # Columns decoded and written together.
_PIECE_BYTES = 16  # What a thread stores at once; runs, and the rows of the result, are multiples of it.
_NOWHERE = 0xFFFFFFFF  # The column of what is padding.


@dataclasses.dataclass(frozen=True)
class DecodeConfig(Config):
    """What may be tuned about the decoding; `column_warps`, `prefetch` and `stage_x` have no meaning here.

    Attributes:
        cached_entries: a codebook too large for shared memory is left to L1 by default.
        team: warps that write runs together: 4, 8 or 16 (runs of fewer may be no multiples of 16 bytes).
    """

    cached_entries: int = 0
    team: int = 4


@dataclasses.dataclass(frozen=True)
class DecodePlan(Plan):
    """One launch that decodes the only weight; the slabs are those of a product with one row."""

    config: DecodeConfig

    @property
    def column_warps(self) -> int:
        """All warps lie side by side down the output rows."""
        return 1

    @property
    def stage_x(self) -> bool:
        """There are no activations."""
        return False

    @property
    def run_rows(self) -> int:
        """Outputs of a column that a team writes together."""
        return self.config.team * self.grid.unit_rows

    @property
    def pitch(self) -> int:
        """Bytes from run to run in the staging buffer, an odd number of pieces: neighbours share no bank."""
        return (2 * self.run_rows // _PIECE_BYTES | 1) * _PIECE_BYTES

    @property
    def buffer_bytes(self) -> int:
        """The staging buffer of one team."""
        return _STEP_COLUMNS * self.pitch

    @property
    def teams(self) -> int:
        """Teams of a block."""
        return self.warps // self.config.team

    @property
    def scratch_bytes(self) -> int:
        """The staging buffers."""
        return self.teams * self.buffer_bytes

    @property
    def ring_bytes(self) -> int:
        """Centroids that do not fit shared memory come through registers."""
        return 0


def transposed_weight(plan: DecodePlan, operands: Operands) -> Float[Array, "in out"]:
    """The weight without its outliers, [in_features, outputs up to a multiple of 8], in the dtype of the tables.

    Args:
        plan: the division of the work.
        operands: the weight's, with its offset if it has one.

    Returns:
        Centroids are added, scaled and offset in float32 and rounded once. Rows of outlier columns,
        and outputs beyond out_features, are undefined.
    """
    format = plan.grid.format
    width = -(-format.out_features // 8) * 8
    arrays, structure = jax.tree.flatten(operands)

    def emit(pointers: list[Pointer], shared: Int) -> None:
        *places, output = pointers
        Decoder(plan, Emitter(plan, jax.tree.unflatten(structure, places), [output], shared), width, shared).run()

    return launch(
        emit,
        arrays,
        jax.ShapeDtypeStruct((format.in_features, width), operands.tables[0][0].dtype),
        blocks=plan.blocks,
        warps=plan.warps,
        shared_bytes=plan.shared_bytes,
    )


class Decoder:
    """Emits the decoding of slabs by the teams of an emitter's threads."""

    def __init__(self, plan: DecodePlan, emitter: Emitter, width: int, staging: Int):
        self.plan, self.emitter, self.width = plan, emitter, width
        self.team = emitter.warp // plan.config.team
        self.team_warp = emitter.warp % plan.config.team
        self.team_thread = (self.team_warp << 5) + emitter.lane
        self.staging = staging + self.team * plan.buffer_bytes
        lane, length = emitter.lane, plan.grid.format.vector_len
        # Where a thread's entries of the first tile lie in the buffer: run, then output (see packed._to_streams).
        first_row = emitter.plane * 8 if plan.grid.planes == 2 else ((lane >> 3) & 1) * length
        run = (lane & 7) + ((lane >> 4) << 3)
        self.place = self.staging + run * plan.pitch + (self.team_warp * plan.grid.unit_rows + first_row) * 2
        self.uploads = self._uploads()

    def run(self) -> None:
        plan, emitter = self.plan, self.emitter
        start = Slab(emitter, emitter.first)
        unit = self._load(start)
        emitter.load_tables(start)
        several = plan.grid.format.num_groups > 1

        def body(index: Int, carry: list) -> list:
            slab = Slab(emitter, index)
            following = self._load(Slab(emitter, (index + 1).minimum(emitter.stop - 1)))
            group = []
            if several:
                group = [slab.group]
                with ptx.when(ptx.differ(slab.group, Int(carry[-1]))):
                    ptx.barrier()
                    emitter.load_tables(slab)
            self._unit(slab, [Int(value) for value in carry[: len(following)]])
            return [value.value for value in following + group]

        carry = unit + ([start.group] if several else [])
        ptx.loop(emitter.first, emitter.stop, [value.value for value in carry], body)

    def _load(self, slab: Slab) -> list[Int]:
        """A unit's words; then, for the thread's column of every step, its original index; then their scales."""
        places = [self._kernel_column(slab, step) for step in range(self.plan.order.steps)]
        indices = places
        if self.emitter.operands.columns:
            columns = self.emitter.operands.columns[0]
            indices = [ptx.load_cached(columns.at(place, 4), 1)[0] for place in places]
        scale = self.emitter.operands.column_scales[0]
        scales = [ptx.load_cached(scale.at(place, 4), 1)[0] for place in places]
        return self.emitter.load_words(slab) + indices + scales

    def _kernel_column(self, slab: Slab, step: int) -> Int:
        """The kernel column that the thread's entries of a step belong to."""
        lane = self.emitter.lane
        column = slab.column_run * 32 + ((lane & 6) << 2) + ((lane >> 4) << 1) + (lane & 1)
        return column + (32 * (step // 2) + 4 * (step % 2))

    def _unit(self, slab: Slab, unit: list[Int]) -> None:
        """Decodes a unit step by step; the gathers of a step run while the one before is written."""
        plan, steps = self.plan, self.plan.order.steps
        words, indices, scales = unit[: -2 * steps], unit[-2 * steps : -steps], unit[-steps:]
        offsets = [self._offset(index) for index in indices]
        row = (slab.row_group * plan.row_warps + self.team * plan.config.team) * plan.grid.unit_rows
        parts = self._gather(slab, words, 0)
        for step in range(steps):
            self._synchronize()
            for tile, part in enumerate(parts):
                self._stage(tile, self._combine(part, ptx.as_float(scales[step]), offsets[step]))
            self._synchronize()
            if step + 1 < steps:
                parts = self._gather(slab, words, step + 1)
            self._upload(row, self._target(slab, step, indices[step]))

    def _synchronize(self) -> None:
        ptx.named_barrier(self.team + 1, 32 * self.plan.config.team)

    def _offset(self, index: Int) -> Any:
        if not self.emitter.operands.offsets:
            return ptx.float_constant(0.0)
        return ptx.as_float(ptx.load_cached(self.emitter.operands.offsets[0].at(index, 4), 1)[0])

    def _target(self, slab: Slab, step: int, index: Int) -> Int:
        """The row of the result that a column goes to."""
        grid = self.plan.grid
        if grid.padded_columns == grid.format.group_size:
            return index
        local = self._kernel_column(slab, step) - slab.group * grid.padded_columns
        return ptx.select(local < grid.format.group_size, index, _NOWHERE)

    def _gather(self, slab: Slab, words: list[Int], step: int) -> list[list[list[Int]]]:
        """For every tile the thread's centroid from each codebook, 8 components in 4 words."""
        tiles, books = self.plan.order.tiles, range(len(self.plan.books))
        return [
            [self.emitter.read(slab, i, words, entry) for i in books]
            for entry in range(step * tiles, step * tiles + tiles)
        ]

    def _combine(self, parts: list[list[Int]], scale: Any, offset: Any) -> list[Int]:
        """The 8 values of the weight, in 4 words."""
        kind = self.plan.kind
        if self.plan.shared_tail:  # The upper half of a tail row is the residual's.
            upper = self.emitter.plane.equals(1)
            moved = [ptx.select(upper, tail, head) for head, tail in zip(parts[1][:2], parts[1][2:], strict=True)]
            parts = [parts[0], [*moved, *parts[1][2:]]]
        combined = []
        for words in zip(*parts, strict=True):
            values = list(ptx.unpack(words[0], kind))
            if len(words) > 1:
                values = [ptx.add(a, b) for a, b in zip(values, ptx.unpack(words[1], kind), strict=True)]
            low, high = (ptx.multiply_add(value, scale, offset) for value in values)
            combined.append(ptx.pack(low, high, kind))
        return combined

    def _stage(self, tile: int, values: list[Int]) -> None:
        """Stores a vector (one plane of it) to its run; the width of the stores follows from its alignment."""
        length, planes = self.plan.grid.format.vector_len, self.plan.grid.planes
        width = next(width for width in (8, 4, 2, 1) if length % width == 0)
        place = self.place + tile * (3 - planes) * length * 2
        common = length - 8 if planes == 2 else length  # Components beyond belong to the lower plane alone.
        for start in range(0, common, width):
            self._store(place + 2 * start, values, start, width)
        if planes == 2 and common < 8:
            with ptx.when(self.emitter.plane < 1):
                for start in range(common, 8, width):
                    self._store(place + 2 * start, values, start, width)

    def _store(self, place: Int, values: list[Int], start: int, width: int) -> None:
        if width == 1:
            ptx.store_shared_half(place, values[start // 2] >> (16 * (start % 2)))
        else:
            ptx.store_shared(place, values[start // 2 : (start + width) // 2])

    def _upload(self, row: Int, column: Int) -> None:
        """Writes the runs of a step, whose first output is `row`."""
        # Measured: lines that leave L2 early are 1 to 4 percent faster, where two planes do not slow all down.
        early = self.plan.grid.planes == 1
        for upload in self.uploads:
            # The column of a run is known to the threads that decode it.
            target = ptx.shuffle(column, upload.holder)
            start = row + upload.row
            valid = ptx.both(target < self.plan.grid.format.in_features, start < self.width)
            if upload.exists is not None:
                valid = ptx.both(valid, upload.exists)
            with ptx.when(valid):
                place = self.emitter.outputs[0].at(target, self.width * 2).at(start, 2)
                ptx.store_global(place, ptx.load_shared(upload.source, 4), evict_first=early)

    def _uploads(self) -> list[_Upload]:
        """The pieces that a thread copies, neighbours by neighbours."""
        pieces = 2 * self.plan.run_rows // _PIECE_BYTES
        threads, total = 32 * self.plan.config.team, _STEP_COLUMNS * pieces
        uploads = []
        for first in range(0, total, threads):
            exists = None if first + threads <= total else self.team_thread + first < total
            item = (self.team_thread + first).minimum(total - 1)
            run = item // pieces
            piece = item - run * pieces
            source = self.staging + run * self.plan.pitch + piece * _PIECE_BYTES
            uploads.append(_Upload(source, _holder(run), piece * (_PIECE_BYTES // 2), exists))
        return uploads


@dataclasses.dataclass(frozen=True)
class _Upload:
    """A copy from the staging buffer to device memory: what one thread does of a step.

    Attributes:
        source: address in the buffer.
        holder: lane whose entries belong to the same column.
        row: first output, within the run.
        exists: whether this thread has a copy to make, None if every thread has.
    """

    source: Int
    holder: Int
    row: Int
    exists: Any


def _holder(run: Int) -> Int:
    return (run & 7) + ((run >> 3) << 4)
