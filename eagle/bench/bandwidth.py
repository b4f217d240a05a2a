"""The measured ceilings of a CUDA device: how fast a Triton kernel can read memory, how fast the BLAS library multiplies.

What the rest of a report is compared with, measured in the same run under the same clocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from eagle.bench.timing import time_graph

READ_BYTES = 2 << 30
BLOCK = 8192
"""32-bit words a program reads: 32 a thread with 8 warps, eight 16-byte loads in flight."""

MATMUL_SIZE = {torch.bfloat16: 8192, torch.float16: 8192, torch.float32: 4096}


@triton.jit
def _read_kernel(
    x,  # [N] int32
    out,  # [N / BLOCK] int32
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    values = tl.load(x + program * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(out + program, tl.sum(values, 0))


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of one device."""

    read_gb_s: float
    tflop_s: dict[str, float]
    """By dtype name."""

    def floor(self, traffic: int, flops: int, dtype: str) -> float:
        """Microseconds below which nothing can be: the bytes at the bandwidth or the products at the peak."""
        return max(traffic / self.read_gb_s * 1e-3, flops / self.tflop_s[dtype] * 1e-6)


def measure_ceilings(device: torch.device, dtypes: set[torch.dtype]) -> Ceilings:
    """Read bandwidth over `READ_BYTES` and square products of ``dtypes``.

    float32's is the library's IEEE product or a third of its TF32 product, whichever is faster: three make one of float32's
    precision, which is how the kernels multiply (`eagle.model.triton_kernels.precision`).
    """
    matmul = {str(dtype).removeprefix("torch."): _matmul_tflop_s(dtype, device) for dtype in dtypes}
    if torch.float32 in dtypes:
        with _tf32():
            matmul["float32"] = max(matmul["float32"], _matmul_tflop_s(torch.float32, device) / 3)
    return Ceilings(_read_gb_s(device), matmul)


def read_sum(x: torch.Tensor, out: torch.Tensor) -> None:
    """Sum each BLOCK of x [N] int32 into out [N / BLOCK]; N is a multiple of BLOCK."""
    _read_kernel[(x.numel() // BLOCK,)](x, out, BLOCK=BLOCK, num_warps=8)


@contextmanager
def _tf32() -> Iterator[None]:
    """The library's float32 products in TF32, while the block runs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _read_gb_s(device: torch.device) -> float:
    x = torch.zeros(READ_BYTES // 4, dtype=torch.int32, device=device)
    out = torch.empty(x.numel() // BLOCK, dtype=torch.int32, device=device)
    return READ_BYTES / time_graph([lambda: read_sum(x, out)]).median * 1e-3


def _matmul_tflop_s(dtype: torch.dtype, device: torch.device) -> float:
    size = MATMUL_SIZE[dtype]
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / time_graph([lambda: torch.mm(left, right, out=out)]).median * 1e-6
