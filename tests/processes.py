"""Several processes of one machine, by gloo."""

import os

import torch
import torch.distributed as dist


def run_processes(work, size, folder, *arguments) -> None:
    """work(rank, size, *arguments) in each of `size` processes of one group; the error of one is raised here."""
    torch.multiprocessing.spawn(_process, (work, size, str(folder), arguments), nprocs=size)


def _process(rank, work, size, folder, arguments) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.set_num_threads(1)
    work(rank, size, *arguments)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch's threads may abort while an interpreter ends, which is not what this is about
