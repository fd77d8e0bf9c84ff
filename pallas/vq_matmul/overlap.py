"""The Mosaic GPU kernel for many rows: a weight is decoded while it is multiplied.

A persistent dense product on the tensor cores. Of the three warpgroups of a block two multiply; in
the third one warp fetches tiles to shared memory, and three decode the weight into device memory
(`Decoder`), in the order in which the product needs it. Decoding takes few issue slots and hides
behind the tensor cores; only what the first tiles need is decoded before them, by all warps.

Slabs of the weight are claimed, not assigned: a block that waits for a row group waits for blocks
that run, however many of them the device holds at once.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from vptq_jax.pallas import ptx
from vptq_jax.pallas.ptx import Int, Pointer
from vptq_jax.pallas.vq_matmul.dequantize import DecodePlan, Decoder
from vptq_jax.pallas.vq_matmul.kernel import Crew, Emitter, Operands, Slab
from vptq_jax.pallas.vq_matmul.packed import ROW_BYTES

# The tile of a block: rows of x and outputs, and the columns that are fetched at once.
_ROWS, _OUTPUTS, _DEPTH = 128, 256, 64
_STAGES = 3  # Fetched ahead; a fourth is no faster (measured).
_WARPGROUPS = 3
_MULTIPLIERS = 2  # Warpgroups that share the rows of a tile.
_SHARE = _ROWS // _MULTIPLIERS
TEAM = 3  # Warps that decode a slab together: those beside the warp that fetches.
_FIRST_BARRIER = 8  # Named barrier of the first team; the compiler takes those from 0 to 3.
_MIN_ROWS, _MIN_WEIGHTS = 1024, 1 << 25
_CLAIM_BYTES = 16  # Behind the staging buffer of a team.


@dataclasses.dataclass(frozen=True)
class OverlapPlan(DecodePlan):
    """A launch that decodes the only weight and multiplies it with x [x_rows, in_features].

    Each team takes slabs of its own, so they are those of a decoding by blocks of one team.
    """

    x_rows: int = dataclasses.field(kw_only=True)

    @property
    def warps(self) -> int:
        """Those of a team."""
        return self.config.team

    @property
    def scratch_bytes(self) -> int:
        """The staging buffer of a team and the number of the slab that it takes next."""
        return self.buffer_bytes + _CLAIM_BYTES

    @property
    def free_bytes(self) -> int:
        """What the tiles of the product leave."""
        return self._beside_tiles - 2 * _ROWS * self.epilogue

    @property
    def _beside_tiles(self) -> int:
        return super().free_bytes - 2 * _STAGES * (_ROWS + _OUTPUTS) * _DEPTH

    @property
    def epilogue(self) -> int:
        """Outputs of a row that a warpgroup writes at once: as many as the codebooks leave room for."""
        format = self.grid.format
        tables = (format.num_centroids + format.num_res_centroids) * self.grid.planes * ROW_BYTES
        room = self._beside_tiles - self.scratch_bytes - tables
        return next((width for width in (128, 64, 32) if 2 * _ROWS * width <= room), 16)

    @property
    def row_tiles_of_x(self) -> int:
        """Tiles down the rows of x, which follow each other in the order of tiles."""
        return -(-self.x_rows // _ROWS)

    @property
    def tiles(self) -> int:
        """All tiles."""
        return self.row_tiles_of_x * -(-self.out_features // _OUTPUTS)

    @property
    def steps(self) -> int:
        """Pieces of a tile's columns, fetched one by one."""
        return self.grid.format.in_features // _DEPTH

    @property
    def first_slabs(self) -> int:
        """Slabs that all warpgroups decode first: what the first tiles of those blocks need that have most tiles."""
        most = self.tiles % self.config.blocks or self.config.blocks
        outputs = -(-most // self.row_tiles_of_x) * _OUTPUTS
        return min(self.total, -(-outputs // self.run_rows) * self.slabs_per_row_group)

    @property
    def supported(self) -> bool:
        """Whether the launch can run: one group, codebooks that fit beside the tiles, and whole pieces of tiles.

        Copies of tiles take pieces of 8 rows and 64 columns; what is beyond the end of an array they leave out.
        """
        format = self.grid.format
        return (
            format.num_groups == 1
            and not self.shared_tail
            and self.run_rows % 8 == 0
            and self.x_rows % 8 == 0
            and format.in_features % _DEPTH == 0
            and format.out_features % 64 == 0
            and not any(book.streamed for book in self.books)
        )

    @property
    def worthwhile(self) -> bool:
        """Whether it is faster than decoding first: a large weight and many rows (measured on an H100).

        The first tiles wait for their part of the weight, and the tensor cores lose a tenth of their
        rate to the decoding beside them: a small weight is decoded in less.
        """
        format = self.grid.format
        return self.x_rows >= _MIN_ROWS and format.in_features * format.out_features >= _MIN_WEIGHTS


def product(plan: OverlapPlan, x: Float[Array, "m in"], operands: Operands) -> Float[Array, "m out"]:
    """`x @ w.T` in one launch, with the weight rounded to the dtype of x; sums are float32.

    Args:
        plan: the division of the work, `supported`.
        x: the activations, in the dtype of the tables.
        operands: as for `transposed_weight`; the weight has no outlier columns.
    """
    arrays, structure = jax.tree.flatten(operands)
    blocks = plan.config.blocks

    def body(*refs: Any) -> None:
        x_ref, refs = refs[0], refs[1:]
        packed, (y, dense, x_tiles, w_tiles, y_tiles, shared, full, empty) = refs[: len(arrays)], refs[len(arrays) :]
        # Decoded slabs of every row group, and all claimed slabs.
        counts = pl.get_global(plgpu.SemaphoreType.REGULAR((plan.row_groups[0] + 1,)))
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        block_tiles = lax.div(plan.tiles + (blocks - 1) - block, blocks)

        def each_tile(run: Any) -> None:
            def one(i: Any, _: Any) -> None:
                tile = block + i * blocks
                row = lax.rem(tile, plan.row_tiles_of_x) * _ROWS
                run(i * plan.steps, row, lax.div(tile, plan.row_tiles_of_x) * _OUTPUTS)

            lax.fori_loop(0, block_tiles, one, None)

        def multiply() -> None:
            def one_tile(first_step: Any, row: Any, output: Any) -> None:
                def accumulate(sums: Any) -> None:
                    def step(k: Any, _: Any) -> None:
                        stage = lax.rem(first_step + k, _STAGES)
                        plgpu.barrier_wait(full.at[stage])
                        share = x_tiles.at[stage, pl.ds(warpgroup * _SHARE, _SHARE)]
                        plgpu.wgmma(sums, share, w_tiles.at[stage])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[stage])

                    lax.fori_loop(0, plan.steps, step, None)
                    rounded = sums[...].astype(x.dtype)
                    for start in range(0, _OUTPUTS, plan.epilogue):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        y_tiles[warpgroup] = rounded[:, start : start + plan.epilogue]
                        plgpu.commit_smem()
                        place = y.at[pl.ds(row + warpgroup * _SHARE, _SHARE), pl.ds(output + start, plan.epilogue)]
                        plgpu.copy_smem_to_gmem(y_tiles.at[warpgroup], place)

                pl.run_scoped(accumulate, plgpu.ACC((_SHARE, _OUTPUTS), jnp.float32))

            each_tile(one_tile)
            plgpu.wait_smem_to_gmem(0)

        def fetch() -> None:
            def one_tile(first_step: Any, row: Any, output: Any) -> None:
                def wait(group: Any, _: Any) -> None:
                    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
                    def emit(_: Any, counts: Any, group: Any) -> None:
                        place = Pointer.of(counts).at(Int(group.registers.flat[0]), 4)
                        ptx.wait_count(place, plan.slabs_per_row_group)

                    emit(counts, group)

                last = lax.min(lax.div(output + (_OUTPUTS - 1), plan.run_rows), plan.row_groups[0] - 1)
                lax.fori_loop(lax.div(output, plan.run_rows), last + 1, wait, None)

                def step(k: Any, _: Any) -> None:
                    stage = lax.rem(first_step + k, _STAGES)

                    @pl.when(first_step + k >= _STAGES)
                    def wait_for_room() -> None:
                        plgpu.barrier_wait(empty.at[stage])

                    piece = pl.ds(k * _DEPTH, _DEPTH)
                    plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, _ROWS), piece], x_tiles.at[stage], full.at[stage])
                    plgpu.copy_gmem_to_smem(dense.at[piece, pl.ds(output, _OUTPUTS)], w_tiles.at[stage], full.at[stage])

                lax.fori_loop(0, plan.steps, step, None)

            each_tile(one_tile)

        def decode(staging: Any, transforms: tuple, *, first: bool) -> None:
            @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * (len(arrays) + 3), plgpu.RefType(transforms)))
            def emit(_: Any, *refs: Any) -> None:
                *places, output, counts, shared, staging = refs
                decode_slabs(
                    plan,
                    jax.tree.unflatten(structure, [Pointer.of(place) for place in places]),
                    Pointer.of(output),
                    Pointer.of(counts),
                    ptx.shared_address(shared),
                    ptx.shared_address(staging),
                    first=first,
                )

            emit(*packed, dense, counts, shared, staging)

        def assist() -> None:
            others = functools.partial(decode, shared, (), first=False)
            plgpu.warp_map(lambda warp: lax.cond(warp == 0, fetch, others))

        # No tile is fetched yet: the teams stage in the memory of the tiles.
        decode(x_tiles, in_tiles, first=True)
        lax.cond(warpgroup < _MULTIPLIERS, multiply, assist)

    in_tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    run = min(plan.epilogue, 64)
    out_tiles = (plgpu.TilingTransform((8, run)), plgpu.SwizzleTransform(2 * run))
    y, _ = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((plan.x_rows, plan.out_features), x.dtype),
            jax.ShapeDtypeStruct((plan.grid.format.in_features, plan.out_features), x.dtype),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((_STAGES, _ROWS, _DEPTH), x.dtype, transforms=in_tiles),
            plgpu.SMEM((_STAGES, _DEPTH, _OUTPUTS), x.dtype, transforms=in_tiles),
            plgpu.SMEM((_MULTIPLIERS, _SHARE, plan.epilogue), x.dtype, transforms=out_tiles),
            plgpu.SMEM((plan.shared_bytes // 4,), jnp.uint32),
            plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=_MULTIPLIERS, num_barriers=_STAGES),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x, *arrays)
    return y


def decode_slabs(
    plan: OverlapPlan,
    operands: Operands,
    output: Pointer,
    counts: Pointer,
    shared: Int,
    staging: Int,
    *,
    first: bool,
) -> None:
    """Emits what the threads of a team do to decode slabs.

    Args:
        plan: the division of the work.
        operands: pointers.
        output: the dense weight.
        counts: decoded slabs of each row group, then claimed slabs.
        shared: address of the codebooks' memory.
        staging: address of the teams' staging buffers.
        first: all threads of the block are here; they load the codebooks, decode what the block's first
            tile needs, and wait for each other.
    """
    thread, threads = ptx.thread_index(), 32 * plan.warps
    if first:
        everyone = Emitter(plan, operands, [], shared, Crew(thread, 128 * _WARPGROUPS, ptx.barrier))
        everyone.load_tables(Slab(everyone, ptx.constant(0)))
        staging = staging + thread // threads * plan.scratch_bytes
    name = thread // threads + _FIRST_BARRIER
    team = Crew(thread % threads, threads, lambda: ptx.named_barrier(name, threads))
    decoder = Decoder(plan, Emitter(plan, operands, [output], shared, team), plan.out_features, staging, name)
    decoder.run_claimed(
        counts.offset(4 * plan.row_groups[0]),
        plan.first_slabs if first else plan.total,
        counts,
        staging + plan.buffer_bytes,
    )
    if first:
        ptx.barrier()
