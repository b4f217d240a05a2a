"""Kernels that start while the one before still runs: a chain of them equals the same chain with waits between."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from eagle.model.ops import Sampling, TreeShape
from eagle.model.tree import empty_candidates
from eagle.model.triton_kernels import (
    draft_input,
    draft_positions,
    evaluate_posterior,
    finish_tree,
    grow_tree,
    kv_compact,
    linear,
    rms_norm,
    rope_append,
    topk_log_softmax,
)
from eagle.model.triton_kernels.overlap import overlaps

DEVICE = "cuda" if CUDA else "cpu"
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


def test_never_in_the_interpreter() -> None:
    assert not overlaps(torch.zeros(1))


def chain(between: Callable[[], object], seed: int) -> list[torch.Tensor]:
    """A toy draft, each kernel reading what the one before wrote. Every intermediate result is kept."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator).to(torch.bfloat16)

    shape, vocab, size = TreeShape(40, 4, 8), 4096, 256
    table, mix, head, gain = random(vocab, size), random(size, 2 * size) / 16, random(vocab, size), random(size)
    cos, sin, caches = random(1, 8, 64), random(1, 8, 64), random(2, 1, 1, 4, 128, 64)
    hidden, logits_of_target = random(1, 1, size), random(1, 40, vocab)
    id_map = torch.randperm(vocab, device=DEVICE, generator=generator)
    kv_len, count = torch.tensor([[20], [3]], device=DEVICE)
    candidates, frontier, kept = empty_candidates(shape, 1, hidden.device), None, []
    torch.cuda.synchronize()
    at = draft_positions(kv_len, count, shape)
    for level in range(shape.depth + 1):
        between()
        if frontier is not None:
            both, hidden = draft_input(hidden, frontier.rows, frontier.tokens, table, gain, gain, 1e-5, 1e-5)
            between()
            hidden = rms_norm(linear(both, mix, residual=hidden), gain, 1e-5)
            between()
            heads = hidden.view(1, 8, 4, 64)
            k_cache, v_cache = caches[0, 0], caches[1, 0]
            hidden = rope_append(heads, heads, heads, cos, sin, k_cache, v_cache, at.slots[level - 1]).view(1, 8, size)
            between()
        values, ids = topk_log_softmax(linear(hidden, head).flatten(0, 1), shape.top_k)
        between()
        children = (part.view(1, -1, shape.top_k) for part in (values, ids))
        frontier = grow_tree(candidates, frontier, level, *children, id_map)
        kept += [hidden, values, ids, *vars(frontier).values()]
    between()
    tree = finish_tree(candidates, ids[0, :1], shape.total_token)
    between()
    accepted = evaluate_posterior(logits_of_target, tree, shape.path, Sampling())
    between()
    kv_compact(*caches, accepted.nodes, kv_len, accepted.count)
    between()
    return [*kept, *vars(tree).values(), accepted.nodes, accepted.count, caches]


@pytest.mark.gpu
@needs_gpu
def test_a_chain_needs_no_waits() -> None:
    for seed in range(10):
        wanted = chain(torch.cuda.synchronize, seed)
        found = chain(lambda: None, seed)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
