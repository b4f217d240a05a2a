"""The seam between what a step needs and who computes it: one table of functions with one signature each.

`Ops` is that table. `eagle.model.torch_ops.TORCH_OPS` fills it with plain PyTorch; Triton kernels replace entries one
by one. Every op has a leading batch dimension B, takes lengths and indices as int64 device tensors, reads nothing on
the host, and has shapes that depend on its arguments' shapes alone, so that a step can be captured.

Letters: B sequences, T rows, L layers, S cache slots, Hq and Hkv heads, D head size, V vocabulary, N tree nodes (root
included), W int64 mask words a row, P = depth + 2 the longest accepted path, K = top_k, C all candidates of a tree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from eagle.errors import InvalidInputError

WORD_BITS = 64
"""Tree nodes a mask word holds."""


def mask_words(nodes: int) -> int:
    """How many int64 words hold one bit for each of ``nodes`` nodes."""
    return -(-nodes // WORD_BITS)


@dataclass(frozen=True)
class TreeShape:
    """The fixed shape of a run's draft trees (EAGLE-2, sec. 4; the reference's ``total_token``, ``depth``, ``top_k``).

    ``depth`` passes follow the extend pass, so candidates have levels 1 … depth + 1, and a step commits at most
    depth + 2 tokens.
    """

    total_token: int
    depth: int
    top_k: int

    @property
    def candidates(self) -> int:
        """C: top_k of level 1, then top_k² a level."""
        return self.top_k + self.depth * self.top_k**2

    @property
    def path(self) -> int:
        """P: root, depth + 1 levels."""
        return self.depth + 2

    @property
    def draft_slots(self) -> int:
        """Cache slots the frontier rows of one tree take in the draft's cache."""
        return self.depth * self.top_k


@dataclass
class DraftTree:
    """The nodes to verify. Node 0 is the root: the last committed token. A parent precedes its children."""

    tokens: torch.Tensor  # [B, N] int64, target vocabulary
    parents: torch.Tensor  # [B, N] int64, -1 for the root
    depths: torch.Tensor  # [B, N] int64, 0 for the root
    words: torch.Tensor  # [B, N, W] int64: bit j of row i is set where node j is i or an ancestor of i


class DraftPositions(NamedTuple):
    """Where the rows of a step's draft passes lie: the extend over the tokens just committed, then each level."""

    start: torch.Tensor  # [B] int64: the extend's first slot, which is its first position too
    last: torch.Tensor  # [B] int64: the extend's row of the last committed token, of all B · P
    slots: torch.Tensor  # [depth, B] int64: each level's first slot
    rope: torch.Tensor  # [B, P + depth] int64: RoPE positions of the extend's rows, then of each level's


@dataclass
class Candidates:
    """Every candidate of one tree, filled level by level by ``grow_tree``."""

    scores: torch.Tensor  # [B, C] float32, cumulative log-probability
    tokens: torch.Tensor  # [B, C] int64, target vocabulary
    frontier_index: torch.Tensor  # [B, depth, K] int64: which candidate each frontier row is


@dataclass
class Frontier:
    """The K rows the draft runs next."""

    scores: torch.Tensor  # [B, K] float32
    tokens: torch.Tensor  # [B, K] int64
    rows: torch.Tensor  # [B, K] int64: the previous pass's row whose hidden state continues here
    words: torch.Tensor  # [B, K, Wd] int64: the draft-cache slots each row sees, itself included


@dataclass
class Acceptance:
    """What one verification decided. Entries at and beyond ``count`` are undefined."""

    nodes: torch.Tensor  # [B, P] int64: accepted nodes, the root first
    tokens: torch.Tensor  # [B, P] int64: the token after each accepted node; the last one is the bonus token
    count: torch.Tensor  # [B] int64, 1 … P


@dataclass
class DecodeState:
    """What a step hands to the next. Rows that are done stay as they are."""

    kv_len: torch.Tensor  # [B] int64: committed positions in the target's cache; the root is not among them
    root: torch.Tensor  # [B] int64: the last committed token
    tokens: torch.Tensor  # [B, P] int64: the tokens this step committed
    features: torch.Tensor | None  # [B, P, F]: the target's features at the position before each of them
    count: torch.Tensor  # [B] int64: how many it committed, 0 for a row that was done
    generated: torch.Tensor  # [B] int64: tokens committed since the prompt
    budget: torch.Tensor  # [B] int64: tokens still allowed
    done: torch.Tensor  # [B] bool

    def load(self, other: DecodeState) -> DecodeState:
        """Copy ``other``'s values into these tensors. Returns this state."""
        for entry in fields(self):
            mine, theirs = getattr(self, entry.name), getattr(other, entry.name)
            if mine is not None:
                mine.copy_(theirs)
        return self


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. ``temperature`` 0 is greedy; ``top_p`` 0 or 1 and ``top_k`` 0 are off.

    ``top_k_first`` orders the two filters as transformers' ``generate`` does; the reference's own methods cut by
    ``top_p`` first. Raises InvalidInputError, a ValueError, for values that are none of these.

    held: `numbers` on the device, which then go before the fields: these only say what is on. A captured step reads
    them there, so that one capture serves all settings of a `kind`.
    """

    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    top_k_first: bool = True
    held: torch.Tensor | None = field(default=None, compare=False, repr=False)  # [3] float32

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, Real) or not 0.0 <= self.temperature < float("inf"):
            raise InvalidInputError(f"temperature is {self.temperature!r}; expected 0 (greedy) or a positive number")
        if not isinstance(self.top_p, Real) or not 0.0 <= self.top_p <= 1.0:
            raise InvalidInputError(
                f"top_p is {self.top_p!r}; expected a number from 0 to 1 (0 and 1 both turn it off)"
            )
        if not isinstance(self.top_k, Integral) or self.top_k < 0:
            raise InvalidInputError(f"top_k is {self.top_k!r}; expected a whole number of at least 0 (0 turns it off)")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def numbers(self) -> tuple[float, float, float]:
        """1 / temperature (0 if greedy), 1 - ``top_p`` and ``top_k``, all exact enough in float32: what is computed with,
        and what `held` holds."""
        scale = 0.0 if self.greedy else 1.0 / self.temperature
        # In float32 the second must stay below 1, or no token is kept; whole numbers are exact up to 2²⁴.
        return scale, min(1.0 - self.top_p, 1.0 - 2.0**-24), float(min(self.top_k, 1 << 24))

    def cuts_rank(self, vocab: int) -> bool:
        """Whether ``top_k`` drops any of ``vocab`` tokens."""
        return 0 < self.top_k < vocab

    @property
    def cuts_share(self) -> bool:
        """Whether ``top_p`` is on."""
        return 0.0 < self.top_p < 1.0

    def kind(self, vocab: int) -> tuple[str, ...]:
        """What does not change with the numbers: greedy, or drawn after which filters in which order."""
        if self.greedy:
            return ("greedy",)
        filters = [name for name, on in (("top_k", self.cuts_rank(vocab)), ("top_p", self.cuts_share)) if on]
        return ("drawn", *(filters if self.top_k_first else reversed(filters)))

    def on(self, device: torch.device) -> Sampling:
        """The same with its numbers held on a device."""
        return replace(self, held=torch.tensor(self.numbers, dtype=torch.float32, device=device))


@dataclass(frozen=True)
class Ops:
    """One function for each op of a step; signatures are those of the functions in `eagle.model.torch_ops`."""

    attention: Callable[..., torch.Tensor]
    kv_append: Callable[..., None]
    kv_retrieve: Callable[..., torch.Tensor]
    kv_compact: Callable[..., None]
    rope_append: Callable[..., torch.Tensor]
    draft_positions: Callable[..., DraftPositions]
    topk_log_softmax: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    grow_tree: Callable[..., Frontier]
    finish_tree: Callable[..., DraftTree]
    evaluate_posterior: Callable[..., Acceptance]
    update_inputs: Callable[..., DecodeState]
    rms_norm: Callable[..., torch.Tensor]
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    cat_rms_norm: Callable[..., torch.Tensor]
    draft_input: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    swiglu: Callable[..., torch.Tensor]
    linear: Callable[..., torch.Tensor]
    gate_up_swiglu: Callable[..., torch.Tensor]
    linear_add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def replaced(self, **functions: Callable[..., Any]) -> Ops:
        """This table with some entries served by other functions."""
        return replace(self, **functions)
