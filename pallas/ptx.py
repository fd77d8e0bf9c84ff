"""Integers and PTX instructions for kernels written below Pallas' array level, inside `plgpu.inline_mgpu`.

Pallas has no gather from shared memory and no `mma.sync` on Hopper; both are single PTX
instructions. `Int` gives 32-bit index arithmetic Python operators, each function below emits one
instruction (or one short sequence) per thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith as _arith
from jaxlib.mlir.dialects import gpu
from jaxlib.mlir.dialects import llvm as _llvm
from jaxlib.mlir.dialects import scf as _scf

# The dialects' type stubs describe generated classes, not the ones that replace them.
arith: Any = _arith
llvm: Any = _llvm
scf: Any = _scf

SHARED_MEMORY_BYTES = 227 * 1024  # What one block of a Hopper GPU may use.


class Int:
    """An unsigned 32-bit integer of the running thread."""

    def __init__(self, value: ir.Value):
        self.value = value

    def __add__(self, other: Int | int) -> Int:
        return self if _is(other, 0) else Int(arith.addi(self.value, _int(other)))

    __radd__ = __add__

    def __sub__(self, other: Int | int) -> Int:
        return Int(arith.subi(self.value, _int(other)))

    def __rsub__(self, other: int) -> Int:
        return Int(arith.subi(_int(other), self.value))

    def __mul__(self, other: Int | int) -> Int:
        return self if _is(other, 1) else Int(arith.muli(self.value, _int(other)))

    __rmul__ = __mul__

    def __floordiv__(self, other: Int | int) -> Int:
        return self if _is(other, 1) else Int(arith.divui(self.value, _int(other)))

    def __mod__(self, other: Int | int) -> Int:
        return constant(0) if _is(other, 1) else Int(arith.remui(self.value, _int(other)))

    def __and__(self, other: Int | int) -> Int:
        return Int(arith.andi(self.value, _int(other)))

    def __rshift__(self, other: int) -> Int:
        return Int(arith.shrui(self.value, _int(other))) if other else self

    def __lshift__(self, other: int) -> Int:
        return Int(arith.shli(self.value, _int(other))) if other else self

    def __or__(self, other: Int | int) -> Int:
        return Int(arith.ori(self.value, _int(other)))

    def __lt__(self, other: Int | int) -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.ult, self.value, _int(other))

    def __ge__(self, other: Int | int) -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.uge, self.value, _int(other))

    def equals(self, other: Int | int) -> ir.Value:
        """The comparison `==`, which Python reserves for objects."""
        return arith.cmpi(arith.CmpIPredicate.eq, self.value, _int(other))

    def minimum(self, other: Int | int) -> Int:
        """The lesser of two."""
        return Int(arith.minui(self.value, _int(other)))


def _is(value: Int | int, number: int) -> bool:
    return isinstance(value, int) and value == number


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _f32() -> ir.Type:
    return ir.F32Type.get()


def _int(value: Int | int) -> ir.Value:
    return value.value if isinstance(value, Int) else arith.constant(_i32(), ir.IntegerAttr.get(_i32(), value))


def constant(value: int) -> Int:
    """A compile-time integer."""
    return Int(_int(value))


def float_constant(value: float) -> ir.Value:
    """A compile-time float32."""
    return arith.constant(_f32(), ir.FloatAttr.get(_f32(), value))


def select(condition: ir.Value, then: Any, otherwise: Any) -> Any:
    """`condition ? then : otherwise`, for `Int` or MLIR values of one type."""
    if isinstance(then, Int | int):
        return Int(arith.select(condition, _int(then), _int(otherwise)))
    return arith.select(condition, then, otherwise)


def both(first: ir.Value, second: ir.Value) -> ir.Value:
    """Logical and of two conditions."""
    return arith.andi(first, second)


def either(first: ir.Value, second: ir.Value) -> ir.Value:
    """Logical or of two conditions."""
    return arith.ori(first, second)


def differ(first: Int, second: Int) -> ir.Value:
    """Whether two integers differ."""
    return arith.cmpi(arith.CmpIPredicate.ne, first.value, second.value)


def thread_index() -> Int:
    """Thread within the block."""
    return Int(arith.index_cast(_i32(), gpu.thread_id(gpu.Dimension.x)))


def block_index() -> Int:
    """Block within the grid."""
    return Int(arith.index_cast(_i32(), gpu.block_id(gpu.Dimension.x)))


def barrier() -> None:
    """Waits for all threads of the block."""
    gpu.barrier()


def named_barrier(name: Int, threads: int) -> None:
    """Waits for `threads` threads, whole warps, that name the same barrier, 1 to 15."""
    _asm([], [name], f"bar.sync $0,{threads};", "r")


def warp_barrier() -> None:
    """Orders memory among the 32 threads of a warp."""
    _asm([], [], "bar.warp.sync 0xffffffff;", "")


@contextlib.contextmanager
def when(condition: ir.Value) -> Iterator[None]:
    """Emits the body of the `with` under a condition."""
    branch = scf.IfOp(condition)
    with ir.InsertionPoint(branch.then_block):
        yield
        scf.yield_([])


def loop(start: Int, stop: Int, carry: Sequence[ir.Value], body: Callable[[Int, list], Sequence[ir.Value]]) -> list:
    """`for i in range(start, stop): carry = body(i, carry)`; returns the last carry."""
    index = ir.IndexType.get()
    one = arith.constant(index, ir.IntegerAttr.get(index, 1))
    bounds = [arith.index_cast(index, bound.value) for bound in (start, stop)]
    operation = scf.ForOp(*bounds, one, list(carry))
    with ir.InsertionPoint(operation.body):
        step = Int(arith.index_cast(_i32(), operation.induction_variable))
        scf.YieldOp(list(body(step, list(operation.inner_iter_args))))
    return list(operation.results)


def _asm(results: list, operands: list, text: str, constraints: str, *, pure: bool = False) -> tuple:
    values = [operand.value if isinstance(operand, Int) else operand for operand in operands]
    if not results:
        llvm.inline_asm(None, values, text, constraints, has_side_effects=True)
        return ()
    kind = results[0] if len(results) == 1 else llvm.StructType.get_literal(results)
    value = llvm.inline_asm(kind, values, text, constraints, has_side_effects=not pure)
    if len(results) == 1:
        return (value,)
    return tuple(llvm.extractvalue(result, value, [i]) for i, result in enumerate(results))


class Pointer:
    """An address in device memory."""

    def __init__(self, value: ir.Value):
        self.value = value

    @classmethod
    def of(cls, ref: ir.Value) -> Pointer:
        """The first element of an array in device memory."""
        return cls(llvm.ptrtoint(_i64(), mgpu_utils.memref_ptr(ref)))

    def at(self, index: Int, size: int) -> Pointer:
        """The address of element `index`, elements of `size` bytes; `index * size` may exceed 32 bits."""
        wide = arith.extui(_i64(), index.value)
        scale = arith.constant(_i64(), ir.IntegerAttr.get(_i64(), size))
        return Pointer(arith.addi(self.value, arith.muli(wide, scale)))

    def offset(self, size: int) -> Pointer:
        """The address `size` bytes further."""
        if not size:
            return self
        return Pointer(arith.addi(self.value, arith.constant(_i64(), ir.IntegerAttr.get(_i64(), size))))


def choose(condition: ir.Value, then: Pointer, otherwise: Pointer) -> Pointer:
    """`condition ? then : otherwise` of two addresses."""
    return Pointer(arith.select(condition, then.value, otherwise.value))


def shared_address(ref: ir.Value) -> Int:
    """Byte address of a shared-memory array within the block's window."""
    return Int(llvm.ptrtoint(_i32(), mgpu_utils.memref_ptr(ref)))


def _vector(words: int) -> tuple[str, str, str]:
    registers = ",".join(f"${i}" for i in range(words))
    if words == 1:
        return "u32", registers, "=r"
    return f"v{words}.u32", f"{{{registers}}}", ",".join(["=r"] * words)


def load_stream(pointer: Pointer, words: int) -> list[Int]:
    """1, 2 or 4 words that are read once: they pass through without a place in L1."""
    kind, registers, outputs = _vector(words)
    text = f"ld.global.nc.L1::no_allocate.{kind} {registers},[${words}];"
    return [Int(v) for v in _asm([_i32()] * words, [pointer.value], text, f"{outputs},l")]


def load_cached(pointer: Pointer, words: int) -> list[Int]:
    """1, 2 or 4 words that other warps will read too."""
    kind, registers, outputs = _vector(words)
    text = f"ld.global.nc.{kind} {registers},[${words}];"
    return [Int(v) for v in _asm([_i32()] * words, [pointer.value], text, f"{outputs},l")]


def store_global(pointer: Pointer, words: Sequence[Int], *, evict_first: bool = False) -> None:
    """1, 2 or 4 words to device memory; with `evict_first` they are the first to leave L2."""
    kind, registers, _ = _vector(len(words))
    count = len(words)
    text = f"st.global.{kind} [${count}],{registers};"
    if evict_first:
        policy = ".reg .b64 p; createpolicy.fractional.L2::evict_first.b64 p,1.0;"
        text = f"{{{policy} st.global.L2::cache_hint.{kind} [${count}],{registers},p;}}"
    _asm([], [*words, pointer.value], text, ",".join(["r"] * count + ["l"]))


def store_global_float(pointer: Pointer, value: ir.Value) -> None:
    """One float32 to device memory."""
    _asm([], [pointer.value, value], "st.global.f32 [$0],$1;", "l,f")


def load_shared(address: Int, words: int) -> list[Int]:
    """1, 2 or 4 words from shared memory."""
    kind, registers, outputs = _vector(words)
    text = f"ld.shared.{kind} {registers},[${words}];"
    return [Int(v) for v in _asm([_i32()] * words, [address], text, f"{outputs},r")]


def load_shared_float(address: Int) -> ir.Value:
    """One float32 from shared memory."""
    return _asm([_f32()], [address], "ld.shared.f32 $0,[$1];", "=f,r")[0]


def load_shared_half(address: Int) -> Int:
    """16 bits from shared memory, as the lower half of a word."""
    return Int(_asm([_i32()], [address], "ld.shared.u16 $0,[$1];", "=r,r")[0])


def store_shared_float(address: Int, value: ir.Value) -> None:
    """One float32 to shared memory."""
    _asm([], [address, value], "st.shared.f32 [$0],$1;", "r,f")


def store_shared_half(address: Int, word: Int) -> None:
    """The lower 16 bits of a word to shared memory."""
    text = "{.reg .b16 l,h; mov.b32 {l,h},$1; st.shared.b16 [$0],l;}"
    _asm([], [address, word], text, "r,r")


def copy_async(address: Int, pointer: Pointer, size: int, condition: ir.Value | None = None) -> None:
    """Starts the copy of 8 or 16 bytes from device memory to shared memory, if the condition holds."""
    cache = "cg" if size == 16 else "ca"
    copy = f"cp.async.{cache}.shared.global [$0],[$1],{size};"
    if condition is None:
        _asm([], [address, pointer.value], copy, "r,l")
        return
    flag = arith.extui(_i32(), condition)
    _asm([], [address, pointer.value, flag], f"{{.reg .pred p; setp.ne.u32 p,$2,0; @p {copy}}}", "r,l,r")


def commit_copies() -> None:
    """Closes a group of started copies."""
    _asm([], [], "cp.async.commit_group;", "")


def wait_copies(pending: int) -> None:
    """Waits until at most `pending` groups of this thread are still running."""
    _asm([], [], f"cp.async.wait_group {pending};", "")


def gather_transposed(address: Int) -> list[Int]:
    """`ldmatrix.x4.trans`: the 32 threads' 16-byte rows, as four 8x8 blocks of 16-bit values, transposed.

    Every thread names its own row, so this is a gather of 32 centroids straight into the operand
    layout of `mma`: a register of block b holds component `lane // 4` of the rows that threads
    8b + 2 * (lane % 4) and the next one named.
    """
    text = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3},[$4];"
    return [Int(v) for v in _asm([_i32()] * 4, [address], text, "=r,=r,=r,=r,r")]


def mma(a: Sequence[Int], b: Sequence[Int], c: Sequence[ir.Value], kind: str) -> list[ir.Value]:
    """`c + a @ b` of a [16, 16 or 8] and b [16 or 8, 8] in `kind` ("bf16" or "f16"), float32 sums [16, 8]."""
    depth = 4 * len(a)
    count = 4 + len(a) + len(b)
    inputs = [f"${i}" for i in range(4, count)]
    groups = (inputs[: len(a)], inputs[len(a) :], [f"${i}" for i in range(count, count + 4)])
    operands = ",".join("{" + ",".join(group) + "}" for group in groups)
    text = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{$0,$1,$2,$3}},{operands};"
    constraints = ",".join(["=f"] * 4 + ["r"] * (len(a) + len(b)) + ["f"] * 4)
    return list(_asm([_f32()] * 4, [*a, *b, *c], text, constraints, pure=True))


def funnel_shift_right(low: Int, high: Int, shift: int) -> Int:
    """Bits shift .. shift + 31 of the 64-bit value `high:low`."""
    text = f"shf.r.wrap.b32 $0,$1,$2,{shift};"
    return Int(_asm([_i32()], [low, high], text, "=r,r,r", pure=True)[0])


def shuffle_xor(value: ir.Value, mask: int) -> ir.Value:
    """The float32 that the thread `lane ^ mask` of the warp holds."""
    return _asm([_f32()], [value], f"shfl.sync.bfly.b32 $0,$1,{mask},31,0xffffffff;", "=f,f")[0]


def shuffle_xor_int(value: Int, mask: int) -> Int:
    """The integer that the thread `lane ^ mask` of the warp holds."""
    return Int(_asm([_i32()], [value], f"shfl.sync.bfly.b32 $0,$1,{mask},31,0xffffffff;", "=r,r")[0])


def shuffle(value: Int, lane: Int) -> Int:
    """The integer that a thread of the warp holds."""
    return Int(_asm([_i32()], [value, lane], "shfl.sync.idx.b32 $0,$1,$2,31,0xffffffff;", "=r,r,r")[0])


def less(first: ir.Value, second: ir.Value) -> ir.Value:
    """`first < second` of two float32, false where one is NaN."""
    return arith.cmpf(arith.CmpFPredicate.OLT, first, second)


def minimum(first: ir.Value, second: ir.Value) -> ir.Value:
    """The lesser of two float32."""
    return _asm([_f32()], [first, second], "min.f32 $0,$1,$2;", "=f,f,f", pure=True)[0]


def add(first: ir.Value, second: ir.Value) -> ir.Value:
    """Float32 sum."""
    return arith.addf(first, second)


def subtract(first: ir.Value, second: ir.Value) -> ir.Value:
    """Float32 difference."""
    return arith.subf(first, second)


def multiply_add(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Fused `a * b + c` in float32."""
    return _asm([_f32()], [a, b, c], "fma.rn.f32 $0,$1,$2,$3;", "=f,f,f,f", pure=True)[0]


def as_float(value: Int) -> ir.Value:
    """The float32 with these bits."""
    return arith.bitcast(_f32(), value.value)


def add_packed(first: Int, second: Int, kind: str) -> Int:
    """Sums of two pairs of 16-bit floats, `kind` "bf16" or "f16"."""
    return Int(_asm([_i32()], [first, second], f"add.rn.{kind}x2 $0,$1,$2;", "=r,r,r", pure=True)[0])


def as_int(value: ir.Value) -> Int:
    """The bits of a float32."""
    return Int(arith.bitcast(_i32(), value))


def equal(first: ir.Value, second: ir.Value) -> ir.Value:
    """`first == second` of two float32, false where one is NaN."""
    return arith.cmpf(arith.CmpFPredicate.OEQ, first, second)


def store_shared(address: Int, words: Sequence[Int]) -> None:
    """1, 2 or 4 words to shared memory."""
    kind, registers, _ = _vector(len(words))
    count = len(words)
    _asm([], [*words, address], f"st.shared.{kind} [${count}],{registers};", ",".join(["r"] * (count + 1)))


def unpack(word: Int, kind: str) -> tuple[ir.Value, ir.Value]:
    """The two 16-bit floats of a word as float32, `kind` "bf16" or "f16"."""
    if kind == "bf16":
        return as_float(word << 16), as_float(word & 0xFFFF0000)
    text = "{.reg .b16 l,h; mov.b32 {l,h},$2; cvt.f32.f16 $0,l; cvt.f32.f16 $1,h;}"
    low, high = _asm([_f32()] * 2, [word], text, "=f,=f,r", pure=True)
    return low, high


def pack(low: ir.Value, high: ir.Value, kind: str) -> Int:
    """Two float32 rounded to 16-bit floats in one word, `kind` "bf16" or "f16"."""
    return Int(_asm([_i32()], [high, low], f"cvt.rn.{kind}x2.f32 $0,$1,$2;", "=r,f,f", pure=True)[0])


def multiply(first: ir.Value, second: ir.Value) -> ir.Value:
    """Float32 product."""
    return arith.mulf(first, second)


def exp2(value: ir.Value) -> ir.Value:
    """Two to the power of a float32, about 22 bits."""
    return _asm([_f32()], [value], "ex2.approx.f32 $0,$1;", "=f,f", pure=True)[0]


def inverse_sqrt(value: ir.Value) -> ir.Value:
    """One over the square root of a float32, about 22 bits."""
    return _asm([_f32()], [value], "rsqrt.approx.f32 $0,$1;", "=f,f", pure=True)[0]


def maximum(first: ir.Value, second: ir.Value) -> ir.Value:
    """The greater of two float32."""
    return _asm([_f32()], [first, second], "max.f32 $0,$1,$2;", "=f,f,f", pure=True)[0]
