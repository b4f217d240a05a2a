"""One EAGLE step by loops, in float64 and without caches: the independent reference for the ops."""

from __future__ import annotations

from collections.abc import Callable

import torch


def head_output(weights: dict, config, pairs: list, embedding: torch.Tensor) -> torch.Tensor:
    """The head's recurrent hidden state at the last of ``pairs`` (hidden [H], token, position)."""

    def rms(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    def rope(x, position):
        half = config.head_dim // 2
        angle = torch.tensor(float(position)) * config.rope_theta ** (-torch.arange(half).float() / half)
        cos, sin = angle.cos().double(), angle.sin().double()
        return torch.cat((x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin))

    layer = "layers.0."
    hidden = torch.stack([pair[0] for pair in pairs])
    embedded = embedding[[pair[1] for pair in pairs]]
    if config.kind == "eagle3":
        normed = rms(hidden, layer + "hidden_norm.weight")
        x = torch.cat((rms(embedded, layer + "input_layernorm.weight"), normed), -1)
        residual = normed[-1] if config.norm_before_residual else hidden[-1]
    else:
        x = torch.cat((embedded, hidden), -1) @ weights["fc.weight"].T + weights.get("fc.bias", 0.0)
        residual = x[-1]
    q, k, v = (x @ weights[f"{layer}self_attn.{name}_proj.weight"].T for name in "qkv")
    heads = []
    for head in range(config.num_heads):
        mine = slice(head * config.head_dim, (head + 1) * config.head_dim)
        shared = head * config.num_kv_heads // config.num_heads
        theirs = slice(shared * config.head_dim, (shared + 1) * config.head_dim)
        query = rope(q[-1, mine], pairs[-1][2])
        keys = torch.stack([rope(row[theirs], pair[2]) for row, pair in zip(k, pairs, strict=True)])
        heads.append((keys @ query / config.head_dim**0.5).softmax(0) @ v[:, theirs])
    residual = residual + weights[layer + "self_attn.o_proj.weight"] @ torch.cat(heads)
    x = rms(residual, layer + "post_attention_layernorm.weight")
    gate, up = (weights[f"{layer}mlp.{name}_proj.weight"] @ x for name in ("gate", "up"))
    return residual + weights[layer + "mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)


def tree_by_loops(log_probs: Callable[[tuple[int, ...]], list[tuple[float, int]]], root: int, shape) -> list[tuple]:
    """The tree's nodes (token, parent node, depth). ``log_probs(path)`` lists (log-probability, target id) by draft id."""
    candidates, frontier = [], [None]  # (score, token, parent candidate, path)
    for _ in range(shape.depth + 1):
        children = []
        for row in frontier:
            score, path = (torch.tensor(0.0), ()) if row is None else (candidates[row][0], candidates[row][3])
            ranked = sorted(enumerate(log_probs(path)), key=lambda item: (-item[1][0].item(), item[0]))
            for _, (log_prob, token) in ranked[: shape.top_k]:
                children.append(len(candidates))
                candidates.append((score + log_prob, token, row, (*path, token)))
        frontier = sorted(children, key=lambda c: (-candidates[c][0].item(), c))[: shape.top_k]
    best = sorted(range(len(candidates)), key=lambda c: (-candidates[c][0].item(), c))
    kept = sorted(best[: shape.total_token - 1])
    node = {None: 0, **{candidate: index + 1 for index, candidate in enumerate(kept)}}
    rows = [(candidates[c][1], node[candidates[c][2]], len(candidates[c][3])) for c in kept]
    return [(root, -1, 0), *rows]


def walk_by_loops(tree: list[tuple], choose: Callable[[tuple[int, ...]], int]) -> list[int]:
    """Greedy acceptance: the tokens one step commits. ``choose(path)`` is the target's token after the root and path."""
    node, path = 0, ()
    while True:
        token = choose(path)
        path = (*path, token)
        node = next((n for n, row in enumerate(tree) if row[1] == node and row[0] == token), None)
        if node is None:
            return list(path)
