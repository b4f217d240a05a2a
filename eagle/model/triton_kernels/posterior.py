"""Acceptance on the device: choose a token at every node, then walk from the root along the children that carry it.

Contract. The meaning is that of `eagle.model.verify.evaluate_posterior`. logits are [B, N, V] float16, bfloat16 or
float32 with a contiguous last dimension and rows at one stride, N ≤ 256; the tree's tensors are contiguous int64. Greedy
takes the largest logit and of equals the lowest id (NaN counts as the largest). Sampling is `sampling`'s, exact about
ties. Of two equal children the later one is taken, as in the PyTorch op. Entries at and beyond ``count`` repeat the last
accepted node and the bonus token, so they are valid indices.

All nodes are decided at once, because the uniform of a node's output position is known from its depth: N rows fill the
GPU, where the path alone would be P passes over the vocabulary one after the other. The walk is then one program a
sequence over N choices. A node's choice depends on its own row only. Nothing is read on the host and every size comes
from the arguments' shapes: safe under CUDA-graph capture. Uniforms, seeds, offsets and what `Sampling.held` holds are
tensors and may change between replays; a temperature, top-k or top-p given as a number is fixed at capture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eagle.model.ops import Acceptance, DraftTree, Sampling
from eagle.model.triton_kernels.cache_checks import check_values, debugging
from eagle.model.triton_kernels.dense import check_dense, check_range
from eagle.model.triton_kernels.order import EMPTY, key_ids, make_keys
from eagle.model.triton_kernels.overlap import await_earlier, overlaps
from eagle.model.triton_kernels.rows import check_float
from eagle.model.triton_kernels.sampling import draw_keys

MAX_NODES = 256


@triton.jit
def _argmax_kernel(
    logits,  # [R, V]
    keys,  # [R, chunks] int64
    vocab,
    chunks,
    stride,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < vocab
    x = tl.load(logits + row * stride + ids, mask=inside, other=float("-inf")).to(tl.float32)
    best = tl.max(tl.where(inside, make_keys(x, ids), EMPTY), 0)
    tl.store(keys + row * chunks + chunk, best)


@triton.jit
def _walk_kernel(
    keys,  # [B, N, chunks] int64: the largest is the choice
    parents,  # [B, N] int64
    tokens,  # [B, N] int64
    path_nodes,  # [B, P] int64
    path_tokens,  # [B, P] int64
    counts,  # [B] int64
    nodes,
    chunks,
    path,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    inside = n < nodes
    parent = tl.load(parents + b * nodes + n, mask=inside, other=-2).to(tl.int32)
    token = tl.load(tokens + b * nodes + n, mask=inside, other=-1).to(tl.int32)
    best = tl.full([BLOCK_N], EMPTY, tl.int64)
    for start in range(0, chunks, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        place = (b * nodes + n[:, None]) * chunks + c[None, :]
        part = tl.load(keys + place, mask=inside[:, None] & (c < chunks)[None, :], other=EMPTY)
        best = tl.maximum(best, tl.max(part, 1))
    choice = key_ids(best)

    node = tl.full((), 0, tl.int32)
    count = tl.full((), 0, tl.int64)
    alive = tl.full((), 1, tl.int64)
    for step in range(path):
        chosen = tl.max(tl.where(n == node, choice, -1), 0)
        tl.store(path_nodes + b * path + step, node.to(tl.int64))
        tl.store(path_tokens + b * path + step, chosen.to(tl.int64))
        count += alive
        child = tl.max(tl.where(inside & (parent == node) & (token == chosen), n, -1), 0)
        alive = tl.where(child >= 0, alive, 0)  # without a child the node stays, so it stays 0
        node = tl.where(child >= 0, child, node)
    tl.store(counts + b, count)


def evaluate_posterior(
    logits: torch.Tensor, tree: DraftTree, path: int, sampling: Sampling, uniforms: torch.Tensor | None = None
) -> Acceptance:
    """Accept the longest path of the tree that the target itself would have produced.

    logits: [B, N, V], the target's at each node; path: P, the most nodes a path can have; uniforms: [B, P] float32 in
    [0, 1), one for each token that may be committed, required unless greedy. Raises ValueError for a dtype, device,
    stride or size outside the module's contract.
    """
    _check(logits, tree, path, sampling)
    if sampling.greedy:
        return _walk(_argmax_keys(logits), tree, path)
    if uniforms is None:
        raise ValueError(f"sampling at temperature {sampling.temperature} needs uniforms [B, {path}], got None")
    check_dense(uniforms, "uniforms", logits, (logits.shape[0], path), torch.float32)
    if debugging():
        check_values((uniforms >= 0) & (uniforms < 1), "uniforms must lie in [0, 1)", uniforms=uniforms)
    return _walk(draw_keys(logits, tree.depths, sampling, uniforms, None, None), tree, path)


def evaluate_posterior_seeded(
    logits: torch.Tensor, tree: DraftTree, path: int, sampling: Sampling, seeds: torch.Tensor, offsets: torch.Tensor
) -> Acceptance:
    """`evaluate_posterior` that draws its own uniforms: Philox of (seed, output position).

    seeds: [B] int64, one a sequence; offsets: [B] int64, the output position of the first token to be committed (the
    tokens generated so far), at most 2³¹ - P. A position's uniform does not depend on how many tokens a step commits, so
    plain and EAGLE decoding of one seed draw alike; `sampling.philox_uniforms` gives the same numbers. Both are ignored
    when greedy. Raises ValueError as `evaluate_posterior`.
    """
    _check(logits, tree, path, sampling)
    if sampling.greedy:
        return _walk(_argmax_keys(logits), tree, path)
    for name, x in (("seeds", seeds), ("offsets", offsets)):
        check_dense(x, name, logits, (logits.shape[0],), torch.int64)
    if debugging():
        fine = (offsets >= 0) & (offsets <= 2**31 - path)
        check_values(fine, f"offsets must lie from 0 to 2³¹ - {path}", offsets=offsets)
    return _walk(draw_keys(logits, tree.depths, sampling, None, seeds, offsets), tree, path)


def _check(logits: torch.Tensor, tree: DraftTree, path: int, sampling: Sampling) -> None:
    check_float(logits, "logits")
    if logits.dim() != 3 or not 1 <= logits.shape[1] <= MAX_NODES or logits.shape[2] == 0 or path < 1:
        raise ValueError(
            f"logits is {tuple(logits.shape)} with path {path}; expected [B, N, V] with 1 to {MAX_NODES} nodes, path ≥ 1"
        )
    batch, nodes, vocab = logits.shape
    row, token = logits.stride(1), logits.stride(2)
    if (token != 1 and vocab != 1) or (batch > 1 and logits.stride(0) != nodes * row):
        raise ValueError(f"logits {tuple(logits.shape)} has strides {logits.stride()}; expected rows at one stride")
    for name in ("tokens", "parents", "depths"):
        check_dense(getattr(tree, name), f"tree.{name}", logits, (batch, nodes), torch.int64)
    if sampling.held is not None:
        check_dense(sampling.held, "sampling.held", logits, (len(sampling.numbers),), torch.float32)
    check_range(tree.parents, "tree.parents", -1, nodes)
    check_range(tree.depths, "tree.depths", 0, nodes)


def _argmax_keys(logits: torch.Tensor) -> torch.Tensor:
    """Each chunk's best key: [B, N, chunks] int64."""
    batch, nodes, vocab = logits.shape
    # 8192 logits a program: 60 nodes of a 128k vocabulary give 960 programs, and 16 keys a node for the walk to merge
    chunk = min(8192, max(64, triton.next_power_of_2(vocab)))
    chunks = triton.cdiv(vocab, chunk)
    keys = logits.new_empty((batch, nodes, chunks), dtype=torch.int64)
    if batch:
        pdl = overlaps(logits)
        with torch.cuda.device_of(logits):
            _argmax_kernel[(batch * nodes, chunks)](
                logits,
                keys,
                vocab,
                chunks,
                logits.stride(1),
                CHUNK=chunk,
                num_warps=max(1, min(8, chunk // 1024)),
                PDL=pdl,
                launch_pdl=pdl,
            )
    return keys


def _walk(keys: torch.Tensor, tree: DraftTree, path: int) -> Acceptance:
    batch, nodes, chunks = keys.shape
    steps = keys.new_empty((2, batch, path))
    accepted = Acceptance(nodes=steps[0], tokens=steps[1], count=keys.new_empty((batch,)))
    block = triton.next_power_of_2(nodes)
    if batch:
        pdl = overlaps(keys)
        with torch.cuda.device_of(keys):
            _walk_kernel[(batch,)](
                keys,
                tree.parents,
                tree.tokens,
                accepted.nodes,
                accepted.tokens,
                accepted.count,
                nodes,
                chunks,
                path,
                BLOCK_N=block,
                BLOCK_C=min(16, triton.next_power_of_2(chunks)),
                num_warps=1 if block <= 64 else 4,  # one warp's reductions need no barrier
                PDL=pdl,
                launch_pdl=pdl,
            )
    return accepted


@torch.library.custom_op("eagle::evaluate_posterior", mutates_args=())
def evaluate_posterior_op(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    depths: torch.Tensor,
    path: int,
    temperature: float,
    top_p: float,
    top_k: int,
    top_k_first: bool,
    uniforms: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`evaluate_posterior` as a registered operator: (nodes [B, P], tokens [B, P], count [B])."""
    tree = DraftTree(tokens, parents, depths, parents)
    out = evaluate_posterior(logits, tree, path, Sampling(temperature, top_p, top_k, top_k_first), uniforms)
    # an operator's results may not share storage
    return out.nodes.clone(), out.tokens.clone(), out.count


@torch.library.custom_op("eagle::evaluate_posterior_seeded", mutates_args=())
def evaluate_posterior_seeded_op(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    depths: torch.Tensor,
    path: int,
    temperature: float,
    top_p: float,
    top_k: int,
    top_k_first: bool,
    seeds: torch.Tensor,
    offsets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`evaluate_posterior_seeded` as a registered operator: (nodes [B, P], tokens [B, P], count [B])."""
    tree = DraftTree(tokens, parents, depths, parents)
    sampling = Sampling(temperature, top_p, top_k, top_k_first)
    out = evaluate_posterior_seeded(logits, tree, path, sampling, seeds, offsets)
    return out.nodes.clone(), out.tokens.clone(), out.count


def _fake(
    logits: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, depths: torch.Tensor, path: int, *_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = logits.shape[0]
    return parents.new_empty((batch, path)), parents.new_empty((batch, path)), parents.new_empty((batch,))


evaluate_posterior_op.register_fake(_fake)
evaluate_posterior_seeded_op.register_fake(_fake)
