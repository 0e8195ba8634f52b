"""What a piece of work costs, and where that was measured."""

import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..ops import cpu_bf16


def peak_bytes(fn: Callable[[], object]) -> int:
    """Peak bytes that `fn()` holds at once beyond what is allocated when it starts, as the tensor allocator counts.

    With a CUDA device in use, that device's own counter; otherwise the running sum of the CPU allocator's events, as
    exact, which leaves out what a library takes for itself below the allocator (threads, packed GEMM operands).
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        fn()
    return most_held(prof)


def most_held(prof: Any) -> int:
    """Peak bytes of the CPU allocator, beyond those at its start, in a profile with `profile_memory` that has ended."""
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def environment(*packages: str) -> dict[str, Any]:
    """Device, threads, versions of Python, of `packages` (None if missing) and of a GPU's driver, and the commit.

    The commit is what ALIGNLOSS_COMMIT says of a copy without its history, or that of the checkout.
    """
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "device": _device_name(),
        **({"driver": _driver(), "cuda": torch.version.cuda} if on_gpu else {}),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": os.environ.get("ALIGNLOSS_COMMIT") or _commit(),
    }


def _driver() -> str | None:
    """The version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _device_name() -> str:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f"{cpu}, {torch.backends.cpu.get_cpu_capability()}" + ", AMX" * bool(cpu_bf16.capabilities().get("amx_bf16"))


def _commit() -> str | None:
    """The commit of the checkout that holds this file, marked if it has changes beside results; None outside one."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True)
        changed = [
            *git,
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            ":/",
            ":(top,exclude)benchmarks/results",
        ]
        head, changes = (
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            for command in ([*git, "rev-parse", "--short=12", "HEAD"], changed)
        )
        return head + "-dirty" * bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return None
