"""Does a target's pass through its own modules give each row its bits? Watched and measured, before steps are built on it.

`RowLocal` refuses what PyTorch's ops tell. What they don't, such as a kernel of a module's own or another way for many rows,
shows in the bits: rows of the same token at the same position, which see nothing but themselves, must come out equal
wherever they stand and however many there are.
"""

from __future__ import annotations

import torch

from eagle.model.ops import WORD_BITS, Ops
from eagle.model.row_local import NotRowLocal
from eagle.model.target import Target

KINDS = 3
"""Different rows of a trial, by turns. An odd number lets each stand at even and odd places."""


def check_row_local(target: Target, ops: Ops, trees: int = 1, nodes: int = 2) -> None:
    """Run ``trees`` trees of ``nodes`` nodes through the modules, and each kind of node by itself.

    Raises NotRowLocal, naming the op, where they do what may not keep each row's bits, multiply by weights that
    ``ops.linear`` does not take, or give equal rows other bits; and what the modules raise themselves.
    """
    kinds = (torch.arange(trees)[:, None] + torch.arange(nodes)) % KINDS  # no tree is its neighbour's copy
    rows = lone_rows(target, ops, kinds)
    for kind in kinds.unique():
        alone = lone_rows(target, ops, kind.view(1, 1))
        if not equal_rows(rows[kinds == kind], alone[0]):
            raise NotRowLocal(f"the bits of a row alone differ from those of its like among {trees} × {nodes}")


def lone_rows(target: Target, ops: Ops, kinds: torch.Tensor) -> torch.Tensor:
    """The bits [trees, nodes, bytes] of logits and features of nodes that see nothing but themselves.

    kinds: [trees, nodes] int64 on the CPU, which token at which position each is.
    """
    (trees, nodes), vocabulary = kinds.shape, target.spec.vocab_size
    row, words = torch.arange(nodes), torch.zeros(nodes, -(-nodes // WORD_BITS), dtype=torch.int64)
    words[row, row // WORD_BITS] = torch.ones_like(row) << row % WORD_BITS
    tokens = (kinds + 1) * vocabulary // (KINDS + 1)  # the first may be padding, whose embedding is zero
    tokens, depths, words = (part.to(target.device) for part in (tokens, kinds + 1, words.repeat(trees, 1, 1)))
    kv_len = torch.zeros(trees, dtype=torch.int64, device=target.device)
    cache = target.new_cache(trees, -(-nodes // WORD_BITS) * WORD_BITS)
    tree = {"depths": depths, "tree_words": words}
    made = target.forward(tokens, cache, kv_len, **tree, ops=ops, row_local=True)
    return torch.cat([part.contiguous().view(torch.uint8) for part in made], dim=-1).cpu()


def equal_rows(rows: torch.Tensor, alone: torch.Tensor) -> bool:
    """Whether all ``rows`` [n, bytes] have the bits of ``alone`` [1, bytes]."""
    return torch.equal(rows, alone.expand_as(rows))
