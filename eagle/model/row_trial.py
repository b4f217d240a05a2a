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
    """Run ``trees`` trees of ``nodes`` nodes through the modules, and a single node.

    Raises NotRowLocal, naming the op, where they do what may not keep each row's bits, multiply by weights that
    ``ops.linear`` does not take, or give equal rows other bits; and what the modules raise themselves.
    """
    if not equal_rows(lone_rows(target, ops, trees, nodes), lone_rows(target, ops, 1, 1)):
        raise NotRowLocal(f"the bits of a row alone differ from those of its like among {trees} × {nodes}")


def lone_rows(target: Target, ops: Ops, trees: int, nodes: int) -> torch.Tensor:
    """The bits [trees, nodes, bytes] of logits and features of nodes that see nothing but themselves, `KINDS` by turns."""
    device, row = target.device, torch.arange(nodes)
    kind, words = row % KINDS, torch.zeros(nodes, -(-nodes // WORD_BITS), dtype=torch.int64)
    words[row, row // WORD_BITS] = torch.ones_like(row) << row % WORD_BITS
    tokens, depths, words = (part.to(device).repeat(trees, *(1,) * part.dim()) for part in (kind, kind + 1, words))
    kv_len = torch.zeros(trees, dtype=torch.int64, device=device)
    cache = target.new_cache(trees, -(-nodes // WORD_BITS) * WORD_BITS)
    tree = {"depths": depths, "tree_words": words}
    made = target.forward(tokens, cache, kv_len, **tree, ops=ops, row_local=True)
    return torch.cat([part.contiguous().view(torch.uint8) for part in made], dim=-1)


def equal_rows(rows: torch.Tensor, alone: torch.Tensor) -> bool:
    """Whether all rows of a kind have the same bits, and those of the first kind the bits of ``alone`` [1, 1, bytes]."""
    if not torch.equal(rows[0, 0], alone[0, 0]):
        return False
    kinds = (rows[:, kind::KINDS] for kind in range(min(KINDS, rows.shape[1])))
    return all(torch.equal(same, same[:1, :1].expand_as(same)) for same in kinds)
