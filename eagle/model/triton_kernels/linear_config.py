"""The small-M linear's launch configurations: which one serves a size, and which are worth timing.

A configuration fixes the tile and the split of K, and so the order of every sum. It is chosen by the weight's shape,
the dtypes and the device, never by the number of rows: that is what makes a row's result independent of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from eagle.errors import InvalidInputError
from eagle.model.triton_kernels.tuned_table import VARIABLE, tuned_linears

BLOCK_M = 64
"""Rows a tile up to as many: what one Hopper wgmma takes, and as many as a draft tree of 60 nodes needs (fewer:
`linear.FEW_ROWS`, more: `tall`)."""

LATENCY_BYTES = 8 << 20
"""Below this a weight streams in under 3 µs: a second launch for split K (1.2 µs and a reduction) costs more."""


MAX_STAGES = 8
MAX_RESIDENT = 4
"""Programs a multiprocessor is given room for at once; more would leave each too few stages."""

MAX_RULE_SPLIT = 8
"""Parts of K that the rule cuts a float32 product into at most."""

FROM_SHARED_MEMORY = (9, 10)
"""Major capabilities whose tensor cores read the right side of a dot from shared memory."""

SPARE_BYTES = 3072
"""Of shared memory beside the pipeline's buffers: barriers, and what a resident program reserves."""

PREFETCH_LINES = 4
"""Of 128 bytes: what the copies of the first stages read."""

SHORTER_TILE = 128
"""Rows of the shorter tall tiles: a taller one must not compute more rows that are not there."""

TALL_TILES = (
    (0.5, 256, 128, 64, 8, 4),
    (0.5, 128, 128, 64, 4, 5),
    (0.5, 128, 64, 128, 4, 4),
    (0.5, 128, 32, 128, 4, 4),
)
TALL_TILES_ONE_BYTE = (
    (1.3, 256, 64, 64, 4, 3),
    (1.3, 128, 128, 64, 4, 4),
    (1.0, 128, 64, 128, 4, 3),
    (0.5, 128, 64, 128, 4, 4),
)
"""For the rows of several trees: programs a multiprocessor from which on a tile pays, and its block_m, block_n, block_k,
num_warps and num_stages, in order of preference. The fastest at nearly all sizes of four models and 120, 240 and 480 rows
(H100, bfloat16). Llama-3.1-8B's products in microseconds at 240: cuBLAS 24, 18, 101, 59 (qkv, o, gate and up, down),
these 28, 22, 105, 74 with what is fused, tiles of 64 rows 42, 46, 153, 152."""


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
    converted without a way back through shared memory. ``tma`` loads x and the weight by Hopper's copy engine
    (capability 9.0 and up; both 16-byte aligned, their row strides multiples of 16 bytes). ``prefetch``: how many lines
    of 128 bytes of each of a tile's rows of the weight to ask for before x is there (9.0 and up). ``block_m``: rows of x
    a tile; no sum's order depends on it.
    """

    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    swap: bool = False
    tma: bool = False
    prefetch: int = 0
    block_m: int = BLOCK_M

    def shared_memory(self, x_size: int, weight_size: int) -> int:
        """Bytes of the pipeline's buffers for element sizes in bytes, as Triton lays them out (in float32 some releases
        spare a stage).

        A weight that is converted leaves its buffer a step earlier, and goes back to shared memory unless it is on the
        left of the dot.
        """
        converted = weight_size < x_size
        weights = (self.num_stages - converted) * weight_size + (converted and not self.swap) * x_size
        return self.block_k * (self.num_stages * self.block_m * x_size + self.block_n * weights)

    def part_of_k(self, k: int) -> int:
        """Columns of x that one of the ``split_k`` programs sums."""
        steps = -(-k // self.block_k)
        return -(-steps // self.split_k) * self.block_k

    def split_parts(self) -> int:
        """Bytes of the right side of a float32 dot in two parts (`precision`), where they come from shared memory."""
        return 2 * 4 * self.block_k * (self.block_m if self.swap else self.block_n)


INTERPRETER = DeviceTraits("cpu", (0, 0), 1, 1 << 18)


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
def choose(
    n: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: DeviceTraits, *, norm_after: bool = False
) -> LinearConfig:
    """The configuration for x [M, K] of ``dtype`` and a weight [N, K] of ``weight_dtype``, for every M.

    norm_after: for `linear_add_rms_norm`, whose second launch is there anyway, so that splitting K costs less.
    """
    table = tuned_linears(device.name)
    # float16 moves and multiplies as bfloat16 does
    alike = tuple(torch.bfloat16 if kind == torch.float16 else kind for kind in (dtype, weight_dtype))
    for key in ((dtype, weight_dtype, norm_after), (*alike, norm_after), (dtype, weight_dtype, False), (*alike, False)):
        if (fields := table.get((n, k, *key))) is not None:
            config = LinearConfig(**fields)
            if not fits(config, dtype, weight_dtype, device):
                raise InvalidInputError(
                    f"the tuned configuration for {n}x{k}, {config}, does not fit on {device.name}; unset "
                    f"{VARIABLE}, or run `eagle bench tune` again"
                )
            return config
    return rule(n, k, dtype, weight_dtype, device)


def tall(
    config: LinearConfig,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    device: DeviceTraits,
) -> LinearConfig:
    """``config``, or for more than `BLOCK_M` rows one in whose taller tiles the same sums read the weight less often.

    The tensor core adds over K in steps of its own, so that only the split of K sets a sum's order. ``config`` stays for
    float32, where the copy engine can't read, and up to 128 rows where no tall tile has programs enough.
    """
    one_byte = weight_dtype.itemsize == 1
    if m <= BLOCK_M or device.capability[0] != 9 or dtype == torch.float32 or config.swap != one_byte:
        return config
    found = config
    for least, block_m, block_n, block_k, warps, depth in TALL_TILES_ONE_BYTE if one_byte else TALL_TILES:
        tile = LinearConfig(
            block_n, block_k, config.split_k, warps, depth, one_byte, True, config.prefetch, block_m=block_m
        )
        same_parts = config.split_k == 1 or tile.part_of_k(k) == config.part_of_k(k)
        idle = -(-m // block_m) * block_m > -(-m // SHORTER_TILE) * SHORTER_TILE
        if idle or not same_parts or not fits(tile, dtype, weight_dtype, device):
            continue
        if -(-m // block_m) * -(-n // block_n) * config.split_k >= least * device.sms:
            return tile
        found = tile
    return found if m > SHORTER_TILE else config


def rule(n: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: DeviceTraits) -> LinearConfig:
    """For sizes nobody has timed, what most of the timed ones came to."""
    tile = _rule32(n, k, device) if dtype == torch.float32 else _rule16(n, k, weight_dtype, device)
    hopper = device.capability >= (9, 0)
    config = replace(
        tile,
        tma=hopper and k * weight_dtype.itemsize % 16 == 0 and k * dtype.itemsize % 16 == 0,
        prefetch=PREFETCH_LINES if hopper else 0,
    )
    return replace(config, num_stages=stages(config, n, k, dtype, weight_dtype, device))


def _rule16(n: int, k: int, weight_dtype: torch.dtype, device: DeviceTraits) -> LinearConfig:
    """Tiles of N that give three fifths of the multiprocessors one (more and smaller ones leave some with two: 10240×8192
    in 160 tiles took 89 µs of 132 multiprocessors, the library 61), K whole, and as deep a pipeline as leaves every
    program room at once. One-byte weights, which must be widened, want tiles for the tensor core's left side (64 and more).
    """
    one_byte, small = weight_dtype.itemsize == 1, n * k * weight_dtype.itemsize < LATENCY_BYTES
    block_n = 128
    # halving the tile doubles the reads of x (from L2); splitting K instead adds a second launch
    while block_n > (16 if small else 64 if one_byte else 32) and 5 * -(-n // block_n) < 3 * device.sms:
        block_n //= 2
    # 10240×8192 in 80 tiles, each split in two: 45 µs; in 160 tiles: 59
    split_k = 2 if one_byte and not small and 3 * -(-n // block_n) < 2 * device.sms else 1
    block_k = 256 if block_n in (16, 64) else 128
    return LinearConfig(block_n, block_k, split_k, swap=one_byte and block_n >= BLOCK_M)


def _rule32(n: int, k: int, device: DeviceTraits) -> LinearConfig:
    """Large tiles, and K split until there is a program for each multiprocessor, or two: whichever leaves fewer idle.

    A dot is three (`precision`), so each value read must serve many rows: 6144×4096 took 49 µs in tiles of 128 and five
    parts, 64 in tiles of 64 and three. With two programs to a multiprocessor, longer steps leave too few stages: 10240×8192
    143 and 236. With more than two, tiles of 128 do: 128256×4096 892 in tiles of 64, 1,065.
    """
    block_n = 32 if n * k * 4 < LATENCY_BYTES else 128 if n <= 2 * 128 * device.sms else 64
    columns = -(-n // block_n)
    one, two = (max(1, min(many * device.sms // columns, MAX_RULE_SPLIT, k // (2 * 64))) for many in (1, 2))
    split_k = two if two > 2 * one else one
    block_k = 64 if columns * split_k <= device.sms or block_n == 32 else 32
    return LinearConfig(block_n, block_k, split_k, num_warps=8 if block_n == 128 else 4, swap=block_n >= BLOCK_M)


def stages(
    config: LinearConfig, n: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: DeviceTraits
) -> int:
    """As deep a pipeline as a program has steps for, and as leaves every program room at once."""
    programs, steps = -(-n // config.block_n) * config.split_k, -(-k // (config.block_k * config.split_k))
    resident = min(MAX_RESIDENT, -(-programs // device.sms))
    room, depth = device.shared_memory // resident - SPARE_BYTES, max(2, min(MAX_STAGES, steps + 1))
    kinds = (dtype, weight_dtype)

    def roomy(config: LinearConfig) -> bool:
        # the parts of float32 don't count here: 49152×576 took 54 µs in three stages and fewer programs at once
        return config.shared_memory(*(kind.itemsize for kind in kinds)) <= room and fits(config, *kinds, device)

    while depth > 2 and not roomy(replace(config, num_stages=depth)):
        depth -= 1
    return depth


def fits(config: LinearConfig, dtype: torch.dtype, weight_dtype: torch.dtype, device: DeviceTraits) -> bool:
    """Whether a program's buffers and sums have room on the device."""
    needed = config.shared_memory(dtype.itemsize, weight_dtype.itemsize) + SPARE_BYTES
    if dtype == torch.float32 and (weight_dtype != dtype or device.capability[0] in FROM_SHARED_MEMORY):
        needed += config.split_parts()
    return needed <= device.shared_memory and config.block_n * config.block_m <= 128 * config.num_warps * 32
