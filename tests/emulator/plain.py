"""Arithmetic, moves, conversions, exchanges within a warp, loads and stores."""

import functools
import re
from collections.abc import Callable

import numpy as np

from . import arithmetic as on
from .arithmetic import BITS, TYPES
from .machine import LANES, Operation, Reader, Warps
from .memory import Shadow
from .registers import Operands, Writer
from .text import Instruction, PTXError
from .translation import instruction

INT = r"([su](?:16|32|64))"
Ufunc = Callable[..., np.ndarray]


def _apply(write: Writer, function: Ufunc, *readers: Reader) -> Operation:
    if len(readers) == 1:
        (a,) = readers
        return lambda w: write(w, function(a(w)))
    if len(readers) == 2:
        a, b = readers
        return lambda w: write(w, function(a(w), b(w)))
    return lambda w: write(w, function(*(read(w) for read in readers)))


def _plain(operands: Operands, given: Instruction, guard: Reader | None, type_: str, function: Ufunc) -> Operation:
    """All operands and the result of one type."""
    readers = [operands.read(text, type_) for text in given.operands[1:]]
    return _apply(operands.write(given.operands[0], type_, guard), function, *readers)


_FLOAT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@instruction(r"(add|sub|mul)(?:\.rn)?\.(f32|f64)", 3)
@instruction(rf"(add|sub|mul\.lo)\.{INT}", 3)
def _sum(operands, given, found, guard):
    return _plain(operands, given, guard, found[2], _FLOAT[found[1].removesuffix(".lo")])


@instruction(r"(add|sub|mul|fma)(?:\.rn)?\.f32x2", (3, 4))
def _pairs(operands, given, found, guard):
    if len(given.operands) != 3 + (found[1] == "fma"):
        raise PTXError("operands of a pair")
    function = _FLOAT.get(found[1], on.fma)

    def each(*words: np.ndarray) -> np.ndarray:
        pairs = zip(*(on.parts(word, 2) for word in words), strict=True)
        low, high = (function(*(x.view(np.float32) for x in part)).view(np.uint32) for part in pairs)
        return on.halves(low, high)

    return _plain(operands, given, guard, "b64", each)


@instruction(r"(mul|mad)\.wide\.([su](?:16|32))", (3, 4))
def _wide(operands, given, found, guard):
    (name, narrow), wide = found.groups(), on.WIDER[found[2]]
    if len(given.operands) != 3 + (name == "mad"):
        raise PTXError("operands of a product")
    readers = [operands.read(text, narrow) for text in given.operands[1:3]]
    readers += [operands.read(text, wide) for text in given.operands[3:]]
    dtype = TYPES[wide]

    def product(a, b, *c):
        return sum(c, a.astype(dtype) * b.astype(dtype))

    return _apply(operands.write(given.operands[0], wide, guard), product, *readers)


@instruction(rf"mad\.lo\.{INT}", 4)
def _multiply_add(operands, given, found, guard):
    return _plain(operands, given, guard, found[1], lambda a, b, c: a * b + c)


@instruction(r"fma\.rn\.(f32|f64)", 4)
def _fused(operands, given, found, guard):
    return _plain(operands, given, guard, found[1], on.fma)


@instruction(r"add\.rn\.f32\.(bf16|f16)", 3)
@instruction(r"fma\.rn\.f32\.(bf16|f16)", 4)
def _mixed(operands, given, found, guard):
    """A last operand of 32 bits, those before it of 16."""
    widen = on.of_bf16 if found[1] == "bf16" else lambda x: x.view(np.float16).astype(np.float32)
    *narrow, last = given.operands[1:]
    readers = [*(operands.read(text, "b16") for text in narrow), operands.read(last, "f32")]
    function = np.add if len(narrow) == 1 else on.fma
    return _apply(
        operands.write(given.operands[0], "f32", guard),
        lambda *values: function(*map(widen, values[:-1]), values[-1]),
        *readers,
    )


@instruction(r"div\.full\.(f32)", 3)
@instruction(r"div\.rn\.(f64)", 3)
@instruction(rf"div\.{INT}", 3)
def _quotient(operands, given, found, guard):
    functions = {"f32": on.divided_full, "f64": np.divide}
    return _plain(operands, given, guard, found[1], functions.get(found[1], on.divided))


@instruction(rf"(min|max)\.(f32|f64|{INT[1:-1]})", 3)
@instruction(r"(min|max)\.(f32)", 4)
def _extreme(operands, given, found, guard):
    # of a number and NaN the number
    function = getattr(np, f"f{found[1]}" if found[2][0] == "f" else f"{found[1]}imum")
    return _plain(operands, given, guard, found[2], lambda a, *rest: functools.reduce(function, rest, a))


@instruction(r"(abs|neg)(\.ftz)?\.(f32|f64|s32)", 2)
def _sign(operands, given, found, guard):
    function = {"abs": np.abs, "neg": np.negative}[found[1]]
    if found[2]:
        if found[3] != "f32":
            raise PTXError("flushed to zero")
        return _plain(operands, given, guard, found[3], lambda x: function(on.flushed(x)))
    return _plain(operands, given, guard, found[3], function)


@instruction(r"(and|or|xor)\.(b16|b32|b64|pred)", 3)
def _bits(operands, given, found, guard):
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[found[1]]
    return _plain(operands, given, guard, found[2], function)


@instruction(r"popc\.b32", 2)
def _population(operands, given, found, guard):
    return _plain(operands, given, guard, "b32", lambda x: np.bitwise_count(x).astype(np.uint32))


@instruction(r"not\.(b16|b32|b64|pred)", 2)
def _not(operands, given, found, guard):
    return _plain(operands, given, guard, found[1], np.invert)


@instruction(r"(shl)\.(b16|b32|b64)", 3)
@instruction(rf"(shr)\.{INT}", 3)
def _shift(operands, given, found, guard):
    function = {"shl": on.shifted_left, "shr": on.shifted_right}[found[1]]
    value, by = operands.read(given.operands[1], found[2]), operands.read(given.operands[2], "u32")
    return _apply(operands.write(given.operands[0], found[2], guard), function, value, by)


@instruction(r"bfe\.([su]32)", 4)
def _field(operands, given, found, guard):
    readers = [operands.read(text, t) for text, t in zip(given.operands[1:], (found[1], "u32", "u32"), strict=True)]
    return _apply(operands.write(given.operands[0], found[1], guard), on.bit_field, *readers)


@instruction(r"selp\.(b16|b32|b64|f32|f64)", 4)
def _select(operands, given, found, guard):
    a, b = (operands.read(text, found[1]) for text in given.operands[1:3])
    condition = operands.read(given.operands[3], "pred")
    return _apply(operands.write(given.operands[0], found[1], guard), np.where, condition, a, b)


@instruction(r"setp\.(eq|ne|lt|le|gt|ge)\.([bsu](?:16|32|64)|f32|f64)", 3)
@instruction(r"setp\.(equ|neu|ltu|leu|gtu|geu|num|nan)\.(f32|f64)", 3)
def _compare(operands, given, found, guard):
    if found[2][0] == "b" and found[1] not in ("eq", "ne"):
        raise PTXError("an order of bits")
    a, b = (operands.read(text, found[2]) for text in given.operands[1:])
    return _apply(operands.write(given.operands[0], "pred", guard), on.COMPARISONS[found[1]], a, b)


@instruction(r"mov\.([bu](?:16|32|64)|f32|f64|pred)", 2)
def _move(operands, given, found, guard):
    to, value = given.operands
    return _apply(operands.unpacked(to, found[1], guard), lambda x: x, operands.packed(value, found[1]))


@instruction(r"cvta\.param\.u64", 2)
def _address(operands, given, found, guard):
    return _plain(operands, given, guard, "u64", lambda x: x)  # `registers.PARAMETERS` is a generic address


@instruction(r"ex2\.approx(\.ftz)?\.f32", 2)
def _exponential(operands, given, found, guard):
    function = on.exp2 if found[1] is None else lambda x: on.flushed(on.exp2(on.flushed(x)))
    return _plain(operands, given, guard, "f32", function)


@instruction(r"rcp\.approx\.ftz\.f64", 2)
def _reciprocal(operands, given, found, guard):
    return _plain(operands, given, guard, "f64", on.reciprocal_high)


_CONVERSIONS: dict[str, tuple[str, str, Ufunc]] = {
    "f32.bf16": ("f32", "b16", on.of_bf16),
    "f32.f16": ("f32", "f16", lambda x: x.astype(np.float32)),
    "f64.f32": ("f64", "f32", lambda x: x.astype(np.float64)),
    "rn.f32.f64": ("f32", "f64", lambda x: x.astype(np.float32)),
    "rn.bf16.f32": ("b16", "f32", on.bf16_bits),
    "rn.f16.f32": ("f16", "f32", lambda x: x.astype(np.float16)),
    "rn.bf16x2.f32": ("b32", "f32", lambda high, low: on.halves(on.bf16_bits(low), on.bf16_bits(high))),
    "rn.f16x2.f32": (
        "b32",
        "f32",
        lambda high, low: on.halves(*(x.astype(np.float16).view(np.uint16) for x in (low, high))),
    ),
}


@instruction(r"cvt\.((?:rn\.)?(?:b?f16(?:x2)?|f32|f64)\.(?:b?f16|f32|f64))", (2, 3))
def _convert(operands, given, found, guard):
    if found[1] not in _CONVERSIONS or len(given.operands) != 2 + ("x2" in found[1]):
        raise PTXError("unknown conversion")
    to, of, function = _CONVERSIONS[found[1]]
    readers = [operands.read(text, of) for text in given.operands[1:]]
    return _apply(operands.write(given.operands[0], to, guard), function, *readers)


@instruction(r"cvt\.(?:rn\.)?(f32|f64)\.([su](?:32|64))", 2)
@instruction(r"cvt\.([su](?:16|32|64))\.([su](?:8|16|32|64))", 2)
def _convert_integer(operands, given, found, guard):
    to, of = found.groups()
    if (to[0] == "f") != (".rn." in given.opcode):
        raise PTXError("rounding of a conversion")
    write = operands.write(given.operands[0], to, guard, wide=True)
    return _apply(write, lambda x: x.astype(TYPES[to]), operands.read(given.operands[1], of, narrow=True))


def _whole_warp(operands: Operands, mask: str) -> Reader:
    """The mask of lanes that exchange: all of them."""
    read = operands.read(mask, "b32")

    def check(w: Warps) -> np.ndarray:
        if w.active is not None or not (read(w) == 0xFFFFFFFF).all():
            raise PTXError("an exchange between some lanes of a warp")
        return read(w)

    return check


@instruction(r"shfl\.sync\.(bfly|idx|up|down)\.b32", 5)
def _shuffle(operands, given, found, guard):
    to, *rest, mask = given.operands
    value, by, clamp = (operands.read(text, "b32") for text in rest)
    name, _, within = to.partition("|")
    write = operands.write(name, "b32", guard)
    write_within = operands.write(within or "_", "pred", guard)
    whole = _whole_warp(operands, mask)

    def execute(w: Warps) -> None:
        whole(w)
        lane, inside = on.lane_of_shuffle(found[1], by(w), clamp(w))
        write(w, np.take_along_axis(w.full(value(w)), np.broadcast_to(lane, w.shape), 1))
        write_within(w, inside)

    return execute


@instruction(r"elect\.sync", 2)
def _elect(operands, given, found, guard):
    """The first lane; the specification leaves open which."""
    name, _, chosen = given.operands[0].partition("|")
    write, write_chosen = operands.write(name, "b32", guard), operands.write(chosen, "pred", guard)
    whole = _whole_warp(operands, given.operands[1])

    def execute(w: Warps) -> None:
        whole(w)
        write(w, np.zeros((1, 1), np.uint32))
        write_chosen(w, (LANES == 0)[None])

    return execute


@instruction(r"redux\.sync\.(max\.f32|(?:add|max|min)\.s32)", 3)
def _reduce(operands, given, found, guard):
    name, type_ = found[1].split(".")
    function = {"max": np.fmax if type_ == "f32" else np.maximum, "min": np.minimum, "add": np.add}[name]
    value, write = operands.read(given.operands[1], type_), operands.write(given.operands[0], type_, guard)
    whole = _whole_warp(operands, given.operands[2])

    def execute(w: Warps) -> None:
        whole(w)
        values = w.full(value(w))
        write(w, function.reduce(values, axis=1, keepdims=True, dtype=values.dtype))

    return execute


@instruction(r"ld\.param\.([bsuf](?:8|16|32|64))", 2)
def _parameter(operands, given, found, guard):
    name, _, offset = given.operands[1][1:-1].replace(" ", "").partition("+")
    dtype = np.dtype(TYPES[found[1]])
    write = operands.write(given.operands[0], found[1], guard, wide=True)
    operands.number(name, "b64")

    def execute(w: Warps) -> None:
        raw = w.batch.launch.parameters[name]
        write(w, np.frombuffer(raw, dtype, 1, int(offset or 0)).reshape(1, 1))

    return execute


def locate(w: Warps, space: str, address: np.ndarray, size: int, lanes) -> tuple[np.ndarray, np.ndarray, Shadow | None]:
    """Of the lanes that take part: bytes in memory, bytes in the shadow, and the shadow."""
    picked = w.full(address).ravel() if lanes is None else w.full(address)[lanes]
    if space == "global":
        index, shaded = w.batch.launch.memory.locate(picked, size)
        return index, shaded, w.batch.launch.memory.shadow
    slots = np.repeat(w.slots, 32) if lanes is None else w.slots[lanes[0]]
    index = w.batch.shared.locate(slots, picked, size)
    return index, index, w.batch.shared.shadow


def words(w: Warps, space: str, size: int) -> np.ndarray:
    return (w.batch.launch.memory if space == "global" else w.batch.shared).words[size]


def store(w: Warps, space: str, address: np.ndarray, values: list[np.ndarray], size: int, lanes, line: int) -> None:
    """values: of every lane of the warps, unsigned words of this size."""
    total = size * len(values)
    index, shaded, shadow = locate(w, space, address, total, lanes)
    memory = words(w, space, size)
    data = np.stack([w.full(v).ravel() if lanes is None else w.full(v)[lanes] for v in values], 1)
    place = (index // size)[:, None] + np.arange(len(values))
    if shadow is not None:
        changes = np.repeat(memory[place] != data, size // shadow.grain, axis=1)
        shadow.write(w.who(lanes), shadow.places(shaded, total), line, changes)
    memory[place] = data
    if shadow is not None and (memory[place] != data).any():
        w.batch.launch.report(f"{space} memory: two threads of one instruction write two values", line)


_VECTOR = r"(global|shared)(?:\.v([24]))?\.([bsuf](?:8|16|32|64))"


def _form(operands: Operands, found: re.Match, text: str, address: str) -> tuple[str, int, list[str], Reader]:
    """Space, size of a word, the words' operands and the address."""
    space, count, type_ = found.groups()
    names, size = operands.vector(text), np.dtype(TYPES[type_]).itemsize
    if len(names) != int(count or 1):
        raise PTXError("words of a vector")
    operands.grain = min(operands.grain, size)
    return space, size, names, operands.address(address, "b64" if space == "global" else "b32")


@instruction(rf"ld\.{_VECTOR}", 2)
def _load(operands, given, found, guard):
    space, size, names, address = _form(operands, found, *given.operands)
    writers = [operands.write(name, found[3], guard, wide=True) for name in names]
    line, total, dtype = given.line, size * len(names), TYPES[found[3]]

    def execute(w: Warps) -> None:
        lanes = w.lanes(guard)
        if lanes is not None and not len(lanes[0]):
            return
        index, shaded, shadow = locate(w, space, address(w), total, lanes)
        if shadow is not None:
            shadow.read(w.who(lanes), shadow.places(shaded, total), line, must_be_written=space == "shared")
        memory = words(w, space, size)
        for i, write in enumerate(writers):
            values = memory[index // size + i]
            whole = values.reshape(w.shape) if lanes is None else np.zeros(w.shape, BITS[size])
            if lanes is not None:
                whole[lanes] = values
            write(w, whole.view(dtype))

    return execute


@instruction(rf"st\.{_VECTOR}", 2)
def _store(operands, given, found, guard):
    space, size, names, address = _form(operands, found, given.operands[1], given.operands[0])
    readers = [operands.read(name, f"b{8 * size}", narrow=True) for name in names]
    line = given.line

    def execute(w: Warps) -> None:
        lanes = w.lanes(guard)
        if lanes is None or len(lanes[0]):
            store(w, space, address(w), [read(w) for read in readers], size, lanes, line)

    return execute
