"""Runs of `alignloss train` that are killed, each in a process forked from this one, where everything is imported.

    python killed_runs.py MODEL DATA HELD_OUT FOLDER KIND NUMBER... -- OPTION...

KIND "opens" kills a run at its NUMBER-th opening, renaming or deleting of a file, "times" after NUMBER milliseconds of
training. Each run is killed in FOLDER/KIND-NUMBER, started again, killed after half of that, and then left to end.
OPTIONs are those of each run. Prints a line of JSON for each number: how often it was killed, and what the folder held
at the end.
"""

import hashlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch

import alignloss.trl  # noqa: F401
from alignloss.commands.__main__ import main
from alignloss.commands.training import progress, run  # noqa: F401

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
FIXED = ["--cpu", "--steps", "7", "--save-every", "2", "--learning-rate", "1e-3", "--batch-size", "4"]
FIXED += ["disable_dropout=false", "save_total_limit=1"]


def digest(folder: Path) -> dict[str, object]:
    """What a run leaves, but for times and memory."""
    entries = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        entries.append({name: value for name, value in entry.items() if name not in progress.TIMES})
    weights = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("**/*.safetensors"))
        if "references" not in path.parts
    }
    checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
    return {"entries": entries, "weights": weights, "checkpoints": checkpoints}


def start(arguments: list[str], kind: str, number: float | None) -> int:
    """The wait status of a run that is killed at a point, or that ends."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    sys.argv = ["alignloss", *arguments]
    out = arguments[arguments.index("--out") + 1]
    left = number

    def watch(event: str, values: tuple[object, ...]) -> None:
        nonlocal left
        if (
            event in EVENTS
            and isinstance(values[0], (str, bytes, os.PathLike))
            and os.fsdecode(values[0]).startswith(out)
        ):
            assert left is not None
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if kind == "opens" and number is not None:
        sys.addaudithook(watch)
    if kind == "times" and number is not None:
        threading.Timer(number / 1000, os.kill, (os.getpid(), signal.SIGKILL)).start()
    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, data, held_out, where, kind, *rest = sys.argv[1:]
    numbers, options = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    for number in map(int, numbers):
        folder = Path(where) / f"{kind}-{number}"
        files = ["--model", model, "--data", data, "--eval-data", held_out, "--out", str(folder)]
        arguments = ["train", *files, *FIXED, *options]
        killed, point = 0, number
        while os.WIFSIGNALED(status := start(arguments, kind, point or None)):
            killed, point = killed + 1, point // 2
        result = digest(folder) if status == 0 else {}
        print(json.dumps({"number": number, "killed": killed, "status": status, **result}), flush=True)
