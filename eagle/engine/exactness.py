"""Where ``exact="auto"`` is exact: wherever that takes at most a tenth of a step.

Exactness costs something in two places. A library's products keep each row's bits only in passes padded to whole tiles of
rows, and a large target's products of many rows are the library's faster than the kernels'. Both prices were measured on an
H100 and an H200 (``docs/benchmarks``) and depend on rows, width and dtype; these rules are what the figures say.
"""

from __future__ import annotations

import torch

from eagle.engine.state import ROW_TILE

NARROW = 1024
"""Hidden size up to which a target counts as small: its passes are bound by launches. SmolLM2-135M has 576, the shapes of
3B and 8B have 3,072 and 4,096."""

ADDED_ROWS = 48
"""Rows a pass may be given in addition. In % of a step by a target's own modules in bfloat16, SmolLM2-135M, 3B, 8B: 4 rows
for a tree of 60 nodes 0, 0, 2; 16 for four of them 1, 1, 1; 48 for one of 16 nodes 6, 4, 6. 96 for two of 16 nodes cost 3B
and 8B 10, 192 for four 25 and 30; 59 for a chain of 4 both 12; 63 for plain decoding 17 and 16. In float32 48 gain 35
for SmolLM2-135M, 59 cost 29."""

NARROW_ADDED_ROWS, NARROW_ADDED_EACH, NARROW_ADDED_MOST = 60, 3, 192
"""The same for small targets in 16 bits; or so many for each row it has, up to so many. SmolLM2-135M: 59 for a chain of 4
cost 9 %, 118 and 236 for two and four 11 and 12; 96, 192 and 384 for two, four and eight trees of 16 nodes 6, 8 and 13; 63
for plain decoding 19."""

KERNEL_ROWS = 256
"""A larger target's products in 16 bits may have so many rows by the kernels. Steps of trees of 60 nodes by them and by the
library, in ms: four of 8B 11.29 and 10.94 (H100), 9.50 and 9.29 (H200), eight 17.90 and 15.58, 16.10 and 14.19;
SmolLM2-135M in bfloat16 1.35 and 1.58, 1.57 and 1.76 (H100), in float32 3.21 and 4.30, 5.27 and 6.91 (H200)."""


def pads(nodes: int, batch: int, width: int, dtype: torch.dtype) -> bool:
    """Whether a pass of ``batch`` trees of ``nodes`` nodes is padded to whole tiles, for a target of hidden size ``width``
    whose products a library computes in ``dtype``."""
    rows, added = batch * nodes, batch * (-nodes % ROW_TILE)
    if 10 * added <= rows:  # at most a tenth even where time grows with rows
        return True
    if width > NARROW or dtype == torch.float32:
        return added <= ADDED_ROWS
    return added <= max(NARROW_ADDED_ROWS, min(NARROW_ADDED_EACH * rows, NARROW_ADDED_MOST))


def keeps_kernels(nodes: int, batch: int, width: int, dtype: torch.dtype) -> bool:
    """Whether the kernels compute a fused target's products in a pass of ``batch`` trees of ``nodes`` nodes, though a
    library may be faster."""
    return batch * nodes <= KERNEL_ROWS or width <= NARROW or dtype == torch.float32
