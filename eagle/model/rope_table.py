"""RoPE's cos and sin of every position, ready to be gathered: one look-up serves all layers of a pass."""

from __future__ import annotations

from collections.abc import Callable

import torch

LEAST_ROWS = 1024
ROWS_AT_ONCE = 8192
"""Positions computed together: bounds the float32 intermediates."""


class RopeTable:
    """cos and sin side by side, [rows, 2 D], in the activations' dtype; grown when a longer cache asks for it.

    angles: positions [1, R] int64 → cos, sin [1, R, D], the model's own function, so that every value is the model's
    own too. limit: positions from here on get the last one's angles (`Target.forward` does the same).
    """

    def __init__(
        self,
        angles: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        device: torch.device,
        limit: int | None = None,
    ) -> None:
        self._angles, self._device, self._limit = angles, device, limit
        self._tables: list[torch.Tensor] = []  # a captured graph may still read an outgrown one

    @property
    def rows(self) -> int:
        """Positions the table knows."""
        return len(self._tables[-1]) if self._tables else 0

    def reserve(self, rows: int) -> None:
        """Make positions 0 … rows - 1 known. Allocates, so a captured pass must have run once before."""
        if rows <= self.rows:
            return
        rows = max(LEAST_ROWS, 1 << (rows - 1).bit_length())
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(rows, device=self._device)
            if self._limit is not None:
                positions = positions.clamp(max=self._limit - 1)
            parts = [torch.cat(self._angles(part[None]), dim=-1)[0] for part in positions.split(ROWS_AT_ONCE)]
            self._tables.append(torch.cat(parts))

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, views [..., D] of one gather, of ``positions`` [...], which must be known."""
        both = self._tables[-1][positions]  # F.embedding takes three times as long for the few rows of a level
        half = both.shape[-1] // 2
        return both[..., :half], both[..., half:]
