"""Everything a run holds: models' caches, the decode state, the limits. One place, allocated before the first step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eagle.model.drafts import DraftModel
from eagle.model.kv_cache import KVCache
from eagle.model.ops import DecodeState, Ops, Sampling, TreeShape
from eagle.model.target import Target

SLOT_BLOCK = 256
"""Cache sizes are rounded up to this many slots, so that a slightly longer call reuses the memory."""


@dataclass
class Caches:
    """The target's and the draft's cache for one batch size, and what the first row's cache holds.

    ``prefix`` lists the tokens whose keys lie in both caches after a finished single-sequence run, so that a growing
    chat does not pay for its history again; None where nothing may be reused.
    """

    target: KVCache
    draft: KVCache
    prefix: list[int] | None = None

    @property
    def slots(self) -> int:
        return self.target.slots


@dataclass
class Run:
    """One call's fixed parts: who computes, in which shape, and how tokens are chosen."""

    target: Target
    draft: DraftModel | None  # None: plain decoding
    ops: Ops
    shape: TreeShape
    sampling: Sampling
    caches: Caches
    eos: torch.Tensor  # [E] int64
    uniforms: torch.Tensor | None  # [B, max_new_tokens + P] float32: one for each output position

    @property
    def nodes(self) -> int:
        """Rows of one target pass."""
        return self.shape.total_token if self.draft is not None else 1

    @property
    def path(self) -> int:
        """Tokens a step can commit at most."""
        return self.shape.path if self.draft is not None else 1


def slots_needed(positions: int, shape: TreeShape, speculative: bool) -> int:
    """Cache slots for a run that ends with ``positions`` positions: the tree, and the draft's padded extend, come on
    top of the last committed position."""
    extra = max(shape.total_token, shape.path + shape.draft_slots) if speculative else 1
    return -(-(positions + extra) // SLOT_BLOCK) * SLOT_BLOCK


def bounded(slots: int, total: int) -> int:
    """A host-side bound on the slots in use, rounded so that few distinct shapes occur."""
    return min(total, -(-slots // 64) * 64)


def initial_state(
    lengths: torch.Tensor,
    first: torch.Tensor,
    features: torch.Tensor | None,
    budget: torch.Tensor,
    path: int,
    eos: torch.Tensor,
) -> DecodeState:
    """The state after prefill. lengths: [B] prompt lengths; first: [B] the first new token; features: [B, F] at each
    prompt's last position; budget: [B] tokens still allowed, the first one not counted."""
    tokens = first[:, None].repeat(1, path)
    return DecodeState(
        kv_len=lengths,
        root=first,
        tokens=tokens,
        features=None if features is None else features[:, None].repeat(1, path, 1),
        count=torch.ones_like(lengths),
        generated=torch.ones_like(lengths),
        budget=budget,
        done=torch.isin(first, eos) | (budget <= 0),
    )
