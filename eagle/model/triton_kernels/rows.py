"""What the row-wise launchers share: how a tensor is seen as rows, and which tensors they refuse."""

from __future__ import annotations

import torch
import triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

INTERPRETED = triton.knobs.runtime.interpret
"""Whether the kernels of this process run in Triton's interpreter, which takes CPU tensors."""


def as_rows(x: torch.Tensor, name: str) -> torch.Tensor:
    """x as [M, K] with K contiguous. A view; a copy only where the leading dimensions do not lie at one stride."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} is {tuple(x.shape)}; expected [..., K] with K > 0")
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise ValueError(f"{name} {tuple(x.shape)} has strides {x.stride()}; expected a contiguous last dimension")
    return x.reshape(-1, x.shape[-1])


def check_float(x: torch.Tensor, name: str) -> None:
    """Raise ValueError unless a kernel can read x: a float16, bfloat16 or float32 tensor on the kernels' device."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} {tuple(x.shape)} is {x.dtype}; expected float16, bfloat16 or float32")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"{name} {tuple(x.shape)} is on {x.device}; expected a CUDA tensor, or TRITON_INTERPRET=1")


def check_like(x: torch.Tensor, name: str, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless x has that shape and dtype, and the device of ``like``."""
    if tuple(x.shape) != shape or x.dtype != dtype or x.device != like.device:
        found = f"{tuple(x.shape)} {x.dtype} on {x.device}"
        raise ValueError(f"{name} is {found}; expected {shape} {dtype} on {like.device}")


def check_vector(x: torch.Tensor, name: str, like: torch.Tensor, size: int, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless x is a contiguous [size] of that dtype (None: any float) on the device of ``like``."""
    check_like(x, name, like, (size,), x.dtype if dtype is None else dtype)
    if dtype is None:
        check_float(x, name)
    if x.stride(0) != 1 and size != 1:
        raise ValueError(f"{name} {tuple(x.shape)} has strides {x.stride()}; expected contiguous")
