"""Prefill of one sequence in captured chunks: on a GPU a short prompt's pass is launches, not arithmetic.

A chunk's rows are padded up to a bucket. What the padding writes lies beyond the prompt, where the first step's own rows
overwrite it before anything sees it.
"""

from __future__ import annotations

import time

import torch

from eagle.engine.graphs import captured
from eagle.engine.state import Run
from eagle.model.drafts import DraftCall

BUCKETS = (32, 64, 128, 256, 512)
"""Rows of a captured chunk. Twice the rows cost less than twice the time up to about 300 of them (`prefill.CHUNK`)."""


def chunk_rows(length: int) -> tuple[int, ...]:
    """Rows of the captured chunks that take ``length`` rows of a prompt, one after another: the largest, then the bucket
    that the rest fits."""
    whole, rest = divmod(length, BUCKETS[-1])
    last = [next(bucket for bucket in BUCKETS if bucket >= rest)] if rest else []
    return (*[BUCKETS[-1]] * whole, *last)


class StaticPrefill:
    """One chunk of ``rows`` rows of a single sequence, captured on a CUDA device; elsewhere the same ops in turn.

    Its results stay valid until the next replay of any captured step or chunk.
    """

    @torch.no_grad()
    def __init__(
        self, run: Run, rows: int, *, capture: bool, pool: tuple[int, int] | None, stream: torch.cuda.Stream | None
    ) -> None:
        started = time.perf_counter()
        device = run.target.device
        self.run, self.rows = run, rows
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.inference_mode(False):
            self.tokens = torch.zeros(1, rows + 1, dtype=torch.int64, device=device)
            self.begin = torch.full((1,), run.caches.slots - rows, dtype=torch.int64, device=device)
            self.column = torch.zeros(1, dtype=torch.int64, device=device)
            if capture:
                self._graph, self._result = captured(self._body, device, pool, stream)
        self.seconds = time.perf_counter() - started

    @torch.no_grad()
    def __call__(self, tokens: list[int], begin: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run ``tokens`` at position ``begin``: the last row's logits [V] and features [F].

        tokens may have one more than it has rows: the token that follows the chunk.
        """
        count = min(len(tokens), self.rows)
        ids = torch.tensor(tokens[: self.rows + 1])
        if self.tokens.is_cuda:
            ids = ids.pin_memory()
        self.tokens[0, : len(ids)].copy_(ids, non_blocking=True)
        self.begin.fill_(begin)
        self.column.fill_(count - 1)
        if self._graph is None:
            return self._body()
        self._graph.replay()
        return self._result

    @torch.no_grad()
    def _body(self) -> tuple[torch.Tensor, torch.Tensor]:
        run, rows, ops = self.run, self.rows, self.run.target.ops
        logits, features = run.target.forward(
            self.tokens[:, :rows], run.caches.target, self.begin, slots=run.caches.slots, logits_to_keep=self.column
        )
        if run.draft is not None:
            cache = run.caches.draft
            positions = self.begin[:, None] + torch.arange(rows, device=self.begin.device)
            call = DraftCall(ops, cache, self.begin, self.begin, None, positions, cache.slots)
            run.draft(run.draft.fuse(features, ops), self.tokens[:, 1:], call)
        return logits[0, 0], features[0].index_select(0, self.column)[0]
