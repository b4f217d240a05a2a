"""The three ops on the KV cache in Triton: append, retrieve, compact. The PyTorch ops' twins.

Contract: signatures and meaning of `eagle.model.kv_cache`. All strides are free but the last, which is 1. Lengths and
indices are read on the device; grids follow from shapes alone, so every launch may be captured. Rows are copied, so a
row's bits never depend on the others. A slot outside the cache is neither read (retrieve gives zeros) nor written;
EAGLE_DEBUG=1 turns it into a ValueError.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eagle.model.triton_kernels.cache_checks import (
    check_device,
    check_floats,
    check_integers,
    check_values,
    debugging,
    require,
)
from eagle.model.triton_kernels.overlap import await_earlier, overlaps

COPY_ELEMENTS = 2048
"""Elements a program copies: 16 a thread with 4 warps, two 16-byte accesses in half precision."""

MAX_PATH = 64
"""Longest path one program of the compaction holds in registers."""


@triton.jit(do_not_specialize=["rows", "slots"])
def _append_kernel(
    cache,  # [B, H, S, D]
    new,  # [B, H, T, D]
    start,  # [B] int64
    rows,
    slots,
    c_b,
    c_h,
    c_s,
    n_b,
    n_h,
    n_t,
    SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    slot = tl.load(start + b) + row
    mask = ((row < rows) & (slot >= 0) & (slot < slots))[:, None] & (d < SIZE)[None, :]
    values = tl.load(new + b * n_b + head * n_h + row[:, None] * n_t + d[None, :], mask=mask, other=0.0)
    tl.store(cache + b * c_b + head * c_h + slot[:, None] * c_s + d[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["count", "slots"])
def _retrieve_kernel(
    cache,  # [B, H, S, D]
    indices,  # [B, N] int64
    out,  # [B, H, N, D] contiguous
    count,
    slots,
    heads,
    c_b,
    c_h,
    c_s,
    SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    slot = tl.load(indices + b * count + row, mask=row < count, other=-1)
    found = ((slot >= 0) & (slot < slots))[:, None] & (d < SIZE)[None, :]
    values = tl.load(cache + b * c_b + head * c_h + slot[:, None] * c_s + d[None, :], mask=found, other=0.0)
    at = out + ((b * heads + head) * count + row)[:, None] * SIZE + d[None, :]
    tl.store(at, values, mask=(row < count)[:, None] & (d < SIZE)[None, :])


@triton.jit
def _move(base, stride, slots, source, target, moved, column, SIZE: tl.constexpr):
    """Move rows ``source`` of one cache [S, D] to rows ``target``: everything is read before anything is written."""
    reads = (moved & (source >= 0) & (source < slots) & (target < slots))[:, None] & (column < SIZE)[None, :]
    values = tl.load(base + source[:, None] * stride + column[None, :], mask=reads, other=0.0)
    tl.debug_barrier()  # all warps have loaded before the first one stores
    tl.store(base + target[:, None] * stride + column[None, :], values, mask=reads)


@triton.jit(do_not_specialize=["path", "slots"])
def _compact_kernel(
    k,  # [L, B, H, S, D]
    v,  # [L, B, H, S, Dv]
    nodes,  # [B, P] int64
    kv_len,  # [B] int64
    count,  # [B] int64
    path,
    slots,
    heads,
    k_l,
    k_b,
    k_h,
    k_s,
    v_l,
    v_b,
    v_h,
    v_s,
    SIZE: tl.constexpr,
    V_SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    layer, b = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(2).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    step = tl.arange(0, BLOCK_P).to(tl.int64)
    length = tl.load(kv_len + b)
    moved = step < tl.minimum(tl.load(count + b), path)
    node = tl.load(nodes + b * path + step, mask=moved, other=0)
    moved = moved & (node != step)  # the root and an unbroken first chain are in place already
    source, target = length + node, length + step
    _move(k + layer * k_l + b * k_b + head * k_h, k_s, slots, source, target, moved, column, SIZE)
    _move(v + layer * v_l + b * v_b + head * v_h, v_s, slots, source, target, moved, column, V_SIZE)


def kv_append(cache: torch.Tensor, new: torch.Tensor, start: torch.Tensor) -> None:
    """Write rows ``new`` [B, H, T, D] into ``cache`` [B, H, S, D] at slots start … start + T - 1, in place.

    start: [B] int64. Values are cast to the cache's dtype. Raises ValueError for what does not fit.
    """
    given = {"cache": cache, "new": new, "start": start}
    require(cache.dim() == 4 and new.dim() == 4, "cache must be [B, H, S, D] and new [B, H, T, D]", **given)
    batch, heads, rows, size = new.shape
    slots = cache.shape[2]
    agree = cache.shape == (batch, heads, slots, size) and start.shape == (batch,)
    require(agree, "cache [B, H, S, D], new [B, H, T, D] and start [B] must agree in B, H and D", **given)
    check_floats(cache=cache, new=new)
    check_integers(start=start)
    check_device(**given)
    if debugging():
        fine = (start >= 0) & (start + rows <= slots)
        check_values(fine, f"start + {rows} rows must lie in the cache's {slots} slots", start=start)
    if new.numel() == 0:
        return
    block_t, block_d = _blocks(rows, size)
    pdl = overlaps(cache)
    with torch.cuda.device_of(cache):
        _append_kernel[(triton.cdiv(rows, block_t), heads, batch)](
            cache,
            new,
            start,
            rows,
            slots,
            *cache.stride()[:3],
            *new.stride()[:3],
            SIZE=size,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            PDL=pdl,
            launch_pdl=pdl,
        )


def kv_retrieve(cache: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows ``indices`` [B, N] int64 of ``cache`` [B, H, S, D], as [B, H, N, D]."""
    given = {"cache": cache, "indices": indices}
    require(cache.dim() == 4 and indices.dim() == 2, "cache must be [B, H, S, D] and indices [B, N]", **given)
    require(indices.shape[0] == cache.shape[0], "cache and indices must agree in B", **given)
    check_floats(cache=cache)
    check_integers(indices=indices)
    check_device(**given)
    (batch, heads, slots, size), count = cache.shape, indices.shape[1]
    if debugging():
        fine = (indices >= 0) & (indices < slots)
        check_values(fine, f"indices must lie in the cache's {slots} slots", indices=indices)
    out = cache.new_empty(batch, heads, count, size)
    if out.numel() == 0:
        return out
    block_t, block_d = _blocks(count, size)
    pdl = overlaps(cache)
    with torch.cuda.device_of(cache):
        _retrieve_kernel[(triton.cdiv(count, block_t), heads, batch)](
            cache,
            indices,
            out,
            count,
            slots,
            heads,
            *cache.stride()[:3],
            SIZE=size,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            PDL=pdl,
            launch_pdl=pdl,
        )
    return out


def kv_compact(
    k: torch.Tensor, v: torch.Tensor, nodes: torch.Tensor, kv_len: torch.Tensor, count: torch.Tensor
) -> None:
    """Move the accepted nodes' rows down to follow the committed prefix, in all layers, in place, in one launch.

    k: [L, B, H, S, D]; v: [L, B, H, S, Dv]; nodes: [B, P ≤ MAX_PATH]; kv_len, count: [B], all int64. Afterwards path
    row i lies in slot ``kv_len + i`` for i < count; no other slot is written. Entries of ``nodes`` from ``count`` on
    are not read. Source and target rows may overlap.
    """
    given = {"k": k, "v": v, "nodes": nodes, "kv_len": kv_len, "count": count}
    require(k.dim() == v.dim() == 5 and nodes.dim() == 2, "k, v must be [L, B, H, S, D] and nodes [B, P]", **given)
    (layers, batch, heads, slots, size), path = k.shape, nodes.shape[1]
    agree = v.shape[:4] == k.shape[:4] and nodes.shape[0] == batch and kv_len.shape == count.shape == (batch,)
    require(agree, "k and v must agree in L, B, H, S, and nodes, kv_len, count in B", **given)
    require(0 < path <= MAX_PATH, f"a path must have 1 to {MAX_PATH} rows", **given)
    check_floats(k=k, v=v)
    check_integers(nodes=nodes, kv_len=kv_len, count=count)
    check_device(**given)
    if debugging():
        accepted = torch.arange(path, device=nodes.device) < count[:, None]
        last = kv_len + nodes.masked_fill(~accepted, 0).amax(1)
        fine = (kv_len >= 0) & (count >= 0) & (count <= path) & (last < slots) & ((nodes >= 0) | ~accepted).all(1)
        check_values(fine, f"accepted nodes must lie in the cache's {slots} slots", last=last, count=count)
    block_p = triton.next_power_of_2(path)
    wide = triton.next_power_of_2(max(size, v.shape[4]))
    block_c = min(wide, max(16, COPY_ELEMENTS // block_p))
    pdl = overlaps(k)
    with torch.cuda.device_of(k):
        _compact_kernel[(triton.cdiv(wide, block_c), layers * heads, batch)](
            k,
            v,
            nodes,
            kv_len,
            count,
            path,
            slots,
            heads,
            *k.stride()[:4],
            *v.stride()[:4],
            SIZE=size,
            V_SIZE=v.shape[4],
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            PDL=pdl,
            launch_pdl=pdl,
        )


def _blocks(rows: int, size: int) -> tuple[int, int]:
    block_d = triton.next_power_of_2(size)
    return min(triton.next_power_of_2(rows), max(1, COPY_ELEMENTS // block_d)), block_d


@torch.library.custom_op("eagle::kv_append", mutates_args=("cache",))
def _kv_append_op(cache: torch.Tensor, new: torch.Tensor, start: torch.Tensor) -> None:
    """`kv_append` for torch.compile."""
    kv_append(cache, new, start)


@torch.library.custom_op("eagle::kv_retrieve", mutates_args=())
def _kv_retrieve_op(cache: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`kv_retrieve` for torch.compile."""
    return kv_retrieve(cache, indices)


@_kv_retrieve_op.register_fake
def _(cache, indices):
    return cache.new_empty(*cache.shape[:2], indices.shape[1], cache.shape[3])


@torch.library.custom_op("eagle::kv_compact", mutates_args=("k", "v"))
def _kv_compact_op(
    k: torch.Tensor, v: torch.Tensor, nodes: torch.Tensor, kv_len: torch.Tensor, count: torch.Tensor
) -> None:
    """`kv_compact` for torch.compile."""
    kv_compact(k, v, nodes, kv_len, count)


@_kv_append_op.register_fake
def _(cache, new, start):
    return None


@_kv_compact_op.register_fake
def _(k, v, nodes, kv_len, count):
    return None
