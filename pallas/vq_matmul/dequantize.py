"""The Mosaic GPU kernel that decodes one weight for the dense product of many rows.

A warp decodes one unit at a time: every thread reads a centroid of 8 components with one load and
stores it with one store where the transposed weight, [columns, outputs], wants it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, UInt

from vptq_jax.pallas import ptx
from vptq_jax.pallas.ptx import Int, Pointer
from vptq_jax.pallas.vq_matmul.kernel import Emitter, Slab
from vptq_jax.pallas.vq_matmul.plan import Plan

CONSTANT_ROWS = 8  # Rows of ones below the weight: what multiplies them is added to every output.
_BATCH = 8  # Entries whose centroids a thread loads before it stores the first.


def transposed_weight(
    plan: Plan, words: UInt[Array, "G rows columns words"], tables: Sequence[Float[Array, "G k p"]]
) -> Float[Array, "columns out"]:
    """The weight by kernel columns, [G * padded columns + CONSTANT_ROWS, outputs up to a multiple of 8].

    Columns are permuted, unscaled and centred as in the tables; the rows below them hold ones.
    """
    grid = plan.grid
    columns = grid.layout.num_groups * grid.padded_columns
    width = -(-grid.layout.out_features // 8) * 8

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def emit(_: Any, *refs: Any) -> None:
            *inputs, output, shared = refs
            pointers = [Pointer.of(ref) for ref in inputs]
            emitter = Emitter(plan, [[pointers[0], *pointers]], Pointer.of(output), ptx.shared_address(shared))
            _Decoder(emitter, width).run()

        emit(*refs)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((columns + CONSTANT_ROWS, width), tables[0].dtype),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=plan.warps // 4,
        thread_name="warpgroup",
        scratch_types=(plgpu.SMEM((plan.shared_bytes // 4,), jnp.uint32),),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(words, *tables)


class _Decoder:
    def __init__(self, emitter: Emitter, width: int):
        self.emitter, self.plan, self.width = emitter, emitter.plan, width

    def run(self) -> None:
        plan, emitter = self.plan, self.emitter
        first = emitter.block * plan.total // plan.blocks
        stop = (emitter.block + 1) * plan.total // plan.blocks
        start = Slab(emitter, first)
        emitter.load_tables(start)
        self._write_ones()

        def body(index: Int, carry: list) -> list:
            slab = Slab(emitter, index)
            following = emitter.load_words(Slab(emitter, (index + 1).minimum(stop - 1)))
            count = plan.grid.stream_words
            group = []
            if plan.grid.layout.num_groups > 1:
                group = [slab.group.value]
                with ptx.when(ptx.differ(slab.group, Int(carry[-1]))):
                    ptx.barrier()
                    emitter.load_tables(slab)
            with ptx.when(ptx.both(slab.row_valid, slab.column_valid)):
                self._unit(slab, [Int(word) for word in carry[:count]])
            return [word.value for word in following] + group

        words = [word.value for word in emitter.load_words(start)]
        ptx.loop(first, stop, words + ([start.group.value] if plan.grid.layout.num_groups > 1 else []), body)

    def _write_ones(self) -> None:
        """The constant rows, by the first block."""
        emitter = self.emitter
        ones = ptx.constant(0x3F803F80 if self.plan.kind == "bf16" else 0x3C003C00)
        columns = self.plan.grid.layout.num_groups * self.plan.grid.padded_columns
        chunks = CONSTANT_ROWS * self.width // 8
        with ptx.when(emitter.block < 1):
            for start in range(0, chunks, emitter.threads):
                item = emitter.thread + start
                with ptx.when(item < chunks):
                    place = emitter.output.offset(columns * self.width * 2).at(item, 16)
                    ptx.store_global(place, [ones] * 4)

    def _unit(self, slab: Slab, words: list[Int]) -> None:
        plan, emitter, grid = self.plan, self.emitter, self.plan.grid
        length, tiles = grid.layout.vector_len, plan.order.tiles
        lane = emitter.lane
        # The column of step 0 that this thread's entries belong to (see layout._to_streams).
        column = slab.column_run * 32 + ((lane & 6) << 2) + ((lane >> 4) << 1) + (lane & 1)
        row = slab.row_unit * grid.unit_rows
        row = row + (emitter.plane * 8 if grid.planes == 2 else ((lane >> 3) & 1) * length)
        for start in range(0, plan.order.entries, _BATCH):
            batch = range(start, min(start + _BATCH, plan.order.entries))
            centroids = [self._centroid(slab, words, entry) for entry in batch]
            for entry, centroid in zip(batch, centroids, strict=True):
                step, tile = divmod(entry, tiles)
                entry_column = column + (32 * (step // 2) + 4 * (step % 2))
                self._store(entry_column, row + tile * (3 - grid.planes) * length, centroid)

    def _centroid(self, slab: Slab, words: list[Int], entry: int) -> list[Int]:
        parts = [self.emitter.read(slab, i, words, entry) for i in range(len(self.plan.books))]
        if len(parts) == 1:
            return parts[0]
        if self.plan.shared_tail:  # The upper half of a tail row is the residual's.
            upper = self.emitter.plane.equals(1)
            parts[1][:2] = [
                ptx.select(upper, tail, head) for head, tail in zip(parts[1][:2], parts[1][2:], strict=True)
            ]
        return [ptx.add_packed(a, b, self.plan.kind) for a, b in zip(*parts, strict=True)]

    def _store(self, column: Int, row: Int, centroid: list[Int]) -> None:
        length = self.plan.grid.layout.vector_len
        width = 8 if length % 8 == 0 else 4 if length % 4 == 0 else 2
        place = self.emitter.output.at(column, self.width * 2).at(row, 2)
        for start in range(0, min(length, 8), width):
            valid = row + start < self.width
            if self.plan.grid.planes == 2 and start >= length - 8:
                valid = ptx.both(valid, self.emitter.plane < 1)
            with ptx.when(valid):
                ptx.store_global(place.offset(2 * start), centroid[start // 2 : (start + width) // 2])
