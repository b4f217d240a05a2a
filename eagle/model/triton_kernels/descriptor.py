"""Descriptors for Hopper's copy engine (TMA): matrices from which kernels take whole blocks by one instruction."""

from __future__ import annotations

import threading

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16
"""Bytes: of a matrix's start and of the distance of its rows."""

_threads = threading.local()


def aligned(x: torch.Tensor, line: int) -> bool:
    """Whether rows of x that lie ``line`` elements apart can be copied."""
    return (x.data_ptr() | line * x.element_size()) % ALIGNMENT == 0


def rows_descriptor(x: torch.Tensor, rows: int, line: int, block: tuple[int, int]) -> TensorDescriptor:
    """The ``rows`` rows of x's last dimension, ``line`` elements apart, in blocks of [rows, columns]."""
    _enter_context(x.device)
    return TensorDescriptor(x, [rows, x.shape[-1]], [line, 1], list(block))


def _enter_context(device: torch.device) -> None:
    """Descriptors are encoded by the driver, which needs a context that a new thread has only after a runtime call."""
    if device.type == "cuda" and not getattr(_threads, "entered", False):
        torch.cuda.mem_get_info(device)
        _threads.entered = True
