"""`quantize_weight`: one weight matrix and its Hessian in, one `VQArray` out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from vptq_jax.array import VQArray
from vptq_jax.format import FLOATS, Format
from vptq_jax.quantization.column_pass import column_pass
from vptq_jax.quantization.columns import Codes, Segment, arrange, assign_columns, decode_all
from vptq_jax.quantization.kmeans import importance_sample, kmeans
from vptq_jax.quantization.linalg import proxy_loss
from vptq_jax.quantization.metric import Metric, checked_metric, factorize, to_unit
from vptq_jax.quantization.refine import refine
from vptq_jax.spec import DEFAULTS, SearchOptions, VQSpec

_SMALLEST_SCALE = 1e-6  # Of the largest weight: constant columns keep a scale that can be divided by.
_SMALLEST_SAMPLE = 1 << 16  # Vectors that k-means may train on in any case: cheap, and small codebooks gain.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """A weight ready for quantization: normalized, permuted, transposed, in slots (see `columns`).

    Attributes:
        W: W'^T, float32 [slots, rows].
        H: regularized Hessian of the normalized problem, diag(s) H diag(s), float32 [slots, slots].
        U: upper triangular, H^-1 = U^T U.
        importance: weight of each column's squared error in k-means, float32 [slots].
        scale: s, float32 [in_features] in original column order.
        offset: o, float32 [in_features] in original column order.
        perm: original column of each permuted column, int32 [in_features].
        damping: share of the mean diagonal that was added in all.
    """

    W: Float[Array, "slots rows"]
    H: Float[Array, "slots slots"]
    U: Float[Array, "slots slots"]
    importance: Float[Array, " slots"]
    scale: Float[Array, " in"]
    offset: Float[Array, " in"]
    perm: Array
    damping: Float[Array, ""]


def quantize_weight(
    W: Float[Array | np.ndarray, "out in"],
    H: Float[Array | np.ndarray, "in in"] | Metric,
    spec: VQSpec | str,
    *,
    key: Array,
    options: SearchOptions = DEFAULTS,
    name: str = "weight",
) -> tuple[VQArray, dict[str, Any]]:
    """Quantizes one weight matrix with VPTQ in the exact metric of its Hessian.

    Args:
        W: weight [out_features, in_features], any float dtype.
        H: second moment of the layer's inputs E[x x^T] (any positive multiple of it), as collected: it is
            regularized here. Or what `metric.factorize` made of it with the same options, for weights that share it.
        spec: the format.
        key: PRNG key; the result is a function of it and the other arguments alone.
        options: of the search.
        name: the weight's name in error messages.

    Returns:
        (the quantized weight, float32 codebooks; stats). Stats are plain numbers: `error` and, stage by
        stage, `error_kmeans`, `error_pass`, `error_residual`, `error_refine_1`, ...: relative proxy errors
        tr(E H E^T) / tr(W H W^T) under the Hessian as given; `damping`: what was added to the diagonal in all,
        as a share of its mean; `dead_columns`: inputs that were never active; `rounds`: refinement rounds run.

    Raises:
        ValueError: W is not a finite matrix, H cannot be its Hessian, the spec does not fit the
            shape, or a codebook would have more centroids than there are vectors to describe.

    Example:
        >>> W = jax.random.normal(jax.random.key(0), (32, 16))
        >>> x = jax.random.normal(jax.random.key(1), (256, 16))  # what the layer reads
        >>> array, stats = quantize_weight(W, x.T @ x / len(x), "v4-k16-16", key=jax.random.key(2))
        >>> str(array.format), array.shape, stats["dead_columns"]
        ('v4-k16-16', (32, 16), 0)
        >>> 0 < stats["error"] < stats["error_kmeans"] < 1
        True
    """
    spec = VQSpec.parse(spec)
    format = _checked_format(W, spec, name)
    if not isinstance(H, Metric):
        H = checked_metric(H, format.in_features, name, damping=options.damping, permute=format.permute)
    array, found = search(jnp.asarray(W), H, key, format=format, options=_alone(options))
    stats = {stage: value.item() for stage, value in jax.device_get(found).items()}
    check_finite(array, stats, name)
    ran = {f"error_refine_{i + 1}" for i in range(stats["rounds"])}
    return array, {k: v for k, v in stats.items() if not k.startswith("error_refine_") or k in ran}


def _alone(options: SearchOptions) -> SearchOptions:
    """The options without what a subclass adds: less to compile anew for."""
    return SearchOptions(**{field.name: getattr(options, field.name) for field in dataclasses.fields(SearchOptions)})


@functools.partial(jax.jit, static_argnames=("format", "options"))
def search(
    W: Float[Array, "out in"],
    H: Float[Array, "in in"] | Metric,
    key: Array,
    *,
    format: Format,
    options: SearchOptions = DEFAULTS,
) -> tuple[VQArray, dict[str, Array]]:
    """`quantize_weight` without its checks, as one traceable function: `jax.vmap` quantizes equal shapes at once.

    Stats hold an error for every round asked for, those not run repeat the last; `damping` is NaN if the Hessian
    could not be factorized.

    Raises:
        ValueError: a metric was made for another shape, or with other options.
    """
    metric = H if isinstance(H, Metric) else factorize(H, damping=options.damping, permute=format.permute)
    _check_metric(metric, format, options)
    W, unit = to_unit(_live(W, metric.dead))
    segments, slot_columns = arrange(format)
    problem = prepare(W, metric, slot_columns, normalize=format.normalize)
    factorized = jnp.isfinite(problem.U).all()
    stats = {
        "damping": jnp.where(factorized, problem.damping, jnp.nan),
        "dead_columns": metric.dead.sum(),
    }

    def error(codes: tuple[Codes, ...]) -> Float[Array, ""]:
        return _relative_error(W, metric.H, problem, codes, segments, slot_columns)

    codes = initial_codebooks(problem, segments, key, options)
    stats["error_kmeans"] = error(assign(problem.W, codes, segments))
    codes, errors = column_pass(problem.W, problem.U, codes, segments)
    stats["error_pass"] = error(codes)
    if format.num_res_centroids:
        codes = residual_codebook(problem, errors, codes, segments, key, options)
        codes, _ = column_pass(problem.W, problem.U, codes, segments)
        stats["error_residual"] = error(codes)
    codes, stats["rounds"], refined = _refine(problem, codes, segments, options.rounds, options.tolerance, error)
    stats |= {f"error_refine_{i + 1}": refined[i] for i in range(options.rounds)}
    stats["error"] = error(codes)
    array = pack(problem, codes, segments, format)
    return _scaled(array, unit), stats


def _check_metric(metric: Metric, format: Format, options: SearchOptions) -> None:
    found = metric.H.shape[-1], metric.damping, metric.permute
    expected = format.in_features, options.damping, format.permute
    if found != expected:
        raise ValueError(f"the metric has (in_features, damping, permute) = {found}; expected {expected}")


def _live(W: Float[Array, "out in"], dead: Bool[Array, " in"]) -> Float[Array, "out in"]:
    """The weight without the columns of dead inputs, which must not set its unit."""
    return jnp.where(dead, 0, W)


def _scaled(array: VQArray, factor: Float[Array, ""]) -> VQArray:
    """The weight times a factor, which goes into scale and offset where there are any."""
    if array.scale is None or array.offset is None:
        books = {name: getattr(array, name) for name in ("codebook", "res_codebook", "outlier_codebook")}
    else:
        books = {"scale": array.scale, "offset": array.offset}
    return dataclasses.replace(array, **{name: x * factor for name, x in books.items() if x is not None})


def check_finite(array: VQArray, stats: Mapping[str, float], name: str) -> None:
    """Raises ValueError if a number of a result is not finite."""
    parts = {field: getattr(array, field) for field in FLOATS}
    wrong = [stage for stage, value in stats.items() if not np.isfinite(value)]
    wrong += [field for field, part in parts.items() if part is not None and not bool(jnp.isfinite(part).all())]
    if wrong:
        raise ValueError(
            f"{name}: quantizing gave values that are NaN or infinite ({', '.join(wrong)}); its weights or its Hessian "
            "lie beyond what float32 holds. Scale them down, or leave the layer out with a rule"
        )


def store(
    array: VQArray, W: Float[Array, "out in"], H: Float[Array, "in in"], error: float
) -> tuple[VQArray, float, list[str]]:
    """A result as it is stored: in float16, but for tensors that float16 is too narrow for.

    Whether it is too narrow is measured: rounding may raise the error by a hundredth, or by 1e-6 of the output's
    energy.

    Args:
        array: with float32 codebooks, scale and offset.
        W: the weight that it stands for.
        H: its Hessian.
        error: relative proxy error of `array`.

    Returns:
        (the stored form, its relative proxy error, names of the tensors that stay in float32).
    """
    floats = [name for name in FLOATS if getattr(array, name) is not None]

    def rounded(wide: list[str]) -> VQArray:
        narrow = {name: getattr(array, name).astype(jnp.float16) for name in floats if name not in wide}
        return dataclasses.replace(array, **narrow)

    overflowing = [name for name in floats if not bool(jnp.isfinite(getattr(rounded([]), name)).all())]
    for extra in ([], ["scale", "offset"], floats):
        wide = [name for name in floats if name in overflowing or name in extra]
        stored = rounded(wide)
        found = float(stored_error(stored, W, H))
        if found <= error * _ROUNDING + _NEGLIGIBLE or wide == floats:
            break
    return stored, found, wide


_ROUNDING, _NEGLIGIBLE = 1.01, 1e-6


@jax.jit
def stored_error(array: VQArray, W: Float[Array, "out in"], H: Float[Array, "in in"]) -> Float[Array, ""]:
    """tr(E H E^T) / tr(W H W^T) of a quantized weight as it is."""
    W, unit = to_unit(_live(W, jnp.diag(H) <= 0))
    H, _ = to_unit(H)
    error = (_scaled(jax.tree.map(_widened, array), 1 / unit).dequantize() - W).T
    return proxy_loss(error, H) / jnp.maximum(proxy_loss(W.T, H), jnp.finfo(jnp.float32).tiny)


def _widened(x: Array) -> Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _refine(
    problem: Problem,
    codes: tuple[Codes, ...],
    segments: tuple[Segment, ...],
    rounds: int,
    tolerance: float,
    error: Callable[[tuple[Codes, ...]], Array],
) -> tuple[tuple[Codes, ...], Array, Float[Array, " rounds"]]:
    """A refit, then refinement rounds until one gains less than the tolerance.

    Returns:
        (codes, rounds run, error after each round).
    """

    def unfinished(state: tuple[Any, ...]) -> Array:
        i, _, before, loss, _ = state
        return (i <= rounds) & ((i <= 1) | (before - loss >= tolerance * before))

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        i, codes, _, before, errors = state
        # The first pass through the loop is the refit alone: one loop body to compile.
        codes, loss = refine(problem.W, problem.H, codes, segments, descend=i > 0)
        return i + 1, codes, before, loss, jnp.where(jnp.arange(1, rounds + 1) >= i, error(codes), errors)

    start = proxy_loss(problem.W - decode_all(segments, codes), problem.H)
    state = (jnp.zeros((), jnp.int32), codes, start, start, jnp.zeros(rounds))
    if rounds:
        state = lax.while_loop(unfinished, step, state)
    return state[1], jnp.maximum(state[0] - 1, 0), state[4]


def _checked_format(W: Array | np.ndarray, spec: VQSpec, name: str) -> Format:
    if W.ndim != 2:
        raise ValueError(f"{name}: the weight has shape {tuple(W.shape)}; expected [out_features, in_features]")
    if not jnp.issubdtype(W.dtype, jnp.floating):
        raise ValueError(f"{name}: the weight has dtype {W.dtype}; expected a floating-point dtype")
    out_features, in_features = W.shape
    if not bool(jnp.isfinite(W).all()):
        raise ValueError(f"{name}: the weight holds NaN or infinite values")
    try:
        format = Format.of(spec, (out_features, in_features))
        check_centroids(format)
    except ValueError as error:
        raise ValueError(f"{name} with spec {spec}: {error}") from None
    return format


def check_centroids(format: Format) -> None:
    """Raises ValueError if a codebook has more centroids than there are vectors for it.

    Such a codebook would take more bytes than the weights it describes; a smaller one is never worse.
    """
    for segment in arrange(format)[0]:
        vectors = segment.group_size * segment.num_vectors
        for what, count in (("", segment.num_centroids), ("residual ", segment.num_res_centroids)):
            if count > vectors:
                raise ValueError(
                    f"{count} {what}centroids of length {segment.vector_len} for only {vectors} vectors "
                    f"({segment.group_size} columns of {segment.num_vectors}); choose fewer centroids, fewer groups or "
                    "a shorter vector for this layer, or leave it out"
                )


def prepare(W: Float[Array, "out in"], metric: Metric, slot_columns: np.ndarray, *, normalize: bool) -> Problem:
    """Normalizes and permutes one weight, dead inputs zeroed, and lays it out with its metric."""
    W = _live(W, metric.dead)
    scale, offset = normalization(W) if normalize else (jnp.ones(W.shape[1]), jnp.zeros(W.shape[1]))
    H, perm = metric.regularized, metric.perm

    filled, columns = slot_columns >= 0, np.maximum(slot_columns, 0)
    both = filled[:, None] & filled[None, :]
    slot_scale = scale[perm][columns]
    slot_W = ((W - offset) / scale).T[perm][columns]
    eye = jnp.eye(len(slot_columns), dtype=jnp.float32)
    slot_U = metric.U[columns][:, columns]
    slot_H = (
        (H + metric.extra * jnp.diag(H).mean() * jnp.eye(len(H)))[columns][:, columns]
        * slot_scale
        * slot_scale[:, None]
    )
    return Problem(
        W=jnp.where(filled[:, None], slot_W, 0),
        H=jnp.where(both, slot_H, 0),
        # (S H S)^-1 = (U S^-1)^T (U S^-1): the scale never enters the factorization.
        U=jnp.where(both, slot_U / slot_scale, eye),
        importance=jnp.where(filled & ~metric.dead[perm][columns], compensated_cost(slot_U), 0),
        scale=scale,
        offset=offset,
        perm=perm,
        damping=metric.damping + metric.extra,
    )


def compensated_cost(U: Float[Array, "n n"]) -> Float[Array, " n"]:
    """What a squared error in each column costs once the columns behind it have compensated for it: 1 / U_qq^2.

    The loss of the column pass is the sum of these costs; the paper weights k-means by diag(H), as if nothing were
    compensated. They are taken before normalization: errors count in units of their column's scale. Errors of the
    weight itself would add the scale squared, which leaves the proxy error of nearly all layers as it is and more
    perplexity, the more the smaller the codebooks are (measured: benchmarks/RESULTS.md).
    """
    return 1 / jnp.square(jnp.diag(U))


def normalization(W: Float[Array, "out in"]) -> tuple[Float[Array, " in"], Float[Array, " in"]]:
    """(scale, offset) per column: standard deviation and mean over the rows; the scale is never zero.

    The released code takes the range and the minimum, which hand the spread of a column to its two most
    extreme weights: at equal bits that leaves about 30 % more error.
    """
    largest = jnp.abs(W).max()
    largest = jnp.where(largest > 0, largest, 1)
    return jnp.maximum(W.std(axis=0), _SMALLEST_SCALE * largest), W.mean(axis=0)


def initial_codebooks(
    problem: Problem, segments: tuple[Segment, ...], key: Array, options: SearchOptions
) -> tuple[Codes, ...]:
    """Main codebooks of every segment by weighted k-means over its vectors; no indices yet."""
    return tuple(
        Codes(
            codebook=train_codebooks(
                problem.W, problem.importance, jax.random.fold_in(key, i), segment,
                segment.num_centroids, options,
            ),
            res_codebook=None,
            index=jnp.zeros((segment.slots, segment.num_vectors), jnp.int32),
            res_index=None,
        )
        for i, segment in enumerate(segments)
    )  # fmt: skip


def residual_codebook(
    problem: Problem,
    errors: Float[Array, "slots rows"],
    codes: tuple[Codes, ...],
    segments: tuple[Segment, ...],
    key: Array,
    options: SearchOptions,
) -> tuple[Codes, ...]:
    """Adds residual codebooks to the main segment, trained on what the column pass left over."""
    segment = segments[-1]
    res_codebook = train_codebooks(
        errors, problem.importance, jax.random.fold_in(key, len(segments)), segment,
        segment.num_res_centroids, options,
    )  # fmt: skip
    return (*codes[:-1], dataclasses.replace(codes[-1], res_codebook=res_codebook))


def train_codebooks(
    columns: Float[Array, "slots rows"],
    importance: Float[Array, " slots"],
    key: Array,
    segment: Segment,
    count: int,
    options: SearchOptions,
) -> Float[Array, "G k v"]:
    """One weighted k-means for each group of a segment, on a bounded random sample of its vectors."""
    columns = columns[segment.start : segment.start + segment.size]
    # A partial vector is no sample of whole ones; if there are no others, its padding is all zeros and harmless.
    whole = segment.num_vectors - (segment.tail < segment.vector_len and segment.num_vectors > 1)
    vectors = segment.split(columns)[:, :whole].reshape(segment.num_groups, -1, segment.vector_len)
    weights = importance[segment.start : segment.start + segment.size]
    weights = jnp.repeat(weights, whole).reshape(segment.num_groups, -1)
    wanted = min(vectors.shape[1], max(count * options.samples_per_centroid, _SMALLEST_SAMPLE))

    def train(group: tuple[Array, Array, Array]) -> Array:
        vectors, weights, key = group
        sample_key, start_key = jax.random.split(key)
        if wanted < vectors.shape[0]:
            sample, weights = importance_sample(weights, wanted, sample_key)
            vectors = vectors[sample]
        return kmeans(vectors, weights, num_centroids=count, iterations=options.kmeans_iters, key=start_key)[0]

    return lax.map(train, (vectors, weights, jax.random.split(key, segment.num_groups)))


def assign(W: Float[Array, "slots rows"], codes: tuple[Codes, ...], segments: tuple[Segment, ...]) -> tuple[Codes, ...]:
    """The indices of plain k-means: nearest centroids, nothing compensated."""
    return tuple(
        assign_columns(segment, W[segment.start : segment.start + segment.slots], code)
        for segment, code in zip(segments, codes, strict=True)
    )


def pack(
    problem: Problem,
    codes: tuple[Codes, ...],
    segments: tuple[Segment, ...],
    format: Format,
) -> VQArray:
    """The codes in stored form."""
    main, segment = codes[-1], segments[-1]

    def grouped(index: Array) -> Array:  # [slots, n] -> [G, n, group_size]
        index = index[: segment.size].reshape(segment.num_groups, segment.group_size, segment.num_vectors)
        return index.transpose(0, 2, 1)

    outliers = codes[0] if len(codes) > 1 else None
    return VQArray.from_indices(
        format,
        grouped(main.index),
        None if main.res_index is None else grouped(main.res_index),
        main.codebook,
        main.res_codebook,
        outlier_indices=None if outliers is None else outliers.index[: segments[0].size].T,
        outlier_codebook=None if outliers is None else outliers.codebook[0],
        scale=problem.scale if format.normalize else None,
        offset=problem.offset if format.normalize else None,
        perm=problem.perm if format.permute else None,
    )


def _relative_error(
    W: Float[Array, "out in"],
    H: Float[Array, "in in"],
    problem: Problem,
    codes: tuple[Codes, ...],
    segments: tuple[Segment, ...],
    slot_columns: np.ndarray,
) -> Float[Array, ""]:
    """tr(E H E^T) / tr(W H W^T) of the codes as they would be stored, in original units."""
    filled = slot_columns >= 0
    columns = decode_all(segments, codes)[filled]
    restored = jnp.zeros_like(W.T).at[problem.perm[slot_columns[filled]]].set(columns, unique_indices=True)
    error = (restored.T * problem.scale + problem.offset - W).T
    return proxy_loss(error, H) / jnp.maximum(proxy_loss(W.T, H), jnp.finfo(jnp.float32).tiny)
