"""Operands of an instruction as functions that read and write arrays; what they do not know they refuse."""

import re
from collections.abc import Callable

import numpy as np

from .arithmetic import BITS, TYPES, halves, parts
from .machine import LANES, Reader, Warps
from .memory import SHARED
from .text import PTXError, Text, split

Writer = Callable[[Warps, np.ndarray], None]
PARAMETERS = 1 << 28  # where the parameters lie; 32 bits hold it, and no tensor lies so low


def _block(axis: int) -> Reader:
    def read(w: Warps) -> np.ndarray:
        x, y, _ = w.batch.launch.grid
        number = w.batch.numbers[w.slots]
        return (number % x, number // x % y, number // (x * y))[axis].astype(np.uint32)[:, None]

    return read


def _blocks(axis: int) -> Reader:
    return lambda w: np.full((1, 1), w.batch.launch.grid[axis], np.uint32)


SPECIAL: dict[str, Reader] = {
    "%tid.x": lambda w: (w.indices[:, None] * 32 + LANES).astype(np.uint32),
    **{f"%ctaid.{axis}": _block(i) for i, axis in enumerate("xyz")},
    **{f"%nctaid.{axis}": _blocks(i) for i, axis in enumerate("xyz")},
}


class Operands:
    """Those of one kernel."""

    def __init__(self, text: Text):
        self.text = text
        self.index = {name: number for number, name in enumerate(text.registers)}
        self.stored = [
            np.bool_ if kind == "pred" else BITS[np.dtype(TYPES[kind]).itemsize] for kind in text.registers.values()
        ]
        self.grain, self.uses_tensor_memory = 16, False  # what the instructions translated so far ask for
        self.starts, start = {}, 0
        for parameter in text.parameters:
            start = -(-start // 128) * 128
            self.starts[parameter.name] = PARAMETERS + start
            start += parameter.size

    def poison(self) -> list[np.ndarray]:
        """All bits set, which as a number is NaN."""
        made = {t: np.full((1, 1), True if t is np.bool_ else np.iinfo(t).max, t) for t in set(self.stored)}
        return [made[t] for t in self.stored]

    def number(self, text: str, type_: str) -> Reader:
        """A number, or the address of a symbol, as an array of one entry."""
        dtype = TYPES[type_]
        if text in self.starts or text == "global_smem":
            value = np.array([[SHARED if text == "global_smem" else self.starts[text]]], np.uint64)
        elif found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", text):
            value = np.array([[int(found[1] or found[2], 16)]], np.uint32 if found[1] else np.uint64)
            if value.dtype.itemsize != np.dtype(dtype).itemsize:
                raise PTXError(f"{text} is no {type_}")
        elif re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", text):
            value = np.array([[int(text, 0) & (1 << 64) - 1]], np.uint64)
        else:
            raise PTXError(f"unknown operand {text!r}")
        constant = value != 0 if dtype is np.bool_ else value.astype(BITS[np.dtype(dtype).itemsize]).view(dtype)
        return lambda w: constant

    def read(self, text: str, type_: str, narrow: bool = False) -> Reader:
        """narrow: the low bits of a wider register, as of a store and of a conversion."""
        if text.startswith("!"):
            inner = self.read(text[1:], type_)
            return lambda w: ~inner(w)
        if (number := self.index.get(text)) is None:
            if text.startswith("%"):
                if text not in SPECIAL or type_ not in ("u32", "b32"):
                    raise PTXError(f"unknown register {text} of {type_}")
                return SPECIAL[text]
            return self.number(text, type_)
        stored, dtype = np.dtype(self.stored[number]), np.dtype(TYPES[type_])
        if stored == dtype:
            return lambda w: w.registers[number]
        if (stored == np.bool_) != (dtype == np.bool_) or stored.itemsize != dtype.itemsize:
            if narrow and dtype != np.bool_ and stored.itemsize > dtype.itemsize:
                bits = BITS[dtype.itemsize]
                return lambda w: w.registers[number].astype(bits).view(dtype)
            raise PTXError(f"register {text} of {self.text.registers[text]} read as {type_}")
        return lambda w: w.registers[number].view(dtype)

    def guard(self, text: str | None) -> Reader | None:
        return None if text is None else self.read(text, "pred")

    def write(self, text: str, type_: str, guard: Reader | None, wide: bool = False) -> Writer:
        """wide: into a wider register, extended by the sign of a signed type, as of a load and of a conversion."""
        if text == "_":
            return lambda w, value: None
        if (number := self.index.get(text)) is None:
            raise PTXError(f"cannot write to {text!r}")
        stored, dtype = np.dtype(self.stored[number]), np.dtype(TYPES[type_])
        signed = {2: np.int16, 4: np.int32, 8: np.int64}
        same = stored.itemsize == dtype.itemsize and (stored == np.bool_) == (dtype == np.bool_)
        if not same and not (wide and np.bool_ not in (stored, dtype) and dtype.itemsize < stored.itemsize):
            raise PTXError(f"register {text} of {self.text.registers[text]} written as {type_}")

        def put(w: Warps, value: np.ndarray) -> None:
            if same:
                value = value if value.dtype == stored else value.view(stored)
            else:
                value = value.astype(signed[stored.itemsize] if dtype.kind == "i" else stored).view(stored)
            mask = w.mask(guard)
            w.registers[number] = value if mask is None else np.where(mask, value, w.registers[number])

        return put

    def vector(self, text: str) -> list[str]:
        """Parts of { a, b }, or a single operand."""
        return split(text[1:-1]) if text.startswith("{") else [text]

    def packed(self, text: str, type_: str) -> Reader:
        """An operand of a move, which may be a pair of halves."""
        if not text.startswith("{"):
            return self.read(text, type_)
        size = int(type_[1:]) // 2
        low, high = (self.read(part, f"b{size}") for part in self.vector(text))
        return lambda w: halves(low(w), high(w))

    def unpacked(self, text: str, type_: str, guard: Reader | None) -> Writer:
        if not text.startswith("{"):
            return self.write(text, type_, guard)
        names = self.vector(text)
        writers = [self.write(name, f"b{int(type_[1:]) // len(names)}", guard) for name in names]

        def put(w: Warps, value: np.ndarray) -> None:
            for writer, part in zip(writers, parts(value, len(writers)), strict=True):
                writer(w, part)

        return put

    def address(self, text: str, type_: str) -> Reader:
        """[register + offset] or [symbol + offset] as an address of this type."""
        found = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\d+)\s*)?\]", text)
        if found is None:
            raise PTXError(f"unknown address {text!r}")
        base, offset = self.read(found[1], type_), int(found[2] or 0)
        if not offset:
            return base
        by = np.array([[offset & (1 << 64) - 1]], np.uint64).astype(TYPES[type_])
        return lambda w: base(w) + by


def unguarded(guard: Reader | None, what: str) -> None:
    if guard is not None:
        raise PTXError(f"{what} with a guard")
