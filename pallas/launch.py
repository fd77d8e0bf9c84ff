"""Launches of kernels that are written in PTX instructions (`ptx`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from vptq_jax.pallas import ptx
from vptq_jax.pallas.ptx import Int, Pointer


def launch(
    emit: Callable[[list[Pointer], Int], None],
    operands: Any,
    out_type: Any,
    *,
    blocks: int,
    warps: int,
    shared_bytes: int,
) -> Any:
    """Runs a kernel on a Hopper GPU.

    Args:
        emit: called once while tracing, with pointers to operands and results, in this order, and with the address of
            the block's shared memory; emits the code of one thread.
        operands: arrays.
        out_type: `jax.ShapeDtypeStruct`, one or a list.
        blocks: thread blocks.
        warps: warps of a block, a multiple of 4.
        shared_bytes: shared memory of a block, a multiple of 4.

    Returns:
        What `out_type` names.
    """

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def run(_: Any, *refs: Any) -> None:
            *arrays, shared = refs
            emit([ptx.Pointer.of(array) for array in arrays], ptx.shared_address(shared))

        run(*refs)

    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warps // 4,
        thread_name="warpgroup",
        scratch_types=(plgpu.SMEM((shared_bytes // 4,), jnp.uint32),),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*operands)
