"""Launch configurations of the attention kernels, chosen from sizes, dtype and device alone.

What must not vary for decoding to be bit for bit the same with and without a tree: ``block_n``, ``unit``, ``path_m``,
``path_warps`` and ``merge_splits`` depend on the model (dtype, head sizes, group) and the device, never on the number
of rows, the batch or the cache bound. ``prefix_m`` may follow the number of rows only where a row's arithmetic does not
depend on the tile's height. That is so for Hopper's wgmma, where Triton stacks all warps along M: each row lies inside
one warp and is reduced in one order. Elsewhere (mma.sync, float32 on the ordinary units) the compiler spreads the warps
of a 64-row tile along N and those of a taller one along M, so the height is fixed at ``path_m``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

LARGE_SHARED_MEMORY = ((8, 0), (9, 0), (10, 0), (10, 3))
"""Capabilities with at least 160 KiB of shared memory a program; the others have about 99 KiB."""

HOPPER = 9
"""Major capability of the GPUs with wgmma."""

MERGE_ELEMENTS = 8192
"""Partial outputs merged at once: 64 float32 registers a thread with 4 warps."""


@dataclass(frozen=True)
class DecodeConfig:
    """Tiles of the two decoding kernels. Sizes are powers of two; ``unit`` is a multiple of ``block_n``."""

    prefix_m: int  # rows × group heads a program of the prefix kernel holds
    prefix_warps: int
    path_m: int  # group heads a program of the path kernel holds
    path_warps: int
    block_n: int  # cache positions a step
    unit: int  # length of the first splits in positions, see `count_splits`
    stages: int
    merge_splits: int  # splits merged at once


@dataclass(frozen=True)
class PrefillConfig:
    """Tiles of the prefill kernel."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def count_splits(slots: int, unit: int) -> int:
    """How many splits cover ``slots`` positions.

    Split boundaries are fixed positions, whatever the length: 4 splits of ``unit`` positions, 6 of 2 units, 12 of 4
    units, then 16 units each (with a unit of 128: to 512, 2048, 8192 and beyond). Short prefixes so get enough
    programs, and long ones do not drown in partial results, each of which is as large as the output in float32.
    """
    units = triton.cdiv(slots, unit)
    near, middle, far = min(units, 4), min(max(units - 4, 0), 12), min(max(units - 16, 0), 48)
    return near + triton.cdiv(middle, 2) + triton.cdiv(far, 4) + triton.cdiv(max(units - 64, 0), 16)


def decode_config(
    rows: int, group: int, size: int, v_size: int, dtype: torch.dtype, capability: tuple[int, int] | None
) -> DecodeConfig:
    """rows: tree rows × ``group``, the query heads of a kv head; capability: the device's, None in the interpreter."""
    wide = max(16, triton.next_power_of_2(max(size, v_size)))

    def merged(path_m: int) -> int:
        heads = min(triton.next_power_of_2(group), path_m)
        return min(16, max(1, MERGE_ELEMENTS // (heads * wide)))

    if capability is None:
        return DecodeConfig(16, 4, 16, 4, block_n=16, unit=32, stages=1, merge_splits=min(4, merged(16)))
    if dtype == torch.float32:  # ieee dots keep whole operand rows in registers, hence the small tiles
        return DecodeConfig(16, 4, 16, 4, block_n=32, unit=128, stages=2, merge_splits=merged(16))
    # Taller tiles read the cache fewer times; [256, 64] and [128, 128] float32 accumulators take 64 registers a thread.
    roomy = capability in LARGE_SHARED_MEMORY
    if capability[0] == HOPPER and rows > 128 and wide <= 64:
        prefix_m, warps = 256, 8
    elif capability[0] == HOPPER and rows > 64:
        prefix_m, warps = 128, 8
    else:
        prefix_m, warps = 64, 4
    block_n = 64 if wide <= 128 else 32  # with [64, 256] accumulators, longer blocks spill
    stages = 3 if roomy and wide <= 128 else 2
    return DecodeConfig(prefix_m, warps, 64, 4, block_n=block_n, unit=128, stages=stages, merge_splits=merged(64))


def prefill_config(size: int, v_size: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> PrefillConfig:
    """Arguments as for `decode_config`."""
    wide = max(16, triton.next_power_of_2(max(size, v_size)))
    if capability is None:
        return PrefillConfig(16, 16, warps=4, stages=1)
    if dtype == torch.float32:
        return PrefillConfig(32, 32, warps=4, stages=2)
    roomy = capability in LARGE_SHARED_MEMORY
    if wide <= 128:
        return PrefillConfig(128, 64, warps=8, stages=3 if roomy else 2)
    return PrefillConfig(64, 64, warps=4, stages=2) if roomy else PrefillConfig(64, 32, warps=4, stages=2)
