"""The small-M linear's launch configurations: which one serves a size, and which are worth timing.

A configuration fixes the tile and the split of K, and so the order of every sum. It is chosen by the weight's shape,
the dtypes and the device, never by the number of rows: that is what makes a row's result independent of the others.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import torch

from eagle.model.triton_kernels.tuned_table import tuned_linears

BLOCK_M = 64
"""Rows a tile, always: what one Hopper wgmma takes, and as many as a draft tree of 60 nodes needs."""

LATENCY_BYTES = 8 << 20
"""Below this a weight streams in under 3 µs: a second launch for split K (1.2 µs and a reduction) costs more."""


@dataclass(frozen=True)
class DeviceTraits:
    """What the choice depends on."""

    name: str
    capability: tuple[int, int]
    sms: int
    shared_memory: int
    """Bytes a program may have."""


@dataclass(frozen=True)
class LinearConfig:
    """One launch: a tile of ``block_n`` outputs, K in steps of ``block_k``, K cut into ``split_k`` programs.

    ``swap`` puts the weight on the left of the dot, where Hopper's wgmma reads registers: one-byte weights are then
    converted without a way back through shared memory. ``tma`` loads the weight by Hopper's copy engine (capability
    9.0 and up; the weight 16-byte aligned, its row stride a multiple of 16 bytes).
    """

    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    swap: bool = False
    tma: bool = False

    def shared_memory(self, x_size: int, weight_size: int) -> int:
        """Bytes of the pipeline's buffers for element sizes in bytes."""
        return self.num_stages * self.block_k * (self.block_n * weight_size + BLOCK_M * x_size)


INTERPRETER = DeviceTraits("cpu", (0, 0), 1, 1 << 18)

TUNED: dict[tuple[str, int, int, torch.dtype, torch.dtype], LinearConfig] = {}
"""Choices by (device name, N, K, dtype of x, dtype of the weight) that go before the measured tables of `tuned_table`."""


@cache
def device_traits(device: torch.device) -> DeviceTraits:
    """The traits of a CUDA device, or of the interpreter for a CPU."""
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    return DeviceTraits(
        found.name, (found.major, found.minor), found.multi_processor_count, found.shared_memory_per_block_optin
    )


@cache
def choose(n: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: DeviceTraits) -> LinearConfig:
    """The configuration for x [M, K] of ``dtype`` and a weight [N, K] of ``weight_dtype``, for every M."""
    tuned = TUNED.get((device.name, n, k, dtype, weight_dtype))
    if tuned is None and (fields := tuned_linears(device.name).get((n, k, dtype, weight_dtype))) is not None:
        tuned = LinearConfig(**fields)
    return tuned if tuned is not None else _rule(n, k, dtype, weight_dtype, device)


def candidates(
    n: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: DeviceTraits
) -> list[LinearConfig]:
    """Configurations worth timing for a size: those that fit the device and fill at least half of it; the rule's first."""
    one_byte, wide = weight_dtype.itemsize == 1, dtype == torch.float32
    copy_engine = device.capability >= (9, 0) and not wide and k * weight_dtype.itemsize % 16 == 0
    found = [_rule(n, k, dtype, weight_dtype, device)]
    blocks_n = (16, 32, 64) if wide else (16, 32, 64, 128, 256)
    blocks_k = (32,) if wide else (128, 256) if one_byte else (64, 128)
    for block_n, block_k, split_k in itertools.product(blocks_n, blocks_k, (1, 2, 3, 4, 6, 8)):
        programs = -(-n // block_n) * split_k
        too_few = 2 * programs < device.sms and block_n > 16
        if too_few or (split_k > 1 and (programs > 2 * device.sms or split_k * block_k > k)):
            continue
        swaps = (False, True) if one_byte and block_n >= 64 else (False,)
        warps = (4, 8) if block_n >= 128 else (4,)
        tmas = (False, True) if copy_engine else (False,)
        for swap, num_warps, num_stages, tma in itertools.product(swaps, warps, (3, 4, 6), tmas):
            config = LinearConfig(block_n, block_k, split_k, num_warps, num_stages, swap, tma)
            if _fits(config, dtype, weight_dtype, device) and config not in found:
                found.append(config)
    return found


def _rule(n: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: DeviceTraits) -> LinearConfig:
    """For sizes nobody has timed: enough programs to fill the device, as few re-reads of x as that allows."""
    if dtype == torch.float32:
        block_n, block_k = 64, 32
    else:
        # a row's piece of a tile is one 128-byte line of memory
        block_n, block_k = 128, 128 // weight_dtype.itemsize
    split_k = 1
    if n * k * weight_dtype.itemsize < LATENCY_BYTES:
        while block_n > 16 and 3 * -(-n // block_n) < 2 * device.sms:
            block_n //= 2
    else:
        # halving the tile doubles the reads of x (from L2); splitting K adds partial sums instead, which are fewer
        tiles, steps = -(-n // block_n), -(-k // block_k)
        while 10 * tiles * split_k < 9 * device.sms and split_k < 8 and steps >= 8 * split_k:
            split_k *= 2
    swap = weight_dtype.itemsize == 1 and block_n >= 64
    num_warps = 8 if dtype == torch.float32 or swap else 4
    alone = -(-n // block_n) * split_k <= device.sms
    num_stages = 6 if alone else 4  # with one program on each SM, its own loads must cover the memory's latency
    config = LinearConfig(block_n, block_k, split_k, num_warps, num_stages, swap)
    while config.num_stages > 2 and not _fits(config, dtype, weight_dtype, device):
        config = LinearConfig(block_n, block_k, split_k, num_warps, config.num_stages - 1, swap)
    return config


def _fits(config: LinearConfig, dtype: torch.dtype, weight_dtype: torch.dtype, device: DeviceTraits) -> bool:
    # one more copy of the converted operand may be held beside the pipeline, and barriers: 2 KiB
    needed = config.shared_memory(dtype.itemsize, weight_dtype.itemsize) + 2048
    return needed <= device.shared_memory and config.block_n * BLOCK_M <= 128 * config.num_warps * 32
