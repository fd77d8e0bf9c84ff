"""The Mosaic GPU kernel: a block per row, key head and run of slots; XLA joins the runs.

Every warp reads its keys and values once, all loads in flight before the first use, and keeps the
maximum, the sum and the weighted values of its own slots; the warps of a block join theirs through
shared memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vptq_jax.pallas import ptx
from vptq_jax.pallas.launch import launch
from vptq_jax.pallas.ptx import Int, Pointer

_WARPS = 8
_MOST_LOADS = 4  # Slots that a group of threads reads, all at once.
_HIDDEN = -1e30  # Score of a slot that is not visible: finite, so that no sum is NaN.
_UNROLLED = 16  # Runs of slots that are joined by plain additions, which join the next operation's launch.


def unsupported(head_dim: int, group: int) -> str | None:
    """Why the kernel cannot run for a head width and a number of query heads per key head, or None."""
    if head_dim not in (8, 16, 32, 64, 128, 256):
        return f"head_dim is {head_dim}; the kernel takes powers of two from 8 to 256"
    return f"{group} query heads share a key head; the kernel takes up to 8" if group > 8 else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """One launch: queries [batch, heads, head_dim] over a cache [batch, kv_heads, slots, head_dim]."""

    batch: int
    heads: int
    kv_heads: int
    slots: int
    head_dim: int
    kind: Literal["bf16", "f16"]

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def key_threads(self) -> int:
        """Threads that read one key, 8 components each."""
        return self.head_dim // 8

    @property
    def warp_keys(self) -> int:
        """Keys that a warp reads at a time."""
        return 32 // self.key_threads

    @property
    def loads(self) -> int:
        """Times that a warp reads keys."""
        return min(_MOST_LOADS, -(-self.slots // (_WARPS * self.warp_keys)))

    @property
    def run(self) -> int:
        """Slots of a block."""
        return _WARPS * self.warp_keys * self.loads

    @property
    def runs(self) -> int:
        """Runs that make up all slots, the last one padded."""
        return -(-self.slots // self.run)


def decode_attention(
    q: Float[Array, "B N D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S D"],
    visible: Bool[Array, "B S"],
) -> Float[Array, "B N D"]:
    """See the api; q, keys and values in one 16-bit dtype."""
    kind: Any = "bf16" if q.dtype == jnp.bfloat16 else "f16"
    plan = Plan(q.shape[0], q.shape[1], keys.shape[1], keys.shape[2], q.shape[2], kind)
    bias = jnp.where(visible, 0.0, _HIDDEN).astype(jnp.float32)
    sums, peaks, totals = _runs(plan, q, keys, values, bias)
    if plan.runs == 1:
        return (sums[0] / totals[0][..., None]).astype(q.dtype)
    if plan.runs > _UNROLLED:
        weights = jnp.exp2(peaks - peaks.max(axis=0))
        return ((weights[..., None] * sums).sum(0) / (weights * totals).sum(0)[..., None]).astype(q.dtype)
    peak = functools.reduce(jnp.maximum, list(peaks))
    shares = [jnp.exp2(peaks[i] - peak) for i in range(plan.runs)]
    total = functools.reduce(operator.add, [shares[i] * totals[i] for i in range(plan.runs)])
    y = functools.reduce(operator.add, [shares[i][..., None] * sums[i] for i in range(plan.runs)])
    return (y / total[..., None]).astype(q.dtype)


def _runs(plan: Plan, q: Array, keys: Array, values: Array, bias: Array) -> tuple[Array, Array, Array]:
    """For every run of slots: weighted sums of values [runs, B, N, D], peak scores (log2) and sums of weights."""

    rows = (plan.runs, plan.batch, plan.heads)
    sums, peaks, totals = launch(
        functools.partial(_emit, plan),
        (q, keys, values, bias),
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*rows, plan.head_dim), rows, rows)],
        blocks=plan.batch * plan.kv_heads * plan.runs,
        warps=_WARPS,
        shared_bytes=_WARPS * plan.group * (plan.head_dim + 2) * 4,
    )
    return sums, peaks, totals


def _emit(plan: Plan, pointers: list[Pointer], shared: Int) -> None:
    q, keys, values, bias, sums, peaks, totals = pointers
    thread, block = ptx.thread_index(), ptx.block_index()
    lane, warp = thread & 31, thread >> 5
    head = block // plan.runs  # Row and key head.
    run = block - head * plan.runs
    row = head // plan.kv_heads
    component = (lane & (plan.key_threads - 1)) * 8
    slots, biases = [], []
    for load in range(plan.loads):
        first = run * plan.run + (warp + load * _WARPS) * plan.warp_keys
        slot = first + lane // plan.key_threads
        inside = slot < plan.slots
        slot = slot.minimum(plan.slots - 1)
        slots.append(head * plan.slots + slot)
        seen = ptx.as_float(ptx.load_cached(bias.at(row * plan.slots + slot, 4), 1)[0])
        biases.append(ptx.select(inside, seen, ptx.float_constant(_HIDDEN)))

    def read(source: Pointer, index: Int) -> list[Int]:
        return ptx.load_stream(source.at(index, plan.head_dim * 2).at(component, 2), 4)

    key_words = [read(keys, slot) for slot in slots]
    value_words = [read(values, slot) for slot in slots]
    first_query = head * plan.group
    for member in range(plan.group):
        words = ptx.load_cached(q.at(first_query + member, plan.head_dim * 2).at(component, 2), 4)
        scale = ptx.float_constant(plan.head_dim**-0.5 * math.log2(math.e))
        query = [ptx.multiply(value, scale) for value in _floats(words, plan.kind)]
        scores = []
        for words, seen in zip(key_words, biases, strict=True):
            score = ptx.float_constant(0.0)
            for a, b in zip(query, _floats(words, plan.kind), strict=True):
                score = ptx.multiply_add(a, b, score)
            scores.append(ptx.add(_reduced(score, ptx.add, 1, plan.key_threads), seen))
        peak = _reduced(functools.reduce(ptx.maximum, scores), ptx.maximum, plan.key_threads, 32)
        weights = [ptx.exp2(ptx.subtract(score, peak)) for score in scores]
        total = _reduced(functools.reduce(ptx.add, weights), ptx.add, plan.key_threads, 32)
        weighted = [ptx.float_constant(0.0)] * 8
        for weight, words in zip(weights, value_words, strict=True):
            pairs = zip(weighted, _floats(words, plan.kind), strict=True)
            weighted = [ptx.multiply_add(weight, value, so_far) for so_far, value in pairs]
        weighted = [_reduced(value, ptx.add, plan.key_threads, 32) for value in weighted]
        place = shared + (warp * plan.group + member) * ((plan.head_dim + 2) * 4)
        with ptx.when(lane < plan.key_threads):
            for i, value in enumerate(weighted):
                ptx.store_shared_float(place + (component + i) * 4, value)
        with ptx.when(lane < 1):
            ptx.store_shared_float(place + plan.head_dim * 4, peak)
            ptx.store_shared_float(place + (plan.head_dim + 1) * 4, total)
    ptx.barrier()
    items = plan.group * plan.head_dim
    for start in range(0, items, _WARPS * 32):
        item = thread + start
        with ptx.when(item < items):
            group_member = item // plan.head_dim
            at = item - group_member * plan.head_dim
            places = [
                shared + (group_member + index * plan.group) * ((plan.head_dim + 2) * 4) for index in range(_WARPS)
            ]
            found = [ptx.load_shared_float(place + plan.head_dim * 4) for place in places]
            peak = functools.reduce(ptx.maximum, found)
            weights = [ptx.exp2(ptx.subtract(value, peak)) for value in found]
            value, total = ptx.float_constant(0.0), ptx.float_constant(0.0)
            for place, weight in zip(places, weights, strict=True):
                value = ptx.multiply_add(weight, ptx.load_shared_float(place + at * 4), value)
                part = ptx.load_shared_float(place + (plan.head_dim + 1) * 4)
                total = ptx.multiply_add(weight, part, total)
            query_row = run * (plan.batch * plan.heads) + first_query + group_member
            ptx.store_global_float(sums.at(query_row, plan.head_dim * 4).at(at, 4), value)
            with ptx.when(at < 1):
                ptx.store_global_float(peaks.at(query_row, 4), peak)
                ptx.store_global_float(totals.at(query_row, 4), total)


def _floats(words: list[Int], kind: str) -> list:
    return [value for word in words for value in ptx.unpack(word, kind)]


def _reduced(value: Any, join: Any, start: int, stop: int) -> Any:
    """Joins the values of the threads whose lanes differ in the bits start .. stop / 2."""
    mask = start
    while mask < stop:
        value = join(value, ptx.shuffle_xor(value, mask))
        mask *= 2
    return value
