"""The registered operators: there after one import, and taken by `torch.compile` whole."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

import eagle.model.triton_kernels.operators  # noqa: F401 - registers them
from eagle.model import kv_cache, layers

DEVICE = "cuda" if CUDA else "cpu"

FRESH = """
import torch
import eagle.model.triton_kernels as kernels
names = set(kernels._KERNELS) - {"pack_gate_up", "quantize_weight"}
print(sum(hasattr(torch.ops.eagle, name) for name in names))
import eagle.model.triton_kernels.operators
print(sorted(name for name in names if not hasattr(torch.ops.eagle, name)))
"""


def test_one_import_registers_all_of_them() -> None:
    """In a process of its own: here other tests have imported kernels."""
    ran = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=120)
    assert ran.stdout.split("\n")[:2] == ["0", "[]"], ran.stderr


@pytest.fixture
def compiled():
    """`torch.compile` into one graph, without a compiler behind it."""
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def test_compile_takes_one_that_reads(compiled) -> None:
    def doubled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.eagle.rms_norm(x, weight, 1e-5) * 2

    x, weight = torch.randn(5, 37, device=DEVICE), torch.rand(37, device=DEVICE) + 0.5
    wanted = 2 * layers.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(compiled(doubled)(x, weight), wanted)


def test_compile_takes_one_that_writes(compiled) -> None:
    def appended(cache: torch.Tensor, new: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        torch.ops.eagle.kv_append(cache, new, start)
        return cache.sum(dim=2)

    cache, new = torch.randn(2, 3, 11, 6, device=DEVICE), torch.randn(2, 3, 4, 6, device=DEVICE)
    start, wanted = torch.tensor([2, 7], device=DEVICE), cache.clone()
    kv_cache.kv_append(wanted, new, start)
    torch.testing.assert_close(compiled(appended)(cache, new, start), wanted.sum(dim=2))
    assert torch.equal(cache, wanted)
