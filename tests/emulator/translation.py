"""PTX to functions of `Warps`: the table of what this GPU knows, by patterns of whole opcodes."""

import re
from collections.abc import Callable

from .machine import Barrier, Block, Branch, Exit, Jump, Operation, Program, Reader
from .registers import Operands, unguarded
from .text import Instruction, PTXError, Text

Builder = Callable[[Operands, Instruction, re.Match, Reader | None], Operation]
_TABLE: list[tuple[re.Pattern, int | tuple[int, ...], Builder]] = []


def instruction(pattern: str, operands: int | tuple[int, ...]) -> Callable[[Builder], Builder]:
    """Of opcodes that match as a whole, with this number of operands, or one of these."""

    def entered(builder: Builder) -> Builder:
        _TABLE.append((re.compile(pattern), operands, builder))
        return builder

    return entered


def translate(text: Text) -> Program:
    operands = Operands(text)
    blocks = []
    for number, instructions in enumerate(text.blocks):
        operations, registers, lines, end = [], [], [], None
        for given in instructions:
            try:
                end = _end(operands, given, number)
                if end is None:
                    operations.append(_operation(operands, given))
                    registers.append(_registers(operands, given))
                    lines.append(given.line)
            except PTXError as error:
                raise PTXError(f"{error}, in {str(given)[:200]!r} at {text.source(given.line)}") from None
        if end is None:
            end = Jump(number + 1) if number + 1 < len(text.blocks) else Exit()
        blocks.append(Block(operations, end, registers, lines))
    return Program(text, blocks, operands.poison(), operands.grain, operands.uses_tensor_memory)


def _registers(operands: Operands, given: Instruction) -> frozenset[int]:
    """Those that an instruction names; products may follow each other into the same ones."""
    if given.opcode.startswith("wgmma"):
        return frozenset()
    named = re.findall(r"[%\w$@]+", " ".join((given.guard or "", *given.operands)))
    return frozenset(operands.index[name] for name in named if name in operands.index)


def _operation(operands: Operands, given: Instruction) -> Operation:
    known = False
    for pattern, count, builder in _TABLE:
        if found := pattern.fullmatch(given.opcode):
            known = True
            if len(given.operands) in ((count,) if isinstance(count, int) else count):
                return builder(operands, given, found, operands.guard(given.guard))
    raise PTXError(f"{len(given.operands)} operands" if known else "unknown instruction")


def _end(operands: Operands, given: Instruction, number: int) -> Jump | Branch | Barrier | Exit | None:
    if given.opcode in ("bra", "bra.uni"):
        target = operands.text.labels[given.operands[0]]
        guard = operands.guard(given.guard)
        return Jump(target) if guard is None else Branch(guard, target)
    if given.opcode == "ret":
        unguarded(given.guard, "the end of a kernel")
        return Exit()
    if given.opcode in ("bar.sync", "barrier.sync"):
        unguarded(given.guard, "a barrier")
        if given.operands != ("0",):
            raise PTXError("a barrier of some of the threads")
        return Barrier()
    return None
