"""Global and shared memory: bounds, alignment, and the shadow that finds races.

Two accesses of one place race if one of them writes and nothing orders them: threads of one block within one epoch
(between two barriers), or threads of two blocks. A write that changes nothing does not race with another write, and a
lane may write what other lanes of its warp have read.
An access under way (a copy, a product that reads shared memory) races with whatever would change its result before the
wait that ends it.
"""

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .arithmetic import BITS
from .text import PTXError

SHARED = 1024  # where shared memory begins, so that a null pointer lies outside; a multiple of what a swizzle spans
SEVERAL = -2


class Region(NamedTuple):
    name: str
    first: int
    size: int


class Threads(NamedTuple):
    """Who makes an access, one entry for each lane that does: its number in the grid, and its epoch."""

    number: np.ndarray
    epoch: np.ndarray


class Shadow:
    """For every `grain` bytes: who wrote last, which warp and block read, when and where; what is under way."""

    def __init__(self, name: str, size: int, grain: int, threads_per_block: int, report: Callable[..., None]):
        self.name, self.grain, self.block, self.report = name, grain, threads_per_block, report
        count = -(-size // grain)
        self.writer, self.reading_warp, self.reading_block = (np.full(count, -1, np.int32) for _ in range(3))
        self.write_epoch, self.read_epoch, self.write_line, self.read_line = (
            np.zeros(count, np.int32) for _ in range(4)
        )
        self.written = np.zeros(count, bool)
        self.clock, self.write_time = 0, np.zeros(count, np.int64)  # of writes and of fences of the asynchronous proxy
        self.flying_writes, self.flying_reads = (np.zeros(count, np.int16) for _ in range(2))
        self.flying_line = np.zeros(count, np.int32)

    def places(self, index: np.ndarray, size: int) -> np.ndarray:
        """(accesses, grains) of accesses that begin at these bytes."""
        return (index[..., None] // self.grain) + np.arange(size // self.grain)

    def _clash(self, kind: str, bad: np.ndarray, at: np.ndarray, line: int, lines: np.ndarray) -> None:
        if bad.any():
            place = at[bad][0]
            self.report(f"{self.name} memory: {kind}", line, int(lines[place]), f"byte {place * self.grain}")

    def read(self, who: Threads, at: np.ndarray, line: int, must_be_written: bool) -> None:
        me, now = who.number[:, None], who.epoch[:, None]
        writer = self.writer[at]
        apart = (writer != me) & (writer >= 0)
        if apart.any():
            other = writer // self.block != me // self.block
            self._clash(
                "read races with a write", apart & (other | (self.write_epoch[at] == now)), at, line, self.write_line
            )
        self._clash("read while a write is under way", self.flying_writes[at] > 0, at, line, self.flying_line)
        if must_be_written:
            self._clash("read of what nothing wrote", ~self.written[at], at, line, self.write_line)
        for readers, mine, counts in (
            (self.reading_warp, me // 32, self.read_epoch[at] == now),
            (self.reading_block, me // self.block, True),
        ):
            before = readers[at]
            value = np.where((before != -1) & (before != mine) & counts, SEVERAL, mine).astype(np.int32)
            readers[at] = value
            readers[at[readers[at] != value]] = SEVERAL  # several in this instruction
        self.read_epoch[at], self.read_line[at] = now, line

    def write(self, who: Threads, at: np.ndarray, line: int, changes: np.ndarray | None) -> None:
        """changes: whether the write alters each grain; None: taken to do so."""
        me, now = who.number[:, None], who.epoch[:, None]
        writer, block = self.writer[at], me // self.block
        clash = (writer >= 0) & (writer != me) & ((writer // self.block != block) | (self.write_epoch[at] == now))
        self._clash(
            "write races with a write", clash if changes is None else clash & changes, at, line, self.write_line
        )
        reading_block, reading_warp = self.reading_block[at], self.reading_warp[at]
        clash = (reading_block == block) & (reading_warp != me // 32) & (self.read_epoch[at] == now)
        clash |= (reading_block != -1) & (reading_block != block)
        self._clash("write races with a read", clash, at, line, self.read_line)
        self._clash("write while a read is under way", self.flying_reads[at] > 0, at, line, self.flying_line)
        self._clash("write while a write is under way", self.flying_writes[at] > 0, at, line, self.flying_line)
        self.writer[at], self.write_epoch[at], self.write_line[at] = me, now, line
        self.clock += 1
        self.written[at], self.write_time[at] = True, self.clock

    def fly(self, at: np.ndarray, writes: bool, line: int) -> None:
        """An access by an engine begins."""
        self._clash(
            "an engine reads or writes while a write is under way",
            self.flying_writes[at] > 0,
            at,
            line,
            self.flying_line,
        )
        if writes:
            self._clash(
                "an engine writes while a read is under way", self.flying_reads[at] > 0, at, line, self.flying_line
            )
        np.add.at(self.flying_writes if writes else self.flying_reads, at.ravel(), 1)
        self.flying_line[at] = line

    def land(self, at: np.ndarray, writes: bool) -> None:
        np.subtract.at(self.flying_writes if writes else self.flying_reads, at.ravel(), 1)


def _aligned(address: np.ndarray, size: int) -> None:
    if (address % address.dtype.type(size)).any():
        raise PTXError(f"misaligned access of {size} bytes")


class Global:
    """The tensors of a launch where they lie; addresses are the host's."""

    def __init__(self, regions: list[Region], shadow: Callable[[str, int], Shadow | None]):
        self.regions = sorted(regions, key=lambda region: region.first)
        self.first = np.array([region.first for region in self.regions], np.uint64)
        self.size = np.array([region.size for region in self.regions], np.int64)
        starts = np.concatenate([[0], np.cumsum(-(-self.size // 16) * 16)])
        # in the shadow the regions lie one behind the other, at an offset that keeps their alignment
        self.start = starts[:-1]
        self.shadow = shadow("global", int(starts[-1]) + 16)
        self.origin = (int(self.first[0]) if self.regions else 0) & ~15
        end = max((region.first + region.size for region in self.regions), default=self.origin)
        whole = (ctypes.c_uint8 * (end - self.origin)).from_address(self.origin) if end > self.origin else b""
        flat = np.frombuffer(whole, np.uint8)
        self.words = {size: flat[: len(flat) // size * size].view(word) for size, word in BITS.items()}

    def locate(self, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Bytes from the origin, and bytes in the shadow."""
        region = np.searchsorted(self.first, address, side="right") - 1
        offset = (address - self.first[region]).astype(np.int64) if len(self.regions) else np.zeros(0, np.int64)
        bad = (region < 0) | (offset + size > self.size[region]) if len(self.regions) else np.ones(len(address), bool)
        if bad.any():
            at, near = int(address[bad][0]), int(region[bad][0])
            name = "" if near < 0 else f": {at - self.regions[near].first} bytes into {self.regions[near]}"
            raise PTXError(f"access of {size} bytes outside of every tensor{name}")
        _aligned(address, size)
        return (address - np.uint64(self.origin)).astype(np.int64), self.start[region] + offset


class Shared:
    """Shared memory of the blocks that run together, one behind the other."""

    def __init__(self, blocks: int, size: int, shadow: Callable[[str, int], Shadow | None]):
        self.size, self.stride = size, -(-max(size, 16) // 1024) * 1024
        self.shadow = shadow("shared", blocks * self.stride)
        flat = np.full(blocks * self.stride, 0xFF, np.uint8)
        self.words = {size: flat.view(word) for size, word in BITS.items()}

    def locate(self, slots: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        offset = address.astype(np.int64) - SHARED
        if len(offset) and (offset.min() < 0 or offset.max() + size > self.size):
            raise PTXError(f"access of {size} bytes outside of the {self.size} of shared memory")
        _aligned(address, size)
        return offset + slots * self.stride
