"""Who executes what, and when: warps in lockstep until a barrier, split and joined where they branch.

`Warps` are at one place of the program. Their registers are arrays that broadcast to (warps, 32), so one call of NumPy
executes an instruction for all of them, of several blocks too. `Order` says which warps go first between two barriers.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .memory import Global, Region, Shadow, Shared, Threads
from .text import PTXError, Text

LANES = np.arange(32)
LANES_TOGETHER = 8192  # of the blocks that run together, at most, if more than one

Reader = Callable[["Warps"], np.ndarray]
Operation = Callable[["Warps"], None]


@dataclass
class Settings:
    # between two barriers: all warps in lockstep, or one after the other, from the first or from the last
    order: str = "together"  # "forward", "reverse"
    late: bool = True  # engines do their work when somebody waits for it; else at once
    shadows: bool = True


class Finding(NamedTuple):
    kernel: str
    kind: str
    source: str
    other: str  # source of the access that it races with


class Jump(NamedTuple):
    target: int


class Branch(NamedTuple):
    condition: Reader
    target: int


class Barrier(NamedTuple):
    """Of every thread of a block."""


class Exit(NamedTuple):
    """The end of the kernel."""


class Block(NamedTuple):
    operations: list[Operation]
    end: Jump | Branch | Barrier | Exit
    registers: list[frozenset[int]]  # of each operation; none of those that products under way may have
    lines: list[int]


@dataclass
class Program:
    text: Text
    blocks: list[Block]
    poison: list[np.ndarray]  # what each register holds before it is written
    grain: int  # bytes of the smallest access to memory
    uses_tensor_memory: bool = False
    joins: list[int | None] = field(default_factory=list)  # where the ways after each block meet again

    def __post_init__(self) -> None:
        self.joins = joins([successors(number, block) for number, block in enumerate(self.blocks)])


def successors(number: int, block: Block) -> list[int]:
    match block.end:
        case Jump(target):
            return [target]
        case Branch(_, target):
            return [number + 1, target]
        case Barrier():
            return [number + 1]
    return []


def joins(following: list[list[int]]) -> list[int | None]:
    """The nearest block that every way from a block to the end passes; None where there is none."""
    end = len(following)
    passed: list[set[int]] = [set(range(end + 1)) for _ in following] + [{end}]
    changed = True
    while changed:
        changed = False
        for number in reversed(range(end)):
            ways = [passed[n] for n in following[number]] or [passed[end]]
            new = {number} | set.intersection(*ways)
            changed, passed[number] = changed or new != passed[number], new
    nearest: list[int | None] = []
    for number in range(end):
        later = passed[number] - {number, end}
        nearest.append(max(later, key=lambda n: len(passed[n]), default=None))
    return nearest


class Warps:
    """`rows` of warps at one place: registers, the block of each, and what they have under way."""

    def __init__(self, batch: "Batch", slots: np.ndarray, indices: np.ndarray, registers: list[np.ndarray]):
        self.batch, self.slots, self.indices, self.registers = batch, slots, indices, registers
        self.place = 0
        self.active: np.ndarray | None = None  # lanes of a branch that only some of a warp take
        self.waits = False
        self.busy: set[int] = set()  # registers of products under way
        self.shape = (len(slots), 32)
        per_block = batch.launch.program.text.threads
        numbers = batch.numbers[slots][:, None] * per_block + indices[:, None] * 32 + LANES
        self.threads = numbers.astype(np.int32)
        self.jobs: dict[str, Any] = {}  # engines' work under way, by engine; see `asynchronous` and `products`

    def full(self, x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, self.shape)

    def mask(self, guard: Reader | None) -> np.ndarray | None:
        """Which lanes execute an instruction; None for all."""
        if guard is None:
            return self.active
        return guard(self) if self.active is None else guard(self) & self.active

    def lanes(self, guard: Reader | None) -> tuple[np.ndarray, np.ndarray] | None:
        """(rows, lanes) of those that execute an instruction; None for all."""
        mask = self.mask(guard)
        if mask is None:
            return None
        mask = self.full(mask)
        return None if mask.all() else np.nonzero(mask)

    def who(self, lanes: tuple[np.ndarray, np.ndarray] | None) -> Threads:
        epochs = self.batch.epochs[self.slots]
        if lanes is None:
            return Threads(self.threads.ravel(), np.repeat(epochs, 32))
        return Threads(self.threads[lanes], epochs[lanes[0]])

    def take(self, rows: np.ndarray) -> "Warps":
        """Those warps, and what they have under way."""
        registers = [r if r.shape[0] == 1 and len(self.slots) > 1 else r[rows] for r in self.registers]
        part = Warps(self.batch, self.slots[rows], self.indices[rows], registers)
        part.place, part.busy = self.place, set(self.busy)
        part.jobs = {engine: jobs.take(rows) for engine, jobs in self.jobs.items()}
        return part

    @staticmethod
    def merged(groups: list["Warps"]) -> "Warps":
        first = groups[0]
        if len(groups) == 1:
            return first
        slots = np.concatenate([g.slots for g in groups])
        indices = np.concatenate([g.indices for g in groups])
        order = np.lexsort((indices, slots))

        def joined(parts: tuple[np.ndarray, ...]) -> np.ndarray:
            if all(part is parts[0] for part in parts) and parts[0].shape[0] == 1 and len(first.slots) > 1:
                return parts[0]
            columns = max(part.shape[1] for part in parts)
            whole = [np.broadcast_to(p, (len(g.slots), columns)) for p, g in zip(parts, groups, strict=True)]
            return np.concatenate(whole)[order]

        registers = [joined(parts) for parts in zip(*(g.registers for g in groups), strict=True)]
        whole = Warps(first.batch, slots[order], indices[order], registers)
        whole.place = first.place
        return whole


class Batch:
    """Blocks that run together: their shared memory, their epochs, and what their engines have under way."""

    def __init__(self, launch: "Launch", numbers: list[int]):
        self.launch, self.numbers = launch, np.array(numbers)
        self.epochs = np.zeros(len(numbers), np.int32)
        self.shared = Shared(len(numbers), launch.shared_bytes, launch.shadow)
        self.fenced = np.zeros((len(numbers), launch.program.text.threads // 32), np.int64)  # when each warp last was
        self.mbarriers: dict[tuple[int, int], Any] = {}  # (block, address)
        self.boxes: list[list[Any]] = [[] for _ in numbers]  # of each block, on their way, each by itself
        self.work: list[list[Any]] = [[] for _ in numbers]  # of each block's tensor core, in order
        self.tensor_memory: np.ndarray | None = None
        self.allocated: list[range] = []  # columns of it, by block

    def groups(self) -> list[Warps]:
        program, order = self.launch.program, self.launch.settings.order
        warps = program.text.threads // 32
        blocks = np.arange(len(self.numbers))

        def of(indices: np.ndarray) -> Warps:
            slots = np.repeat(blocks, len(indices))
            return Warps(self, slots, np.tile(indices, len(blocks)), list(program.poison))

        if order == "together":
            return [of(np.arange(warps))]
        found = [of(np.array([index])) for index in range(warps)]
        return found[::-1] if order == "reverse" else found

    def run(self) -> None:
        groups = self.groups()
        while groups:
            arrived, ended = self.advance(deque(groups))
            self.check(arrived, ended)
            groups = self.regrouped(arrived)

    def advance(self, queue: deque[Warps]) -> tuple[list[Warps], list[Warps]]:
        """Every group to its next barrier or its end."""
        arrived, ended, idle = [], [], 0
        while queue:
            outcome, warps = self.step(queue.popleft(), queue)
            idle = idle + 1 if outcome == "waits" else 0
            if outcome == "waits":
                if idle > len(queue) + 1:
                    raise PTXError(f"deadlock: every warp of {self.launch.program.text.name} waits at an mbarrier")
                queue.append(warps)
            else:
                (arrived if outcome == "barrier" else ended).append(warps)
        return arrived, ended

    def step(self, warps: Warps, queue: deque[Warps], until: int | None = None) -> tuple[str, Warps]:
        """Execute until a barrier, the end, a wait for others, or the block `until`."""
        blocks = self.launch.program.blocks
        while warps.place != until:
            warps.waits = False
            block = blocks[warps.place]
            if self.numbers[warps.slots[0]] == 0 and warps.indices[0] == 0:
                self.launch.path.append(warps.place)
            for place, operation in enumerate(block.operations):
                if warps.busy and not warps.busy.isdisjoint(block.registers[place]):
                    self.launch.report("a register is used while a product into it is under way", block.lines[place])
                try:
                    operation(warps)
                except PTXError as error:
                    raise PTXError(f"{error} at {self.launch.program.text.source(block.lines[place])}") from None
            match block.end:
                case Jump(target):
                    warps.place = target
                case Branch(condition, target):
                    warps = self.branch(warps, queue, condition(warps), target)
                    if warps.waits and warps.place == target:
                        return "waits", warps
                case end:
                    if until is not None or warps.active is not None:
                        raise PTXError(
                            f"a barrier or the end of {self.launch.program.text.name} for some lanes of a warp"
                        )
                    warps.place += 1
                    if isinstance(end, Barrier):
                        self.launch.reached.add(self.line_before(warps.place))
                    return "barrier" if isinstance(end, Barrier) else "ended", warps
        return "joined", warps

    def branch(self, warps: Warps, queue: deque[Warps], condition: np.ndarray, target: int) -> Warps:
        """The warps to go on with, at their next block; others that go another way join the queue."""
        active = np.True_ if warps.active is None else warps.active
        taken, passed = warps.full(condition & active), warps.full(~condition & active)
        if not taken.any():
            warps.place += 1
        elif not passed.any():
            warps.place = target
        elif warps.active is None and not (taken.any(1) & passed.any(1)).any():
            rest = warps.take(passed.any(1))
            rest.place += 1
            queue.appendleft(rest)
            part = warps.take(taken.any(1))
            part.place, part.waits = target, warps.waits
            return part
        else:
            join, outer, start = self.launch.program.joins[warps.place], warps.active, warps.place
            if join is None or warps.waits:
                raise PTXError(f"lanes of a warp part and do not meet again in {self.launch.program.text.name}")
            for place, lanes in ((target, taken), (start + 1, passed)):
                warps.place, warps.active = place, lanes
                self.step(warps, queue, until=join)
            warps.active = outer
        return warps

    def check(self, arrived: list[Warps], ended: list[Warps]) -> None:
        """Every warp of a block reaches a barrier that one of them reaches; what has begun is waited for."""
        for warps in ended:
            for engine, jobs in warps.jobs.items():
                if jobs.under_way():
                    self.launch.report(f"a warp ends with {engine} under way", 0)
        waiting = (
            np.bincount(np.concatenate([w.slots for w in arrived]), minlength=len(self.numbers))
            if arrived
            else np.zeros(1)
        )
        expected = self.launch.program.text.threads // 32
        if ((waiting != 0) & (waiting != expected)).any():
            self.launch.report("a barrier that not every warp of the block reaches", self.line_before(arrived[0].place))
        self.epochs[np.flatnonzero(waiting)] += 1

    def line_before(self, place: int) -> int:
        block = self.launch.program.text.blocks[place - 1]
        return block[-1].line if block else 0

    def regrouped(self, arrived: list[Warps]) -> list[Warps]:
        by_key: dict[tuple, list[Warps]] = {}
        apart = self.launch.settings.order != "together"
        for number, warps in enumerate(arrived):
            pending = any(jobs.under_way() for jobs in warps.jobs.values())
            key = (warps.place, int(warps.indices[0]) if apart else 0, number if pending else -1)
            by_key.setdefault(key, []).append(warps)
        groups = [Warps.merged(found) for found in by_key.values()]
        if apart:
            groups.sort(key=lambda g: int(g.indices[0]), reverse=self.launch.settings.order == "reverse")
        return groups


class Launch:
    """One call of a kernel on tensors; `findings` count what is wrong with it."""

    def __init__(
        self,
        program: Program,
        parameters: dict[str, bytes],
        regions: list[Region],
        shared_bytes: int,
        settings: Settings,
    ):
        self.program, self.parameters, self.settings, self.shared_bytes = program, parameters, settings, shared_bytes
        self.tensor_maps: dict[str, Any] = {}
        self.path: list[int] = []  # blocks of the program as block 0 of the grid executes them
        self.reached: set[int] = set()  # lines of barriers, fences and signals, and of waits for what was under way
        self.findings: Counter[Finding] = Counter()
        self.details: dict[Finding, str] = {}
        self.memory = Global(regions, self.shadow)

    def shadow(self, name: str, size: int) -> Shadow | None:
        if not self.settings.shadows:
            return None
        return Shadow(name, size, self.program.grain, self.program.text.threads, self.report)

    def report(self, kind: str, line: int, other: int = 0, detail: str = "") -> None:
        source = self.program.text.source
        finding = Finding(self.program.text.name, kind, source(line) if line else "", source(other) if other else "")
        self.findings[finding] += 1
        self.details.setdefault(finding, detail)

    def run(self, grid: tuple[int, int, int], only: Iterable[int] | None = None) -> None:
        """Every block of the grid, or those with these numbers."""
        self.grid = grid
        numbers = list(range(grid[0] * grid[1] * grid[2]) if only is None else only)
        together = max(1, LANES_TOGETHER // self.program.text.threads)
        if self.program.uses_tensor_memory:
            together = min(together, 8)
        with np.errstate(all="ignore"):
            for first in range(0, len(numbers), together):
                Batch(self, numbers[first : first + together]).run()
