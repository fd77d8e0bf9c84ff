"""Runs kernels written with `pallas/ptx.py` on the CPU, every thread of a block in step with the others.

Each function of `ptx` has its counterpart here on NumPy arrays with one element a thread, so a test
of values needs no GPU. Copies and barriers happen at once: what it cannot see is a missing wait.
Addresses are checked: alignment, and that they lie inside an array.
"""

from __future__ import annotations

import contextlib
import math
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from vptq_jax.pallas import launch, ptx

_GAP = 1 << 12  # Bytes between arrays, so that no address just beyond one lies inside another.
_FLOATS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def _poison(dtype):
    return np.nan if jnp.issubdtype(dtype, jnp.inexact) else np.iinfo(dtype).max


def use(monkeypatch, *modules):
    """Lets the kernels of these modules run here when they are called, outside `jax.jit`."""
    simulated = {name: value for name, value in vars(_Machine).items() if not name.startswith("_")}
    machine = _Machine()
    for name in simulated:
        monkeypatch.setattr(ptx, name, getattr(machine, name))
    monkeypatch.setattr(ptx, "Int", Int)
    monkeypatch.setattr(ptx, "Pointer", Pointer)
    fake = types.SimpleNamespace(
        kernel=machine._kernel,
        inline_mgpu=lambda **_: lambda emit: lambda *refs: emit(None, *refs),
        RefType=lambda: None,
        SMEM=lambda shape, dtype: math.prod(shape) * np.dtype(dtype).itemsize,
        CompilerParams=lambda **_: None,
        LoweringSemantics=types.SimpleNamespace(Lane=None),
    )
    monkeypatch.setattr(launch, "plgpu", fake)
    for module in modules:
        for name in ("Int", "Pointer"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(ptx, name))


class Int(ptx.Int):
    """The counterpart of `ptx.Int`; `value` has one element a thread, or is one for all."""

    def __init__(self, value):
        self.value = np.asarray(value.value if isinstance(value, Int) else value).astype(np.uint32)

    def _with(self, other, function):
        with np.errstate(over="ignore"):
            return Int(function(self.value, Int(other).value))

    def __add__(self, other):
        return self._with(other, np.add)

    __radd__ = __add__

    def __sub__(self, other):
        return self._with(other, np.subtract)

    def __rsub__(self, other):
        return Int(other) - self

    def __mul__(self, other):
        return self._with(other, np.multiply)

    __rmul__ = __mul__

    def __floordiv__(self, other):
        return self._with(other, np.floor_divide)

    def __mod__(self, other):
        return self._with(other, np.remainder)

    def __and__(self, other):
        return self._with(other, np.bitwise_and)

    def __or__(self, other):
        return self._with(other, np.bitwise_or)

    def __rshift__(self, other):
        return self._with(other, np.right_shift)

    def __lshift__(self, other):
        return self._with(other, np.left_shift)

    def __lt__(self, other):
        return self.value < Int(other).value

    def __ge__(self, other):
        return self.value >= Int(other).value

    def equals(self, other):
        return self.value == Int(other).value

    def minimum(self, other):
        return self._with(other, np.minimum)


class Pointer(ptx.Pointer):
    """The counterpart of `ptx.Pointer`."""

    def __init__(self, value):
        self.value = np.asarray(value, np.int64)

    @classmethod
    def of(cls, ref):
        return cls(ref)

    def at(self, index, size):
        return Pointer(self.value + index.value.astype(np.int64) * size)

    def offset(self, size):
        return Pointer(self.value + size)


class _Machine:
    """Public methods stand for the functions of `ptx`."""

    def _kernel(self, body, out_type, grid, num_threads, scratch_types, **_):
        def call(*operands):
            outputs = out_type if isinstance(out_type, list) else [out_type]
            arrays = [np.asarray(operand) for operand in operands]
            arrays += [np.full(out.shape, _poison(out.dtype), out.dtype) for out in outputs]
            self._arrays = [array.reshape(-1).view(np.uint8) for array in arrays]
            sizes = [_GAP + -(-array.nbytes // _GAP) * _GAP for array in arrays]
            self._starts = np.cumsum([_GAP, *sizes])[: len(arrays)]
            self._memory = np.zeros(_GAP + sum(sizes), np.uint8)
            self._inside = np.zeros(len(self._memory), bool)
            for start, array in zip(self._starts, self._arrays, strict=True):
                self._memory[start : start + len(array)] = array
                self._inside[start : start + len(array)] = True
            self._threads = 128 * num_threads
            for self._block in range(grid[0]):
                self._shared = np.full(scratch_types[0], 0xFF, np.uint8)
                self._mask = np.ones(self._threads, bool)
                body(*(int(start) for start in self._starts), 0)
            results = []
            for start, out in list(zip(self._starts, arrays, strict=True))[len(operands) :]:
                results.append(self._memory[start : start + out.nbytes].view(out.dtype).reshape(out.shape))
            return (
                [jax.numpy.asarray(a) for a in results] if isinstance(out_type, list) else jax.numpy.asarray(results[0])
            )

        return call

    # --- threads and control ---

    def constant(self, value):
        return Int(value)

    def float_constant(self, value):
        return np.float32(value)

    def select(self, condition, then, otherwise):
        if isinstance(then, Int | int):
            return Int(np.where(condition, Int(then).value, Int(otherwise).value))
        return np.where(condition, then, otherwise)

    def both(self, first, second):
        return first & second

    def either(self, first, second):
        return first | second

    def differ(self, first, second):
        return first.value != second.value

    def thread_index(self):
        return Int(np.arange(self._threads))

    def block_index(self):
        return Int(self._block)

    def barrier(self):
        pass

    warp_barrier = commit_copies = barrier

    def wait_copies(self, pending):
        pass

    def named_barrier(self, name, threads):
        names = np.broadcast_to(name.value, self._mask.shape)[self._mask]
        assert ((names >= 1) & (names < 16)).all()
        assert (np.unique(names, return_counts=True)[1] == threads).all()

    @contextlib.contextmanager
    def when(self, condition):
        before, self._mask = self._mask, self._mask & condition
        yield
        self._mask = before

    def loop(self, start, stop, carry, body):
        assert self._mask.all()
        for index in range(int(start.value.max()), int(stop.value.max())):
            carry = list(body(Int(index), carry))
        return carry

    def _addresses(self, address, size, memory):
        places = np.broadcast_to(address.value, self._mask.shape).astype(np.int64)[self._mask]
        assert (places % size == 0).all(), f"misaligned by {np.unique(places % size)} of {size}"
        assert ((places >= 0) & (places + size <= len(memory))).all()
        assert memory is self._shared or (self._inside[places] & self._inside[places + size - 1]).all()
        return places[:, None] + np.arange(size)

    def _load(self, memory, address, words):
        places = self._addresses(address, 4 * words, memory)
        found = np.zeros((len(self._mask), words), np.uint32)
        found[self._mask] = memory[places].view(np.uint32)
        return [Int(word) for word in found.T]

    def _store(self, memory, address, values):
        values = np.stack([np.broadcast_to(value, self._mask.shape) for value in values], axis=1)[self._mask]
        values = np.ascontiguousarray(values).view(np.uint8)
        memory[self._addresses(address, values.shape[1], memory)] = values

    def choose(self, condition, then, otherwise):
        return type(then)(np.where(condition, then.value, otherwise.value))

    def shared_address(self, ref):
        return Int(ref)

    def load_stream(self, pointer, words):
        return self._load(self._memory, pointer, words)

    load_cached = load_stream

    def load_shared(self, address, words):
        return self._load(self._shared, address, words)

    def load_shared_float(self, address):
        return self.as_float(self.load_shared(address, 1)[0])

    def load_shared_half(self, address):
        found = np.zeros(len(self._mask), np.uint16)
        found[self._mask] = self._shared[self._addresses(address, 2, self._shared)].view(np.uint16)[:, 0]
        return Int(found)

    def store_global(self, pointer, words, *, evict_first=False):
        self._store(self._memory, pointer, [word.value for word in words])

    def store_global_float(self, pointer, value):
        self._store(self._memory, pointer, [np.float32(value)])

    def store_shared(self, address, words):
        self._store(self._shared, address, [word.value for word in words])

    def store_shared_float(self, address, value):
        self._store(self._shared, address, [np.float32(value)])

    def store_shared_half(self, address, word):
        self._store(self._shared, address, [word.value.astype(np.uint16)])

    def copy_async(self, address, pointer, size, condition=None):
        with self.when(True if condition is None else condition):
            self.store_shared(address, self._load(self._memory, pointer, size // 4))

    def _warps(self, value):
        return np.broadcast_to(value, self._mask.shape).reshape(-1, 32)

    def shuffle(self, value, lane):
        return Int(np.take_along_axis(self._warps(value.value), self._warps(lane.value).astype(int), 1).reshape(-1))

    def shuffle_xor(self, value, mask):
        return self._warps(value)[:, np.arange(32) ^ mask].reshape(-1)

    def gather_transposed(self, address):
        rows = self._shared[self._addresses(address, 16, self._shared)].view(np.uint16).reshape(-1, 4, 8, 8)
        #                                                       warp, block, row, component
        pairs = rows.transpose(0, 1, 3, 2).reshape(-1, 4, 32, 2)
        return [Int(np.ascontiguousarray(pairs[:, block]).view(np.uint32).reshape(-1)) for block in range(4)]

    def mma(self, a, b, c, kind):
        def matrix(words, rows):  # [warps, lane // 4 (+ 8 a word), 2 * (lane % 4) + half (+ 8 a word pair)]
            parts = [self._floats(word, kind).reshape(-1, 8, 8) for word in words]
            return np.concatenate([np.concatenate(parts[i : i + rows], 1) for i in range(0, len(parts), rows)], 2)

        product = matrix(a, 2) @ matrix(b, 1).transpose(0, 2, 1)  # [warps, 16, 8]
        product = product.reshape(-1, 2, 32, 2)
        return [np.float32(c[i] + product[:, i // 2, :, i % 2].reshape(-1)) for i in range(4)]

    # --- values ---

    def _floats(self, word, kind):
        words = np.ascontiguousarray(np.broadcast_to(word.value, self._mask.shape))
        return words.view(_FLOATS[kind]).reshape(-1, 2).astype(np.float32)

    def unpack(self, word, kind):
        return tuple(self._floats(word, kind).T)

    def pack(self, low, high, kind):
        pair = [np.broadcast_to(value, self._mask.shape) for value in (low, high)]
        return Int(np.stack(pair, 1).astype(_FLOATS[kind]).view(np.uint32).reshape(-1))

    def add_packed(self, first, second, kind):
        return self.pack(*(self._floats(first, kind) + self._floats(second, kind)).T, kind)

    def funnel_shift_right(self, low, high, shift):
        wide = low.value.astype(np.uint64) | high.value.astype(np.uint64) << np.uint64(32)
        return Int(wide >> np.uint64(shift) & np.uint64(0xFFFFFFFF))

    def as_float(self, value):
        return np.ascontiguousarray(value.value).view(np.float32)

    def inverse_sqrt(self, value):
        return np.float32(1) / np.sqrt(value)

    def add(self, first, second):
        return np.float32(first + second)

    def multiply(self, first, second):
        return np.float32(first * second)

    def multiply_add(self, a, b, c):
        return np.float32(np.float64(a) * b + c)
