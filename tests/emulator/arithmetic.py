"""Numbers as the hardware rounds them: functions of arrays of one type each.

What is not bit for bit: products with a sum in float32 (`fma`) go through float64 and in float64 through the 64-bit
significand of x86, and so round twice; approximate instructions are rounded exactly, or, with `rough`, anywhere within
the error that the specification allows.
"""

import numpy as np

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# of every type of an instruction; those without a dtype in NumPy are their bits
TYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16, "bf16x2": np.uint32,
    "f16x2": np.uint32, "f32x2": np.uint64, "pred": np.bool_,
}  # fmt: skip
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}

rough: np.random.Generator | None = None


def within(exact: np.ndarray, relative: float, absolute: float = 0.0) -> np.ndarray:
    """float64 as float32; with `rough`, off by as much as these bounds allow."""
    if rough is not None:
        off = rough.uniform(-1, 1, exact.shape)
        exact = exact * (1 + off * relative) + off * absolute
    return exact.astype(np.float32)


def accumulated(sums: np.ndarray) -> np.ndarray:
    """float64 sums of a tensor core as float32: to nearest, with `rough` toward zero."""
    rounded = sums.astype(np.float32)
    if rough is None:
        return rounded
    beyond = np.abs(rounded.astype(np.float64)) > np.abs(sums)
    return np.where(beyond, np.nextafter(rounded, np.float32(0)), rounded)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 to bf16, to the nearest and even; NaN is 0x7FFF (section cvt)."""
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def of_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def halves(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two words of one size as one of twice the size."""
    whole, size = BITS[2 * low.dtype.itemsize], 8 * low.dtype.itemsize
    return low.astype(whole) | (high.astype(whole) << whole(size))


def parts(word: np.ndarray, count: int) -> list[np.ndarray]:
    size = word.dtype.itemsize // count
    return [(word >> word.dtype.type(8 * size * i)).astype(BITS[size]) for i in range(count)]


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers, toward zero; division by zero is unspecified, and all ones here."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * safe != a)).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(-1 if a.dtype.kind == "i" else np.iinfo(a.dtype).max), quotient)


def divided_full(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return within(a.astype(np.float64) / b.astype(np.float64), 2.0**-22)  # 2 ulp


def shifted_left(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def shifted_right(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    """With the sign for signed types; by more than the width as by the width."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


def bit_field(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """32 bits; the field's own top bit is the sign of a signed one (section bfe)."""
    position, length = (x.astype(np.int64) & 255 for x in (position, length))
    wide = a.astype(np.int64)
    field = np.where(position > 31, np.where(wide < 0, -1, 0), wide >> np.minimum(position, 31))
    length = np.minimum(length, 32)
    field = field & ((1 << length) - 1)
    if a.dtype.kind == "i":
        top = np.minimum(position + length - 1, 31)
        negative = (length > 0) & ((wide >> np.maximum(top, 0)) & 1 == 1)
        field = np.where(negative, field | -(1 << length), field)
    return field.astype(a.dtype)


def exp2(x: np.ndarray) -> np.ndarray:
    return within(np.exp2(x.astype(np.float64)), 2.0**-22)


def reciprocal_high(x: np.ndarray) -> np.ndarray:
    """rcp.approx.ftz.f64: the upper words of the operand and of the result alone."""
    high = np.uint64(0xFFFFFFFF00000000)
    operand = (x.view(np.uint64) & high).view(np.float64)
    operand = np.where(np.abs(operand) < np.finfo(np.float64).tiny, np.copysign(0.0, operand), operand)
    result = (np.float64(1) / operand).view(np.uint64) & high
    return result.view(np.float64)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def unordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


# comparisons of setp; those with "u" are true too where an operand is NaN
COMPARISONS = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ne": lambda a, b: (a != b) & ~unordered(a, b) if a.dtype.kind == "f" else a != b,
    "equ": lambda a, b: (a == b) | unordered(a, b), "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~unordered(a, b), "nan": unordered,
}  # fmt: skip


def lane_of_shuffle(mode: str, by: np.ndarray, clamp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which lane each of the 32 reads, and whether that one is in range (section shfl.sync)."""
    lane = np.arange(32)
    by, bound, segment = (
        np.broadcast_to(x.astype(np.int64), (*x.shape[:-1], 32)) for x in (by & 31, clamp & 31, (clamp >> 8) & 31)
    )
    low = lane & segment
    high = low | (bound & ~segment & 31)
    source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": low | (by & ~segment & 31)}[mode]
    inside = source >= high if mode == "up" else source <= high
    return np.where(inside, source, lane), inside
