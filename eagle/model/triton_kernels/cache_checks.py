"""What the launchers of the cache and attention kernels ask of their arguments.

Shapes, dtypes, strides and devices are always checked. Values that live on the device (lengths, indices) are read only
with EAGLE_DEBUG=1 in the environment, which costs a synchronisation and so forbids CUDA-graph capture.
"""

from __future__ import annotations

import os

import torch

from eagle.model.triton_kernels.rows import DTYPES, INTERPRETED


def debugging() -> bool:
    """Whether device-side values are to be checked."""
    return os.environ.get("EAGLE_DEBUG") == "1"


def describe(**tensors: torch.Tensor | None) -> str:
    """Names, dtypes, shapes and strides, for an error message."""
    return ", ".join(
        f"{name} {str(t.dtype).removeprefix('torch.')}{list(t.shape)} strides {list(t.stride())} on {t.device}"
        for name, t in tensors.items()
        if t is not None
    )


def require(condition: bool, what: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError saying ``what`` was expected and what was given."""
    if not condition:
        raise ValueError(f"{what}; got {describe(**tensors)}")


def check_device(**tensors: torch.Tensor | None) -> None:
    """All on one device that Triton can reach: CUDA, or the CPU in the interpreter."""
    devices = {t.device for t in tensors.values() if t is not None}
    require(len(devices) == 1, "all tensors must be on one device", **tensors)
    usable = next(iter(devices)).type == "cuda" or INTERPRETED
    require(usable, "Triton kernels need CUDA tensors (or TRITON_INTERPRET=1 before triton is imported)", **tensors)


def check_floats(**tensors: torch.Tensor) -> None:
    """float16, bfloat16 or float32, rows contiguous (last stride 1)."""
    fine = all(t.dtype in DTYPES for t in tensors.values())
    require(fine, "dtypes must be float16, bfloat16 or float32", **tensors)
    rows = all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in tensors.values())
    require(rows, "the last dimension must have stride 1 (call .contiguous())", **tensors)


def check_integers(**tensors: torch.Tensor | None) -> None:
    """int64, contiguous."""
    fine = all(t is None or (t.dtype == torch.int64 and t.is_contiguous()) for t in tensors.values())
    require(fine, "lengths, indices and mask words must be contiguous int64", **tensors)


def check_values(condition: torch.Tensor, what: str, **tensors: torch.Tensor) -> None:
    """With EAGLE_DEBUG=1: every element of ``condition`` holds. Reads the device."""
    if not bool(condition.all()):
        values = ", ".join(f"{name} {t.tolist()}" for name, t in tensors.items())
        raise ValueError(f"{what}; got {values}")
