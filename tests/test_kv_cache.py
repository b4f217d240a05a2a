"""Append, retrieve and compact against loops, with overlapping moves and untouched neighbours."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle.model.kv_cache import KVCache, LayerShape, kv_append, kv_compact, kv_retrieve


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 4), heads=st.integers(1, 3), rows=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_append_writes_its_rows_and_nothing_else(batch: int, heads: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    cache = torch.randn(batch, heads, 33, 5)
    new, start = torch.randn(batch, heads, rows, 5), torch.randint(0, 33 - rows + 1, (batch,))
    wanted = cache.clone()
    for b in range(batch):
        for t in range(rows):
            wanted[b, :, start[b] + t] = new[b, :, t]
    kv_append(cache, new, start)
    assert torch.equal(cache, wanted)


def test_retrieve() -> None:
    cache, indices = torch.randn(3, 2, 19, 5), torch.randint(0, 19, (3, 7))
    out = kv_retrieve(cache, indices)
    for b in range(3):
        for n in range(7):
            assert torch.equal(out[b, :, n], cache[b, :, indices[b, n]])


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 4), path=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_compact_moves_the_path_down(batch: int, path: int, seed: int) -> None:
    torch.manual_seed(seed)
    layers, heads, nodes, slots = 3, 2, 23, 60
    k, v = torch.randn(layers, batch, heads, slots, 4), torch.randn(layers, batch, heads, slots, 6)
    kv_len, count = torch.randint(0, slots - nodes, (batch,)), torch.randint(1, path + 1, (batch,))
    chosen = [sorted(torch.randperm(nodes - 1)[: path - 1].add(1).tolist()) for _ in range(batch)]
    nodes_tensor = torch.tensor([[0, *row] for row in chosen])
    before_k, before_v = k.clone(), v.clone()
    kv_compact(k, v, nodes_tensor, kv_len, count)
    for b in range(batch):
        start = kv_len[b].item()
        for cache, before in ((k, before_k), (v, before_v)):
            assert torch.equal(cache[:, b, :, :start], before[:, b, :, :start])
            for i in range(count[b].item()):
                assert torch.equal(cache[:, b, :, start + i], before[:, b, :, start + nodes_tensor[b, i]])


def test_layers_of_one_shape_share_an_allocation() -> None:
    wide = LayerShape(2, 8, 8, torch.float32, torch.device("cpu"))
    narrow = LayerShape(1, 8, 4, torch.float32, torch.device("cpu"))
    cache = KVCache([wide, narrow, wide], batch=2, slots=16)
    assert [k.shape[0] for k, _ in cache.groups] == [2, 1]
    cache.layers[2][0].fill_(3.0)
    assert cache.groups[0][0][1].eq(3.0).all()
    assert cache.groups[0][0][0].eq(0.0).all()
    larger = KVCache([wide, narrow, wide], batch=2, slots=32)
    larger.carry_over(cache, 7)
    assert larger.layers[2][0][:, :, :7].eq(3.0).all()
    assert larger.layers[2][0][:, :, 7:].eq(0.0).all()
