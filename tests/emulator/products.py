"""Tensor cores: mma.sync and the loads for it, wgmma, tcgen05 with its memory.

A product of 16-bit or TF32 operands is exact in float64, and so is, nearly, the sum of the 8 or 16 of one instruction;
`arithmetic.accumulated` rounds it with the accumulator.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .arithmetic import accumulated, of_bf16
from .asynchronous import Signal, each, mbarrier, seen_by_engines, swizzled, under_way
from .machine import LANES, Batch, Reader, Warps
from .memory import Shadow, Threads
from .plain import locate, store
from .registers import Operands, unguarded
from .text import PTXError
from .translation import instruction

GROUP, IN_GROUP = LANES // 4, LANES % 4  # of a lane in a fragment
ALL = np.float64

Place = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


def _fragment(rows: int, columns: int, registers: int, halves: int, place: Place) -> np.ndarray:
    """Where in (registers, lanes, halves) each entry of the matrix is; place(register, half): its row and column."""
    index = np.full((rows, columns), -1)
    for register in range(registers):
        for half in range(halves):
            index[place(register, half)] = (register * 32 + LANES) * halves + half
    assert (index >= 0).all()
    return index


# sections "Matrix Fragments for mma.m16n8k16" and "for mma.m16n8k8"; the first also of wgmma's A and, by 8 columns, D
A16 = _fragment(16, 16, 4, 2, lambda r, h: (GROUP + 8 * (r & 1), 2 * IN_GROUP + h + 8 * (r >> 1)))
B16 = _fragment(16, 8, 2, 2, lambda r, h: (2 * IN_GROUP + h + 8 * r, GROUP))
A8 = _fragment(16, 8, 4, 1, lambda r, h: (GROUP + 8 * (r & 1), IN_GROUP + 4 * (r >> 1)))
B8 = _fragment(8, 8, 2, 1, lambda r, h: (IN_GROUP + 4 * r, GROUP))
D = _fragment(16, 8, 4, 1, lambda r, h: (GROUP + 8 * (r >> 1), 2 * IN_GROUP + (r & 1)))
# and back: (register, lane) of the flattened 16 x 8
D_BACK = np.argsort(D.ravel()).reshape(4, 32)


def numbers(words: np.ndarray, kind: str) -> np.ndarray:
    """Bits as float64: 16-bit words, or 32-bit words of which TF32 is the upper 19 bits."""
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(ALL)
    return (of_bf16(words) if kind == "bf16" else words.view(np.float16)).astype(ALL)


def of_registers(w: Warps, readers: list[Reader], index: np.ndarray, kind: str) -> np.ndarray:
    """(warps, *index.shape) of a matrix held as a fragment."""
    words = np.stack([w.full(read(w)) for read in readers], 1)
    if kind != "tf32":
        words = np.ascontiguousarray(words).view(np.uint16)
    return numbers(words.reshape(len(words), -1)[:, index], kind)


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", 2)
def _load_matrix(operands, given, found, guard):
    unguarded(guard, "ldmatrix")
    names, address = operands.vector(given.operands[0]), operands.address(given.operands[1], "b32")
    if len(names) != int(found[1]):
        raise PTXError("matrices")
    operands.grain = min(operands.grain, 2 if found[2] else 4)
    writers = [operands.write(name, "b32", None) for name in names]

    def read(w: Warps, at: np.ndarray, size: int) -> np.ndarray:
        index, shaded, shadow = locate(w, "shared", at, size, None)
        if shadow is not None:
            shadow.read(w.who(None), shadow.places(shaded, size), given.line, must_be_written=True)
        return w.batch.shared.words[size][index // size].reshape(w.shape)

    def execute(w: Warps) -> None:
        addresses = w.full(address(w))
        for j, write in enumerate(writers):
            rows = addresses[:, 8 * j : 8 * j + 8]
            if (rows % 16).any():
                raise PTXError("misaligned ldmatrix")
            if found[2]:
                low, high = (read(w, rows[:, 2 * IN_GROUP + h] + (2 * GROUP).astype(np.uint32), 2) for h in range(2))
                write(w, low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16)))
            else:
                write(w, read(w, rows[:, GROUP] + (4 * IN_GROUP).astype(np.uint32), 4))

    return execute


@instruction(r"stmatrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16", 2)
def _store_matrix(operands, given, found, guard):
    unguarded(guard, "stmatrix")
    address, names = operands.address(given.operands[0], "b32"), operands.vector(given.operands[1])
    if len(names) != int(found[1]):
        raise PTXError("matrices")
    operands.grain = min(operands.grain, 4)
    readers = [operands.read(name, "b32") for name in names]

    def execute(w: Warps) -> None:
        addresses = w.full(address(w))
        for j, read in enumerate(readers):
            at = addresses[:, 8 * j : 8 * j + 8][:, GROUP] + (4 * IN_GROUP).astype(np.uint32)
            store(w, "shared", at, [read(w)], 4, None, given.line)

    return execute


@instruction(r"mma\.sync\.aligned\.(m16n8k16|m16n8k8)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32", 4)
def _mma(operands, given, found, guard):
    unguarded(guard, "mma")
    shape, kind = found.groups()
    if (shape == "m16n8k8") != (kind == "tf32"):
        raise PTXError("shape of a product")
    index_a, index_b = (A8, B8) if kind == "tf32" else (A16, B16)
    a, b, c = ([operands.read(name, "b32") for name in operands.vector(text)] for text in given.operands[1:])
    writers = [operands.write(name, "b32", None) for name in operands.vector(given.operands[0])]
    if (len(a), len(b), len(c), len(writers)) != (4, 2, 4, 4):
        raise PTXError("registers of a product")

    def execute(w: Warps) -> None:
        before = np.stack([w.full(read(w)) for read in c], 1).reshape(len(w.slots), -1)[:, D].view(np.float32)
        sums = of_registers(w, a, index_a, kind) @ of_registers(w, b, index_b, kind) + before.astype(ALL)
        after = accumulated(sums).view(np.uint32).reshape(len(w.slots), -1)
        for write, back in zip(writers, D_BACK, strict=True):
            write(w, after[:, back])

    return execute


# the swizzle of a descriptor, by generation: bytes
SWIZZLES = {"wgmma": {1: 128, 2: 64, 3: 32}, "tcgen05": {2: 128, 4: 64, 6: 32}}


def matrix(
    w: Warps,
    rows: np.ndarray,
    descriptor: np.ndarray,
    first: np.ndarray,
    shape: tuple[int, int],
    size: int,
    engine: str,
) -> np.ndarray:
    """(rows, *shape) bytes in shared memory of a K-major operand (section Matrix Descriptor).

    rows: of the warps; first: the first row of the operand for each.
    """
    count, width = shape
    d = descriptor.astype(np.uint64).astype(object)
    start, stride = (np.array([(x >> s & 0x3FFF) << 4 for x in d], np.int64) for s in (0, 32))
    kinds = {(x >> 49 & 7, x >> 62, 1) if engine == "wgmma" else (x >> 49 & 7, x >> 61, x >> 46 & 7) for x in d}
    if len(kinds) != 1:
        raise PTXError("descriptors of different kinds")
    base, swizzle, version = kinds.pop()
    if base or version != 1 or swizzle not in SWIZZLES[engine]:
        raise PTXError(f"a matrix descriptor of {engine} with base offset {base}, swizzle {swizzle}, version {version}")
    span = SWIZZLES[engine][swizzle]
    r = first[:, None, None] + np.arange(count)[:, None]
    at = start[:, None, None] + r % 8 * span + r // 8 * stride[:, None, None] + np.arange(width) * size
    at = swizzled(at, span)
    slots = np.repeat(w.slots[rows], count * width)
    return w.batch.shared.locate(slots, at.ravel(), size).reshape(at.shape)


def places_of(shadow: Shadow, at: np.ndarray, size: int) -> np.ndarray:
    """(rows, grains) of the entries of an operand."""
    return shadow.places(at.reshape(len(at), -1), size).reshape(len(at), -1)


def reads_shared(w: Warps, rows: np.ndarray, at: np.ndarray, size: int, line: int) -> None:
    """An engine begins to read: what it reads must be written, visible to it, and stay until it is done."""
    if (shadow := w.batch.shared.shadow) is not None:
        places = places_of(shadow, at, size)
        who = Threads(w.threads[rows, 0], w.batch.epochs[w.slots[rows]])
        shadow.read(who, places, line, must_be_written=True)
        seen_by_engines(w, rows, places, line)
        shadow.fly(places, writes=False, line=line)


class Product(NamedTuple):
    """One wgmma: each warp makes 16 of its 64 rows."""

    registers: list[int]
    a: np.ndarray  # bytes in shared memory, or float64
    b: np.ndarray
    size: int
    kind: str
    accumulates: np.ndarray  # (warps, 1, 1)
    line: int

    def take(self, rows: np.ndarray) -> "Product":
        return self._replace(a=self.a[rows], b=self.b[rows], accumulates=self.accumulates[rows])

    def run(self, w: Warps) -> None:
        memory, n = w.batch.shared.words[self.size], self.b.shape[1]
        a = self.a if self.a.dtype == ALL else numbers(memory[self.a // self.size], self.kind)
        sums = a @ numbers(memory[self.b // self.size], self.kind).transpose(0, 2, 1)
        held = np.stack([w.full(w.registers[i]) for i in self.registers], 1)  # (warps, n / 2, 32)
        before = held.reshape(len(sums), n // 8, 128)[:, :, D].view(np.float32)  # (warps, n / 8, 16, 8)
        before = before.transpose(0, 2, 1, 3).reshape(sums.shape).astype(ALL)
        after = accumulated(sums + np.where(self.accumulates, before, 0.0)).view(np.uint32)
        after = after.reshape(len(sums), 16, n // 8, 8).transpose(0, 2, 1, 3).reshape(len(sums), n // 8, 128)
        after = after[:, :, D_BACK].reshape(len(sums), n // 2, 32)
        for place, register in enumerate(self.registers):
            w.registers[register] = after[:, place]

    def land(self, w: Warps) -> None:
        if w.batch.launch.settings.late:
            self.run(w)
        shadow = w.batch.shared.shadow
        for at in (self.a, self.b):
            if at.dtype != ALL and shadow is not None:
                places = places_of(shadow, at, self.size)
                shadow.land(places, writes=False)
                # the warps that have waited read up to here: what others write before the next barrier races with it
                who = Threads(w.threads[:, 0], w.batch.epochs[w.slots])
                shadow.read(who, places, self.line, must_be_written=True)


def _uniform(values: np.ndarray, what: str) -> np.ndarray:
    if (values != values[:, :1]).any():
        raise PTXError(f"lanes of a warp have different {what}")
    return values[:, 0]


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(8|16)\.f32\.(bf16|f16|tf32)\.\3", (6, 7, 8))
def _wgmma(operands, given, found, guard):
    unguarded(guard, "wgmma")
    n, k, kind = int(found[1]), int(found[2]), found[3]
    d, a, b, scale, *rest = given.operands
    in_registers = a.startswith("{")
    plain = ["1", "1"] + ["0"] * (0 if kind == "tf32" else 1 if in_registers else 2)
    if rest != plain or k != (8 if kind == "tf32" else 16) or n % 8:
        raise PTXError("a negated or transposed operand, or a shape")
    size = 4 if kind == "tf32" else 2
    operands.grain = min(operands.grain, size)
    registers = [operands.index[name] for name in operands.vector(d)]
    if len(registers) != n // 2 or any(operands.stored[i] != np.uint32 for i in registers):
        raise PTXError("registers of a product")
    parts = [operands.read(name, "b32") for name in operands.vector(a)] if in_registers else []
    descriptors = [operands.read(text, "b64") for text in ([b] if in_registers else [a, b])]
    scales = operands.read(scale, "pred")

    def execute(w: Warps) -> None:
        rows = np.arange(len(w.slots))
        of = [_uniform(w.full(read(w)), "descriptors") for read in descriptors]
        at_b = matrix(w, rows, of[-1], np.zeros(len(rows), np.int64), (n, k), size, "wgmma")
        if in_registers:
            left = of_registers(w, parts, A8 if kind == "tf32" else A16, kind)
        else:
            left = matrix(w, rows, of[0], 16 * (w.indices % 4), (16, k), size, "wgmma")
            reads_shared(w, rows, left, size, given.line)
        reads_shared(w, rows, at_b, size, given.line)
        accumulates = _uniform(w.full(scales(w)), "scales")[:, None, None]
        product = Product(registers, left, at_b, size, kind, accumulates, given.line)
        if not w.batch.launch.settings.late:
            product.run(w)
        under_way(w, "wgmma").begun.append(product)
        w.busy |= set(registers)

    return execute


@instruction(r"wgmma\.fence\.sync\.aligned", 0)
def _wgmma_fence(operands, given, found, guard):
    return lambda w: None  # orders registers; the assembler warns where it is missing


@instruction(r"wgmma\.commit_group\.sync\.aligned", 0)
def _wgmma_commit(operands, given, found, guard):
    return lambda w: under_way(w, "wgmma").commit()


@instruction(r"wgmma\.wait_group\.sync\.aligned", 1)
def _wgmma_wait(operands, given, found, guard):
    most = int(given.operands[0], 0)

    def execute(w: Warps) -> None:
        jobs = under_way(w, "wgmma")
        jobs.wait(w, most, given.line)
        w.busy = {register for product in jobs.under_way() for register in product.registers}

    return execute


# tcgen05: 128 lanes of 512 columns of 32 bits a block

COLUMNS = 512


def tensor_memory(batch: Batch) -> np.ndarray:
    if batch.tensor_memory is None:
        batch.tensor_memory = np.full((len(batch.numbers), 128, COLUMNS), 0xFFFFFFFF, np.uint32)
        batch.allocated = [range(0) for _ in batch.numbers]
    return batch.tensor_memory


def one_of_each(w: Warps, guard: Reader | None) -> list[tuple[int, int]]:
    """(row, lane) of the first lane of each warp that executes."""
    first: dict[int, int] = {}
    for row, lane in each(w, guard):
        first.setdefault(row, lane)
    return list(first.items())


def _allocated(w: Warps, row: int, columns: range) -> None:
    slot = int(w.slots[row])
    tensor_memory(w.batch)
    allocated = w.batch.allocated[slot]
    if columns.start < allocated.start or columns.stop > allocated.stop:
        raise PTXError("tensor memory outside of what is allocated")


def _usable(w: Warps, row: int, columns: range, line: int) -> None:
    """Allocated, and no product into these columns is under way."""
    _allocated(w, row, columns)
    for item in w.batch.work[int(w.slots[row])]:
        if isinstance(item, TensorProduct):
            into = range(item.column, item.column + len(item.b))
            if columns.start < into.stop and into.start < columns.stop:
                w.batch.launch.report("tensor memory is used while a product into it is under way", line)
                return


@instruction(r"tcgen05\.alloc\.cta_group::1\.sync\.aligned\.shared::cta\.b32", 2)
def _allocate(operands, given, found, guard):
    address, count = operands.address(given.operands[0], "b32"), int(given.operands[1], 0)
    operands.uses_tensor_memory = True
    if count not in (32, 64, 128, 256, 512):
        raise PTXError("columns of tensor memory")

    def execute(w: Warps) -> None:
        for row, _ in one_of_each(w, guard):
            tensor_memory(w.batch)
            slot, first = int(w.slots[row]), COLUMNS - count  # not zero, if it can be
            if w.batch.allocated[slot]:
                raise PTXError("tensor memory is allocated twice")
            w.batch.allocated[slot] = range(first, COLUMNS)
            lane = np.array([row]), np.array([0])
            store(w, "shared", address(w), [np.full((1, 1), first, np.uint32)], 4, lane, given.line)
            _, at, shadow = locate(w, "shared", address(w), 4, lane)
            if shadow is not None:  # the specification names no proxy that this write is of
                shadow.write_time[shadow.places(at, 4)] = 0

    return execute


@instruction(r"tcgen05\.dealloc\.cta_group::1\.sync\.aligned\.b32", 2)
def _free(operands, given, found, guard):
    address, count = operands.read(given.operands[0], "b32"), int(given.operands[1], 0)

    def execute(w: Warps) -> None:
        for row, lane in one_of_each(w, guard):
            first = int(w.full(address(w))[row, lane])
            _usable(w, row, range(first, first + count), given.line)
            w.batch.allocated[int(w.slots[row])] = range(0)

    return execute


@instruction(r"tcgen05\.relinquish_alloc_permit\.cta_group::1\.sync\.aligned", 0)
@instruction(r"tcgen05\.wait::(?:ld|st)\.sync\.aligned", 0)
def _nothing(operands, given, found, guard):
    return lambda w: None


@instruction(r"tcgen05\.st\.sync\.aligned\.32x32b\.x(\d+)\.b32", 2)
def _store_tensor(operands, given, found, guard):
    address, names = operands.address(given.operands[0], "b32"), operands.vector(given.operands[1])
    if len(names) != int(found[1]):
        raise PTXError("columns")
    readers = [operands.read(name, "b32") for name in names]

    def execute(w: Warps) -> None:
        values = [w.full(read(w)) for read in readers]
        for row, lane in one_of_each(w, guard):
            at = int(w.full(address(w))[row, lane])
            first, column = at >> 16, at & 0xFFFF
            if first != 32 * (int(w.indices[row]) % 4):
                raise PTXError("a warp reaches into lanes of tensor memory of another")
            _usable(w, row, range(column, column + len(values)), given.line)
            memory = tensor_memory(w.batch)[int(w.slots[row])]
            memory[first : first + 32, column : column + len(values)] = np.stack([v[row] for v in values], 1)

    return execute


@instruction(r"tcgen05\.ld\.sync\.aligned\.(32x32b)\.x(\d+)\.b32", 2)
@instruction(r"tcgen05\.ld\.sync\.aligned\.(16x32bx2)\.x(\d+)\.b32", 3)
def _load_tensor(operands, given, found, guard):
    """Each lane its own of tensor memory; or lanes 16 to 31 those of lanes 0 to 15, so many columns further."""
    unguarded(guard, "a load of tensor memory")
    outputs, source, *apart = given.operands
    names, address = operands.vector(outputs), operands.address(source, "b32")
    if len(names) != int(found[2]):
        raise PTXError("columns")
    writers = [operands.write(name, "b32", None) for name in names]
    lane_of, further = (LANES % 16, int(apart[0]) * (LANES // 16)) if apart else (LANES, 0 * LANES)

    def execute(w: Warps) -> None:
        addresses = _uniform(w.full(address(w)), "addresses").astype(np.int64)
        lanes = (addresses >> 16)[:, None] + lane_of
        if (lanes // 32 != w.indices[:, None] % 4).any():
            raise PTXError("a warp reaches into lanes of tensor memory of another")
        columns = (addresses & 0xFFFF)[:, None] + further
        for row in range(len(w.slots)):
            for first in np.unique(columns[row]).tolist():
                _usable(w, row, range(first, first + len(writers)), given.line)
        memory = tensor_memory(w.batch)
        for i, write in enumerate(writers):
            write(w, memory[w.slots[:, None], lanes, columns + i])

    return execute


@dataclass
class TensorProduct:
    """One tcgen05.mma, in the order of its block."""

    a: np.ndarray  # bytes in shared memory
    b: np.ndarray
    column: int
    size: int
    kind: str
    accumulates: bool
    done: bool = False

    def multiply(self, batch: Batch, slot: int) -> None:
        memory = batch.shared.words[self.size]
        sums = numbers(memory[self.a // self.size], self.kind) @ numbers(memory[self.b // self.size], self.kind).T
        place = tensor_memory(batch)[slot, :, self.column : self.column + len(self.b)]
        if self.accumulates:
            sums = sums + np.ascontiguousarray(place).view(np.float32).astype(ALL)
        place[...] = accumulated(sums).view(np.uint32)
        self.done = True

    def run(self, batch: Batch, slot: int) -> None:
        if not self.done:
            self.multiply(batch, slot)
        if (shadow := batch.shared.shadow) is not None:
            for at in (self.a, self.b):
                shadow.land(places_of(shadow, at[None], self.size), writes=False)


# section "Instruction descriptor": formats of D, A and B -> K, bytes and kind
FORMATS = {(1, 0, 0): (16, 2, "f16"), (1, 1, 1): (16, 2, "bf16"), (1, 2, 2): (8, 4, "tf32")}


@instruction(r"tcgen05\.mma\.cta_group::1\.kind::(f16|tf32)", 5)
def _tensor_product(operands: Operands, given, found, guard):
    to, a, b, described, accumulate = given.operands
    readers = [operands.address(to, "b32"), *(operands.read(text, "b64") for text in (a, b))]
    readers += [operands.read(described, "b32"), operands.read(accumulate, "pred")]
    operands.grain = min(operands.grain, 4 if found[1] == "tf32" else 2)

    def execute(w: Warps) -> None:
        for row, lane in each(w, guard):
            where, of_a, of_b, form, accumulates = (w.full(read(w))[row, lane] for read in readers)
            form = int(form)
            formats = form >> 4 & 3, form >> 7 & 7, form >> 10 & 7
            n, m = (form >> 17 & 63) << 3, (form >> 24 & 31) << 4
            if formats not in FORMATS or m != 128 or form >> 13 & 15 or form & 15 or form >> 30 or int(where) >> 16:
                raise PTXError(f"a product by the descriptor {form:#x}")
            k, size, kind = FORMATS[formats]
            if (kind == "tf32") != (found[1] == "tf32"):
                raise PTXError("kind of a product")
            column = int(where) & 0xFFFF
            _allocated(w, row, range(column, column + n))
            one, zero = np.array([row]), np.zeros(1, np.int64)
            at_a = matrix(w, one, np.array([of_a]), zero, (m, k), size, "tcgen05")
            at_b = matrix(w, one, np.array([of_b]), zero, (n, k), size, "tcgen05")
            for at in (at_a, at_b):
                reads_shared(w, one, at, size, given.line)
            product = TensorProduct(at_a[0], at_b[0], column, size, kind, bool(accumulates))
            if not w.batch.launch.settings.late:
                product.multiply(w.batch, int(w.slots[row]))
            w.batch.work[int(w.slots[row])].append(product)

    return execute


@instruction(r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one(?:\.shared::cluster)?\.b64", 1)
def _tensor_commit(operands, given, found, guard):
    address = operands.address(given.operands[0], "b32")

    def execute(w: Warps) -> None:
        for row, lane in each(w, guard):
            at = int(w.full(address(w))[row, lane])
            w.batch.launch.reached.add(given.line)
            mbarrier(w, row, at, given.line)
            w.batch.work[int(w.slots[row])].append(Signal(at))

    return execute
