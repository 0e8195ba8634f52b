"""The longest sequence and the largest vocabulary that train within a limit that the kernel holds a process to.

Each provider trains in a process of its own, whose data (RLIMIT_DATA: everything that it may write to) may grow by so
many bytes beyond what it has after one step of a tiny model: weights, gradients, AdamW's states, activations and the
loss layer.
"""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

from .cases import Case
from .measure import Row, last_line, search
from .steps import Run, Trained, build, expected_bytes, make_labels, take_step

ESTIMATED = ("alignloss", "full logits")
CLOSING = 5  # halvings of the last doubling


def measure_limit(case: Case, run: Run, vary: str, names: list[str], memory: int, most: int) -> list[Row]:
    """The largest size of each provider, with the one that `fit` expects. `vary` is "length" or "vocabulary"."""
    rows = []
    for name in names:
        command = [
            sys.executable,
            "-m",
            "benchmarks",
            "alone",
            json.dumps(["limit", case, name, run, vary, memory, most]),
        ]
        # each tensor a mapping of its own: what is freed can be had again in another size
        found = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        )
        row: Row = {"provider": name, "mode": str(run), "memory_bytes": memory}
        rows.append(row)
        if found.returncode:
            row["failed"] = last_line(found.stderr)
            continue
        row |= json.loads(found.stdout.splitlines()[-1])
        if name in ESTIMATED:
            row[f"estimated_most_{vary}"], _ = search(
                lambda size, name=name: expected(sized(case, vary, size), run, name),
                memory, start(case, vary), most, 1, CLOSING,
            )  # fmt: skip
            row["estimate_of_measured"] = row[f"estimated_most_{vary}"] / row[f"most_{vary}"]
    return rows


def start(case: Case, vary: str) -> int:
    return case.vocabulary if vary == "vocabulary" else case.tokens // case.sequences


def sized(case: Case, vary: str, size: int) -> Case:
    if vary == "vocabulary":
        return case._replace(vocabulary=size)
    return case._replace(tokens=size * case.sequences)


def expected(case: Case, run: Run, name: str) -> int:
    """Bytes that `alignloss fit` expects of a step in float32 on a CPU."""
    return expected_bytes(case, run, name, precision="fp32", accumulates=False, device="cpu")


def limit(case: Case, name: str, run: Run, vary: str, memory: int, most: int) -> Row:
    """What a fresh process finds: the largest size of one provider."""
    tiny = case._replace(tokens=16 * case.sequences, vocabulary=256)
    take_step(tiny, build(tiny, run, layers=1), make_labels(tiny), name)  # libraries and threads, outside of the count
    before = _data_bytes()
    resource.setrlimit(resource.RLIMIT_DATA, (before + memory, before + memory))
    trained: Trained | None = None if vary == "vocabulary" else build(case, run)

    def needed(size: int) -> int:
        chosen = sized(case, vary, size)
        model = trained or build(chosen, run)
        try:
            for _ in range(2):  # the second beside AdamW's states
                take_step(chosen, model, make_labels(chosen), name)
        finally:
            model.model.zero_grad(set_to_none=True)
        return 0

    largest, stopped = search(needed, memory, start(case, vary), most, 1, CLOSING)
    return {f"most_{vary}": largest, "stopped_by": stopped}


def _data_bytes() -> int:
    found = re.search(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024
