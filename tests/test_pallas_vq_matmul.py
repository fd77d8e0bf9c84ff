"""`vq_matmul`: the kernel order, every implementation against float64, lowering, derivatives, transformations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import ptx_simulator
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pallas_cases import (
    CASES,
    TOLERANCE,
    activations,
    float64_product,
    lower,
    poison,
    random_weight,
    relative_error,
)

from vptq_jax.format import Format
from vptq_jax.pallas.vq_matmul import (
    RMS,
    api,
    choose_order,
    mosaic,
    pack,
    packed,
    unpack,
    vq_matmul,
    vq_matmuls,
)
from vptq_jax.pallas.vq_matmul import dequantize as decoding
from vptq_jax.pallas.vq_matmul import kernel as product_kernel
from vptq_jax.pallas.vq_matmul.dequantize import DecodeConfig
from vptq_jax.pallas.vq_matmul.packed import Order
from vptq_jax.pallas.vq_matmul.plan import Config, Plan

# Besides `CASES`: vectors of odd length in both forms of table, outputs in several row groups.
SIMULATED_CASES = [
    ("v9-k4096-4096", 70, 130),
    ("v3-k4096-16", 1100, 66),
    ("v15-k256-256", 700, 64),
    ("v14-k256", 300, 64),
    ("v6-k4096", 1700, 128),
]


def _assert_same(first, second):
    leaves = list(zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in leaves:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --- the kernel order ---------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    vector_len=st.integers(1, 16),
    out_features=st.integers(1, 140),
    columns=st.integers(1, 90),
    groups=st.integers(1, 3),
    order=st.sampled_from([Order(4, 8), Order(4, 2), Order(2, 2), Order(4, 4)]),
)
def test_streams_lose_nothing(vector_len, out_features, columns, groups, order):
    weight = Format.of(f"v{vector_len}-k65536-g{groups}", (out_features, columns * groups))
    grid = packed.UnitGrid(weight, order)
    shape = (groups, weight.num_vectors, columns)
    index = np.random.default_rng(columns).integers(0, 1 << 16, shape, np.uint32)
    streams = packed._to_streams(jnp.asarray(index), grid)
    assert streams.shape == (*grid.words_shape[:3], grid.streams, order.entries)
    np.testing.assert_array_equal(packed._from_streams(streams, grid), index)


@pytest.mark.parametrize("bits", [(8, 0), (12, 0), (16, 8), (11, 0), (3, 2)])
def test_words_lose_nothing(bits):
    """Loads of 4, 2 and 1 words, and entries across word borders."""
    residual = f"-{1 << bits[1]}" if bits[1] else ""
    weight = Format.of(f"v8-k{1 << bits[0]}{residual}", (128, 128))
    grid = packed.UnitGrid(weight, Order(4, 8))
    rng = np.random.default_rng(0)
    shape = (*grid.words_shape[:3], grid.streams, grid.order.entries)
    streams = [jnp.asarray(rng.integers(0, 1 << b, shape, np.uint32)) if b else None for b in bits]
    words = packed._pack_units(*streams, grid)
    assert words.shape == grid.words_shape
    for found, expected in zip(packed._unpack_units(words, grid), streams, strict=True):
        assert (found is None) == (expected is None)
        assert expected is None or np.array_equal(found, expected)


@pytest.mark.parametrize(("spec", "out_features", "in_features"), [CASES[0], CASES[4], CASES[-1]])
def test_chosen_order_loses_nothing(spec, out_features, in_features):
    weight = random_weight(spec, out_features, in_features)
    _assert_same(weight, unpack(pack(weight)))


@pytest.mark.parametrize(("spec", "bits"), [("v8-k256-256", 16), ("v8-k4096", 12), ("v8-k256", 8), ("v8-k2048", 11)])
def test_kernel_order_moves_exactly_the_index_bits(spec, bits):
    weight = Format.of(spec, (1024, 4096))
    grid = packed.UnitGrid(weight, choose_order([weight]))
    assert 32 * np.prod(grid.words_shape) == weight.num_vectors * weight.group_size * bits


def test_stream_of_a_thread():
    """One index, followed by hand from its vector and column to its thread and entry."""
    weight = random_weight("v8-k256-nonorm-noperm", 64, 128)
    order = Order(4, 8)
    main, _ = weight.unpack()
    streams = packed._to_streams(main, packed.UnitGrid(weight.format, order))
    # Block 2 of the unit's rows, its second vector; columns 32 * 1 + 8 * 3 + 4 * 1 + 2 * 1 + 0.
    thread, entry = 2 * 3 + 8 * 1 + 16 * 1, (2 * 1 + 1) * 4 + 2
    assert streams[0, 0, 0, thread, entry] == main[0, 5, 62]


def test_packing_says_why_it_cannot():
    with pytest.raises(NotImplementedError, match="vector length 24"):
        pack(random_weight("v24-k16", 48, 32))
    with pytest.raises(NotImplementedError, match="float32"):
        pack(random_weight("v8-k16", 48, 32), dtype=jnp.float32)


# --- the division of the work -------------------------------------------------------------------


@settings(max_examples=40)
@given(
    outs=st.lists(st.integers(1, 1500), min_size=1, max_size=3),
    columns=st.integers(1, 1500),
    groups=st.integers(1, 3),
    rows=st.integers(1, 64),
    blocks=st.integers(1, 132),
    column_warps=st.sampled_from([1, 2, 4, 16]),
)
def test_every_row_group_has_slots_for_its_blocks(outs, columns, groups, rows, blocks, column_warps):
    formats = tuple(Format.of(f"v8-k256-g{groups}", (out, columns * groups)) for out in outs)
    plan = Plan(formats, Order(4, 4), rows, "bf16", Config(blocks, column_warps))
    size = plan.slabs_per_row_group
    for start in range(0, plan.total, size):
        owners = {plan.block_of(slab) for slab in range(start, start + size)}
        assert owners == set(range(min(owners), max(owners) + 1))
        assert len(owners) <= plan.slots_per_group
    for slab in range(plan.total):
        block = plan.block_of(slab)
        assert block * plan.total // plan.blocks <= slab < (block + 1) * plan.total // plan.blocks


@pytest.mark.parametrize(("spec", "out_features", "in_features"), CASES)
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_shared_memory_fits(spec, out_features, in_features, rows):
    kernel = jax.eval_shape(pack, random_weight(spec, out_features, in_features))
    for plan in (mosaic.make_plan([kernel], rows), mosaic.make_decode_plan(kernel)):
        assert plan.shared_bytes <= 227 * 1024
        for book in plan.books:
            assert all(offset % 16 == 0 for offset in book.planes)


def test_staging_gives_way():
    """To rows off 16 bytes, to codebooks that fill shared memory, to many rows, to long rows and to the user."""

    def staged(spec, in_features=4096, rows=1, **options):
        return Plan((Format.of(spec, (4096, in_features)),), Order(4, 4), rows, "bf16", Config(**options)).stage_x

    assert staged("v8-k256-256")
    assert staged("v8-k256-256", 4096, 4)
    assert staged("v8-k4096-4096", 14336)
    assert not staged("v8-k256-256", 4100)
    assert not staged("v8-k65536")
    assert not staged("v8-k256-256", 4096, 5)
    assert not staged("v8-k4096-4096", 14336, 4)
    assert not staged("v8-k256-256", stage_x=False)


# --- lowering -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "out_features", "in_features"), CASES)
@pytest.mark.parametrize("rows", [1, 64, 100])
def test_lowers_to_cuda(spec, out_features, in_features, rows):
    kernel = jax.eval_shape(pack, random_weight(spec, out_features, in_features))
    x = jax.ShapeDtypeStruct((rows, in_features), jnp.bfloat16)
    lower(lambda x, w: mosaic.matmul(x, [w]), x, kernel)


def test_alike_weights_share_one_launch():
    order = Order(4, 4)
    kernels = [pack(random_weight("v8-k256-256", out, 256, seed=out), order) for out in (128, 64, 64)]
    text = lower(lambda x, w: api._matmuls(x, w, None, x.dtype), activations(3, 256), kernels)
    assert text.count("mosaic_gpu_v2") == 1 or text.count("custom_call @mosaic_gpu") == 1


# --- on a simulator -----------------------------------------------------------------------------


@pytest.fixture
def simulator(monkeypatch):
    """Three processors that the kernels run on, on any machine."""
    monkeypatch.setattr(mosaic.dispatch, "num_processors", lambda: 3)
    ptx_simulator.use(monkeypatch, product_kernel, decoding)


@pytest.mark.parametrize(("spec", "out_features", "in_features"), [*CASES, *SIMULATED_CASES])
def test_simulated_kernel_agrees_with_float64(simulator, spec, out_features, in_features):
    weight = random_weight(spec, out_features, in_features)
    kernel = pack(weight)
    for rows in (1, 20, 100):
        x = activations(rows, in_features)
        assert relative_error(mosaic.matmul(x, [kernel])[0], float64_product(x, weight)) <= TOLERANCE[jnp.bfloat16]


@pytest.mark.parametrize("spec", ["v8-k256-256-g2-o1v4k256", "v6-k4096"])
@pytest.mark.parametrize("rows", [1, 100])
def test_simulated_kernel_in_float16(simulator, spec, rows):
    weight = random_weight(spec, 100, 132, jnp.float16)
    x = activations(rows, 132, jnp.float16)
    found = mosaic.matmul(x, [pack(weight)])[0]
    assert relative_error(found, float64_product(x, weight)) <= TOLERANCE[jnp.float16]


@pytest.mark.parametrize("spec", ["v8-k256-256", "v6-k4096", "v12-k4096-4096"])
@pytest.mark.parametrize("options", [{"team": 8}, {"team": 16}])
def test_simulated_decoding_is_independent_of_its_configuration(simulator, spec, options):
    kernel = pack(random_weight(spec, 300, 200))
    x = jnp.eye(200, dtype=jnp.bfloat16)
    expected = mosaic.matmul(x, [kernel])[0]
    np.testing.assert_array_equal(expected, mosaic.matmul(x, [kernel], DecodeConfig(blocks=2, **options))[0])


@pytest.mark.parametrize("blocks", [1, 4])
def test_simulated_kernel_of_several_weights(simulator, blocks):
    """With fewer blocks than shares of the offsets, and with more."""
    weights = [random_weight("v8-k256-256-g2", out, 512, seed=out) for out in (200, 128)]
    kernels = [pack(weight, Order(4, 4)) for weight in weights]
    x = activations(2, 512)
    for product, weight in zip(mosaic.matmul(x, kernels, Config(blocks=blocks)), weights, strict=True):
        assert relative_error(product, float64_product(x, weight)) <= TOLERANCE[jnp.bfloat16]


@pytest.mark.parametrize(
    ("spec", "outs", "in_features", "blocks"),
    [
        ("v8-k256-256", (130,), 328, 3),  # Padding within a unit, and units that do not exist.
        ("v6-k4096-nonorm-noperm", (50, 200), 256, 2),  # Columns in their order; a block with slabs of both weights.
        ("v8-k256-16-g2-o1v4k256", (100, 40), 136, 1),  # A block with slabs of all groups of all weights.
    ],
)
def test_simulated_staging_changes_nothing(simulator, spec, outs, in_features, blocks):
    kernels = [pack(random_weight(spec, out, in_features, seed=out), Order(2, 4)) for out in outs]
    assert (kernels[0].columns is None) == ("noperm" in spec)
    for rows in (1, 3):
        x = activations(rows, in_features)
        config = Config(blocks=blocks)
        plan = mosaic.make_plan(kernels, rows, config)
        assert plan.stage_x
        assert plan.blocks == blocks
        _assert_same(
            mosaic.matmul(x, kernels, config), mosaic.matmul(x, kernels, dataclasses.replace(config, stage_x=False))
        )


@pytest.mark.parametrize(
    ("spec", "outs", "in_features", "rows", "in_kernel"),
    [
        ("v8-k256-256", (130,), 328, 1, True),
        ("v8-k256-256", (40,), 4104, 3, True),  # Several pieces of x for a thread.
        ("v12-k4096-4096", (50, 200), 1032, 1, True),
        ("v8-k256-16-g2-nonorm", (100, 40), 136, 3, True),
        ("v12-k4096-4096", (100,), 4104, 3, False),  # Codebooks fill shared memory,
        ("v8-k256-o1v4k256", (100,), 136, 1, False),  # XLA multiplies outliers,
        ("v6-k4096", (100,), 130, 1, False),  # and permutes rows off 16 bytes.
    ],
)
def test_simulated_kernel_normalizes(simulator, spec, outs, in_features, rows, in_kernel):
    weights = [random_weight(spec, out, in_features, seed=out) for out in outs]
    kernels = [pack(weight, Order(2, 4)) for weight in weights]
    x = 30 * activations(rows, in_features)
    norm = RMS(jnp.asarray(np.random.default_rng(9).normal(1, 0.3, in_features), jnp.bfloat16), 0.5)
    for config in (Config(blocks=1), Config(blocks=3)):
        assert (mosaic.make_plan(kernels, rows, config, norm).norm_eps is not None) == in_kernel
        for product, weight in zip(mosaic.matmul(x, kernels, config, norm=norm), weights, strict=True):
            assert relative_error(product, _normalized_product(x, norm, weight)) <= TOLERANCE[jnp.bfloat16]


def _normalized_product(x, norm, weight):
    x = np.asarray(x, np.float64)
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + norm.eps) * np.asarray(norm.weight, np.float64)
    return float64_product(x, weight)


# --- the api ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "out_features", "in_features"), CASES[:1] + CASES[-2:])
def test_xla_takes_either_order(spec, out_features, in_features):
    weight = random_weight(spec, out_features, in_features)
    x = activations(3, in_features)
    expected = vq_matmul(x, weight, implementation="xla")
    np.testing.assert_array_equal(expected, vq_matmul(x, pack(weight), implementation="xla"))
    assert relative_error(expected, float64_product(x, weight)) < 4e-3


def test_several_weights_and_leading_axes():
    weights = [random_weight("v8-k16", out, 96, seed=out) for out in (40, 24)]
    x = activations(6, 96).reshape(2, 3, 96)
    first, second = vq_matmuls(x, weights)
    assert first.shape == (2, 3, 40)
    np.testing.assert_array_equal(second, vq_matmul(x, weights[1]))


def test_norm_comes_first():
    weights = [random_weight("v8-k16", out, 96, seed=out) for out in (40, 24)]
    x, norm = activations(6, 96), RMS(activations(1, 96)[0], 1e-5)
    for implementation in (None, "xla"):
        for found, weight in zip(
            vq_matmuls(x, weights, norm=norm, implementation=implementation), weights, strict=True
        ):
            assert relative_error(found, _normalized_product(x, norm, weight)) <= 6e-3  # x is rounded once more.
    with pytest.raises(ValueError, match=r"norm.weight has shape \(95,\); expected in_features = 96"):
        vq_matmuls(x, weights, norm=RMS(norm.weight[1:], 1e-5))


def test_no_rows():
    assert vq_matmul(jnp.zeros((0, 96)), random_weight("v8-k16", 40, 96)).shape == (0, 40)


def test_bad_input_is_named():
    weight = random_weight("v8-k16", 40, 96)
    with pytest.raises(ValueError, match="in_features = 96"):
        vq_matmul(jnp.zeros((2, 95)), weight)
    with pytest.raises(ValueError, match="int32"):
        vq_matmul(jnp.zeros((2, 96), jnp.int32), weight)
    with pytest.raises(NotImplementedError, match="magic"):
        vq_matmul(jnp.zeros((2, 96)), weight, implementation="magic")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="tests the CPU's answer")
def test_mosaic_on_cpu_says_why_not():
    weight = random_weight("v8-k16", 40, 96)
    with pytest.raises(NotImplementedError, match="'cpu'"):
        vq_matmul(activations(2, 96), weight, implementation="mosaic")


# --- derivatives and transformations: the kernel replaced by the reference, so that they run anywhere ---


@pytest.fixture
def stand_in(monkeypatch):
    """The kernel path of the api with the reference in the kernel's place."""

    def matmul(x, weights, norm=None, out_dtype=None):
        assert x.ndim == 2
        x = x if norm is None else norm(x)
        return tuple(x.astype(jnp.float32) @ unpack(weight).dequantize().T for weight in weights)

    monkeypatch.setattr(mosaic, "matmul", matmul)
    monkeypatch.setattr(api, "_why_not_mosaic", lambda *_, **__: None)


def test_a_packed_weight_has_no_gradient(stand_in):
    kernel = pack(random_weight("v4-k16-8-g2-o2v2k8", 20, 34))
    x = activations(3, 34)

    def loss(x, kernel):
        return jnp.sum(jnp.sin(vq_matmul(x, kernel).astype(jnp.float32)))

    for transform in (lambda f: f, jax.jit):
        with pytest.raises(TypeError, match=r"packed weight has no gradient.*unpack\(weight\)"):
            jax.grad(transform(loss), 1, allow_int=True)(x, kernel)
        with pytest.raises(TypeError, match="packed weight has no gradient"):
            jax.grad(transform(lambda c: loss(x, dataclasses.replace(kernel, codebook=c))))(kernel.codebook)
    assert jax.grad(loss)(x, kernel).shape == x.shape


def test_derivatives_through_the_norm(stand_in):
    weights = [random_weight("v4-k16-8", out, 34, seed=out) for out in (20, 12)]
    order = choose_order([weight.format for weight in weights])
    kernels = [pack(weight, order) for weight in weights]
    x, norm = activations(3, 34), RMS(activations(1, 34)[0], 1e-5)

    def loss(x, norm, weights, implementation):
        products = vq_matmuls(x, weights, norm=norm, implementation=implementation)
        return sum(jnp.sum(jnp.sin(product)) for product in products)

    def assert_close(found, expected):
        assert relative_error(found, np.asarray(expected, np.float64)) < 2e-2

    expected = jax.grad(loss, (0, 1))(x, norm, weights, "xla")
    found = jax.grad(loss, (0, 1))(x, norm, kernels, None)
    jax.tree.map(lambda a, b: assert_close(a, b), found, expected)


def test_vmap_over_x_adds_rows(stand_in):
    kernel = pack(random_weight("v8-k16", 40, 96))
    x, norm = activations(12, 96).reshape(3, 4, 96), RMS(activations(1, 96)[0], 1e-5)
    np.testing.assert_array_equal(jax.vmap(lambda x: vq_matmul(x, kernel))(x), vq_matmul(x, kernel))
    np.testing.assert_array_equal(
        jax.vmap(lambda x: vq_matmuls(x, [kernel], norm=norm)[0])(x), vq_matmuls(x, [kernel], norm=norm)[0]
    )


def test_vmap_over_weights(stand_in):
    kernels = [pack(random_weight("v8-k16", 40, 96, seed=seed)) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kernels)
    x = activations(4, 96)
    batched = jax.vmap(vq_matmul, in_axes=(None, 0))(x, stacked)
    norms = RMS(activations(2, 96), 1e-5)
    normalized = jax.vmap(lambda norm, weight: vq_matmuls(x, [weight], norm=norm)[0])(norms, stacked)
    for i, kernel in enumerate(kernels):
        np.testing.assert_array_equal(batched[i], vq_matmul(x, kernel))
        norm = RMS(norms.weight[i], 1e-5)
        np.testing.assert_array_equal(normalized[i], vq_matmuls(x, [kernel], norm=norm)[0])


def test_inside_while_loop(stand_in):
    kernel = pack(random_weight("v8-k16", 96, 96))
    x = activations(2, 96)

    @jax.jit
    def three_times(x, kernel):
        return jax.lax.fori_loop(0, 3, lambda _, x: vq_matmul(x, kernel), x)

    expected = x
    for _ in range(3):
        expected = vq_matmul(expected, kernel)
    np.testing.assert_allclose(
        np.asarray(three_times(x, kernel), np.float32), np.asarray(expected, np.float32), rtol=2e-2, atol=1e-3
    )


@pytest.mark.parametrize("rows", [1, 100])
def test_lowers_inside_loops_and_shard_map(monkeypatch, rows):
    monkeypatch.setattr(api, "_why_not_mosaic", lambda *_: None)
    kernel = pack(random_weight("v8-k256", 96, 96))
    x = activations(rows, 96)
    lower(lambda x, w: jax.lax.fori_loop(0, 3, lambda _, x: vq_matmul(x, w), x), x, kernel)
    lower(lambda x, w: jax.value_and_grad(lambda x: vq_matmul(x, w).sum().astype(jnp.float32))(x), x, kernel)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        vq_matmul, mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data"), check_vma=False
    )
    lower(split, x, kernel)


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("spec", "out_features", "in_features"), CASES)
@pytest.mark.parametrize("rows", [1, 8, 64, 100])
def test_kernel_agrees_with_float64(spec, out_features, in_features, rows, dtype):
    weight = random_weight(spec, out_features, in_features, dtype)
    x = activations(rows, in_features, dtype)
    product = jax.jit(lambda x, w: vq_matmul(x, w, implementation="mosaic"))
    poison()
    found = product(x, pack(weight))
    assert relative_error(found, float64_product(x, weight)) <= TOLERANCE[dtype]
    np.testing.assert_array_equal(found, product(x, pack(weight)))


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
def test_kernel_of_several_weights(groups):
    weights = [random_weight(f"v8-k256-256-g{groups}", out, 512, seed=out) for out in (384, 128, 200)]
    order = choose_order([weight.format for weight in weights])
    x = activations(2, 512)
    products = vq_matmuls(x, [pack(weight, order) for weight in weights], implementation="mosaic")
    for product, weight in zip(products, weights, strict=True):
        assert relative_error(product, float64_product(x, weight)) <= 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["v8-k256-256", "v12-k4096-4096", "v8-k65536-256", "v8-k256-256-g2-o1v4k256"])
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_kernel_normalizes(spec, rows):
    weights = [random_weight(spec, out, 520, seed=out) for out in (384, 200)]
    order = choose_order([weight.format for weight in weights])
    x, norm = 30 * activations(rows, 520), RMS(1 + 0.3 * activations(1, 520)[0], 0.5)
    products = jax.jit(lambda x, w, norm: vq_matmuls(x, w, norm=norm, implementation="mosaic"))
    poison()
    kernels = [pack(weight, order) for weight in weights]
    for product, weight in zip(products(x, kernels, norm), weights, strict=True):
        assert relative_error(product, _normalized_product(x, norm, weight)) <= 4e-3


@pytest.mark.gpu
def test_kernel_takes_checkpoint_order_and_differentiates():
    weight = random_weight("v8-k256-256", 256, 512)
    x = activations(4, 512)

    def gradient(implementation):
        return jax.grad(lambda x: vq_matmul(x, weight, implementation=implementation).astype(jnp.float32).sum())(x)

    np.testing.assert_array_equal(gradient("mosaic"), gradient("xla"))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 100, 1160])
@pytest.mark.parametrize("spec", ["v8-k256-256", "v8-k256-256-g2-o1v4k256"])
def test_kernel_writes_float32_where_it_is_asked_to(spec, rows):
    weight, x = random_weight(spec, 384, 520), activations(rows, 520)
    product = jax.jit(lambda x, w: vq_matmul(x, w, implementation="mosaic", out_dtype=jnp.float32))
    found = product(x, pack(weight))
    assert found.dtype == jnp.float32
    assert float(jnp.mean(found == found.astype(jnp.bfloat16))) < 0.1, "on the grid of bfloat16"
    assert relative_error(found, float64_product(x, weight)) <= TOLERANCE[jnp.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "out_features", "in_features"), CASES)
@pytest.mark.parametrize("rows", [1, 4, 5, 100])
def test_xla_on_a_gpu_agrees_with_float64(spec, out_features, in_features, rows):
    assert jax.default_backend() == "gpu"
    weight, x = random_weight(spec, out_features, in_features), activations(rows, in_features)
    exact = float64_product(x, weight)

    def error(implementation):
        product = jax.jit(lambda x, w: vq_matmul(x, w, implementation=implementation))
        return relative_error(product(x, weight), exact)

    # The oracle rounds the weight to bfloat16 with its offset, which in these random ones takes from it half.
    assert error("xla") <= max(TOLERANCE[jnp.bfloat16], 2.5 * error("reference"))
