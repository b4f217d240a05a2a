"""How fast a device reads memory: what achieved bytes a second are compared with, on a CPU too."""

from __future__ import annotations

import importlib.util
import os
import time

import torch

SUM_BYTES = {"cpu": 512 << 20}
OTHER_BYTES = 2 << 30
REPEATS = 7


def read_gb_s(device: torch.device) -> float:
    """Measured read bandwidth in GB/s: on a CUDA device by the Triton kernel of `eagle.bench.bandwidth`, elsewhere by
    torch's sum of an array beyond the caches, the best of some repeats."""
    has_triton = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") != "1"
    if device.type == "cuda" and has_triton:
        from eagle.bench.bandwidth import measure_ceilings

        return measure_ceilings(device, set()).read_gb_s
    size = SUM_BYTES.get(device.type, OTHER_BYTES)
    values = torch.zeros(size // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        values.sum().item()  # the read waits for the device
        best = min(best, time.perf_counter() - started)
    return size / best * 1e-9
