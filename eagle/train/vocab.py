"""The draft vocabulary: the tokens the assistant writes most."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from eagle.train.corpus import Corpus


def choose_vocabulary(corpus: Corpus, vocab_size: int, draft_size: int, always: Iterable[int]) -> tuple[Tensor, float]:
    """The ``draft_size`` most frequent assistant tokens.

    Args:
        corpus: counted are the tokens that the assistant wrote.
        vocab_size: of the target.
        draft_size: how many to keep; at least the number of ``always``.
        always: tokens kept whatever their count, such as the one that ends an answer.

    Returns:
        Target ids in ascending order, int64 [min(draft_size, vocab_size)], and the share of the assistant's tokens
        that they cover.
    """
    written = [corpus.tokens[rows][corpus.mask[rows] == 1] for rows in map(corpus.rows, range(len(corpus)))]
    counts = np.bincount(np.concatenate(written), minlength=vocab_size)
    ranked = counts.copy()
    ranked[list(always)] = np.iinfo(np.int64).max
    # A stable sort: equal counts go to the lower id.
    kept = np.sort(np.argsort(-ranked, kind="stable")[: min(draft_size, vocab_size)])
    return torch.from_numpy(kept), float(counts[kept].sum() / max(1, counts.sum()))


def offsets(ids: Tensor) -> Tensor:
    """``d2t``: target_id = draft_id + d2t[draft_id], int64 [draft_vocab]."""
    return ids - torch.arange(len(ids))


def draft_first(ids: Tensor, vocab_size: int) -> Tensor:
    """A permutation of the target's ids, int64 [vocab], with the draft vocabulary's first and in its order."""
    rest = torch.ones(vocab_size, dtype=torch.bool)
    rest[ids] = False
    return torch.cat([ids, rest.nonzero()[:, 0]])
