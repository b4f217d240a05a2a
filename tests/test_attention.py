"""The attention op against a loop over rows and heads in float64."""

from __future__ import annotations

import pytest
import torch
from tiny import relative_error

from eagle.model.attention import attention
from eagle.model.tree import ancestor_words


def attention_by_loops(q, k, v, seen: list[list[set[int]]], scale: float, softcap: float | None) -> torch.Tensor:
    """seen[b][t]: the slots row t sees."""
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b, t, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        slots = sorted(seen[b][t])
        kv = h * k.shape[1] // q.shape[2]
        scores = k[b, kv, slots].double() @ q[b, t, h].double() * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        out[b, t, h] = scores.softmax(0) @ v[b, kv, slots].double()
    return out


def random_parents(batch: int, nodes: int) -> torch.Tensor:
    rows = [[-1, *(int(torch.randint(node, ())) for node in range(1, nodes))] for _ in range(batch)]
    return torch.tensor(rows)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("nodes", [0, 1, 13, 70], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (5, 1)], ids=lambda h: f"H{h[0]}-{h[1]}")
def test_attention(heads: tuple[int, int], nodes: int, window: int | None, softcap: float | None) -> None:
    batch, rows, size, slots = 3, nodes or 5, 24, 101
    kv_len = torch.tensor([0, 9, 31])
    q = torch.randn(batch, rows, heads[0], size)
    k = torch.randn(batch, heads[1], slots, size)
    v = torch.randn(batch, heads[1], slots, size + 8)
    words, seen = None, []
    parents = random_parents(batch, nodes) if nodes else None
    for b, start in enumerate(kv_len.tolist()):
        depth = {-1: -1}
        for t in range(rows):
            own = [start + t] if parents is not None else list(range(start, start + t + 1))
            node = parents[b, t].item() if parents is not None else -1
            depth[t] = depth[node] + 1 if parents is not None else t
            while node >= 0:
                own.append(start + node)
                node = parents[b, node].item()
            position = {s: s if s < start else start + depth[s - start] for s in [*range(start), *own]}
            limit = start + depth[t] - (window or 10**9)
            seen.append({s for s in position if position[s] > limit})
    if parents is not None:
        words = ancestor_words(parents, nodes)
    seen = [seen[b * rows : (b + 1) * rows] for b in range(batch)]
    out = attention(q, k, v, kv_len, words, scale=0.3, window=window, softcap=softcap)
    assert relative_error(out, attention_by_loops(q, k, v, seen, 0.3, softcap)) < 2e-6
