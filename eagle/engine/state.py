"""Everything a run holds: models' caches, the decode state, the limits. One place, allocated before the first step."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields

import torch
from transformers.cache_utils import Cache

from eagle.model.drafts import DraftModel
from eagle.model.fused_draft import FusedDraft
from eagle.model.hf_seams import TreeCacheLayer
from eagle.model.kv_cache import KVCache
from eagle.model.ops import DecodeState, Ops, Sampling, TreeShape
from eagle.model.target import Target

SLOT_BLOCK = 256
"""Cache sizes are rounded up to this many slots, so that a slightly longer call reuses the memory."""

ROW_TILE = 64
"""Rows the matrix products of a padded target pass come in."""


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

    def first_rows(self, count: int) -> Caches:
        """The first ``count`` rows of this memory, for a pass that leaves out idle ones."""
        if count == self.target.batch:
            return self
        return Caches(_first_rows(self.target, count), _first_rows(self.draft, count))


def _first_rows(cache: KVCache, count: int) -> KVCache:
    part = copy(cache)
    part.batch = count
    part.groups = [(k[:, :count], v[:, :count]) for k, v in cache.groups]
    part.layers = [(k[:count], v[:count]) for k, v in cache.layers]
    if cache.view is not None:
        part.view = Cache(layers=[TreeCacheLayer(k, v) for k, v in part.layers])
    return part


@dataclass
class Run:
    """One call's fixed parts: who computes, in which shape, and how tokens are chosen."""

    target: Target
    draft: DraftModel | FusedDraft | None  # None: plain decoding
    ops: Ops
    shape: TreeShape
    sampling: Sampling
    caches: Caches
    eos: torch.Tensor  # [E] int64
    uniforms: torch.Tensor | None  # [B, max_new_tokens + P] float32: one for each output position
    pad_rows: bool = False  # see `rows`
    row_local: bool = False  # see `Target.forward`

    @property
    def nodes(self) -> int:
        """Nodes a step verifies: the tree's, or the root alone."""
        return self.shape.total_token if self.draft is not None else 1

    @property
    def rows(self) -> int:
        """Rows of one target pass. With ``pad_rows`` plain decoding and every tree of up to 64 nodes have the same, so
        that a library's matrix product, whose order of sums follows from its sizes, treats each row alike."""
        return padded_rows(self.shape) if self.pad_rows else self.nodes

    @property
    def path(self) -> int:
        """Tokens a step can commit at most."""
        return self.shape.path if self.draft is not None else 1


def padded_rows(shape: TreeShape) -> int:
    """``total_token`` rounded up to whole tiles."""
    return -(-shape.total_token // ROW_TILE) * ROW_TILE


def slots_beyond(shape: TreeShape, speculative: bool, pad_rows: bool = False) -> int:
    """Cache slots a step may write at and beyond the committed length: the tree, the draft's padded extend."""
    rows = padded_rows(shape) if pad_rows else 1
    return max(shape.total_token, rows, shape.path + shape.draft_slots) if speculative else rows


def slots_needed(positions: int, shape: TreeShape, speculative: bool, pad_rows: bool = False) -> int:
    """Cache slots for a run that ends with ``positions`` positions."""
    return -(-(positions + slots_beyond(shape, speculative, pad_rows)) // SLOT_BLOCK) * SLOT_BLOCK


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
        done=(first[:, None] == eos).any(1) | (budget <= 0),  # torch.isin sorts: 0.5 ms of launches on a GPU
    )


@dataclass
class StaticState:
    """A decode state at fixed addresses, and what the host reads of it as one block of memory."""

    state: DecodeState
    report: torch.Tensor  # [R] int64: tokens [B, P], count [B], done [B] as bytes

    @classmethod
    def like(cls, state: DecodeState) -> StaticState:
        """Room for states of the same shapes, with the same values."""
        batch, path = state.tokens.shape
        words = batch * path + batch
        report = torch.zeros(words + -(-batch // 8), dtype=torch.int64, device=state.root.device)
        static = DecodeState(
            kv_len=torch.empty_like(state.kv_len),
            root=torch.empty_like(state.root),
            tokens=report[: batch * path].view(batch, path),
            features=None if state.features is None else torch.empty_like(state.features).contiguous(),
            count=report[batch * path : words],
            generated=torch.empty_like(state.generated),
            budget=torch.empty_like(state.budget),
            done=report[words:].view(torch.bool)[:batch],
        )
        return cls(static.load(state), report)

    def begin(self, state: DecodeState) -> None:
        """Take over the rows of ``state``. Those there are beyond them stay idle: done from the start, after a prefix of
        one position, which is the shortest a prompt can have."""
        rows = state.root.shape[0]
        for entry in fields(state):
            mine, theirs = getattr(self.state, entry.name), getattr(state, entry.name)
            if mine is not None:
                mine[:rows].copy_(theirs)
                if rows < len(mine):
                    mine[rows:].zero_()
        if rows < len(self.state.root):
            self.state.kv_len[rows:].fill_(1)
            self.state.done[rows:].fill_(True)

    def read(self, report: torch.Tensor) -> tuple[list[list[int]], list[bool]]:
        """Each row's new tokens and whether it is done, from a copy of ``report`` on the host."""
        batch, path = self.state.tokens.shape
        words = batch * path + batch
        counts = report[batch * path : words].tolist()
        tokens = report[: batch * path].view(batch, path).tolist()
        done = report[words:].view(torch.bool)[:batch].tolist()
        return [row[:count] for row, count in zip(tokens, counts, strict=True)], done
