"""Soft cross-entropy over the draft vocabulary, in chunks of label positions, with its gradients formed on the way.

A label position p holds the target's distribution for token p + 1. Step j of the training-time test meets it from row
t = p - 1 - j. So a chunk computes the target's probabilities once and serves all steps with them; nothing of size
rows × vocabulary outlives a chunk.

The label is the target's softmax over its whole vocabulary, restricted to the draft vocabulary and *not* renormalised:
a position whose probability lies mostly outside the draft vocabulary weighs less, as no draft token can be right there.
loss = Σ_i p_i (logsumexp(z) - z_i), gradient = (Σ p) softmax(z) - p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEP_DECAY = 0.8


@dataclass
class Labels:
    """Which positions are labels, for each step.

    ``positions`` int64 [M], M a multiple of the chunk; ``weights`` fp32 [steps, M], 0 or 1; ``counts`` how many of
    each step's weights are 1.
    """

    positions: Tensor
    weights: Tensor
    counts: list[int]
    chunk: int


def _teacher(logits: Tensor, draft_size: int) -> tuple[Tensor, Tensor]:
    """Probabilities of the first ``draft_size`` columns [C, Vd] and the best column over all [C]."""
    wide = logits.float()
    probabilities = (wide[:, :draft_size] - wide.logsumexp(-1, keepdim=True)).exp()
    return probabilities.to(logits.dtype), wide.argmax(-1)


def _student(
    logits: Tensor, probabilities: Tensor, best: Tensor, weight: Tensor, scaled: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, summed hits, and the gradient by the logits for rows weighing ``scaled`` [C, Vd]."""
    wide, p = logits.float(), probabilities.float()
    lse = wide.logsumexp(-1, keepdim=True)
    mass = p.sum(-1, keepdim=True)
    loss = ((p * (lse - wide)).sum(-1) * weight).sum()
    hits = ((wide.argmax(-1) == best) * weight).sum()
    gradient = ((wide - lse).exp() * mass - p) * scaled[:, None]
    return loss, hits, gradient.to(logits.dtype)


class Fused:
    """The chunk's elementwise parts; :func:`compile_parts` swaps in compiled versions."""

    teacher = staticmethod(_teacher)
    student = staticmethod(_student)


def compile_parts(enabled: bool) -> None:
    """Serve the elementwise parts by ``torch.compile``, or eagerly."""
    Fused.teacher = staticmethod(torch.compile(_teacher, dynamic=False) if enabled else _teacher)
    Fused.student = staticmethod(torch.compile(_student, dynamic=False) if enabled else _student)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        labels: Labels,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        lm_head: Tensor,
        train: bool,
        *hidden: Tensor,
    ):
        steps, rows, chunk = len(hidden), hidden[0].shape[0], labels.chunk
        device = lm_head.device
        projection = lm_head.to(hidden[0].dtype)
        scale = 1.0 / sum(STEP_DECAY**j for j in range(steps))
        factors = torch.tensor(
            [scale * STEP_DECAY**j / max(1, count) for j, count in enumerate(labels.counts)], dtype=torch.float32
        ).to(device, non_blocking=True)
        grads = [hidden[0].new_zeros(rows + 1, hidden[0].shape[1]) for _ in range(steps)] if train else []
        grad_head = torch.zeros_like(lm_head, dtype=torch.float32) if train and lm_head.requires_grad else None
        losses = torch.zeros(steps, device=device)
        hits = torch.zeros(steps, device=device)
        for start in range(0, labels.positions.shape[0], chunk):
            positions = labels.positions[start : start + chunk]
            probabilities, best = Fused.teacher(teacher_hidden[positions] @ teacher_head.t(), lm_head.shape[0])
            for step in range(steps):
                weight = labels.weights[step, start : start + chunk]
                # Rows that carry no label read row 0 and write to a spare last row.
                source = (positions - 1 - step).clamp_min(0)
                x = hidden[step][source]
                loss, hit, grad_logits = Fused.student(
                    x @ projection.t(), probabilities, best, weight, weight * factors[step]
                )
                losses[step] += loss
                hits[step] += hit
                if train:
                    grads[step][torch.where(weight > 0, source, rows)] = grad_logits @ projection
                if grad_head is not None:
                    grad_head += grad_logits.t() @ x
        ctx.save_for_backward(*grads, *([grad_head] if grad_head is not None else []))
        ctx.steps, ctx.rows = steps, rows
        total = (losses * factors).sum()
        ctx.mark_non_differentiable(losses, hits)
        return total, losses, hits

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor):
        saved = ctx.saved_tensors
        grads = [g[: ctx.rows] * grad.to(g.dtype) for g in saved[: ctx.steps]]
        grad_head = saved[ctx.steps] * grad if len(saved) > ctx.steps else None
        return None, None, None, grad_head, None, *grads


def chunked_loss(
    hidden: list[Tensor], lm_head: Tensor, labels: Labels, teacher_hidden: Tensor, teacher_head: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The training loss and what to log.

    Args:
        hidden: for each step the head's normed hidden states [N, H].
        lm_head: [draft_vocab, H], trained if it requires a gradient.
        labels: which positions count.
        teacher_hidden: the target's final hidden states [N, Ht].
        teacher_head: the target's output rows [vocab, Ht], those of the draft vocabulary first and in its order.

    Returns:
        The loss, Σ 0.8^j mean_j / Σ 0.8^j, differentiable; the summed loss [steps]; the summed hits [steps], where a
        hit is a draft argmax equal to the target's over its whole vocabulary.
    """
    train = torch.is_grad_enabled() and any(h.requires_grad for h in hidden)
    return _ChunkedLoss.apply(labels, teacher_hidden, teacher_head, lm_head, train, *hidden)
