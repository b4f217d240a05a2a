"""Launch configurations of the attention kernels, chosen from sizes, dtype and device alone.

What must not vary for decoding to be bit for bit the same with and without a tree: ``block_n``, ``splits``, ``tail``,
``path_warps`` and ``narrow_states`` depend on the model (dtype, head sizes, heads) and the device, never on the number
of rows, the batch or the cache bound. ``prefix_m`` may follow the rows only where a row's arithmetic does not depend on
the tile's height. That is so for Hopper's wgmma, where Triton stacks all warps along M: each row lies
inside one warp and is reduced in one order. Elsewhere (mma.sync) the compiler spreads
the warps of a 64-row tile along N and those of a taller one along M, so the height is fixed.

Times in the comments: one H100, bfloat16 (but for float32's own), 60 tree nodes, microseconds for both kernels at
prefixes 512 and 8192.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

LARGE_SHARED_MEMORY = ((8, 0), (9, 0), (10, 0), (10, 3))
"""Capabilities with at least 160 KiB of shared memory a program; the others have about 99 KiB."""

HOPPER = 9
"""Major capability of the GPUs with wgmma, and the first with programmatic dependent launch."""

PATH_HEADS = 16
"""Heads of a group that a program of the path kernel takes: the tensor core's least height."""

TAIL = 16
"""A row's last keys, which it reads by itself. Paths of the usual trees (depth 5 to 10) fit: all rows share the body."""

REGISTERS = {64: 128, 128: 168}
"""By head size, what the loop over whole blocks needs on Hopper. Without the cap the compiler takes 255 for the turns
of deep paths, and the path kernel finds no room beside: 12.1 with, 15.8 without (heads of 128). It spills there only.
"""


@dataclass(frozen=True)
class DecodeConfig:
    """Tiles of the two decoding kernels. Sizes are powers of two."""

    prefix_m: int  # rows × group heads a program of the prefix kernel holds
    prefix_warps: int
    stages: int
    copier: bool  # Hopper's copy engine brings whole blocks, where the cache's strides allow; the bits are the same
    prefix_registers: int | None  # most a thread may use
    block_n: int  # cache positions a step
    splits: int  # block j is split j mod splits' work
    tail: int  # a row's last keys, left to the path kernel
    path_warps: int
    narrow_states: bool  # the splits' outputs pass through memory in the model's dtype, not in float32
    overlap: bool  # programmatic dependent launch: each kernel starts beside the one before it


@dataclass(frozen=True)
class PrefillConfig:
    """Tiles of the prefill kernel."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def decode_config(
    rows: int,
    group: int,
    kv_heads: int,
    size: int,
    v_size: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
) -> DecodeConfig:
    """rows: tree rows × ``group``, the query heads of a kv head; capability: the device's, None in the
    interpreter."""
    wide = max(16, triton.next_power_of_2(max(size, v_size)))
    half = dtype != torch.float32
    heads = min(triton.next_power_of_2(group), PATH_HEADS)
    splits = _splits(kv_heads) if capability is not None else 4

    def config(prefix_m: int, warps: int, stages: int, block_n: int, copier: bool = False) -> DecodeConfig:
        return DecodeConfig(
            prefix_m,
            warps,
            stages,
            copier,
            REGISTERS.get(wide) if hopper and half else None,
            block_n,
            splits=splits,
            tail=TAIL if capability is not None else 4,
            # The fewest that hold its tiles in registers: 11.8 with 1 warp, 12.6 with 2 (32 / 8 heads of 128).
            path_warps=min(4, max(1, heads * wide * splits // 4096, wide // 128)) if half else 4,
            # 11.3 against 11.8 and 30.1 against 31.2 with heads of 128; no gain with 9 / 3 heads of 64.
            narrow_states=half and (wide > 64 or capability is None),
            # 11.8 against 15.3 with heads of 128, 6.0 against 8.6 with heads of 64.
            overlap=capability is not None and capability[0] >= HOPPER,
        )

    hopper = capability is not None and capability[0] == HOPPER
    if capability is None:
        return config(16, 4, 1, block_n=16)
    if not half:
        if hopper and wide <= 128:
            # Heads of 128: [128] 30.0 and 213, [64] 42.1 and 331 (SDPA 73 and 879); of 64: [64] 9.1 and 58, [128] 12.6, 57.
            tall = rows > 64 and wide > 64
            return config(128 if tall else 64, 8 if tall else 4, 3, block_n=32, copier=wide == size == v_size)
        return config(16, 4, 2, block_n=32) if wide <= 64 else config(16, 8, 1, block_n=16)
    stages = 3 if capability in LARGE_SHARED_MEMORY and wide <= 128 else 2
    block_n = 64 if wide <= 128 else 32  # with [64, 256] accumulators, longer blocks spill
    if hopper and wide == size == v_size and wide in REGISTERS:
        # Heads of 128, by the copy engine: [128] 10.2 and 26.7; by pointers: [64] 10.0 and 38.4, [128] 11.3 and 29.5.
        # Warp specialisation (Gluon, a producer and two consumers of 64 rows) came to 11.4 and 28.1.
        # Heads of 64: [64] 5.6 and 12.1, by pointers 5.7 and 12.3, [128] 6.8 and 14.9.
        tall = rows > 64 and wide > 64
        return config(128 if tall else 64, 8 if tall else 4, stages + tall, block_n, copier=True)
    if hopper and rows > 64 and wide > 64:
        return config(128, 8, stages, block_n)
    return config(64, 4, stages, block_n)


def _splits(kv_heads: int) -> int:
    """Enough to fill the device with one or two tiles of rows; each adds a partial result as large as the output.

    8 kv heads of 128: 8 splits 11.3 and 30.1, 16 splits 14.0 and 37.2. 3 of 64: 8 splits 6.0 and 15.9, 16 splits 6.0
    and 13.5, 32 splits 7.0 and 13.6.
    """
    splits = 4
    while splits < 32 and 2 * splits * kv_heads <= 64:
        splits *= 2
    return splits


def prefill_config(size: int, v_size: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> PrefillConfig:
    """Arguments as for `decode_config`. Times: one H200, 512 rows after 7,168 positions (heads of 64), or 3,584."""
    wide = max(16, triton.next_power_of_2(max(size, v_size)))
    if capability is None:
        return PrefillConfig(16, 16, warps=4, stages=1)
    roomy = capability in LARGE_SHARED_MEMORY
    hopper = capability[0] == HOPPER
    if dtype == torch.float32:
        if hopper and wide <= 128:
            # 9 / 3 heads of 64: 395, in blocks of 32 keys 534, [64] 456 (SDPA 997); 32 / 8 of 128: 774, 874 (SDPA 919).
            return PrefillConfig(32, 64, warps=4, stages=3 if wide <= 64 else 2)
        deep = wide <= 128 or (roomy and capability >= (9, 0))  # with heads of 256 two stages take 168 KiB
        return PrefillConfig(32, 32, warps=4, stages=2 if deep else 1)
    if hopper and wide <= 64:  # 9 / 3 heads: 80, [128] 119 (SDPA 142); 32 / 8: 119, [128] 118 (SDPA 146)
        return PrefillConfig(64, 64, warps=4, stages=3)
    if wide <= 128:  # 32 / 8 heads of 128: 89, [64] 94 (SDPA 127)
        return PrefillConfig(128, 64, warps=8, stages=3 if roomy else 2)
    return PrefillConfig(64, 64, warps=4, stages=2) if roomy else PrefillConfig(64, 32, warps=4, stages=2)
