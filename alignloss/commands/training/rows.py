"""The rows of a JSONL file that can be trained on, and what is wrong with the others, by the number of their line."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError

COLUMNS = {
    "paired": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "unlabelled": ("prompt", "completion"),
}
REFERENCES = {
    "paired": ("ref_chosen_logps", "ref_rejected_logps"),
    "unpaired": ("ref_logps",),
    "unlabelled": ("ref_logps",),
}
SCORED_LENGTH = "ref_max_length"  # tokens that the references of a row count, beside them
SHOWN = 10


class Bad(NamedTuple):
    line: int  # from 1
    reason: str


class Rows(NamedTuple):
    """What a file holds. Each of `rows` has its columns, and `line`."""

    path: Path
    kind: str  # of COLUMNS
    rows: list[dict[str, Any]]
    bad: list[Bad]
    unused: list[str]  # columns that nothing reads
    originals: dict[int, dict[str, Any]]  # by line
    scored: bool  # references are those of the file

    def summary(self) -> str:
        text = f"{self.path}: {len(self.rows):,} rows"
        if self.bad:
            more = f", and {len(self.bad) - SHOWN:,} more" if len(self.bad) > SHOWN else ""
            shown = "; ".join(f"line {number}: {reason}" for number, reason in self.bad[:SHOWN])
            counts = Counter(reason.split(":")[0] for _, reason in self.bad)
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())
            text += f", {len(self.bad):,} bad ones left out ({kinds}): {shown}{more}"
        if self.scored:
            text += "; references are those of the file"
        if self.unused:
            text += f"; not read: {', '.join(self.unused)}"
        return text


def read_rows(
    path: Path,
    kind: str | None,
    *,
    numbers: Sequence[str] = (),
    references: bool = False,
    policy: str = "skip",
    fault: Callable[[dict[str, Any]], str | None] = lambda row: None,
) -> Rows:
    """Read a file of one JSON object per line.

    Args:
        path: UTF-8; empty lines are passed over.
        kind: of COLUMNS. Pairs serve an unpaired loss too: the chosen is desirable, the rejected is not. None: pairs,
            or prompts and completions, as the file has them.
        numbers: columns of the loss beside those of its kind.
        references: read log-probabilities of the reference where the file has them.
        policy: "skip" leaves bad rows out, "stop" is an error at the first.
        fault: what else is wrong with a row, or None.

    Raises:
        UserError: where no row can be used, at the first bad one if so asked, or for a file that cannot be read.
    """
    if policy not in ("skip", "stop"):
        raise UserError(f"--bad-rows must be skip or stop, got {policy!r}")
    parsed = _lines(path)
    objects = [row for _, row in parsed if isinstance(row, dict)]
    names = {name for row in objects for name in row}
    if kind is None:
        kind = "paired" if {"chosen", "rejected"} <= names else "unlabelled"
    if kind == "unpaired" and "completion" not in names and {"chosen", "rejected"} <= names:
        kind = "paired"
    needed = COLUMNS[kind]
    lacking = [name for name in needed if objects and name not in names]
    if lacking:
        raise UserError(
            f"{path} has no column {', '.join(lacking)}: this loss needs {', '.join(needed)}, and the file has "
            f"{', '.join(sorted(names)) or 'none'}"
        )
    references = references and names.issuperset(REFERENCES[kind])
    if references:
        numbers = [*numbers, *REFERENCES[kind]]
    rows: list[dict[str, Any]] = []
    bad: list[Bad] = []
    originals: dict[int, dict[str, Any]] = {}
    for number, row in parsed:
        reason = row if isinstance(row, str) else _fault(row, needed, numbers, rows[0] if rows else None)
        reason = reason or fault(row)
        if reason is None:
            rows.append(
                {name: bool(row[name]) if name == "label" else row[name] for name in needed}
                | {name: float(row[name]) for name in numbers}
                | {"line": number}
            )
            originals[number] = row
            continue
        bad.append(Bad(number, reason))
        if policy == "stop":
            raise UserError(f"{path}, line {number}: {reason} (--bad-rows skip leaves such rows out)")
    unused = sorted(names - {*needed, *numbers} - ({SCORED_LENGTH} if references else set()))
    result = Rows(path, kind, rows, bad, unused, originals, references)
    if not rows:
        first = f"; line {bad[0].line}: {bad[0].reason}" if bad else ": it is empty"
        raise UserError(f"{path} has no usable row, of {len(parsed):,}{first}")
    return result


def _lines(path: Path) -> list[tuple[int, Any]]:
    """Numbers of lines that are not empty, each with its object, or with what is wrong."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return [(number, _parsed(line)) for number, line in enumerate(lines, 1) if line.strip(b" \t\r\xef\xbb\xbf")]


def _parsed(line: bytes) -> Any:
    """The object of a line, or a string that says why there is none."""
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once)
    except UnicodeDecodeError:
        return "not UTF-8"
    except _Twice as error:
        return f"given twice: {error}"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"not an object: {type(row).__name__}"


class _Twice(ValueError):
    """A name of which an object has several entries."""


def _once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; JSON's parser would keep the last of several entries of one name."""
    names = Counter(name for name, _ in entries)
    if len(names) < len(entries):
        raise _Twice(names.most_common(1)[0][0])
    return dict(entries)


def _fault(
    row: dict[str, Any], needed: Sequence[str], numbers: Sequence[str], first: dict[str, Any] | None
) -> str | None:
    missing = [name for name in (*needed, *numbers) if row.get(name) is None]
    if missing:
        return f"missing column: {', '.join(missing)}"
    texts = [name for name in needed if name != "label"]
    for name in texts:
        fault = _text_fault(row[name], may_be_empty=name == "prompt")
        if fault is not None:
            return fault.format(name)
    forms = {isinstance(row[name], str) for name in texts}
    if first is not None:
        forms.add(isinstance(first["prompt"], str))
    if len(forms) > 1:
        return "wrong type: text and messages in one data set"
    if "label" in needed and not (isinstance(row["label"], bool) or row["label"] in (0, 1)):
        return f"wrong type: label must be true or false, got {row['label']!r}"
    for name in numbers:
        value = row[name]
        if not _is_finite(value):
            return f"wrong type: {name} must be a finite number, got {value!r}"
    if "chosen" in needed and row["chosen"] == row["rejected"]:
        return "chosen = rejected"
    return None


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _text_fault(value: Any, may_be_empty: bool) -> str | None:
    """What is wrong with text or messages, about a column of which the name is to be filled in."""
    if isinstance(value, str):
        parts = [value]
    elif isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        parts = [message.get("content") for message in value]
        if not all(isinstance(part, str) for part in (*parts, *(message.get("role") for message in value))):
            return "wrong type: {} has a message without role and content as text"
        if any(message.keys() - {"role", "content"} for message in value):
            return "wrong type: {} has a message with more than role and content"
    else:
        return f"wrong type: {{}} must be text or a list of messages, got {type(value).__name__}"
    try:
        for part in parts:
            part.encode("utf-8")
    except UnicodeEncodeError:
        return "wrong type: {} has a half of a surrogate pair, which is no text"
    if not may_be_empty and not "".join(parts).strip():
        return "empty completion: {}"
    return None
