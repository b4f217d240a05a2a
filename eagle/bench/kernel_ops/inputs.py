"""Random inputs that several ops share: trees and their masks."""

from __future__ import annotations

import torch

from eagle.model.ops import WORD_BITS, DraftTree, mask_words


def random_parents(nodes: int, *, chain: bool) -> list[int]:
    """Parents of one tree, -1 for the root: a chain, or each node under one of the eight before it."""
    if chain:
        return list(range(-1, nodes - 1))
    return [-1] + [int(torch.randint(max(0, node - 8), node, ())) for node in range(1, nodes)]


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


def random_tree(nodes: int, vocab: int, device: torch.device) -> DraftTree:
    """One random tree; siblings may carry equal tokens."""
    parents = random_parents(nodes, chain=False)
    depths = [len(path) - 1 for path in ancestors(parents)]
    as_row = {"dtype": torch.int64, "device": device}
    return DraftTree(
        tokens=torch.randint(vocab, (1, nodes), device=device),
        parents=torch.tensor([parents], **as_row),
        depths=torch.tensor([depths], **as_row),
        words=tree_words(parents, device),
    )
