"""Weights that every implementation of `vq_matmul` is tested with."""

import jax
import jax.numpy as jnp
import numpy as np

from vptq_jax.array import VQArray
from vptq_jax.format import Format
from vptq_jax.spec import VQSpec

# (spec, out_features, in_features): every vector length, codebooks in and beyond shared memory,
# residuals, groups, outliers, with and without normalization, shapes off every tile.
CASES = [
    ("v8-k256-256", 130, 320),
    ("v8-k4096", 200, 264),
    ("v6-k4096", 100, 264),
    ("v8-k4096-4096", 136, 320),
    ("v12-k4096-4096", 100, 320),
    ("v10-k4096-4096", 64, 130),
    ("v8-k65536", 128, 128),
    ("v8-k65536-256", 72, 320),
    ("v16-k65536-65536", 50, 128),
    ("v8-k16384", 64, 128),
    ("v8-k2048", 64, 520),
    ("v4-k256", 66, 128),
    ("v2-k16", 66, 128),
    ("v16-k1024", 64, 128),
    ("v12-k256-16", 60, 128),
    ("v5-k32-nonorm-noperm", 33, 130),
    ("v8-k256-256-g2-o1v4k256", 64, 516),
    ("v12-k4096-4096-g4-o1v4k4096", 96, 400),
]

TOLERANCE = {jnp.bfloat16: 4e-3, jnp.float16: 1e-3}


def activations(rows, columns, dtype=jnp.bfloat16):
    """Normal values, those of one number of rows always the same."""
    return jnp.asarray(np.random.default_rng(rows).normal(size=(rows, columns)), dtype)


def lower(function, *arguments):
    """The text of a function's lowering to CUDA, which holds a kernel."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    return text


def poison():
    """Leaves NaN in the memory that the next outputs will take."""
    garbage = [jnp.full(1 << 26, jnp.nan) for _ in range(4)]
    jax.block_until_ready(garbage)


def random_weight(spec: str, out_features: int, in_features: int, dtype=jnp.bfloat16, seed: int = 0) -> VQArray:
    """A weight with random indices; columns stored as minimum and range, as published checkpoints have them."""
    parsed = VQSpec.parse(spec)
    format = Format.of(parsed, (out_features, in_features))
    rng = np.random.default_rng(seed)  # Not jax.random: that compiles anew for every shape.

    def indices(shape, entries):
        return jnp.asarray(rng.integers(0, entries, shape, np.uint32))

    def codebook(shape, mean, deviation):
        return jnp.asarray(rng.normal(mean, deviation, shape), dtype)

    shape = (format.num_groups, format.num_vectors, format.group_size)
    books = (format.num_groups, format.num_centroids, format.vector_len)
    residual = format.num_res_centroids > 0
    fields = {}
    if format.outlier_size:
        fields["outlier_indices"] = indices(
            (format.num_outlier_vectors, format.outlier_size), format.num_outlier_centroids
        )
        fields["outlier_codebook"] = codebook((format.num_outlier_centroids, format.outlier_vector_len), 0.5, 0.15)
    if parsed.normalize:
        scale = 0.2 * np.exp(0.3 * rng.normal(size=in_features))
        fields["scale"] = jnp.asarray(scale, jnp.float32)
        fields["offset"] = jnp.asarray(rng.normal(-0.5 * scale, 0.02), jnp.float32)
    if parsed.permute:
        fields["perm"] = jnp.asarray(rng.permutation(in_features), jnp.int32)
    return VQArray.from_indices(
        format,
        indices(shape, format.num_centroids),
        indices(shape, format.num_res_centroids) if residual else None,
        codebook(books, 0.5 if parsed.normalize else 0.0, 0.15),
        codebook((format.num_groups, format.num_res_centroids, format.vector_len), 0.0, 0.05) if residual else None,
        **fields,
    )


@jax.jit
def _dequantized(weight: VQArray) -> jax.Array:
    return weight.dequantize(jnp.float32)


def float64_product(x, weight: VQArray) -> np.ndarray:
    """`x @ w.T` in float64 from the definition of the format."""
    dense = np.asarray(_dequantized(weight), np.float64)
    return np.asarray(x, np.float64) @ dense.T


def relative_error(found, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what is expected; NaN counts as infinite."""
    error = np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)
    return float("inf") if np.isnan(error) else float(error)
