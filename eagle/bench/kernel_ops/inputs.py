"""Random inputs that several ops share: trees and their masks."""

from __future__ import annotations

import torch

from eagle.model.ops import WORD_BITS, DraftTree, TreeShape, mask_words


def chain_parents(nodes: int) -> list[int]:
    """Parents of a chain, -1 for the root."""
    return list(range(-1, nodes - 1))


def random_parents(nodes: int, depth: int) -> list[int]:
    """Parents of one tree, -1 for the root: each node under one of the eight before it, or above that one where it would
    lie deeper than ``depth`` (the root's is 0)."""
    parents, depths = [-1], [0]
    for node in range(1, nodes):
        parent = int(torch.randint(max(0, node - 8), node, ()))
        if depths[parent] == depth:
            parent = parents[parent]
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return parents


def ancestors(parents: list[int]) -> list[list[int]]:
    """Each node's path from the root to itself."""
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([node] if parent < 0 else [*paths[parent], node])
    return paths


def tree_words(parents: list[int], device: torch.device) -> torch.Tensor:
    """Mask words [1, N, W] int64, by loops."""
    words = [[0] * mask_words(len(parents)) for _ in parents]
    for node, path in enumerate(ancestors(parents)):
        for above in path:
            words[node][above // WORD_BITS] |= 1 << (above % WORD_BITS)
    signed = [[word - 2**64 if word >= 2**63 else word for word in row] for row in words]
    return torch.tensor(signed, dtype=torch.int64, device=device)[None]


def random_tree(shape: TreeShape, vocab: int, device: torch.device) -> DraftTree:
    """One random tree of a shape's nodes and depth; siblings may carry equal tokens."""
    nodes = shape.total_token
    parents = random_parents(nodes, shape.path - 1)
    depths = [len(path) - 1 for path in ancestors(parents)]
    as_row = {"dtype": torch.int64, "device": device}
    return DraftTree(
        tokens=torch.randint(vocab, (1, nodes), device=device),
        parents=torch.tensor([parents], **as_row),
        depths=torch.tensor([depths], **as_row),
        words=tree_words(parents, device),
    )
