"""PTX to blocks of instructions; every name is that of its scope, every instruction knows its line and its source."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class PTXError(Exception):
    """What this GPU refuses: an instruction it does not know, an address outside of every tensor, a deadlock."""


class Instruction(NamedTuple):
    line: int
    guard: str | None  # "%p1" or "!%p1"
    opcode: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.opcode} {', '.join(self.operands)}"


class Parameter(NamedTuple):
    name: str
    type: str  # "u64", "f32", ...; "b8" of a tensor map
    size: int


@dataclass
class Text:
    """One kernel: `blocks` of instructions that end with a jump or where a label stands."""

    ptx: str
    name: str
    threads: int
    parameters: list[Parameter]
    registers: dict[str, str] = field(default_factory=dict)  # name -> "b32", "pred", ...
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)  # name -> block
    sources: dict[int, str] = field(default_factory=dict)  # line of PTX -> "tile.py:61"

    def source(self, line: int) -> str:
        return f"{self.sources.get(line, '?')} (PTX line {line})"


ENDS = ("bra", "ret", "bar", "barrier")
_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


def parse(ptx: str) -> Text:
    """The one kernel of a module."""
    (name,) = re.findall(r"\.entry\s+([\w$]+)", ptx)
    head, body = re.split(r"^\{", ptx[ptx.index(".entry") :], maxsplit=1, flags=re.MULTILINE)
    (threads,) = re.findall(r"\.reqntid\s+(\d+)", head) or [None]
    if threads is None:
        raise PTXError(f"{name} does not say its number of threads (.reqntid)")
    parameters = [
        Parameter(name, letter + bits, int(count or 1) * _SIZES[bits])
        for letter, bits, name, count in re.findall(
            r"\.param\s+(?:\.align\s+\d+\s+)?\.([a-z])(\d+)\s[^,\n\[]*?([\w$]+)(?:\[(\d+)\])?(?=,|\n)", head
        )
    ]
    text = Text(ptx, name, int(threads), parameters)
    first = ptx[: len(ptx) - len(body)].count("\n") + 1
    _fill(text, list(_statements(text, body, first)))
    return text


class _Statement(NamedTuple):
    line: int
    scopes: tuple[int, ...]  # lines where the scopes around it open
    content: str


def _statements(text: Text, body: str, first: int) -> Iterator[_Statement]:
    """Labels (with their colon), directives and instructions, each with the scopes around it; ends with the body."""
    scopes: list[int] = []
    pending, begun, source = "", 0, "?"
    for line, raw in enumerate(body.split("\n"), first):
        code, _, comment = raw.partition("//")
        if code.lstrip().startswith((".loc", ".file")):
            if found := re.match(r"\s*(\S+:\d+):\d+", comment):
                source = found[1]
            continue
        text.sources[line] = source
        rest = code.strip()
        while rest:
            if not pending:
                begun = line
                if rest[0] == "{":
                    scopes.append(line)
                    rest = rest[1:].lstrip()
                    continue
                if rest[0] == "}":
                    if not scopes:
                        return
                    scopes.pop()
                    rest = rest[1:].lstrip()
                    continue
                if found := re.match(r"([\w$]+:)(?!:)\s*", rest):
                    yield _Statement(line, tuple(scopes), found[1])
                    rest = rest[found.end() :]
                    continue
            content, end, rest = rest.partition(";")
            pending = f"{pending} {content.strip()}".strip()
            rest = rest.lstrip()
            if end:
                if pending:
                    yield _Statement(begun, tuple(scopes), pending)
                pending = ""
    raise PTXError("the body of the kernel has no end")


def _fill(text: Text, statements: list[_Statement]) -> None:
    own: dict[tuple[tuple[int, ...], str], str] = {}  # scope and name there -> name of its own

    def declare(statement: _Statement, name: str) -> str:
        unique = f"{name}@{statement.scopes[-1]}" if statement.scopes else name
        own[statement.scopes, name] = unique
        return unique

    for statement in statements:
        if statement.content.endswith(":"):
            declare(statement, statement.content[:-1])
        elif statement.content.startswith(".reg"):
            _, kind, names = statement.content.split(None, 2)
            for name in names.split(","):
                base, _, count = name.strip().rstrip(">").partition("<")
                for each in [f"{base}{i}" for i in range(int(count))] if count else [base]:
                    text.registers[declare(statement, each)] = kind[1:]

    def resolve(found: re.Match, scopes: tuple[int, ...]) -> str:
        for depth in range(len(scopes), -1, -1):
            if (unique := own.get((scopes[:depth], found[0]))) is not None:
                return unique
        return found[0]

    for statement in statements:
        content = statement.content
        if content.endswith(":"):
            if text.blocks[-1]:
                text.blocks.append([])
            text.labels[own[statement.scopes, content[:-1]]] = len(text.blocks) - 1
        elif content.startswith("."):
            if not content.startswith((".reg", ".pragma")):
                raise PTXError(f"unknown directive {content!r} (PTX line {statement.line})")
        else:
            content = re.sub(r"[%$]?[A-Za-z_$][\w$]*", lambda m, s=statement.scopes: resolve(m, s), content)
            text.blocks[-1].append(_instruction(statement.line, content))
            if text.blocks[-1][-1].opcode.partition(".")[0] in ENDS:
                text.blocks.append([])


def _instruction(line: int, content: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?[%\w$@]+)\s+)?([\w.:]+)\s*(.*)", content, re.DOTALL)
    if found is None:
        raise PTXError(f"cannot read {content!r} (PTX line {line})")
    return Instruction(line, found[1], found[2], tuple(split(found[3])))


def split(text: str) -> list[str]:
    """Parts between the commas that stand outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts] if text.strip() else []
