"""The Mosaic GPU kernel: scores on the tensor cores, minima in registers, the last choice in float32.

The score |c|^2 / 2 - x.c of every pair is one accumulator of a tensor-core product whose operands
are float16 halves of float32 values (x_hi.c_hi + x_hi.c_lo + x_lo.c_hi, about 22 bits). A thread
keeps, for each of its vectors, the two runs of 16 centroids that held the lowest scores; the best
two runs of each vector are then compared once more by their distances in float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vptq_jax.pallas import dispatch, ptx
from vptq_jax.pallas.launch import launch
from vptq_jax.pallas.ptx import Int as Word
from vptq_jax.pallas.ptx import Pointer

MAX_VECTOR_LEN = 16
_WARPS = 16
_TILE = 8  # Centroids of one tensor-core product.
_RUN_TILES = 8
_RUN = _RUN_TILES * _TILE  # Centroids whose scores share one minimum per thread quad.
_CHUNK = 1024  # Centroids in shared memory at a time; there are two such buffers.
_LARGEST = 64.0  # Values are scaled below this, so that float16 halves neither overflow nor lose bits.


@dataclasses.dataclass(frozen=True)
class Plan:
    """One launch for n vectors of length v and k centroids.

    A block works on `row_warps * row_tiles * 16` vectors at a time; its warps share them
    `16 / row_warps` ways, each with its own centroids of every chunk.
    """

    count: int
    length: int
    centroids: int
    blocks: int

    @property
    def depth(self) -> int:
        """Depth of the tensor-core product: three runs of the vector length."""
        return -(-3 * self.length // 8) * 8

    @property
    def row_warps(self) -> int:
        """Warps with vectors of their own, as many as there are vectors to give every block work."""
        warps = _WARPS
        while warps > 1 and -(-self.count // (warps * self.row_tiles * 16)) < self.blocks:
            warps //= 2
        return warps

    @property
    def row_tiles(self) -> int:
        """Runs of 16 vectors of a warp."""
        return 4 if self.count >= 64 * self.blocks else 1

    @property
    def chunks(self) -> int:
        """Chunks of the codebook, the last one padded."""
        return -(-self.centroids // _CHUNK)

    @property
    def block_vectors(self) -> int:
        """Vectors of a block at a time."""
        return self.row_warps * self.row_tiles * 16

    @property
    def passes(self) -> int:
        """Times that `block_vectors` go into all vectors."""
        return -(-self.count // self.block_vectors)

    @property
    def buffer_bytes(self) -> int:
        """Shared memory of one chunk: operands, then half norms."""
        return _CHUNK * (2 * self.depth + 4)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: two chunks; the warps' candidates reuse it."""
        return max(2 * self.buffer_bytes, _WARPS * self.row_tiles * 16 * 16)


def nearest_index(vectors: Float[Array, "n v"], codebook: Float[Array, "k v"]) -> Int[Array, " n"]:
    """Index of the nearest centroid of every vector, n >= 1, v <= 16."""
    plan = Plan(vectors.shape[0], vectors.shape[1], codebook.shape[0], dispatch.num_processors())
    vectors, codebook = vectors.astype(jnp.float32), codebook.astype(jnp.float32)
    rows, columns, half_norms = _operands(plan, vectors, codebook)
    padding = ((0, 0), (0, -plan.length % 4))
    operands = (rows, columns, half_norms, jnp.pad(vectors, padding), jnp.pad(codebook, padding))

    return launch(
        lambda pointers, shared: _Emitter(plan, pointers, shared).run(),
        operands,
        jax.ShapeDtypeStruct((plan.count,), jnp.int32),
        blocks=min(plan.blocks, plan.passes),
        warps=_WARPS,
        shared_bytes=plan.shared_bytes,
    )


def _operands(plan: Plan, vectors: Float[Array, "n v"], codebook: Float[Array, "k v"]) -> tuple[Array, Array, Array]:
    """Tensor-core operands: rows float16 [n, depth], columns uint32 by tile and thread, half norms float32."""
    centre = codebook.mean(axis=0)
    vectors, codebook = vectors - centre, codebook - centre
    # A vector that is not finite must not spoil the others.
    largest = jnp.maximum(*(jnp.where(jnp.isfinite(a), jnp.abs(a), 0.0).max() for a in (vectors, codebook)))
    scale = jnp.exp2(jnp.floor(jnp.log2(_LARGEST / jnp.where(largest > 0, largest, 1.0))))
    vectors, codebook = vectors * scale, codebook * scale
    (high, low), (column_high, column_low) = _halves(vectors), _halves(-codebook)
    spare = plan.depth - 3 * plan.length
    rows = jnp.pad(jnp.concatenate([high, high, low], axis=1), ((0, 0), (0, spare)))
    missing = plan.chunks * _CHUNK - plan.centroids
    columns = jnp.concatenate([column_high, column_low, column_high], axis=1)
    columns = jnp.pad(columns, ((0, missing), (0, spare)))
    # Thread 4n + j of a warp holds depths 2j, 2j + 1 of every 8 of centroid n of a tile.
    words = jax.lax.bitcast_convert_type(columns.reshape(-1, _TILE, plan.depth // 8, 4, 2), jnp.uint32)
    words = words.transpose(0, 2, 1, 3).reshape(-1)
    half_norms = jnp.pad(0.5 * jnp.sum(jnp.square(codebook), axis=1), (0, missing), constant_values=jnp.inf)
    return rows, words, half_norms


def _halves(values: Float[Array, "n v"]) -> tuple[Array, Array]:
    high = values.astype(jnp.float16)
    return high, (values - high.astype(jnp.float32)).astype(jnp.float16)


class _Emitter:
    """Emits the kernel; holds what every step needs."""

    def __init__(self, plan: Plan, pointers: list[Pointer], shared: Word):
        self.plan, self.shared = plan, shared
        self.rows, self.columns, self.half_norms, self.vectors, self.codebook, self.output = pointers
        self.thread = ptx.thread_index()
        self.block = ptx.block_index()
        self.lane = self.thread & 31
        self.quad = self.lane & 3
        warp = self.thread >> 5
        self.row_warp = warp % plan.row_warps
        self.share = warp // plan.row_warps
        self.shares = _WARPS // plan.row_warps
        self.infinity = ptx.float_constant(float("inf"))

    def run(self) -> None:
        plan = self.plan
        blocks = min(plan.blocks, plan.passes)
        mine = (plan.passes - 1 - self.block) // blocks + 1

        def body(index: Word, carry: list) -> list:
            self._vectors((self.block + index * blocks) * plan.block_vectors)
            return carry

        ptx.loop(ptx.constant(0), mine, [], body)

    def _vectors(self, first: Word) -> None:
        """Finds the centroids of one block's vectors."""
        plan = self.plan
        first = first + self.row_warp * (plan.row_tiles * 16)
        rows = [
            (first + (16 * tile + 8 * half) + (self.lane >> 2)).minimum(plan.count - 1)
            for tile in range(plan.row_tiles)
            for half in (0, 1)
        ]
        fragments = [self._row_fragment(rows[2 * tile], rows[2 * tile + 1]) for tile in range(plan.row_tiles)]
        self._load_chunk(ptx.constant(0))

        def body(chunk: Word, carry: list) -> list:
            self._load_chunk(chunk + 1)
            ptx.wait_copies(1)
            ptx.barrier()
            carry = self._chunk(chunk, fragments, carry)
            ptx.barrier()
            return carry

        empty = [self.infinity, ptx.constant(0).value] * 2
        carry = ptx.loop(ptx.constant(0), ptx.constant(plan.chunks), empty * len(rows), body)
        ptx.wait_copies(0)
        found = [_Candidates.of(carry[4 * i : 4 * i + 4]) for i in range(len(rows))]
        for mask in (1, 2):
            found = [best.merged(best.shuffled(mask)) for best in found]
        if self.shares > 1:
            found = self._merge_shares(found)
        for i, row in enumerate(rows):
            inside = (first + (16 * (i // 2) + 8 * (i % 2)) + (self.lane >> 2)) < plan.count
            self._choose(row, inside, found[i])
        if self.shares > 1:
            ptx.barrier()  # The next vectors' chunks overwrite the shared candidates.

    def _row_fragment(self, upper: Word, lower: Word) -> list[Word]:
        """Operands of 16 vectors, two words for every 8 of depth."""
        width = 2 * self.plan.depth
        words = []
        for depth in range(0, self.plan.depth, 8):
            for row in (upper, lower):
                place = self.rows.at(row, width).at(self.quad, 4).offset(2 * depth)
                words += ptx.load_stream(place, 1)
        return words

    def _load_chunk(self, chunk: Word) -> None:
        """Starts the copy of a chunk into its buffer."""
        plan = self.plan
        threads = _WARPS * 32
        buffer = self.shared + (chunk & 1) * plan.buffer_bytes
        operand_bytes = _CHUNK * 2 * plan.depth
        exists = chunk < plan.chunks
        sources = ((self.columns, 0, operand_bytes), (self.half_norms, operand_bytes, 4 * _CHUNK))
        for source, offset, size in sources:
            for start in range(0, size // 16, threads):
                item = self.thread + start
                inside = ptx.both(exists, item < size // 16)
                ptx.copy_async(buffer + offset + item * 16, source.at(chunk, size).at(item, 16), 16, inside)
        ptx.commit_copies()

    def _chunk(self, chunk: Word, fragments: list[list[Word]], carry: list) -> list:
        """Scores of this warp's share of a chunk against its vectors."""
        plan = self.plan
        buffer = self.shared + (chunk & 1) * plan.buffer_bytes
        runs = _CHUNK // _RUN // self.shares
        steps = plan.depth // 8

        def body(index: Word, carry: list) -> list:
            run = self.share * runs + index
            lowest: list[Any] = [None] * (2 * plan.row_tiles)
            for tile in range(_RUN_TILES):
                at = run * _RUN_TILES + tile
                place = buffer + at * (steps * 128) + self.lane * 4
                columns = [ptx.load_shared(place + 128 * step, 1)[0] for step in range(steps)]
                norms = buffer + _CHUNK * 2 * plan.depth + at * (4 * _TILE) + self.quad * 8
                first, second = (ptx.as_float(word) for word in ptx.load_shared(norms, 2))
                for i, fragment in enumerate(fragments):
                    scores = [first, second, first, second]
                    for step in range(0, steps, 2):
                        depth = min(2, steps - step)
                        operand = fragment[2 * step : 2 * (step + depth)]
                        scores = ptx.mma(operand, columns[step : step + depth], scores, "f16")
                    for half in (0, 1):
                        pair = scores[2 * half : 2 * half + 2]
                        kept = lowest[2 * i + half]
                        values = pair if kept is None else [kept, *pair]
                        low = values[0]
                        for value in values[1:]:
                            low = ptx.minimum(low, value)
                        lowest[2 * i + half] = low
            code = ((chunk * (_CHUNK // _RUN) + run) << 2) + self.quad
            result = []
            for i, low in enumerate(lowest):
                result += _Candidates.of(carry[4 * i : 4 * i + 4]).with_later(low, code).values()
            return result

        return ptx.loop(ptx.constant(0), ptx.constant(runs), carry, body)

    def _merge_shares(self, found: list[_Candidates]) -> list[_Candidates]:
        """Candidates of the warps that searched other centroids for the same vectors."""
        rows = self.plan.row_tiles * 16
        base = self.shared + self.row_warp * (self.shares * rows * 16)

        def place(share: Word | int, i: int) -> Word:
            row = (self.lane >> 2) + (16 * (i // 2) + 8 * (i % 2))
            return base + (row + share * rows) * 16

        ptx.barrier()
        with ptx.when(self.quad < 1):
            for i, best in enumerate(found):
                ptx.store_shared(place(self.share, i), best.words())
        ptx.barrier()
        merged = []
        for i in range(len(found)):
            best = _Candidates.of_words(ptx.load_shared(place(0, i), 4))
            for share in range(1, self.shares):
                best = best.merged(_Candidates.of_words(ptx.load_shared(place(share, i), 4)))
            merged.append(best)
        return merged

    def _choose(self, row: Word, inside: Any, found: _Candidates) -> None:
        """Compares the candidates by distance, eight per thread of a quad, and writes the index of the nearest."""
        plan = self.plan
        words = -(-plan.length // 4)
        vector = [
            ptx.as_float(word)
            for i in range(words)
            for word in ptx.load_cached(self.vectors.at(row, 16 * words).offset(16 * i), 4)
        ]
        code = ptx.select(self.quad < 2, found.first_code, found.second_code)
        start = (code >> 2) * _RUN + (code & 3) * 2 + (self.quad & 1) * (_RUN // 2)
        best, index = self.infinity, ptx.constant(0)
        for tile in range(_RUN_TILES // 2):
            for parity in (0, 1):
                candidate = start + (tile * _TILE + parity)
                exists = candidate < plan.centroids
                source = self.codebook.at(candidate.minimum(plan.centroids - 1), 16 * words)
                distance = ptx.float_constant(0.0)
                for i in range(words):
                    for x, word in zip(vector[4 * i :], ptx.load_cached(source.offset(16 * i), 4), strict=False):
                        difference = ptx.subtract(x, ptx.as_float(word))
                        distance = ptx.multiply_add(difference, difference, distance)
                nearer = ptx.both(exists, ptx.less(distance, best))
                best, index = ptx.select(nearer, distance, best), ptx.select(nearer, candidate, index)
        for mask in (1, 2):
            other, other_index = ptx.shuffle_xor(best, mask), ptx.shuffle_xor_int(index, mask)
            tie = ptx.both(ptx.equal(other, best), other_index < index)
            nearer = ptx.either(ptx.less(other, best), tie)
            best, index = ptx.select(nearer, other, best), ptx.select(nearer, other_index, index)
        with ptx.when(ptx.both(inside, ptx.both(self.quad < 1, self.share < 1))):
            ptx.store_global(self.output.at(row, 4), [index])


@dataclasses.dataclass(frozen=True)
class _Candidates:
    """The two lowest scores of a vector so far, and the runs of centroids that hold them."""

    first: Any
    first_code: Word
    second: Any
    second_code: Word

    @classmethod
    def of(cls, values: list) -> _Candidates:
        return cls(values[0], Word(values[1]), values[2], Word(values[3]))

    @classmethod
    def of_words(cls, words: list[Word]) -> _Candidates:
        return cls(ptx.as_float(words[0]), words[1], ptx.as_float(words[2]), words[3])

    def values(self) -> list:
        return [self.first, self.first_code.value, self.second, self.second_code.value]

    def words(self) -> list[Word]:
        return [ptx.as_int(self.first), self.first_code, ptx.as_int(self.second), self.second_code]

    def shuffled(self, mask: int) -> _Candidates:
        return _Candidates(
            ptx.shuffle_xor(self.first, mask),
            ptx.shuffle_xor_int(self.first_code, mask),
            ptx.shuffle_xor(self.second, mask),
            ptx.shuffle_xor_int(self.second_code, mask),
        )

    def with_later(self, score: Any, code: Word) -> _Candidates:
        """One more candidate, which must be strictly lower to displace another."""
        lowest, lower = ptx.less(score, self.first), ptx.less(score, self.second)
        second = ptx.select(lowest, self.first, ptx.select(lower, score, self.second))
        second_code = ptx.select(lowest, self.first_code, ptx.select(lower, code, self.second_code))
        return _Candidates(
            ptx.select(lowest, score, self.first), ptx.select(lowest, code, self.first_code), second, second_code
        )

    def merged(self, other: _Candidates) -> _Candidates:
        """The two lowest of both; the same whichever side asks."""
        return self._with(other.first, other.first_code)._with(other.second, other.second_code)

    def _with(self, score: Any, code: Word) -> _Candidates:
        def before(value: Any, value_code: Word) -> Any:
            tie = ptx.both(ptx.equal(score, value), code < value_code)
            return ptx.either(ptx.less(score, value), tie)

        lowest, lower = before(self.first, self.first_code), before(self.second, self.second_code)
        second = ptx.select(lowest, self.first, ptx.select(lower, score, self.second))
        second_code = ptx.select(lowest, self.first_code, ptx.select(lower, code, self.second_code))
        return _Candidates(
            ptx.select(lowest, score, self.first), ptx.select(lowest, code, self.first_code), second, second_code
        )
