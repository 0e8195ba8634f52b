"""Several processes of one machine, by gloo."""

import multiprocessing
import os
from datetime import timedelta

import torch
import torch.distributed as dist

_IMPORTED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "alignloss"]


def run_processes(work, size, folder, *arguments, seconds=300) -> None:
    """work(rank, size, *arguments) in each of `size` processes of one group; the error of one is raised here.

    seconds: the group's time-out. Work that returns False is not waited for by the others.
    """
    # forked from one process that has imported torch and computed nothing, as spawned ones import for seconds
    multiprocessing.set_forkserver_preload(_IMPORTED)
    given = work, size, str(folder), arguments, seconds
    torch.multiprocessing.start_processes(_process, given, nprocs=size, start_method="forkserver")


def _process(rank, work, size, folder, arguments, seconds) -> None:
    init = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # poisons torch.empty
    if work(rank, size, *arguments) is not False:
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)  # torch's threads may abort while an interpreter ends, which is not what this is about
