"""One training step's forward: the head's training-time test and its loss, as a module for DistributedDataParallel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eagle.train import attention, loss
from eagle.train.corpus import Batch
from eagle.train.model import Eagle3Head
from eagle.train.target import Target


class TrainStep(nn.Module):
    """Batch, features and the target's hidden states → loss, summed losses [steps], summed hits [steps].

    Args:
        head: what is trained.
        target: gives the embeddings.
        teacher_head: the target's output rows [vocab, hidden], the draft vocabulary's first.
        steps: of the training-time test.
        backend: of the attention.
    """

    def __init__(self, head: Eagle3Head, target: Target, teacher_head: Tensor, steps: int, backend: str) -> None:
        super().__init__()
        self.head, self.steps, self.backend = head, steps, backend
        # Held in tuples, so that these frozen tensors are no part of this module's state.
        self._frozen = (target.embeddings.detach(), teacher_head.detach())

    @property
    def teacher_head(self) -> Tensor:
        return self._frozen[1]

    @property
    def projection(self) -> Tensor:
        """The rows the head scores with, [draft_vocab, hidden]."""
        own = getattr(self.head, "lm_head", None)
        return own.weight if own is not None else self.teacher_head[: self.head.config.draft_vocab_size]

    def outputs(self, batch: Batch, features: Tensor) -> list[Tensor]:
        """The head's normed hidden states of each step."""
        return self.head(
            features, self._frozen[0], batch.tokens, batch.positions, batch.packing, self.backend, self.steps
        )

    def score(self, outputs: list[Tensor], batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of those states; see :func:`eagle.train.loss.chunked_loss`."""
        return loss.chunked_loss(outputs, self.projection, batch.labels, hidden, self.teacher_head)

    def forward(self, batch: Batch, features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.score(self.outputs(batch, features), batch, hidden)

    def compile_parts(self, enabled: bool) -> None:
        """Serve all elementwise parts by ``torch.compile``, or eagerly."""
        self.head.compile_parts(enabled)
        attention.compile_parts(enabled)
        loss.compile_parts(enabled)


@torch.no_grad()
def teacher_rows(target: Target, order: Tensor) -> Tensor:
    """The target's output rows in the order of ``order`` int64 [vocab]."""
    return target.head[order.to(target.device)].contiguous()
