"""Which launch configurations of the small-M linear are worth timing: tiles first, then the neighbours of the best.

A tile comes with as many stages as let all programs run at once, so that tiles are compared at their likely best.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from eagle.model.triton_kernels.linear_config import (
    BLOCK_M,
    LATENCY_BYTES,
    PREFETCH_LINES,
    DeviceTraits,
    LinearConfig,
    fits,
    rule,
    stages,
)

MAX_TILE = 32768
"""Weight values a stage; beyond it two stages do not fit beside x."""

SMALL_SPLITS = (1, 2, 3, 4, 6, 9, 12)
SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 12)


def tiles(n: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: DeviceTraits) -> list[LinearConfig]:
    """The rule's choice, then every tile and split of K that fills the device, through the copy engine or not."""
    found = [rule(n, k, dtype, weight_dtype, device)]
    small = n * k * weight_dtype.itemsize < LATENCY_BYTES
    one_byte, wide = weight_dtype.itemsize == 1, dtype == torch.float32
    hopper = device.capability >= (9, 0)
    copies = (False, True) if found[0].tma else (False,)
    for block_n in (16, 32, 64, 128) if wide else (16, 32, 64, 128, 256):
        for block_k in (32, 64) if wide else (128, 256) if one_byte else (64, 128, 256):
            columns, steps = -(-n // block_n), -(-k // block_k)
            if block_n * block_k > MAX_TILE or (block_n == 16 and not small) or columns > 16 * device.sms:
                continue
            swap = (one_byte or wide) and block_n >= BLOCK_M
            num_warps = 8 if block_n == 256 or (swap and block_n == 128) else 4
            for split_k in SMALL_SPLITS if small else SPLITS:
                programs = columns * split_k
                enough = 4 * programs >= (1 if small or split_k == 1 else 3) * device.sms
                if not enough or (split_k > 1 and (programs > 2.05 * device.sms or split_k > steps)):
                    continue
                for tma in copies:
                    config = LinearConfig(
                        block_n,
                        block_k,
                        split_k,
                        num_warps,
                        swap=swap,
                        tma=tma,
                        prefetch=PREFETCH_LINES if hopper else 0,
                    )
                    depth = stages(config, n, k, dtype, weight_dtype, device)
                    config = replace(config, num_stages=depth)
                    if fits(config, dtype, weight_dtype, device) and config not in found:
                        found.append(config)
    return found


def neighbours(
    config: LinearConfig, dtype: torch.dtype, weight_dtype: torch.dtype, device: DeviceTraits
) -> list[LinearConfig]:
    """The configuration with one choice changed: depth, warps, operand order, who copies, how much is asked for ahead."""
    changes: list[dict[str, int | bool]] = [{"num_stages": config.num_stages + step} for step in (-1, 1)]
    changes += [{"num_warps": warps} for warps in (2, 4, 8) if warps > 2 or config.block_n <= 64]
    if config.block_n >= BLOCK_M:
        changes += [{"swap": not config.swap, "num_warps": warps} for warps in (4, 8)]
    if device.capability >= (9, 0):
        changes += [{"prefetch": lines} for lines in (0, 2, 8, 16)]
    found = [replace(config, **change) for change in changes]
    return [
        other
        for other in found
        if other != config and other.num_stages >= 2 and fits(other, dtype, weight_dtype, device)
    ]
