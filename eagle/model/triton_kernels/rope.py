"""RoPE in Triton: with the cache append in one launch (`rope_append`, the PyTorch op's twin), or alone and in place.

Contract: pairs are (i, i + D/2) and cos, sin have both halves filled (RoFormer, eq. 34, in Llama's layout), as in
`eagle.model.layers.rope_append`. The rotation is computed in float32 and rounded once. All strides are free but the
last, which is 1; cos and sin may be expanded over the batch. Graph-safe; every row is computed by itself, so its bits
do not depend on the others. Slots outside the cache are not written; EAGLE_DEBUG=1 turns them into a ValueError.
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

BLOCK_ELEMENTS = 1024
"""Elements a program turns or copies: a few heads, so that one row of a model spreads over several programs."""


@triton.jit
def _turn(source, target, cos, sin, inside, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Rotate heads. source, target: [H] pointers to heads [D]; cos, sin: pointers to the row's [D]; inside: [H]."""
    i = tl.arange(0, BLOCK)
    known = i < HALF
    mask = inside[:, None] & known[None, :]
    low = tl.load(source[:, None] + i[None, :], mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source[:, None] + (i + HALF)[None, :], mask=mask, other=0.0).to(tl.float32)
    low_cos = tl.load(cos + i, mask=known, other=0.0).to(tl.float32)[None, :]
    low_sin = tl.load(sin + i, mask=known, other=0.0).to(tl.float32)[None, :]
    high_cos = tl.load(cos + i + HALF, mask=known, other=0.0).to(tl.float32)[None, :]
    high_sin = tl.load(sin + i + HALF, mask=known, other=0.0).to(tl.float32)[None, :]
    dtype = target.dtype.element_ty
    tl.store(target[:, None] + i[None, :], (low * low_cos - high * low_sin).to(dtype), mask=mask)
    tl.store(target[:, None] + (i + HALF)[None, :], (high * high_cos + low * high_sin).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["rows", "slots"])
def _rope_append_kernel(
    q,  # [B, T, Hq, D]
    k,  # [B, T, Hkv, D]
    v,  # [B, T, Hkv, Dv]
    cos,  # [B, T, D]
    sin,  # [B, T, D]
    k_cache,  # [B, Hkv, S, D]
    v_cache,  # [B, Hkv, S, Dv]
    start,  # [B] int64
    out,  # [B, T, Hq, D] contiguous
    rows,
    slots,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    cos_b,
    cos_t,
    sin_b,
    sin_t,
    kc_b,
    kc_h,
    kc_s,
    vc_b,
    vc_h,
    vc_s,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    V_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    HALF: tl.constexpr = SIZE // 2
    Q_BLOCKS: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    KV_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    b, t = (tl.program_id(0) // rows).to(tl.int64), (tl.program_id(0) % rows).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(start + b) + t
    writable = (slot >= 0) & (slot < slots)
    cos_row, sin_row = cos + b * cos_b + t * cos_t, sin + b * sin_b + t * sin_t
    within = tl.arange(0, BLOCK_H).to(tl.int64)
    if part < Q_BLOCKS:
        head = part * BLOCK_H + within
        target = out + ((b * rows + t) * Q_HEADS + head) * SIZE
        _turn(q + b * q_b + t * q_t + head * q_h, target, cos_row, sin_row, head < Q_HEADS, HALF, BLOCK_HALF)
    elif part < Q_BLOCKS + KV_BLOCKS:
        head = (part - Q_BLOCKS) * BLOCK_H + within
        inside = head < tl.where(writable, KV_HEADS, 0)
        target = k_cache + b * kc_b + head * kc_h + slot * kc_s
        _turn(k + b * k_b + t * k_t + head * k_h, target, cos_row, sin_row, inside, HALF, BLOCK_HALF)
    else:
        head = (part - Q_BLOCKS - KV_BLOCKS) * BLOCK_H + within
        inside = head < tl.where(writable, KV_HEADS, 0)
        d = tl.arange(0, BLOCK_DV)
        mask = inside[:, None] & (d < V_SIZE)[None, :]
        values = tl.load(v + b * v_b + t * v_t + (head * v_h)[:, None] + d[None, :], mask=mask, other=0.0)
        tl.store(v_cache + b * vc_b + slot * vc_s + (head * vc_h)[:, None] + d[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _rope_kernel(
    x,  # [B, T, H, D], changed in place
    cos,  # [B, T, D]
    sin,  # [B, T, D]
    rows,
    x_b,
    x_t,
    x_h,
    cos_b,
    cos_t,
    sin_b,
    sin_t,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    b, t = (tl.program_id(0) // rows).to(tl.int64), (tl.program_id(0) % rows).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    at = x + b * x_b + t * x_t + head * x_h
    cos_row, sin_row = cos + b * cos_b + t * cos_t, sin + b * sin_b + t * sin_t
    # A thread stores only pairs it has loaded itself, so in place is safe.
    _turn(at, at, cos_row, sin_row, head < HEADS, SIZE // 2, BLOCK_HALF)


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    start: torch.Tensor,
) -> torch.Tensor:
    """Rotate q and k, append k and v to the cache, return the rotated q, in one launch.

    q: [B, T, Hq, D]; k: [B, T, Hkv, D]; v: [B, T, Hkv, Dv]; cos, sin: [B, T, D]; k_cache: [B, Hkv, S, D]; v_cache:
    [B, Hkv, S, Dv]; start: [B] int64, the first slot to write. D is even. Values are cast to the cache's dtype.
    Returns [B, T, Hq, D] in q's dtype. Raises ValueError for what does not fit.
    """
    given = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "k_cache": k_cache, "v_cache": v_cache, "start": start}
    flat = q.dim() == k.dim() == v.dim() == k_cache.dim() == v_cache.dim() == 4
    require(flat, "q, k, v must be [B, T, H, D] and the caches [B, Hkv, S, D]", **given)
    (batch, rows, q_heads, size), kv_heads = q.shape, k.shape[2]
    slots, v_size = k_cache.shape[2], v.shape[3]
    agree = k.shape == (batch, rows, kv_heads, size) and v.shape[:3] == k.shape[:3] and start.shape == (batch,)
    require(agree, "q, k, v and start must agree in B, T, Hkv and D", **given)
    caches = k_cache.shape == (batch, kv_heads, slots, size) and v_cache.shape == (batch, kv_heads, slots, v_size)
    require(caches, "the caches must be [B, Hkv, S, D] and [B, Hkv, S, Dv] with k's and v's sizes", **given)
    _check_angles(q, cos, sin)
    check_floats(q=q, k=k, v=v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache)
    check_integers(start=start)
    check_device(**given)
    if debugging():
        fine = (start >= 0) & (start + rows <= slots)
        check_values(fine, f"start + {rows} rows must lie in the cache's {slots} slots", start=start)
    out = q.new_empty(q.shape)
    if q.numel() == 0:
        return out
    block_h = _heads_a_program(max(q_heads, kv_heads), max(size, v_size))
    parts = triton.cdiv(q_heads, block_h) + 2 * triton.cdiv(kv_heads, block_h)
    pdl = overlaps(q)
    with torch.cuda.device_of(q):
        _rope_append_kernel[(batch * rows, parts)](
            q,
            k,
            v,
            cos,
            sin,
            k_cache,
            v_cache,
            start,
            out,
            rows,
            slots,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *cos.stride()[:2],
            *sin.stride()[:2],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            Q_HEADS=q_heads,
            KV_HEADS=kv_heads,
            SIZE=size,
            V_SIZE=v_size,
            BLOCK_H=block_h,
            BLOCK_HALF=triton.next_power_of_2(size // 2),
            BLOCK_DV=triton.next_power_of_2(v_size),
            PDL=pdl,
            launch_pdl=pdl,
        )
    return out


def rope_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate x [B, T, H, D] in place by cos, sin [B, T, D]. Raises ValueError for what does not fit."""
    require(x.dim() == 4, "x must be [B, T, H, D]", x=x)
    _check_angles(x, cos, sin)
    check_floats(x=x, cos=cos, sin=sin)
    check_device(x=x, cos=cos, sin=sin)
    if x.numel() == 0:
        return
    batch, rows, heads, size = x.shape
    block_h = _heads_a_program(heads, size)
    pdl = overlaps(x)
    with torch.cuda.device_of(x):
        _rope_kernel[(batch * rows, triton.cdiv(heads, block_h))](
            x,
            cos,
            sin,
            rows,
            *x.stride()[:3],
            *cos.stride()[:2],
            *sin.stride()[:2],
            HEADS=heads,
            SIZE=size,
            BLOCK_H=block_h,
            BLOCK_HALF=triton.next_power_of_2(size // 2),
            PDL=pdl,
            launch_pdl=pdl,
        )


def _check_angles(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    batch, rows, _, size = x.shape
    fits = cos.shape == sin.shape == (batch, rows, size) and size % 2 == 0
    require(fits, "cos and sin must be [B, T, D] with x's sizes, D even", x=x, cos=cos, sin=sin)


def _heads_a_program(heads: int, size: int) -> int:
    return min(triton.next_power_of_2(heads), max(1, BLOCK_ELEMENTS // triton.next_power_of_2(size)))


@torch.library.custom_op("eagle::rope_append", mutates_args=("k_cache", "v_cache"))
def _rope_append_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    start: torch.Tensor,
) -> torch.Tensor:
    """`rope_append` for torch.compile."""
    return rope_append(q, k, v, cos, sin, k_cache, v_cache, start)


@_rope_append_op.register_fake
def _(q, k, v, cos, sin, k_cache, v_cache, start):
    return q.new_empty(q.shape)


@torch.library.custom_op("eagle::rope_", mutates_args=("x",))
def _rope_op(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """`rope_` for torch.compile."""
    rope_(x, cos, sin)


@_rope_op.register_fake
def _(x, cos, sin):
    return None
