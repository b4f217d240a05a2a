"""What a case becomes before it runs: fresh inputs, who computes from them, and how the result is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error norm against float64 that passes, by the case's dtype."""

TORCH = "torch"
"""The rival that is the package's own PyTorch op."""


class Mismatch(ValueError):
    """An exact result is not what it must be."""


@dataclass
class Trial:
    """One set of inputs of a case."""

    run: Callable[[], Any]
    """The Triton launcher on these inputs."""
    rivals: dict[str, Callable[[], Any]]
    """The same by others: the PyTorch op first, then the library's own function where that is the peak."""
    check: Callable[[Any], float]
    """The relative error of what ``run`` gave, 0 for an exact result; raises `Mismatch`."""
    traffic: int
    """Bytes that must move: each input read once, each output written once."""
    flops: int = 0
    inputs: tuple[torch.Tensor, ...] = field(default=())
    """What the set holds, for its size."""

    @property
    def size(self) -> int:
        """Bytes of the inputs."""
        return nbytes(*self.inputs)


def nbytes(*tensors: torch.Tensor) -> int:
    """Their bytes together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out - reference‖ / ‖reference‖ in float64; infinite where a value is not finite or shapes differ."""
    if out.shape != reference.shape:
        raise Mismatch(f"the result is {tuple(out.shape)}; expected {tuple(reference.shape)}")
    wide, reference = out.double(), reference.double()
    error = (wide - reference).norm() / reference.norm().clamp(min=1e-300)
    return float("inf") if not bool(wide.isfinite().all()) else float(error)


def same(name: str, out: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise Mismatch unless two integer (or copied) tensors are equal."""
    if out.shape != expected.shape:
        raise Mismatch(f"{name} is {tuple(out.shape)}; expected {tuple(expected.shape)}")
    wrong = out != expected
    if bool(wrong.any()):
        raise Mismatch(f"{name} differs in {int(wrong.sum())} of {wrong.numel()} places")
