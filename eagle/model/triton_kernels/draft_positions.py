"""Where the rows of a draft's passes lie, in one launch: first slots and RoPE positions of the extend and of all levels.

Contract. The meaning is that of `eagle.model.tree.draft_positions`. All tensors are contiguous int64; count lies from 0 to P
and to kv_len, which EAGLE_DEBUG=1 checks. One program serves one sequence. Nothing is read on the host and every size comes
from the shapes: safe under CUDA-graph capture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eagle.model.ops import DraftPositions, TreeShape
from eagle.model.triton_kernels.cache_checks import check_device, check_integers, check_values, debugging, require
from eagle.model.triton_kernels.overlap import await_earlier, overlaps


@triton.jit
def _positions_kernel(
    kv_len,  # [B] int64
    count,  # [B] int64
    start,  # [B] int64
    last,  # [B] int64
    slots,  # [depth, B] int64
    rope,  # [B, P + depth] int64
    batch,
    PATH: tl.constexpr,
    DEPTH: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    b = tl.program_id(0).to(tl.int64)
    length, new = tl.load(kv_len + b), tl.load(count + b)
    tl.store(start + b, length - new)
    tl.store(last + b, b * PATH + tl.maximum(new - 1, 0))
    i = tl.arange(0, BLOCK)
    tl.store(slots + i * batch + b, length + i * TOP_K, mask=i < DEPTH)
    position = tl.where(i < PATH, length - new + i, length + i - PATH)
    tl.store(rope + b * (PATH + DEPTH) + i, position, mask=i < PATH + DEPTH)


def draft_positions(kv_len: torch.Tensor, count: torch.Tensor, shape: TreeShape) -> DraftPositions:
    """Slots and positions of a step's draft passes over ``kv_len`` [B] committed positions, ``count`` [B] of them new.

    Both int64. Raises ValueError for a dtype, device, stride or size outside the module's contract.
    """
    given = {"kv_len": kv_len, "count": count}
    require(kv_len.dim() == 1 and kv_len.shape == count.shape, "kv_len and count must both be [B]", **given)
    check_integers(**given)
    check_device(**given)
    if debugging():
        fine = (count >= 0) & (count <= shape.path) & (count <= kv_len)
        check_values(fine, f"count must lie from 0 to the path's {shape.path} rows and to kv_len", **given)
    batch, rows = kv_len.shape[0], shape.path + shape.depth
    found = DraftPositions(
        start=kv_len.new_empty(batch),
        last=kv_len.new_empty(batch),
        slots=kv_len.new_empty(shape.depth, batch),
        rope=kv_len.new_empty(batch, rows),
    )
    if batch:
        pdl = overlaps(kv_len)
        with torch.cuda.device_of(kv_len):
            _positions_kernel[(batch,)](
                kv_len,
                count,
                *found,
                batch,
                PATH=shape.path,
                DEPTH=shape.depth,
                TOP_K=shape.top_k,
                BLOCK=triton.next_power_of_2(rows),
                num_warps=1,
                PDL=pdl,
                launch_pdl=pdl,
            )
    return found


@torch.library.custom_op("eagle::draft_positions", mutates_args=())
def draft_positions_op(
    kv_len: torch.Tensor, count: torch.Tensor, depth: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`draft_positions` as a registered operator: start, last, slots and rope."""
    return tuple(draft_positions(kv_len, count, TreeShape(1, depth, top_k)))


@draft_positions_op.register_fake
def _(
    kv_len: torch.Tensor, count: torch.Tensor, depth: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, rows = kv_len.shape[0], TreeShape(1, depth, top_k).path + depth
    empty = kv_len.new_empty
    return empty(batch), empty(batch), empty(depth, batch), empty(batch, rows)
