"""Copies of global into shared memory that go on beside the program, the groups and the mbarriers that wait for them.

Until the wait that ends it a copy is under way in the shadow. `Settings.late` moves the data only then.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .machine import Batch, Operation, Reader, Warps
from .memory import SHARED, Threads
from .plain import locate, store
from .registers import Operands, unguarded
from .text import PTXError
from .translation import instruction


class Copy(NamedTuple):
    """Of one cp.async of some lanes."""

    rows: np.ndarray
    threads: np.ndarray
    slots: np.ndarray
    to: np.ndarray  # bytes in shared memory
    of: np.ndarray  # bytes in global memory
    given: np.ndarray  # whether the bytes are there, else zeros
    size: int
    line: int

    def move(self, batch: Batch) -> None:
        data = np.zeros((len(self.to), self.size // 4), np.uint32)
        data[self.given] = batch.launch.memory.words[4][(self.of[self.given] // 4)[:, None] + np.arange(self.size // 4)]
        batch.shared.words[4][(self.to // 4)[:, None] + np.arange(self.size // 4)] = data

    def take(self, rows: np.ndarray) -> "Copy":
        kept = rows[self.rows]
        parts = (self.threads, self.slots, self.to, self.of, self.given)
        return Copy((np.cumsum(rows) - 1)[self.rows[kept]], *(part[kept] for part in parts), self.size, self.line)

    def land(self, w: Warps) -> None:
        batch = w.batch
        if batch.launch.settings.late:
            self.move(batch)
        if (shadow := batch.shared.shadow) is not None:
            at = shadow.places(self.to, self.size)
            shadow.land(at, writes=True)
            shadow.write(Threads(self.threads, batch.epochs[self.slots]), at, self.line, None)


@dataclass
class Groups:
    """What some warps have under way with an engine: not committed yet, and the groups of the others, oldest first."""

    begun: list[Any] = field(default_factory=list)
    groups: list[list[Any]] = field(default_factory=list)

    def under_way(self) -> list[Any]:
        return [job for group in (self.begun, *self.groups) for job in group]

    def take(self, rows: np.ndarray) -> "Groups":
        return Groups([job.take(rows) for job in self.begun], [[job.take(rows) for job in g] for g in self.groups])

    def commit(self) -> None:
        self.groups.append(self.begun)
        self.begun = []

    def wait(self, w: Warps, most: int, line: int) -> None:
        while len(self.groups) > most:
            for job in self.groups.pop(0):
                w.batch.launch.reached.add(line)
                job.land(w)


def under_way(w: Warps, engine: str) -> Groups:
    return w.jobs.setdefault(engine, Groups())


@instruction(r"cp\.async\.c[ag]\.shared\.global", (3, 4))
def _copy(operands, given, found, guard):
    to, of, size_text, *given_text = given.operands
    to, of, size = operands.address(to, "b32"), operands.address(of, "b64"), int(size_text, 0)
    if size not in (4, 8, 16):
        raise PTXError("size of a copy")
    operands.grain = min(operands.grain, size)
    length = operands.read(given_text[0], "u32") if given_text else lambda w: np.full((1, 1), size, np.uint32)

    def execute(w: Warps) -> None:
        lanes = w.lanes(guard)
        rows, columns = np.nonzero(np.ones(w.shape, bool)) if lanes is None else lanes
        if not len(rows):
            return
        there = w.full(length(w))[rows, columns]
        if not np.isin(there, (0, size)).all():
            raise PTXError("a copy of a part")
        there = there > 0
        source, shaded = np.zeros(len(rows), np.int64), None
        if there.any():
            picked = rows[there], columns[there]
            source[there], shaded, shadow = locate(w, "global", of(w), size, picked)
            if shadow is not None:
                shadow.read(w.who(picked), shadow.places(shaded, size), given.line, must_be_written=False)
        target, _, shadow = locate(w, "shared", to(w), size, (rows, columns))
        copy = Copy(rows, w.threads[rows, columns], w.slots[rows], target, source, there, size, given.line)
        if shadow is not None:
            at = shadow.places(target, size)
            shadow.write(w.who((rows, columns)), at, given.line, None)
            shadow.fly(at, writes=True, line=given.line)
        if not w.batch.launch.settings.late:
            copy.move(w.batch)
        under_way(w, "cp.async").begun.append(copy)

    return execute


@instruction(r"cp\.async\.commit_group", 0)
def _commit(operands, given, found, guard):
    unguarded(guard, "a group of copies")
    return lambda w: under_way(w, "cp.async").commit()


@instruction(r"cp\.async\.wait_group", 1)
def _wait_group(operands, given, found, guard):
    unguarded(guard, "a wait for copies")
    most = int(given.operands[0], 0)
    return lambda w: under_way(w, "cp.async").wait(w, most, given.line)


@dataclass
class Mbarrier:
    """Section mbarrier: a phase ends when so many have arrived, and so many bytes."""

    count: int
    pending: int
    initialized: tuple[int, int]  # thread, epoch
    phase: int = 0
    bytes: int = 0
    used: dict[int, int] = field(default_factory=dict)  # warp -> last epoch

    def advance(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


@dataclass
class Signal:
    """An arrival, or bytes, at an mbarrier when the work before it is done."""

    address: int
    bytes: int | None = None  # None: an arrival

    def run(self, batch: Batch, slot: int) -> None:
        barrier = batch.mbarriers.get((slot, self.address))
        if barrier is None:
            raise PTXError("an engine signals an mbarrier that is none")
        if self.bytes is None:
            barrier.pending -= 1
        else:
            barrier.bytes -= self.bytes
        barrier.advance()


def each(w: Warps, guard: Reader | None) -> list[tuple[int, int]]:
    """(row, lane) of the lanes that execute."""
    lanes = w.lanes(guard)
    if lanes is None:
        return [(row, lane) for row in range(w.shape[0]) for lane in range(32)]
    return list(zip(*(part.tolist() for part in lanes), strict=True))


def _of_mbarriers(
    operands: Operands, text: str, guard: Reader | None, line: int, act: Callable[[Warps, int, int, int], None]
) -> Operation:
    """act(warps, row, lane, address) for every lane that executes."""
    address = operands.address(text, "b32")

    def execute(w: Warps) -> None:
        for row, lane in each(w, guard):
            act(w, row, lane, int(w.full(address(w))[row, lane]))

    return execute


def mbarrier(w: Warps, row: int, address: int, line: int) -> Mbarrier:
    slot = int(w.slots[row])
    found = w.batch.mbarriers.get((slot, address))
    if found is None:
        raise PTXError("no mbarrier is initialized")
    thread, epoch = found.initialized
    if epoch == w.batch.epochs[slot] and thread // 32 != w.threads[row, 0] // 32:
        w.batch.launch.report("an mbarrier is used by another warp than initialized it, without a barrier", line)
    found.used[int(w.indices[row])] = int(w.batch.epochs[slot])
    return found


@instruction(r"mbarrier\.init\.shared::cta\.b64", 2)
def _initialize(operands, given, found, guard):
    count = int(given.operands[1], 0)

    def act(w: Warps, row: int, lane: int, address: int) -> None:
        slot = int(w.slots[row])
        lanes = np.array([row]), np.array([lane])
        store(w, "shared", np.full((1, 1), address, np.uint32), [np.zeros((1, 1), np.uint64)], 8, lanes, given.line)
        w.batch.mbarriers[slot, address] = Mbarrier(
            count, count, (int(w.threads[row, lane]), int(w.batch.epochs[slot]))
        )

    return _of_mbarriers(operands, given.operands[0], guard, given.line, act)


@instruction(r"mbarrier\.inval\.shared::cta\.b64", 1)
def _invalidate(operands, given, found, guard):
    def act(w: Warps, row: int, lane: int, address: int) -> None:
        barrier = w.batch.mbarriers.pop((int(w.slots[row]), address), None)
        if barrier is None:
            raise PTXError("no mbarrier to end")
        now = int(w.batch.epochs[w.slots[row]])
        if any(epoch == now and warp != w.indices[row] for warp, epoch in barrier.used.items()):
            w.batch.launch.report("an mbarrier ends while another warp may use it", given.line)

    return _of_mbarriers(operands, given.operands[0], guard, given.line, act)


@instruction(r"mbarrier\.arrive\.expect_tx\.shared(?:::cta)?\.b64", 3)
def _expect(operands, given, found, guard):
    count = int(given.operands[2], 0)
    if given.operands[0] != "_":
        raise PTXError("state of an arrival")

    def act(w: Warps, row: int, lane: int, address: int) -> None:
        barrier = mbarrier(w, row, address, given.line)
        barrier.bytes += count
        barrier.pending -= 1
        barrier.advance()

    return _of_mbarriers(operands, given.operands[1], guard, given.line, act)


@instruction(r"mbarrier\.try_wait\.parity\.shared(?:::cta)?\.b64", 3)
def _try_wait(operands, given, found, guard):
    unguarded(guard, "a wait")
    write = operands.write(given.operands[0], "pred", None)
    address, parity = operands.address(given.operands[1], "b32"), operands.read(given.operands[2], "b32")

    def execute(w: Warps) -> None:
        addresses, parities = w.full(address(w)), w.full(parity(w))
        if (addresses != addresses[:, :1]).any() or (parities != parities[:, :1]).any():
            raise PTXError("lanes of a warp wait for different phases")
        done = np.zeros((w.shape[0], 1), bool)
        for row in range(w.shape[0]):
            barrier, slot = mbarrier(w, row, int(addresses[row, 0]), given.line), int(w.slots[row])
            if barrier.phase & 1 == parities[row, 0]:
                w.batch.launch.reached.add(given.line)
            while barrier.phase & 1 == parities[row, 0] and _work_for(w.batch, slot, int(addresses[row, 0])):
                pass
            done[row] = barrier.phase & 1 != parities[row, 0]
        w.waits = not done.all()
        write(w, done)

    return execute


def _work_for(batch: Batch, slot: int, address: int) -> bool:
    """Do the work that the next signal of an mbarrier comes after, if there is one."""
    for place, (box, signal) in enumerate(batch.boxes[slot]):
        if signal.address == address:
            del batch.boxes[slot][place]
            box.run(batch, slot)
            signal.run(batch, slot)
            return True
    work = batch.work[slot]
    signals = [i for i, item in enumerate(work) if isinstance(item, Signal) and item.address == address]
    if not signals:
        return False
    done, batch.work[slot] = work[: signals[0] + 1], work[signals[0] + 1 :]
    for item in done:
        item.run(batch, slot)
    return True


@instruction(r"fence\.proxy\.async(?:\.shared::cta)?", 0)
def _fence(operands, given, found, guard):
    unguarded(guard, "a fence")

    def execute(w: Warps) -> None:
        w.batch.launch.reached.add(given.line)
        if (shadow := w.batch.shared.shadow) is not None:
            shadow.clock += 1
            w.batch.fenced[w.slots, w.indices] = shadow.clock

    return execute


def seen_by_engines(w: Warps, rows: np.ndarray, at: np.ndarray, line: int, does: str = "reads") -> None:
    """An engine sees what threads, or their cp.async, wrote before a fence.proxy.async of the writer or of the warp
    that asks for the access (section Async proxy), and its writes come after that; at: (rows, grains).
    """
    shadow, per_block = w.batch.shared.shadow, w.batch.launch.program.text.threads
    if shadow is None:
        return
    writer = shadow.writer[at]
    slots, warp = w.slots[rows][:, None], np.where(writer >= 0, writer % per_block // 32, 0)
    fenced = np.maximum(w.batch.fenced[slots, warp], w.batch.fenced[slots, w.indices[rows][:, None]])
    hidden = (writer >= 0) & (shadow.write_time[at] > fenced)
    if hidden.any():
        other = int(shadow.write_line[at[hidden][0]])
        w.batch.launch.report(f"an engine {does} what was written without a fence.proxy.async", line, other)


class TensorMap(NamedTuple):
    """What a cp.async.bulk.tensor.2d copies by: a matrix and the box of it."""

    first: int  # address
    size: int  # bytes of an entry
    rows: int
    columns: int
    pitch: int  # bytes from row to row
    box: tuple[int, int]  # rows and columns
    swizzle: int  # bytes of a row of the box that the swizzle spans


def swizzled(address: np.ndarray, width: int) -> np.ndarray:
    """Sixteen bytes change places within `width` by the row of 128 bytes they lie in (section Swizzling modes)."""
    return address ^ (((address >> 7) & (width // 16 - 1)) << 4)


@dataclass
class Box:
    """One box under way."""

    to: np.ndarray  # bytes in shared memory, an entry each
    of: np.ndarray  # bytes in global memory
    given: np.ndarray
    size: int
    moved: bool = False

    def move(self, batch: Batch) -> None:
        memory = batch.launch.memory.words[self.size]
        values = np.zeros(self.to.shape, memory.dtype)
        values[self.given] = memory[self.of[self.given] // self.size]
        batch.shared.words[self.size][self.to // self.size] = values
        self.moved = True

    def run(self, batch: Batch, slot: int) -> None:
        if not self.moved:
            self.move(batch)
        if (shadow := batch.shared.shadow) is not None:
            at = np.unique(shadow.places(self.to, self.size))
            shadow.land(at, writes=True)
            shadow.writer[at] = -1  # seen by all that have waited


def _map_and_corner(operands: Operands, text: str) -> tuple[Callable[[Warps], Any], ...]:
    """Address of the tensor map, and column and row where the box begins, of `[map, {column, row}]`."""
    inner = [part.strip() for part in re.sub(r"[\[\]{}]", "", text).split(",")]
    if len(inner) != 3:
        raise PTXError("coordinates of a box")
    return operands.read(inner[0], "b64"), *(operands.read(text, "s32") for text in inner[1:])


def _tensor_map(w: Warps, names: dict[int, str], address: int) -> TensorMap:
    if address not in names or names[address] not in w.batch.launch.tensor_maps:
        raise PTXError("no tensor map at an address")
    return w.batch.launch.tensor_maps[names[address]]


@instruction(r"cp\.async\.bulk\.tensor\.2d\.shared::(?:cta|cluster)\.global\.mbarrier::complete_tx::bytes", 3)
def _copy_box(operands, given, found, guard):
    to, source, signal = given.operands
    places = operands.address(to, "b32"), operands.address(signal, "b32"), *_map_and_corner(operands, source)
    operands.grain = min(operands.grain, 2)
    names = {address: name for name, address in operands.starts.items()}

    def execute(w: Warps) -> None:
        for row, lane in each(w, guard):
            into, signalled, where, column, first = (int(w.full(read(w))[row, lane]) for read in places)
            tensor = _tensor_map(w, names, where)
            box = _box(w, (row, lane), tensor, into, (first, column), given.line)
            mbarrier(w, row, signalled, given.line)
            w.batch.boxes[int(w.slots[row])].append((box, Signal(signalled, box.size * box.to.size)))

    return execute


def _places(
    w: Warps, slot: int, tensor: TensorMap, corner: tuple[int, int], at: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of the entries of a box: bytes in shared memory, which are inside the matrix, bytes of those in global memory and
    in its shadow. corner: row and column of the matrix."""
    (rows, columns), size = tensor.box, tensor.size
    if at % 128 or columns * size != tensor.swizzle:
        raise PTXError("a box that is not as wide as its swizzle")
    r, c = np.mgrid[corner[0] : corner[0] + rows, corner[1] : corner[1] + columns]
    inside = (r >= 0) & (r < tensor.rows) & (c >= 0) & (c < tensor.columns)
    addresses = (tensor.first + r[inside] * tensor.pitch + c[inside] * size).astype(np.uint64)
    beyond, shaded = w.batch.launch.memory.locate(addresses, size)
    here = at + np.arange(rows)[:, None] * tensor.swizzle + np.arange(columns) * size
    here = swizzled(here.astype(np.int64), tensor.swizzle)
    assert SHARED % 1024 == 0  # the swizzle is by address
    here = w.batch.shared.locate(np.full(here.size, slot), here.ravel(), size).reshape(here.shape)
    return here, inside, beyond, shaded


def _box(w: Warps, thread: tuple[int, int], tensor: TensorMap, into: int, corner: tuple[int, int], line: int) -> Box:
    row, lane = thread
    to, inside, beyond, shaded = _places(w, int(w.slots[row]), tensor, corner, into)
    of, size = np.zeros(to.shape, np.int64), tensor.size
    of[inside] = beyond
    who = Threads(w.threads[row : row + 1, lane], w.batch.epochs[w.slots[row : row + 1]])
    if inside.any() and (shadow := w.batch.launch.memory.shadow) is not None:
        shadow.read(who, shadow.places(shaded, size).reshape(1, -1), line, must_be_written=False)
    box = Box(to, of, inside, size)
    if (shadow := w.batch.shared.shadow) is not None:
        places = np.unique(shadow.places(to, size))
        seen_by_engines(w, np.array([row]), places[None], line, "writes over")
        shadow.write(who, places[None], line, None)
        shadow.fly(places, writes=True, line=line)
    if not w.batch.launch.settings.late:
        box.move(w.batch)
    return box


@dataclass
class Outgoing:
    """Boxes on their way from shared to global memory that one instruction of some warps sent."""

    boxes: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]  # warp, bytes here, there, in its shadow
    size: int
    line: int
    taken: bool = False  # out of shared memory

    def take(self, rows: np.ndarray) -> "Outgoing":
        number = np.cumsum(rows) - 1
        return Outgoing(
            [(int(number[row]), *box) for row, *box in self.boxes if rows[row]], self.size, self.line, self.taken
        )

    def move(self, batch: Batch) -> None:
        for _, of, to, _ in self.boxes:
            words = batch.shared.words[self.size][of // self.size]
            batch.launch.memory.words[self.size][to // self.size] = words

    def leave(self, w: Warps) -> None:
        """Shared memory may be written again."""
        if self.taken:
            return
        if w.batch.launch.settings.late:
            self.move(w.batch)
        if (shadow := w.batch.shared.shadow) is not None:
            for row, of, *_ in self.boxes:
                places = np.unique(shadow.places(of, self.size))
                shadow.land(places, writes=False)
                who = Threads(w.threads[row : row + 1, 0], w.batch.epochs[w.slots[row : row + 1]])
                shadow.read(who, places[None], self.line, must_be_written=True)
        self.taken = True

    def land(self, w: Warps) -> None:
        self.leave(w)
        if (shadow := w.batch.launch.memory.shadow) is not None:
            for *_, shaded in self.boxes:
                shadow.land(shadow.places(shaded, self.size), writes=True)


class OutgoingGroups(Groups):
    """Of `Outgoing`: under way until they have left shared memory; global memory has them at the end of the kernel."""

    def under_way(self) -> list[Any]:
        return [job for job in super().under_way() if job.boxes and not job.taken]

    def take(self, rows: np.ndarray) -> "OutgoingGroups":
        return OutgoingGroups(*vars(super().take(rows)).values())

    def wait_until_read(self, w: Warps, most: int, line: int) -> None:
        for group in self.groups[: max(0, len(self.groups) - most)]:
            for job in group:
                if job.boxes and not job.taken:
                    w.batch.launch.reached.add(line)
                job.leave(w)


def _outgoing(w: Warps) -> OutgoingGroups:
    return w.jobs.setdefault("cp.async.bulk", OutgoingGroups())


@instruction(r"cp\.async\.bulk\.tensor\.2d\.global\.shared::cta\.bulk_group", 2)
def _store_box(operands, given, found, guard):
    target, source = given.operands
    places = operands.address(source, "b32"), *_map_and_corner(operands, target)
    operands.grain = min(operands.grain, 2)
    names = {address: name for name, address in operands.starts.items()}

    def execute(w: Warps) -> None:
        boxes, size = [], 0
        for row, lane in each(w, guard):
            at, where, column, first = (int(w.full(read(w))[row, lane]) for read in places)
            tensor = _tensor_map(w, names, where)
            of, inside, to, shaded = _places(w, int(w.slots[row]), tensor, (first, column), at)
            boxes.append((row, of[inside], to, shaded))
            size = tensor.size
            who = Threads(w.threads[row : row + 1, lane], w.batch.epochs[w.slots[row : row + 1]])
            if (shadow := w.batch.shared.shadow) is not None:
                read = np.unique(shadow.places(of[inside], size))
                shadow.read(who, read[None], given.line, must_be_written=True)
                seen_by_engines(w, np.array([row]), read[None], given.line)
                shadow.fly(read, writes=False, line=given.line)
            if (shadow := w.batch.launch.memory.shadow) is not None:
                written = shadow.places(shaded, size)
                shadow.write(who, written.reshape(1, -1), given.line, None)
                shadow.fly(written, writes=True, line=given.line)
        job = Outgoing(boxes, size, given.line)
        if boxes and not w.batch.launch.settings.late:
            job.move(w.batch)
        _outgoing(w).begun.append(job)

    return execute


@instruction(r"cp\.async\.bulk\.commit_group", 0)
def _commit_boxes(operands, given, found, guard):
    unguarded(guard, "a group of copies")
    return lambda w: _outgoing(w).commit()


@instruction(r"cp\.async\.bulk\.wait_group(\.read)?", 1)
def _wait_for_boxes(operands, given, found, guard):
    unguarded(guard, "a wait for copies")
    most, read = int(given.operands[0], 0), found[1] is not None

    def execute(w: Warps) -> None:
        groups = _outgoing(w)
        (groups.wait_until_read if read else groups.wait)(w, most, given.line)

    return execute
