"""What the tree's launchers check of their small tensors, and the device-side checks of EAGLE_DEBUG=1."""

from __future__ import annotations

import torch

from eagle.model.triton_kernels.cache_checks import debugging
from eagle.model.triton_kernels.rows import check_like


def check_dense(x: torch.Tensor, name: str, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless x is a contiguous tensor of that shape and dtype on the device of ``like``."""
    check_like(x, name, like, shape, dtype)
    if not x.is_contiguous():
        raise ValueError(f"{name} {tuple(x.shape)} has strides {x.stride()}; expected contiguous")


def check_range(x: torch.Tensor, name: str, low: int, high: int, counts: torch.Tensor | None = None) -> None:
    """With EAGLE_DEBUG=1, raise ValueError unless every value of x lies in [low, high).

    counts: [B], where only the first counts[b] entries of row b of x [B, P] are defined.
    """
    if not debugging():
        return
    if counts is not None:
        x = x[torch.arange(x.shape[1], device=x.device) < counts[:, None]]
    if x.numel() and not bool(((x >= low) & (x < high)).all()):
        found = f"{int(x.min())} to {int(x.max())}"
        raise ValueError(f"{name} {tuple(x.shape)} holds {found}; expected values from {low} to {high - 1}")
