"""Where ``exact="auto"`` is exact: where that was measured to take at most a tenth of a step.

Exactness costs something in two places. Where a library has to compute a target's products (`row_bits`), they keep each
row's bits only in passes padded to whole tiles of rows; and a large target's products of many rows are the library's
faster than the kernels'. The prices, on an H100 and an H200, lie in ``docs/benchmarks``; a test holds these rules against
the files.

Plain decoding is never padded here: one row in a tile of 64 costs 14 to 18 % of its step, in float32 84 % and more. So
EAGLE's padded passes write what plain decoding writes with ``exact=True``, whatever the tree.
"""

from __future__ import annotations

import torch

from eagle.engine.state import ROW_TILE

SMALL = 1024
"""Hidden size up to which a target's passes in 16 bits are bound by launches. SmolLM2-135M has 576; the next that were
measured, the shapes of 3B and 8B, 3,072 and 4,096."""

ADDED_ROWS = 48
"""A pass may be given so many rows: those of one tree of 16 nodes. H200: 6 % of a step by SmolLM2-135M's modules, 4 by
3B's, 6 by 8B's, in float32 −35 and −4; 59 for a chain of 4 cost 8 to 9, 12, 13, 29 and 51; 96 for two trees of 16 cost 3B
and 8B 9.8 to 10.1."""

SMALL_PADDED_ROWS = 256
"""So many rows may a small target's pass in 16 bits have after padding, if a quarter of them are its own: four trees of 16
nodes cost 8 % (H100, H200), eight 13."""

KERNEL_ROWS = 256
"""A larger target's products in 16 bits may have so many rows by the kernels. Steps of trees of 60 nodes by them and by the
library, in ms: four of 8B 11.29 and 10.94 (H100), 9.50 and 9.29 (H200), eight 17.90 and 15.58, 16.10 and 14.19;
SmolLM2-135M 1.35 and 1.58, 1.57 and 1.76 (H100), in float32 3.21 and 4.30, 5.27 and 6.91 (H200), eight of 3B in float32
55.25 and 85.02."""


def pads(nodes: int, trees: int, width: int, dtype: torch.dtype) -> bool:
    """Whether a pass of ``trees`` trees of ``nodes`` nodes is padded to whole tiles of rows, by a target of hidden size
    ``width`` whose products a library computes in ``dtype``.

    It is where few rows are added: at most a tenth of its own, or few in all; and by small targets in 16 bits where there
    are not many rows and each tree fills a quarter of its tiles.
    """
    rows, added = trees * nodes, trees * (-nodes % ROW_TILE)
    if 10 * added <= rows or added <= ADDED_ROWS:
        return True
    small = width <= SMALL and dtype != torch.float32
    return small and added <= 3 * rows and rows + added <= SMALL_PADDED_ROWS


def keeps_kernels(nodes: int, trees: int, width: int, dtype: torch.dtype) -> bool:
    """Whether the kernels, where they can, compute a target's products in a pass of ``trees`` trees of ``nodes`` nodes,
    though a library may be faster."""
    return trees * nodes <= KERNEL_ROWS or favours_kernels(width, dtype)


def favours_kernels(width: int, dtype: torch.dtype) -> bool:
    """Whether a target's steps are faster by the kernels than by a library for any number of rows."""
    return width <= SMALL or dtype == torch.float32
