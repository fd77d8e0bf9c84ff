"""Packed, unpacked and trainable: each a new module, and nothing that reads a model changes it."""

import dataclasses
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from pallas_cases import activations, random_weight
from random_models import CONFIG, random_model

import vptq_jax as vq
from vptq_jax.convert import checkpoint
from vptq_jax.convert.export import plan_hf, plan_vptq
from vptq_jax.nn import forms, inference
from vptq_jax.nn.linear import VQLinear, VQParam
from vptq_jax.pallas import dispatch

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (4, 12)))


@pytest.fixture
def model():
    return quantized_model(jnp.bfloat16)


def quantized_model(dtype):
    model = random_model(dataclasses.replace(CONFIG, num_layers=1), dtype=dtype)
    for seed, (path, layer) in enumerate(model.linears().items()):
        weight = random_weight("v4-k16-8", *layer.shape, seed=seed)
        weight = jax.tree.map(lambda a: a.astype(jnp.float16) if a.dtype == jnp.bfloat16 else a, weight)
        model.set_linear(path, VQLinear(weight, None if layer.bias is None else layer.bias[...]))
    return model


def leaves(model):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.flatten_with_path(nnx.state(model))[0]}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[name], err_msg=name)


def loss_of(model, tokens=TOKENS):
    logits = model(tokens)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def test_nothing_that_reads_a_model_changes_it(model, launches, tmp_path):
    before = leaves(model)
    trained = len(jax.tree.leaves(nnx.state(model, nnx.Param)))
    vq.generate(model, [1, 2, 3], max_new_tokens=3)
    assert launches
    checkpoint.save(model, tmp_path / "m")
    plan_hf(model)
    plan_vptq(model)
    vq.pack(model)
    vq.trainable(model)
    vq.perplexity(model, TOKENS.ravel(), context=12)
    assert_same(before, leaves(model))
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == trained


def test_new_modules_share_arrays_and_no_variables(model):
    before = leaves(model)
    for new in (vq.pack(model, target="sm_90"), vq.trainable(model), vq.unpack(model), forms.cast(model, jnp.float32)):
        new.norm.weight[...] = new.norm.weight[...] * 0
        new.layers[0].mlp.up_proj.scale[...] = new.layers[0].mlp.up_proj.scale[...] * 0
        assert_same(before, leaves(model))


def test_threads_on_a_fresh_model_agree_with_one(launches):
    expected = vq.generate(quantized_model(jnp.bfloat16), [1, 2, 3], max_new_tokens=6)
    for _ in range(3):
        model, results = quantized_model(jnp.bfloat16), [None] * 4

        def run(index, model=model, results=results):
            results[index] = vq.generate(model, [1, 2, 3], max_new_tokens=6)

        threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [expected] * 4


def test_a_packed_twin_is_kept_until_the_model_changes(model, launches):
    twin = inference.inference_form(model)
    assert inference.inference_form(model) is twin
    assert inference.inference_form(twin) is twin
    layer = model.layers[0].mlp.up_proj
    layer.codebook[...] = layer.codebook[...] * 2
    again = inference.inference_form(model)
    assert again is not twin
    np.testing.assert_allclose(again.layers[0].mlp.up_proj.array.dequantize(), layer.array.dequantize(), rtol=1e-6)


def test_training_after_sampling_moves_the_codebooks(model, launches):
    student = vq.trainable(model)
    inference.inference_form(student)(TOKENS)  # what `generate` does
    assert launches
    before = leaves(student)
    optimizer = nnx.Optimizer(student, optax.sgd(1e-2), wrt=VQParam)
    optimizer.update(student, nnx.jit(nnx.grad(loss_of, argnums=nnx.DiffState(0, VQParam)))(student))
    moved = {name for name, leaf in leaves(student).items() if not np.array_equal(leaf, before[name])}
    assert moved == {name for name in before if name.split("'")[-2] in ("codebook", "res_codebook", "scale", "offset")}


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("form", ["optimizer", "split"])
def test_training_in_float32(model, name, form):
    student = vq.trainable(model)
    transform = getattr(optax, name)(2e-3)
    losses = []
    if form == "optimizer":
        optimizer = nnx.Optimizer(student, transform, wrt=VQParam)

        @nnx.jit
        def step(student, optimizer):
            loss, gradient = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, VQParam))(student)
            optimizer.update(student, gradient)
            return loss

        losses = [float(step(student, optimizer)) for _ in range(20)]
    else:
        graph, params, rest = nnx.split(student, VQParam, ...)
        state = transform.init(params)

        @jax.jit
        def step(params, state):
            loss, gradient = jax.value_and_grad(lambda params: loss_of(nnx.merge(graph, params, rest)))(params)
            updates, state = transform.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, loss

        for _ in range(20):
            params, state, loss = step(params, state)
            losses.append(float(loss))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.05
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(student, VQParam)))


def test_the_gradient_in_codebooks_is_that_of_the_oracle(model):
    student = vq.trainable(cast_all(model))
    layer = student.layers[0].mlp.up_proj.array
    x = activations(5, layer.shape[1], jnp.float32)

    def loss(floats, implementation):
        weight = dataclasses.replace(layer, **floats)
        return jnp.sum(jnp.sin(vq.matmul(x, weight, implementation=implementation)))

    floats = {name: getattr(layer, name) for name in ("codebook", "res_codebook", "scale", "offset")}
    expected, found = (jax.grad(loss)(floats, name) for name in ("reference", "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def cast_all(model):
    return jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, model)


def test_a_trained_model_is_saved_in_the_dtypes_that_it_had(model, tmp_path):
    student = vq.trainable(model)
    layer = student.layers[0].mlp.up_proj
    layer.codebook[...] = layer.codebook[...] * 1.0001  # no longer float16
    rounding = vq.save(student, tmp_path / "m")
    assert 1e-6 < rounding.error < 1e-3
    assert rounding.wide == ()
    again = checkpoint.load(tmp_path / "m").module
    found = again.layers[0].mlp.up_proj
    assert found.codebook.dtype == jnp.float16
    np.testing.assert_array_equal(found.codebook[...], layer.codebook[...].astype(jnp.float16))
    assert layer.codebook.dtype == jnp.float32


@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_values_beyond_float16_keep_their_dtype_and_are_named(model, tmp_path, factor):
    student = vq.trainable(model)
    layer = student.layers[0].mlp.up_proj
    layer.codebook[...] = layer.codebook[...] * factor
    with pytest.warns(UserWarning, match=r"saved in a wide dtype.*layers\.0\.mlp\.up_proj\.codebook"):
        rounding = vq.save(student, tmp_path / "m")
    assert rounding.wide == ("layers.0.mlp.up_proj.codebook",)
    found = checkpoint.load(tmp_path / "m").module.layers[0].mlp.up_proj
    np.testing.assert_array_equal(found.codebook[...], layer.codebook[...])
    assert found.res_codebook.dtype == jnp.float16


def test_loading_packs_for_inference_unless_it_is_for_training(model, launches, tmp_path):
    vq.save(model, tmp_path / "m")
    packed, student = (vq.load(tmp_path / "m", trainable=trainable).module for trainable in (False, True))
    assert all(layer.order is not None for layer in packed.linears().values())
    for path, layer in student.linears().items():
        assert layer.codebook.dtype == jnp.float32
        np.testing.assert_array_equal(layer.array.dequantize(), model.linears()[path].array.dequantize(), err_msg=path)
    assert vq.load(tmp_path / "m", dtype="float32").module.dtype == jnp.float32


def test_a_language_model_stands_for_its_module(model):
    lm = vq.LanguageModel(model, "a tokenizer", {"top_k": 3})
    packed, student = vq.pack(lm, target="sm_90"), vq.trainable(lm)
    assert all(layer.order is not None for layer in packed.module.linears().values())
    assert_same(leaves(vq.unpack(packed).module), leaves(model))
    assert {layer.codebook.dtype for layer in student.module.linears().values()} == {jnp.dtype("float32")}
    for new in (packed, student):
        assert (new.tokenizer, new.generation_config) == (lm.tokenizer, lm.generation_config)
    with pytest.raises(TypeError, match="found a str; expected a VQArray or a module"):
        vq.pack("model")
    with pytest.raises(TypeError, match="found a str; expected a LanguageModel or its module"):
        vq.generate("model", [1])


def test_single_arrays():
    weight = random_weight("v4-k16-8", 24, 32)
    packed = vq.pack(weight, dtype=jnp.bfloat16, target="sm_90")
    assert isinstance(packed, vq.Packed)
    assert packed.codebook is weight.codebook  # shared, not copied
    jax.tree.map(np.testing.assert_array_equal, vq.unpack(packed), weight)
    assert vq.trainable(packed).codebook.dtype == jnp.float32
    indices = weight.indices
    again = vq.pack(weight, target="sm_90", donate=True)
    assert indices.is_deleted()
    jax.tree.map(np.testing.assert_array_equal, vq.unpack(again), vq.unpack(packed))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda weight: vq.pack(weight), NotImplementedError, r"the device is 'cpu'.*target='sm_90' packs for another"),
        (lambda weight: vq.pack(weight, target="sm_80"), NotImplementedError, "'sm_80' has no kernels; expected"),
        (lambda weight: vq.pack(jnp.ones((2, 2)), target="sm_90"), TypeError, "found a ArrayImpl; expected a VQArray"),
        (lambda weight: vq.unpack(3), TypeError, "found a int; expected a Packed or a module"),
        (lambda weight: vq.trainable(weight, jnp.int8), TypeError, "dtype is int8; expected a floating-point dtype"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed(call, error, message):
    with pytest.raises(error, match=message):
        call(random_weight("v4-k16-8", 24, 32))


def test_a_fallback_from_a_kernel_is_said_once():
    dispatch.warn_fallback.cache_clear()
    packed = vq.pack(random_weight("v4-k16-8", 24, 32), target="sm_90")
    with pytest.warns(vq.KernelFallbackWarning, match=r"without its kernel: the device is 'cpu'.*unpack\(weight\)"):
        vq.matmul(activations(2, 32), packed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vq.matmul(activations(2, 32), packed)
        vq.matmul(activations(2, 32), random_weight("v4-k16-8", 24, 32))  # nothing to be expected on a CPU


def test_an_unpacked_weight_where_kernels_run_is_said_once(launches):
    dispatch.warn_fallback.cache_clear()
    with pytest.warns(vq.KernelFallbackWarning, match=r"the weight is a VQArray; pack\(weight"):
        vq.matmul(activations(2, 32), random_weight("v4-k16-8", 24, 32))


def test_layers_that_no_kernel_takes_are_said_once(launches):
    dispatch.warn_fallback.cache_clear()
    layers = nnx.List([VQLinear(random_weight(spec, 40, 24)) for spec in ("v4-k16", "v20-k16")])
    with pytest.warns(vq.KernelFallbackWarning, match="its vectors have 20 components; choose at most 16"):
        twin = inference.inference_form(layers)
    assert [layer.order is None for layer in twin] == [False, True]


def test_a_program_for_another_machine():
    for spec in ("v8-k256-256", "v8-k4096", "v6-k4096", "v12-k4096-4096", "v8-k65536-256", "v4-k16-8-g2-o2v2k8"):
        packed = vq.pack(random_weight(spec, 96, 96), dtype=jnp.bfloat16, target="sm_90")
        for rows in (1, 100):
            traced = jax.jit(lambda x, w: vq.matmul(x, w, implementation="mosaic")).trace(activations(rows, 96), packed)
            assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    with pytest.raises(NotImplementedError, match="cannot run: the device is 'cpu'"):
        vq.matmul(activations(1, 96), packed, implementation="mosaic")


def test_forms_of_a_module_of_ones_own():
    class Two(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([VQLinear(random_weight("v4-k16", 16, 16, seed=seed)) for seed in range(2)])
            self.named = nnx.Dict(last=VQLinear(random_weight("v4-k16", 8, 16)))

        def __call__(self, x):
            return self.named["last"](self.layers[1](self.layers[0](x)))

    module, x = Two(), activations(3, 16)
    student = forms.trainable(forms.unpack(vq.pack(module, target="sm_90")))
    np.testing.assert_allclose(student(x).astype(jnp.float32), module(x).astype(jnp.float32), rtol=0.02, atol=1e-3)
    assert list(forms.quantized(module)) == ["layers.0", "layers.1", "named.last"]
