"""Checkpoints that are whole or not there, whatever stops the process that writes them.

Transformers writes a checkpoint file by file into its folder. A list of its files with their sizes is added last, under
its name in one step; a folder without that list, or with another size, is not taken for a checkpoint. Older ones are
deleted after that.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, one_line

WHOLE = "whole.json"


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """To the disk, so that not even a loss of power undoes it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_disk(folder: Path) -> list[Path]:
    """The files of a folder, with what was written into them on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    return files


def seal(folder: Path, state: dict[str, Any]) -> None:
    """Declare the files of a folder complete, with a state to go on from."""
    files = [path for path in to_disk(folder) if path.name != WHOLE]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    write_whole(folder / WHOLE, json.dumps({"files": sizes, "state": state}))


def state_of(folder: Path) -> dict[str, Any] | None:
    """The state of a folder that is complete, None for one that is not."""
    try:
        sealed = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
        if all((folder / name).stat().st_size == size for name, size in sealed["files"].items()):
            return dict(sealed["state"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def whole(out: Path) -> list[Path]:
    """The complete checkpoints of a run, the newest first."""
    return [folder for folder in _checkpoints(out) if state_of(folder) is not None]


def remove_unfinished(out: Path, warn: Callable[[str], None]) -> None:
    """Remove what interrupted saves of a run have left; for a folder with a run.json."""
    for folder in _checkpoints(out):
        if state_of(folder) is None:
            warn(f"{folder.name} is not complete, left from an interrupted save; removed")
            shutil.rmtree(folder)


def _checkpoints(out: Path) -> list[Path]:
    numbers = {folder: folder.name.removeprefix("checkpoint-") for folder in out.glob("checkpoint-*")}
    return sorted((f for f, n in numbers.items() if n.isdigit()), key=lambda f: int(numbers[f]), reverse=True)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """One process at a time in a folder; the lock goes with the process, however it ends."""
    with open(out / "lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which workers that load data do not inherit
        except OSError as error:
            raise UserError(f"another process is at work in {out}; wait for it, or give another --out") from error
        yield


def way_on(out: Path) -> str:
    """What is left of a run that could not write."""
    remove_unfinished(out, lambda _: None)  # which makes room
    kept = next(iter(whole(out)), None)
    there = (
        f"{kept.name} is complete, and the same command goes on from there" if kept else "There is no checkpoint yet"
    )
    return f"{there}; {out} has to be there and have room"


def lacks_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """Files that cannot be written or read, and a lack of memory, as what the user can mend."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        named = getattr(error, "filename", None) or out
        said = getattr(error, "strerror", None) or one_line(error)
        left = way_on(out) if (out / "run.json").exists() else "nothing was trained"
        raise UserError(f"{named}: {said}. {left}") from error
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        ways = "a smaller --batch-size or --max-length, --lora, --qlora and --share-prompts need less"
        raise UserError(f"there is not enough memory: {ways}; `alignloss fit` estimates how much") from error


def diverged(what: str, value: str = "") -> UserError:
    """Of a run that is not worth going on with."""
    return UserError(
        f"{what} is not a finite number{value}; nothing is saved since the last checkpoint. A smaller --learning-rate, "
        "another --dtype or the data may be the way out"
    )


# a trainer of TRL stands behind it
_Base: Any = object


class WholeCheckpoints(_Base):
    """Beside a trainer: its checkpoints are sealed, older ones deleted after that, and a failed save is explained."""

    args: Any
    state: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        from safetensors import SafetensorError
        from transformers.trainer_utils import rotate_checkpoints

        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise diverged(f"after step {self.state.global_step} the weight {name}")
        limit, out = self.args.save_total_limit, Path(self.args.output_dir)
        folder = out / f"checkpoint-{self.state.global_step}"
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial)
            seal(folder, self.progress_state())
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder.name} could not be saved: {one_line(error)}. {way_on(out)}") from error
        finally:
            self.args.save_total_limit = limit
        rotate_checkpoints(output_dir=str(out), save_total_limit=limit, use_mtime=False)

    def progress_state(self) -> dict[str, Any]:
        """What transformers does not keep."""
        shift = getattr(self, "shift", None)
        state = {"tokens": self._total_train_tokens, "ended": self.state.global_step >= self.state.max_steps}
        return state if shift is None else state | {"shift": shift.totals.tolist()}

    def take_progress(self, state: dict[str, Any]) -> None:
        self._total_train_tokens = state["tokens"]
        if "shift" in state:
            self.shift.totals = torch.tensor(state["shift"], dtype=torch.float64)
