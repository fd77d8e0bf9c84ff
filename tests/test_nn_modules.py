"""Any NNX module: Hessians by observation, a new module with quantized layers, experts in a stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vptq_jax as vq
from vptq_jax.nn.contraction import Contraction
from vptq_jax.nn.einsum import VQEinsum
from vptq_jax.nn.linear import VQLinear, VQParam
from vptq_jax.nn.surgery import linears, replace

SPEC = "v2-k64"


class Two(nnx.Module):
    """What a stranger writes: two layers, one of them an einsum with heads."""

    def __init__(self, rngs):
        self.first = nnx.Linear(12, 16, rngs=rngs)
        self.heads = nnx.Einsum("...i,hio->...ho", (2, 16, 8), (2, 8), rngs=rngs)
        self.unused = nnx.Linear(3, 5, use_bias=False, rngs=rngs)

    def __call__(self, x):
        y = self.heads(jax.nn.relu(self.first(x)))
        return y.reshape(*y.shape[:-2], -1)


class Experts(nnx.Module):
    """Stacked experts with a leading axis, each of which sees its own rows."""

    def __init__(self, rngs):
        self.up = nnx.Einsum("ecd,edf->ecf", (3, 12, 16), rngs=rngs)
        self.down = nnx.Einsum("ecf,efd->ecd", (3, 16, 12), (3, 12), rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


@pytest.fixture
def two():
    return Two(nnx.Rngs(0))


@pytest.fixture
def batches():
    return [np.random.default_rng(i).standard_normal((4, 10, 12)).astype(np.float32) for i in range(3)]


def moment(rows):
    rows = np.asarray(rows, np.float64).reshape(-1, rows.shape[-1])
    return rows.T @ rows / len(rows)


def test_hessians_are_those_of_the_inputs(two, batches):
    del two.unused
    hessians = vq.collect_hessians(two, batches, progress=False)
    assert set(hessians) == {"first", "heads"}
    x = np.concatenate(batches)
    np.testing.assert_allclose(hessians.for_module("first"), moment(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(hessians.for_module("heads"), moment(jax.nn.relu(two.first(x))), rtol=1e-5, atol=1e-6)
    again = vq.collect_hessians(two, batches, lambda module, batch: module(batch), progress=False)
    np.testing.assert_array_equal(again.for_module("heads"), hessians.for_module("heads"))


def test_hessians_through_files_and_in_groups(two, batches, tmp_path):
    from vptq_jax.nn.collect import collect

    del two.unused
    expected = collect(two, batches)
    found = collect(two, iter(batches), directory=tmp_path / "h", layers_at_once=1)
    for path in expected:
        np.testing.assert_array_equal(found.for_module(path), expected.for_module(path))
    again = vq.load_hessians(tmp_path / "h")
    np.testing.assert_array_equal(again.for_module("heads"), expected.for_module("heads"))


def test_a_module_is_quantized_and_the_old_one_stays(two, batches):
    x = batches[0]
    before, state = two(x), jax.tree.leaves(nnx.state(two))
    hessians = vq.collect_hessians(two, batches, lambda m, batch: (m(batch), m.unused(batch[..., :3])), progress=False)
    small, report = vq.quantize(two, vq.QuantConfig(SPEC, rules=[("unused", None)], rounds=1), hessians, progress=False)
    assert all(a is b for a, b in zip(state, jax.tree.leaves(nnx.state(two)), strict=True))
    assert type(small.first) is VQLinear
    assert type(small.heads) is VQEinsum
    assert type(small.unused) is nnx.Linear
    assert [row["path"] for row in report.operators] == ["first", "heads"]
    # The quantized module is the one whose kernels are the decoded weights.
    dense = Two(nnx.Rngs(0))
    dense.first.kernel[...] = small.first.array.dequantize().T
    dense.heads.kernel[...] = small.heads.array.dequantize().reshape(2, 8, 16).transpose(0, 2, 1)
    np.testing.assert_allclose(small(x), dense(x), rtol=1e-4, atol=1e-5)
    error = np.linalg.norm(small(x) - before) / np.linalg.norm(before)
    assert 1e-4 < error < 0.5
    gradient = nnx.grad(lambda m: jnp.sum(m(x) ** 2), argnums=nnx.DiffState(0, VQParam))(vq.trainable(small))
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


def test_stacked_experts(batches):
    module = Experts(nnx.Rngs(1))
    x = np.stack([batches[0].reshape(-1, 12), batches[1].reshape(-1, 12), 0 * batches[2].reshape(-1, 12)])
    hessians = vq.collect_hessians(module, [x], progress=False)
    assert hessians.for_module("up").shape == (3, 12, 12)
    np.testing.assert_allclose(hessians.for_module("up")[1], moment(x[1]), rtol=1e-5, atol=1e-6)
    small, report = vq.quantize(module, vq.QuantConfig(SPEC, rounds=1), hessians, progress=False)
    assert {row["path"] for row in report.operators} == {"up", "down"}
    dense = Experts(nnx.Rngs(1))
    for name in ("up", "down"):
        weight = getattr(small, name).weight
        matrices = jax.vmap(lambda w: w.dequantize())(weight)
        getattr(dense, name).kernel[...] = matrices.transpose(0, 2, 1)
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(small, x), dense(x), rtol=1e-4, atol=1e-5)
    assert vq.pack(small, target="sm_90").up.order is None  # stacks stay with XLA


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("...i,io->...o", ((2, 3, 4), (4, 5))),
        ("btd,dhk->bthk", ((2, 3, 4), (4, 5, 6))),
        ("bthk,ohk->bto", None),
        ("dbt,dhk->hbkt", ((4, 2, 3), (4, 5, 6))),
        ("ecd,fed->ecf", ((3, 2, 4), (5, 3, 4))),
        ("...ed,edf->f...e", ((2, 3, 4), (3, 4, 5))),
    ],
)
def test_contractions_are_those_of_einsum(text, shapes):
    if shapes is None:
        with pytest.raises(NotImplementedError, match="contracts 2 axes"):
            Contraction.parse(text)
        return
    # Sums of small whole numbers are exact.
    x, kernel = (jax.random.randint(jax.random.key(i), shape, -4, 5).astype(float) for i, shape in enumerate(shapes))
    contraction = Contraction.parse(text)
    matrix, rows = contraction.matrix(kernel), contraction.rows(x)
    product = jnp.einsum("e...i,eoi->e...o", rows, matrix) if contraction.stack else rows @ matrix.T
    found = contraction.arranged(product, x.ndim, contraction.sizes(kernel.shape))
    np.testing.assert_array_equal(found, np.einsum(text, x, kernel))


@pytest.mark.parametrize("text", ["...i,...io->...o", "ii,io->o", "bi,io->b", "abi,abio->abo", "bci,io->bo"])
def test_einsums_that_are_no_products_are_left_alone(text):
    with pytest.raises(NotImplementedError, match="einsum"):
        Contraction.parse(text)


def test_what_does_not_work_is_said(two, batches):
    with pytest.raises(ValueError, match="unused was never called"):
        vq.collect_hessians(two, batches, progress=False)
    with pytest.raises(ValueError, match="has no dense linear layer; expected Linear"):
        vq.collect_hessians(nnx.List([]), batches, progress=False)
    del two.unused
    with pytest.raises(ValueError, match="no calibration batches"):
        vq.collect_hessians(two, [], progress=False)
    with pytest.raises(ValueError, match="gives first inputs that are NaN"):
        vq.collect_hessians(two, [batches[0] * np.nan], progress=False)
    hessians = vq.collect_hessians(two, batches, progress=False)

    def refuse(message, config, module=two, hessians=hessians):
        with pytest.raises(ValueError, match=message):
            vq.quantize(module, config, hessians, progress=False)

    refuse("rule 'head_' matches no layer; near it are heads", vq.QuantConfig(SPEC, rules=[("head_", None)]))
    refuse("no layer has a spec.*there are first, heads", vq.QuantConfig(None))
    refuse(
        r"1 layers cannot be quantized as asked:\n  first \[16, 12\]",
        vq.QuantConfig(None, rules=[("first", "v8-k256")]),
    )
    half = vq.Hessians({"first": hessians.for_module("first")}, {"first": {"first": ""}}, 0)
    refuse("heads: there is no Hessian for it", SPEC, hessians=half)
    refuse("needs Hessians: collect_hessians", SPEC, hessians=batches)
    with pytest.raises(TypeError, match="found a int; expected a language model or an NNX module"):
        vq.quantize(3, SPEC, hessians)


def test_layers_are_found_and_replaced_in_lists_and_dictionaries():
    class Deep(nnx.Module):
        def __init__(self):
            self.parts = nnx.List([nnx.Dict(inner=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))])

    module = Deep()
    assert list(linears(module)) == ["parts.0.inner"]
    other = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    new = replace(module, {"parts.0.inner": other})
    np.testing.assert_array_equal(new.parts[0]["inner"].kernel[...], other.kernel[...])
    assert module.parts[0]["inner"] is not other


def test_the_search_is_pure():
    """Compiled, and mapped over a stack, it gives what it gives one by one."""
    from vptq_jax.quantization.search import search

    rng = np.random.default_rng(0)
    W = jnp.asarray(rng.standard_normal((3, 24, 8)), jnp.float32)
    X = rng.standard_normal((3, 40, 8)).astype(np.float32)
    H, keys = jnp.asarray(np.einsum("eti,etj->eij", X, X)), jax.random.split(jax.random.key(0), 3)
    format = vq.Format.of("v2-k16-4", (24, 8))
    options = vq.SearchOptions(kmeans_iters=20, rounds=1)

    def one(W, H, key):
        return search(W, H, key, format=format, options=options)

    stacked, stats = jax.jit(jax.vmap(one))(W, H, keys)
    for i in range(3):
        alone, numbers = one(W[i], H[i], keys[i])
        np.testing.assert_array_equal(stacked.indices[i], alone.indices)
        np.testing.assert_allclose(stacked.codebook[i], alone.codebook, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats["error"][i], numbers["error"], rtol=1e-4)


def test_arrays_in_modules_of_other_libraries():
    """A `VQArray` is a pytree: Linen takes it as a parameter, and NNX as an attribute."""
    from flax import linen

    from vptq_jax.pallas.vq_matmul import vq_matmul

    weight, _ = vq.quantize_weight(
        np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32), np.eye(8, dtype=np.float32), "v2-k16",
        key=jax.random.key(0),
    )  # fmt: skip
    x = jnp.ones((3, 8))

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x):
            return vq_matmul(x, self.param("weight", lambda key: weight))

    variables = Layer().init(jax.random.key(0), x)
    np.testing.assert_allclose(Layer().apply(variables, x), x @ weight.dequantize().T, rtol=1e-5, atol=1e-5)

    class Holder(nnx.Module):
        def __init__(self):
            self.weight = weight

    holder = Holder()
    np.testing.assert_array_equal(nnx.jit(lambda m, x: vq_matmul(x, m.weight))(holder, x), vq_matmul(x, weight))


def test_an_equinox_module_trains_its_codebooks():
    equinox = pytest.importorskip("equinox")
    optax = pytest.importorskip("optax")

    class Layer(equinox.Module):
        weight: vq.VQArray
        bias: jax.Array

        def __call__(self, x):
            return vq.matmul(x, self.weight) + self.bias

    rng = np.random.default_rng(0)
    weight, _ = vq.quantize_weight(
        rng.standard_normal((16, 8)).astype(np.float32), np.eye(8, dtype=np.float32), "v2-k16", key=jax.random.key(0)
    )
    layer = Layer(vq.trainable(weight), jnp.zeros(16))
    x = jnp.asarray(rng.standard_normal((32, 8)), jnp.float32)
    target = x @ jnp.asarray(rng.standard_normal((8, 16)), jnp.float32)
    np.testing.assert_allclose(layer(x), x @ weight.dequantize().T, rtol=1e-5, atol=1e-5)
    optimizer = optax.adam(1e-2)

    @equinox.filter_jit
    def step(layer, state):
        loss, gradients = equinox.filter_value_and_grad(lambda m: jnp.mean((m(x) - target) ** 2))(layer)
        updates, state = optimizer.update(gradients, state)
        return equinox.apply_updates(layer, updates), state, loss

    state, losses = optimizer.init(equinox.filter(layer, equinox.is_inexact_array)), []
    for _ in range(20):
        layer, state, loss = step(layer, state)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    np.testing.assert_array_equal(layer.weight.indices, weight.indices)
    assert not np.array_equal(layer.weight.codebook, weight.codebook)
