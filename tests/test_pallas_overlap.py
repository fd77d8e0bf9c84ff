"""The product that decodes a weight while it multiplies it: when it runs, what fits, decoding by claims, values."""

import jax
import jax.numpy as jnp
import numpy as np
import ptx_simulator
import pytest
from pallas_cases import TOLERANCE, activations, float64_product, lower, poison, random_weight, relative_error

from vptq_jax.pallas import ptx
from vptq_jax.pallas.launch import launch
from vptq_jax.pallas.vq_matmul import api, mosaic, overlap, pack, vq_matmul
from vptq_jax.pallas.vq_matmul import dequantize as decoding
from vptq_jax.pallas.vq_matmul import kernel as product_kernel
from vptq_jax.pallas.vq_matmul.dequantize import DecodeConfig

OVERLAP = DecodeConfig(overlap=True)
# Every kind of run that a team writes: vectors of one and of two tables, odd ones, one and two codebooks; without
# normalization and permutation; outputs that end within a row group, columns that end within a unit.
CASES = [
    ("v8-k256-256", 576, 448),
    ("v8-k4096", 320, 320),
    ("v6-k4096", 832, 128),
    ("v4-k256", 192, 192),
    ("v2-k64", 320, 64),
    ("v16-k1024", 256, 320),
    ("v12-k256-16", 448, 128),
    ("v5-k32-nonorm-noperm", 384, 192),
]


def _plan(spec, out_features, in_features, rows=2048):
    kernel = jax.eval_shape(pack, random_weight(spec, out_features, in_features))
    return mosaic.make_overlap_plan(kernel, rows)


@pytest.mark.parametrize(("spec", "out_features", "in_features"), CASES)
def test_shared_memory_holds_everything(spec, out_features, in_features):
    plan = _plan(spec, out_features, in_features)
    tiles = 3 * (128 + 256) * 64 * 2 + 128 * plan.epilogue * 2
    assert plan.supported
    assert tiles + plan.shared_bytes <= 225 * 1024  # The compiler wants some for barriers.
    assert 4 * plan.scratch_bytes <= 3 * 128 * 64 * 2  # At first four teams stage where x will lie.
    assert 0 < plan.first_slabs <= plan.total


@pytest.mark.parametrize(
    ("spec", "out_features", "in_features", "rows"),
    [
        ("v8-k256-256-g2", 128, 128, 2048),
        ("v8-k8192", 128, 128, 2048),
        ("v12-k4096-4096", 192, 128, 2048),
        ("v8-k256-256", 136, 128, 2048),
        ("v8-k256-256", 128, 136, 2048),
        ("v8-k256-256", 128, 128, 2047),
    ],
)
def test_not_supported(spec, out_features, in_features, rows):
    assert not _plan(spec, out_features, in_features, rows).supported


def _launches(spec, out_features, in_features, rows, config=None):
    kernel = jax.eval_shape(pack, random_weight(spec, out_features, in_features))
    x = jax.ShapeDtypeStruct((rows, in_features), jnp.bfloat16)
    text = lower(lambda x, w: mosaic.matmul(x, [w], config)[0], x, kernel)
    return "overlapped" if "dot_general" not in text else "decoded first"


@pytest.mark.parametrize(("spec", "out_features", "in_features"), CASES)
@pytest.mark.parametrize("rows", [72, 1024])
def test_lowers_to_cuda(spec, out_features, in_features, rows):
    assert _launches(spec, out_features, in_features, rows, OVERLAP) == "overlapped"


def test_runs_for_large_weights_and_many_rows_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(overlap, "_MIN_WEIGHTS", 256 * 256)
    shape = ("v8-k256", 256, 256)
    assert _launches(*shape, 1024) == "overlapped"
    assert _launches(*shape, 1016) == "decoded first"
    assert _launches("v8-k256", 256, 192, 1024) == "decoded first"
    assert _launches(*shape, 1024, DecodeConfig(overlap=False)) == "decoded first"
    assert _launches("v8-k256-o2v4k16", 256, 300, 1024, OVERLAP) == "decoded first"  # Outlier columns.


def test_lowers_inside_loops_and_shard_map(monkeypatch):
    monkeypatch.setattr(overlap, "_MIN_WEIGHTS", 0)
    monkeypatch.setattr(api, "_why_not_mosaic", lambda *_: None)
    kernel = pack(random_weight("v8-k256", 128, 128))
    x = activations(1024, 128)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        vq_matmul, mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data"), check_vma=False
    )
    for function in (split, lambda x, w: jax.lax.fori_loop(0, 3, lambda _, x: vq_matmul(x, w), x)):
        assert "dot_general" not in lower(function, x, kernel)


# --- decoding by claims, on a simulator ---------------------------------------------------------


def _decoded_by_claims(kernel, blocks, rows):
    """What the blocks decode before and beside the product, [in, out], and the counts of slabs."""
    plan = mosaic.make_overlap_plan(kernel, rows, DecodeConfig(blocks=blocks))
    arrays, structure = jax.tree.flatten(mosaic.decode_operands(kernel))
    slots = plan.row_groups[0] + 1

    def emit(pointers, shared):
        *places, zeros, dense, counts = pointers
        with ptx.when(ptx.both(ptx.block_index() < 1, ptx.thread_index() < slots)):
            place = ptx.thread_index()
            ptx.store_global(counts.at(place, 4), ptx.load_cached(zeros.at(place, 4), 1))
        operands = jax.tree.unflatten(structure, places)
        staging = shared + plan.shared_bytes
        overlap.decode_slabs(plan, operands, dense, counts, shared, staging, first=True)
        with ptx.when(ptx.thread_index() >= 9 * 32):  # The warps of the third warpgroup that decode.
            overlap.decode_slabs(plan, operands, dense, counts, shared, shared, first=False)

    return plan, launch(
        emit,
        [*arrays, jnp.zeros(slots, jnp.uint32)],
        [
            jax.ShapeDtypeStruct(kernel.shape[::-1], kernel.dtype),
            jax.ShapeDtypeStruct((slots,), jnp.uint32),
        ],
        blocks=blocks,
        warps=12,
        shared_bytes=plan.shared_bytes + 4 * plan.scratch_bytes,
    )


@pytest.mark.parametrize(("spec", "out_features", "in_features"), CASES)
@pytest.mark.parametrize(("blocks", "rows"), [(1, 1024), (3, 128)])
def test_claims_decode_every_slab_once(monkeypatch, spec, out_features, in_features, blocks, rows):
    weight = random_weight(spec, out_features, in_features)
    kernel = pack(weight)
    ptx_simulator.use(monkeypatch, product_kernel, decoding, overlap)
    plan, (dense, counts) = _decoded_by_claims(kernel, blocks, rows)
    np.testing.assert_array_equal(counts[:-1], plan.slabs_per_row_group)
    assert counts[-1] >= plan.total
    identity = np.eye(in_features, dtype=np.float32)
    assert relative_error(dense, float64_product(identity, weight)) <= 4e-3


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("spec", "out_features", "in_features"), [*CASES, ("v8-k256-256", 8192, 512)])
@pytest.mark.parametrize("rows", [72, 1160])
def test_agrees_with_float64(spec, out_features, in_features, rows, dtype):
    """Fewer tiles than blocks, and several for each; rows that end within a tile."""
    weight = random_weight(spec, out_features, in_features, dtype)
    x = activations(rows, in_features, dtype)
    kernel = pack(weight)
    product = jax.jit(lambda x, w: mosaic.matmul(x, [w], OVERLAP)[0])
    poison()
    found = product(x, kernel)
    assert relative_error(found, float64_product(x, weight)) <= TOLERANCE[dtype]
    for _ in range(5):
        np.testing.assert_array_equal(found, product(x, kernel))
