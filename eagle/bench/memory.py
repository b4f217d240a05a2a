"""How much memory tensors hold now: what must not grow from one generation to the next."""

from __future__ import annotations

import gc

import torch


def held_bytes(device: torch.device) -> int:
    """Bytes that torch has given out on a CUDA device, or that live CPU tensors hold, shared memory once.

    Cycles that only the garbage collector frees are freed first.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    storages = {}
    for thing in gc.get_objects():
        # By type(): isinstance would ask lazy modules for their __class__, and some warn.
        if issubclass(type(thing), torch.Tensor) and thing.device == device and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
