"""What bounds attention of 8B's tree over a long prefix on Hopper: the bare loop over the cache, taken apart.

    python docs/benchmarks/h100/attention_limits.py

240 rows a KV head (60 nodes of 4 heads), 8 KV heads of 128, bfloat16. Each line is one kernel that goes over all keys and
values and does less or more with them; no edge, no mask, no merge of splits, no second launch, which attention has too.
As in the package's kernel there are 8 splits and 2 tiles of 128 rows a head, so that each key is asked for twice (the second
time it comes from the L2 cache); q is loaded and a state of 4 MB written. Rates count the 240 rows, not the 256 computed.
The pipelined ones are written in Gluon: a warp that asks for tiles and two groups of four that take 64 rows each. Needs
triton 3.6's Gluon (`triton.experimental`, which changes between releases), and nothing of the package.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

HEADS, ROWS, SIZE, TILE, SPLITS = 8, 256, 128, 128, 8
PREFIXES = (8192, 32768)
NODES_ROWS = 240
LOADS, PRODUCTS, IN_TURN, PIPELINED = range(4)


@triton.jit
def plain_loop(
    q,  # [HEADS, ROWS, SIZE]
    k_copier,  # descriptors of [HEADS * positions, SIZE]
    v_copier,
    out,  # [SPLITS, HEADS, ROWS, SIZE]
    positions,
    scale,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    N: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The loop of the package's prefix kernel."""
    program = tl.program_id(0)
    tile = program % (ROWS // TILE)
    head = program // (ROWS // TILE) % HEADS
    split = program // (ROWS // TILE) // HEADS
    m = tile * TILE + tl.arange(0, TILE)
    d = tl.arange(0, SIZE)
    q_tile = tl.load(q + (head * ROWS + m)[:, None] * SIZE + d[None, :])
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, SIZE], tl.float32)
    for at in range(split * N, positions, SPLITS * N):
        k_tile = k_copier.load([head * positions + at, 0])
        v_tile = v_copier.load([head * positions + at, 0])
        scores = tl.dot(q_tile, tl.trans(k_tile))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * fade[:, None])
        top = new_top
    acc = acc / total[:, None]
    at = ((split * HEADS + head) * ROWS + m)[:, None] * SIZE + d[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty))


@gluon.jit
def step(stage, phase, STAGES: gl.constexpr):
    wrap = stage + 1 == STAGES
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def produce(copiers, rings, ready, free, first_line, begin, positions, STEP: gl.constexpr, STAGES: gl.constexpr):
    stage = 0
    phase = 1
    for at in range(begin, positions, STEP):
        for i in gl.static_range(2):
            mbarrier.wait(free[i].index(stage), phase)
            mbarrier.expect(ready[i].index(stage), copiers[i].block_type.nbytes)
            tma.async_copy_global_to_shared(
                copiers[i], [first_line + at, 0], ready[i].index(stage), rings[i].index(stage)
            )
        stage, phase = step(stage, phase, STAGES)


@gluon.jit
def soften(scores, top, total, scale):
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    factor = gl.zeros_like(scores) + scale
    weights = gl.exp2(gl.fma(scores, factor, gl.zeros_like(scores) - new_top[:, None]))
    fade = gl.exp2(top - new_top)
    return weights, new_top, gl.fma(total, fade, gl.sum(weights, 1)), fade


@gluon.jit
def consume(
    part: gl.constexpr,
    shared,
    HEADS: gl.constexpr,
    ROWS: gl.constexpr,
    N: gl.constexpr,
    SIZE: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    MODE: gl.constexpr,
):
    q, out, q_shared, rings, ready, free, head, split, first_row, positions, scale = shared
    k_ring, v_ring = rings
    k_ready, v_ready = ready
    k_free, v_free = free
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, of_out, 2)
    score_rows: gl.constexpr = gl.SliceLayout(1, of_scores)
    out_rows: gl.constexpr = gl.SliceLayout(1, of_out)
    memory: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    m = first_row + part * 64 + gl.arange(0, 64, gl.SliceLayout(1, memory))
    d = gl.arange(0, SIZE, gl.SliceLayout(0, memory))
    q_tile = q_shared.index(part)
    q_tile.store(gl.load(q + (head * ROWS + m)[:, None] * SIZE + d[None, :]))
    fence_async_shared()
    dtype: gl.constexpr = q.dtype.element_ty
    top = gl.full([64], float("-inf"), gl.float32, score_rows)
    total = gl.zeros([64], gl.float32, score_rows)
    acc = gl.zeros([64, SIZE], gl.float32, of_out)
    none = gl.zeros([64, N], gl.float32, of_scores)
    stage = 0
    phase = 0
    begin = split * N
    if MODE == 3:
        mbarrier.wait(k_ready.index(0), 0)
        scores = warpgroup_mma(q_tile, k_ring.index(0).permute((1, 0)), none, use_acc=False)
        mbarrier.arrive(k_free.index(0))
        weights, top, total, fade = soften(scores, top, total, scale)
        p = gl.convert_layout(weights.to(dtype), left)
        for _ in range(begin + STEP, positions, STEP):
            after, after_phase = step(stage, phase, STAGES)
            mbarrier.wait(k_ready.index(after), after_phase)
            next_scores = warpgroup_mma(q_tile, k_ring.index(after).permute((1, 0)), none, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(stage), phase)
            next_acc = warpgroup_mma(p, v_ring.index(stage), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[next_scores])
            mbarrier.arrive(k_free.index(after))
            weights, top, total, fade = soften(scores, top, total, scale)
            next_p = gl.convert_layout(weights.to(dtype), left)
            acc, p = warpgroup_mma_wait(0, deps=[next_acc, p])
            mbarrier.arrive(v_free.index(stage))
            p = next_p
            acc = acc * gl.convert_layout(fade, out_rows)[:, None]
            stage = after
            phase = after_phase
        mbarrier.wait(v_ready.index(stage), phase)
        acc = warpgroup_mma(p, v_ring.index(stage), acc)
        mbarrier.arrive(v_free.index(stage))
    else:
        for _ in range(begin, positions, STEP):
            mbarrier.wait(k_ready.index(stage), phase)
            if MODE > 0:
                scores = warpgroup_mma(q_tile, k_ring.index(stage).permute((1, 0)), none, use_acc=False)
            mbarrier.arrive(k_free.index(stage))
            if MODE == 2:
                scores, top, total, fade = soften(scores, top, total, scale)
                acc = acc * gl.convert_layout(fade, out_rows)[:, None]
            mbarrier.wait(v_ready.index(stage), phase)
            if MODE > 0:
                acc = warpgroup_mma(gl.convert_layout(scores.to(dtype), left), v_ring.index(stage), acc)
            mbarrier.arrive(v_free.index(stage))
            stage, phase = step(stage, phase, STAGES)
    acc = acc * gl.convert_layout(1.0 / gl.where(total > 0, total, 1.0), out_rows)[:, None]
    at = ((split * HEADS + head) * ROWS + m)[:, None] * SIZE + d[None, :]
    gl.store(out + at, gl.convert_layout(acc.to(dtype), memory))


@gluon.jit
def specialised_loop(
    q,
    k_copier,
    v_copier,
    out,
    positions,
    scale,
    HEADS: gl.constexpr,
    SPLITS: gl.constexpr,
    ROWS: gl.constexpr,
    TILE: gl.constexpr,
    N: gl.constexpr,
    SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    MODE: gl.constexpr,
):
    """Shapes as for `plain_loop`. A producer warp and two consumers; MODE: how much the consumers do."""
    dtype: gl.constexpr = q.dtype.element_ty
    program = gl.program_id(0)
    tile = program % (ROWS // TILE)
    head = program // (ROWS // TILE) % HEADS
    split = program // (ROWS // TILE) // HEADS
    q_shared = gl.allocate_shared_memory(dtype, [2, 64, SIZE], gl.NVMMASharedLayout.get_default_for([64, SIZE], dtype))
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, N, SIZE], k_copier.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, N, SIZE], v_copier.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    rings, ready, free = (k_ring, v_ring), (k_ready, v_ready), (k_free, v_free)
    shared = (q, out, q_shared, rings, ready, free, head, split, tile * TILE, positions, scale)
    produced = ((k_copier, v_copier), rings, ready, free, head * positions, split * N, positions, SPLITS * N, STAGES)
    gl.warp_specialize(
        [
            (consume, (0, shared, HEADS, ROWS, N, SIZE, SPLITS * N, STAGES, MODE)),
            (consume, (1, shared, HEADS, ROWS, N, SIZE, SPLITS * N, STAGES, MODE)),
            (produce, produced),
        ],
        [4, 1],
        [232, 40],
    )


@dataclass(frozen=True)
class Variant:
    """One kernel: ``mode`` None is Triton's own pipelining."""

    name: str
    mode: int | None
    block: int
    stages: int


VARIANTS = (
    Variant("load every key and value, nothing else", LOADS, 64, 5),
    Variant("… and both products, no softmax", PRODUCTS, 64, 5),
    Variant("attention's loop in Triton, as shipped", None, 64, 4),
    Variant("warp-specialised, products and softmax in turn", IN_TURN, 64, 5),
    Variant("… the next scores computed during the softmax", PIPELINED, 64, 5),
    Variant("… in blocks of 128", PIPELINED, 128, 2),
)


def launch(variant: Variant, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    """Run a variant. q: [HEADS, ROWS, SIZE]; k, v: [HEADS, positions, SIZE]; out: [SPLITS, HEADS, ROWS, SIZE]."""
    lines, block = [x.view(-1, SIZE) for x in (k, v)], [variant.block, SIZE]
    grid, positions, scale = (ROWS // TILE * HEADS * SPLITS,), k.shape[1], SIZE**-0.5 * 1.4426950408889634
    sizes = (HEADS, SPLITS, ROWS, TILE, variant.block, SIZE)
    if variant.mode is None:
        copiers = [TensorDescriptor(x, list(x.shape), list(x.stride()), block) for x in lines]
        plain_loop[grid](
            q, *copiers, out, positions, scale, *sizes, num_warps=8, num_stages=variant.stages, maxnreg=168
        )
        return
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    copiers = [GluonDescriptor(x, list(x.shape), list(x.stride()), block, layout) for x in lines]
    specialised_loop[grid](
        q, *copiers, out, positions, scale, *sizes, variant.stages, variant.mode, num_warps=4, maxnreg=168
    )


def inputs(positions: int) -> tuple[torch.Tensor, ...]:
    q, k, v = (torch.randn(HEADS, n, SIZE, dtype=torch.bfloat16, device="cuda") for n in (ROWS, positions, positions))
    return q, k, v, torch.full((SPLITS, HEADS, ROWS, SIZE), float("nan"), dtype=torch.bfloat16, device="cuda")


def error(variant: Variant) -> float:
    """Relative error of the first split's state against float64."""
    q, k, v, out = inputs(4096)
    launch(variant, q, k, v, out)
    own = (torch.arange(k.shape[1], device="cuda") // variant.block) % SPLITS == 0
    scores = q.double() @ k[:, own].double().transpose(1, 2) * SIZE**-0.5
    expected = torch.softmax(scores, -1) @ v[:, own].double()
    return ((out[0].double() - expected).norm() / expected.norm()).item()


def microseconds(calls: list[Callable[[], None]]) -> float:
    """Median of a call under graph replay; the calls go round over inputs that exceed the cache."""
    calls[0]()
    torch.cuda.synchronize()
    graph, several = torch.cuda.CUDAGraph(), calls * -(-24 // len(calls))
    with torch.cuda.graph(graph):
        for call in several:
            call()
    times = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(several))
    return statistics.median(times[5:])


def main() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("attention_limits.py needs a Hopper GPU (compute capability 9), for its warpgroup products")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; microseconds")
    print(f"{'':50s}" + "".join(f"{n:>9,}" for n in PREFIXES) + "  TFLOP/s  error")
    sets = {n: [inputs(n) for _ in range(max(2, 300_000_000 // (4 * n * HEADS * SIZE)))] for n in PREFIXES}
    for variant in VARIANTS:
        times = [microseconds([partial(launch, variant, *one) for one in sets[n]]) for n in PREFIXES]
        rate = 4 * NODES_ROWS * HEADS * PREFIXES[-1] * SIZE / times[-1] * 1e-6
        work = f"{rate:9.0f}" if variant.mode != LOADS else " " * 9
        checked = f"{error(variant):8.0e}" if variant.mode in (None, IN_TURN, PIPELINED) else ""
        print(f"{variant.name:50s}" + "".join(f"{t:9.1f}" for t in times) + work + checked, flush=True)


if __name__ == "__main__":
    main()
