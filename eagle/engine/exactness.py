"""Where ``exact="auto"`` is exact: wherever that takes at most a tenth of a step.

Exactness costs something in two places. A library's products keep each row's bits only in passes padded to whole tiles of
rows, and a large target's products of many rows are the library's faster than the kernels'. Both prices depend on rows,
width and dtype, and the rules are what was measured: on an H100 and an H200 (``docs/benchmarks``), here on the H200 where
nothing else is said.
"""

from __future__ import annotations

import torch

from eagle.engine.state import ROW_TILE

NARROW = 1024
"""Hidden size up to which a target counts as small: its passes are bound by launches. SmolLM2-135M has 576, the shapes of
3B and 8B have 3,072 and 4,096."""

ADDED_ROWS, SHARED_ROWS = 48, 128
"""Rows a pass may be given in addition; or up to three for each it has, if they are then so many together. In % of a step
in bfloat16 by the modules of SmolLM2-135M, 3B and 8B: 4 for a tree of 60 nodes 0, 0, 2; 64 for sixteen of SmolLM2-135M's 3;
48 for one of 16 nodes 6, 4, 6; 96 for two 6, 10, 10; 192 for four 8, 25, 29; 59 for a chain of 4 9, 12, 12; 63 for plain
decoding 18, 17, 17."""

NARROW_ADDED_ROWS, NARROW_SHARED_ROWS = 60, 256
"""The same for small targets in 16 bits. SmolLM2-135M, beside the above: 118 for two chains 10.2, 236 for four 12, 384 for
eight trees of 16 nodes 13."""

FLOAT32_ADDED_ROWS = 48
"""In float32 none for each of its own. 48 for a tree of 16 nodes gain SmolLM2-135M 35 and 3B 4, 59 for a chain cost 29 and
51, 192 for four trees of 16 nodes SmolLM2-135M 26."""

KERNEL_ROWS = 256
"""A larger target's products in 16 bits may have so many rows by the kernels. Steps of trees of 60 nodes by them and by the
library, in ms: four of 8B 11.29 and 10.94 (H100), 9.50 and 9.29 (H200), eight 17.90 and 15.58, 16.10 and 14.19;
SmolLM2-135M in bfloat16 1.35 and 1.58, 1.57 and 1.76 (H100), in float32 3.21 and 4.30, 5.27 and 6.91 (H200), eight of 3B
in float32 55.25 and 85.02."""


def pads(nodes: int, batch: int, width: int, dtype: torch.dtype) -> bool:
    """Whether a pass of ``batch`` trees of ``nodes`` nodes is padded to whole tiles, for a target of hidden size ``width``
    whose products a library computes in ``dtype``."""
    rows, added = batch * nodes, batch * (-nodes % ROW_TILE)
    if 10 * added <= rows:  # at most a tenth even where time grows with rows
        return True
    if dtype == torch.float32:
        return added <= FLOAT32_ADDED_ROWS
    alone, together = (NARROW_ADDED_ROWS, NARROW_SHARED_ROWS) if width <= NARROW else (ADDED_ROWS, SHARED_ROWS)
    return added <= alone or (added <= 3 * rows and rows + added <= together)


def keeps_kernels(nodes: int, batch: int, width: int, dtype: torch.dtype) -> bool:
    """Whether the kernels compute a fused target's products in a pass of ``batch`` trees of ``nodes`` nodes, though a
    library may be faster."""
    return batch * nodes <= KERNEL_ROWS or width <= NARROW or dtype == torch.float32
