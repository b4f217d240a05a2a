"""Several processes under torchrun; with one process every function is trivial."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import distributed, nn


def start() -> None:
    """Join the process group if torchrun started this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    """Leave the process group."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _active() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    return distributed.get_rank() if _active() else 0


def world() -> int:
    return distributed.get_world_size() if _active() else 1


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def wrap(module: nn.Module) -> nn.Module:
    """The module in DistributedDataParallel where there are several processes."""
    return nn.parallel.DistributedDataParallel(module) if _active() else module


def agree(value: float) -> float:
    """The first process's value."""
    if not _active():
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=_device())
    distributed.broadcast(tensor, 0)
    return float(tensor)


def gather(value: Any) -> list[Any]:
    """Every process's value, in the order of their ranks."""
    if not _active():
        return [value]
    values: list[Any] = [None] * world()
    distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all processes."""
    if _active():
        distributed.barrier()


def _device() -> str:
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"
