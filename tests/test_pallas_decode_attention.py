"""`decode_attention` against float64 NumPy, and the kernel's lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vptq_jax.pallas.decode_attention import decode_attention, kernel

SHAPES = [(1, 32, 32, 288, 128), (2, 8, 2, 40, 64), (3, 8, 1, 1100, 128), (1, 4, 4, 7, 16), (2, 6, 3, 100, 256)]


def _data(batch, heads, kv_heads, slots, head_dim, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(slots), 4)
    cache = (batch, kv_heads, slots, head_dim)
    visible = jax.random.bernoulli(keys[3], 0.7, (batch, slots)).at[:, slots // 2].set(True)
    return (
        jax.random.normal(keys[0], (batch, heads, head_dim), dtype),
        jax.random.normal(keys[1], cache, dtype),
        jax.random.normal(keys[2], cache, dtype),
        visible,
    )


def _float64(q, keys, values, visible):
    q, keys, values = (np.asarray(a, np.float64) for a in (q, keys, values))
    share = q.shape[1] // keys.shape[1]
    keys, values = np.repeat(keys, share, axis=1), np.repeat(values, share, axis=1)
    scores = np.einsum("bnd,bnsd->bns", q, keys) / np.sqrt(q.shape[-1])
    scores = np.where(np.asarray(visible)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bns,bnsd->bnd", weights / weights.sum(-1, keepdims=True), values)


def _error(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_agrees_with_float64(shape):
    data = _data(*shape)
    assert _error(decode_attention(*data, implementation="xla"), _float64(*data)) < 5e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_lowers_to_cuda(shape):
    text = jax.jit(kernel.decode_attention).trace(*_data(*shape)).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_bad_input_is_named():
    q, keys, values, visible = _data(2, 8, 2, 40, 64)
    with pytest.raises(ValueError, match="multiple of K"):
        decode_attention(q[:, :7], keys, values, visible)
    with pytest.raises(NotImplementedError, match="magic"):
        decode_attention(q, keys, values, visible, implementation="magic")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_agrees_with_float64(shape, dtype):
    data = _data(*shape, dtype)
    kernel = jax.jit(functools.partial(decode_attention, implementation="mosaic"))
    assert _error(kernel(*data), _float64(*data)) < (4e-3 if dtype == jnp.bfloat16 else 1e-3)


@pytest.mark.gpu
def test_kernel_under_vmap():
    q, keys, values, visible = _data(2, 8, 2, 40, 64)
    batched = jax.vmap(lambda *a: decode_attention(*(x[None] for x in a), implementation="mosaic")[0])
    assert _error(batched(q, keys, values, visible), _float64(q, keys, values, visible)) < 4e-3
