"""Commit a step's tokens on the device: one launch for lengths, flags and the gather of features.

Contract. The meaning is that of `eagle.model.verify.update_inputs`: cut after the first end token and at the budget,
rows that are done stay. All tensors are contiguous, ids and lengths int64, ``done`` bool, features of any float dtype.
``out`` may be ``state`` itself (or share any of its [B] tensors): each sequence's values are read before they are written.
Nothing is read on the host and every size comes from the arguments' shapes: safe under CUDA-graph capture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eagle.model.ops import Acceptance, DecodeState
from eagle.model.triton_kernels.dense import check_dense, check_range
from eagle.model.triton_kernels.overlap import await_earlier, overlaps
from eagle.model.triton_kernels.rows import check_float

MAX_PATH = 256
STATE = (
    ("kv_len", torch.int64),
    ("root", torch.int64),
    ("generated", torch.int64),
    ("budget", torch.int64),
    ("done", torch.bool),
)
"""The [B] tensors that a step reads and writes."""


@triton.jit
def _update_kernel(
    accepted_nodes,  # [B, P] int64
    accepted_tokens,  # [B, P] int64
    accepted_count,  # [B] int64
    eos,  # [E] int64
    features,  # [B, N, F]
    kv_len,  # [B] int64
    root,  # [B] int64
    generated,  # [B] int64
    budget,  # [B] int64
    done,  # [B] bool
    new_kv_len,  # [B] int64
    new_root,  # [B] int64
    new_generated,  # [B] int64
    new_budget,  # [B] int64
    new_done,  # [B] bool
    new_count,  # [B] int64
    new_tokens,  # [B, P] int64; written where COPY_TOKENS
    new_features,  # [B, P, F]
    path,
    end_tokens,
    nodes,
    size,
    HAS_FEATURES: tl.constexpr,
    COPY_TOKENS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    b = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1)
    part = tl.program_id(2)
    limit = tl.load(accepted_count + b)
    if HAS_FEATURES:
        # entries beyond the count are undefined: take the last accepted node, whose features are finite
        from_step = tl.maximum(tl.minimum(step.to(tl.int64), limit - 1), 0)
        node = tl.load(accepted_nodes + b * path + from_step)
        f = part * BLOCK_F + tl.arange(0, BLOCK_F)
        row = tl.load(features + (b * nodes + node) * size + f, mask=f < size)
        tl.store(new_features + (b * path + step) * size + f, row, mask=f < size)
    if (step == 0) & (part == 0):
        p = tl.arange(0, BLOCK_P)
        token = tl.load(accepted_tokens + b * path + p, mask=p < path, other=0)
        ends = tl.zeros([BLOCK_P], tl.int32)
        for e in range(end_tokens):
            ends |= (token == tl.load(eos + e)).to(tl.int32)
        first_end = tl.min(tl.where((ends != 0) & (p < limit), p, path), 0)
        was_done = tl.load(done + b)
        old_kv_len = tl.load(kv_len + b)
        old_root = tl.load(root + b)
        old_generated = tl.load(generated + b)
        old_budget = tl.load(budget + b)
        tl.debug_barrier()  # where old and new are one tensor, every thread must have read before any writes

        count = tl.minimum(tl.minimum(limit, first_end + 1), old_budget)
        count = tl.where(was_done, 0, count)
        last = tl.sum(tl.where(p == count - 1, token, 0), 0)
        tl.store(new_kv_len + b, old_kv_len + count)
        tl.store(new_root + b, tl.where(count > 0, last, old_root))
        tl.store(new_generated + b, old_generated + count)
        tl.store(new_budget + b, old_budget - count)
        tl.store(new_done + b, was_done | (first_end < count) | (old_budget - count <= 0))
        tl.store(new_count + b, count)
        if COPY_TOKENS:
            tl.store(new_tokens + b * path + p, token, mask=p < path)


def update_inputs(
    state: DecodeState,
    accepted: Acceptance,
    features: torch.Tensor | None,
    eos: torch.Tensor,
    *,
    out: DecodeState | None = None,
) -> DecodeState:
    """Commit the accepted tokens: cut at the first end token and at the budget, advance lengths, mark finished rows.

    features: [B, N, F] of the tree's nodes or None; eos: [E] int64, may be empty. out: static buffers of the result's
    shapes to write into (then returned); without it the result is new and shares ``accepted.tokens``. Raises ValueError
    for a dtype, device, stride or size outside the module's contract.
    """
    batch, path = accepted.nodes.shape
    for name in ("nodes", "tokens"):
        check_dense(getattr(accepted, name), f"accepted.{name}", state.root, (batch, path), torch.int64)
    check_dense(accepted.count, "accepted.count", state.root, (batch,), torch.int64)
    check_dense(eos, "eos", state.root, (eos.numel(),), torch.int64)
    if path > MAX_PATH:
        raise ValueError(f"accepted.nodes is {tuple(accepted.nodes.shape)}; expected at most {MAX_PATH} nodes a path")
    for name, dtype in STATE:
        check_dense(getattr(state, name), f"state.{name}", state.root, (batch,), dtype)
    nodes, size = _check_features(features, state)
    check_range(accepted.count, "accepted.count", 1, path + 1)
    if features is not None:
        check_range(accepted.nodes, "accepted.nodes", 0, nodes, accepted.count)
    new = out or DecodeState(
        **{name: torch.empty_like(getattr(state, name)) for name, _ in STATE},
        tokens=accepted.tokens,
        features=None if features is None else features.new_empty((batch, path, size)),
        count=torch.empty_like(accepted.count),
    )
    if out is not None:
        _check_out(out, accepted, features, state)
    if batch == 0:
        return new
    block = min(1024, triton.next_power_of_2(max(1, size)))
    grid = (batch, 1 if features is None else path, 1 if features is None else triton.cdiv(size, block))
    pdl = overlaps(state.root)
    with torch.cuda.device_of(state.root):
        _update_kernel[grid](
            accepted.nodes,
            accepted.tokens,
            accepted.count,
            eos,
            state.root if features is None else features,
            *(getattr(state, name) for name, _ in STATE),
            *(getattr(new, name) for name, _ in STATE),
            new.count,
            new.tokens,
            new.root if features is None else new.features,
            path,
            eos.numel(),
            nodes,
            size,
            HAS_FEATURES=features is not None,
            COPY_TOKENS=out is not None,
            BLOCK_P=triton.next_power_of_2(path),
            BLOCK_F=block,
            num_warps=4,
            PDL=pdl,
            launch_pdl=pdl,
        )
    return new


def _check_features(features: torch.Tensor | None, state: DecodeState) -> tuple[int, int]:
    if features is None:
        return 0, 0
    check_float(features, "features")
    if features.dim() != 3:
        raise ValueError(f"features is {tuple(features.shape)}; expected [B, N, F]")
    nodes, size = features.shape[1:]
    check_dense(features, "features", state.root, (state.root.shape[0], nodes, size), features.dtype)
    return nodes, size


def _check_out(out: DecodeState, accepted: Acceptance, features: torch.Tensor | None, state: DecodeState) -> None:
    batch, path = accepted.nodes.shape
    for name, dtype in (*STATE, ("count", torch.int64)):
        check_dense(getattr(out, name), f"out.{name}", state.root, (batch,), dtype)
    check_dense(out.tokens, "out.tokens", state.root, (batch, path), torch.int64)
    if (out.features is None) != (features is None):
        raise ValueError("out.features and features must both be tensors or both be None")
    if features is not None:
        shape = (batch, path, features.shape[2])
        check_dense(out.features, "out.features", state.root, shape, features.dtype)


@torch.library.custom_op("eagle::update_inputs", mutates_args=())
def update_inputs_op(
    kv_len: torch.Tensor,
    root: torch.Tensor,
    generated: torch.Tensor,
    budget: torch.Tensor,
    done: torch.Tensor,
    nodes: torch.Tensor,
    tokens: torch.Tensor,
    count: torch.Tensor,
    features: torch.Tensor | None,
    eos: torch.Tensor,
) -> list[torch.Tensor]:
    """`update_inputs` as a registered operator: kv_len, root, generated, budget, done, count, and features if given."""
    state = DecodeState(kv_len, root, tokens, None, count, generated, budget, done)
    new = update_inputs(state, Acceptance(nodes, tokens, count), features, eos)
    results = [new.kv_len, new.root, new.generated, new.budget, new.done, new.count]
    return results if new.features is None else [*results, new.features]


@update_inputs_op.register_fake
def _(
    kv_len: torch.Tensor,
    root: torch.Tensor,
    generated: torch.Tensor,
    budget: torch.Tensor,
    done: torch.Tensor,
    nodes: torch.Tensor,
    tokens: torch.Tensor,
    count: torch.Tensor,
    features: torch.Tensor | None,
    eos: torch.Tensor,
) -> list[torch.Tensor]:
    results = [torch.empty_like(x) for x in (kv_len, root, generated, budget, done, count)]
    return results if features is None else [*results, features.new_empty((*nodes.shape, features.shape[2]))]
