"""A session: one model's caches over its calls, and the lock that keeps two generations apart."""

from __future__ import annotations

import threading
from collections.abc import Generator

import torch

from eagle.engine.loop import GenerationStats, decode
from eagle.engine.state import Caches, Run, slots_needed
from eagle.errors import InvalidInputError, OutOfMemoryError
from eagle.model.drafts import DraftModel
from eagle.model.ops import Ops, Sampling, TreeShape
from eagle.model.target import Target


class Session:
    """Runs generations of one target and one draft, one at a time, and keeps the cache memory between them."""

    def __init__(self, target: Target, draft: DraftModel) -> None:
        self.target, self.draft = target, draft
        self._caches: Caches | None = None
        self._lock = threading.Lock()
        self._owner: int | None = None

    def run(
        self,
        prompts: list[list[int]],
        budgets: list[int],
        ops: Ops,
        shape: TreeShape,
        sampling: Sampling,
        eos: torch.Tensor,
        uniforms: torch.Tensor | None,
        stats: GenerationStats,
        *,
        speculative: bool = True,
        reuse_prefix: bool = False,
    ) -> Generator[list[list[int]], None, None]:
        """Yield each step's new tokens of each row. A second thread waits for its turn; a second generation of the same
        thread, which would wait forever, raises InvalidInputError."""
        if self._owner == threading.get_ident():
            raise InvalidInputError("a generation of this thread is still open on this model; finish or close it first")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                reused = self._common_prefix(prompts) if reuse_prefix else 0
                longest = max(len(prompt) + budget for prompt, budget in zip(prompts, budgets, strict=True))
                needed = slots_needed(longest, shape, speculative)
                caches = self._caches_for(len(prompts), needed, reused)
                draft = self.draft if speculative else None
                run = Run(self.target, draft, ops, shape, sampling, caches, eos, uniforms)
                yield from decode(run, prompts, budgets, stats, reused)
            finally:
                self._owner = None

    def _common_prefix(self, prompts: list[list[int]]) -> int:
        """Positions of a single prompt whose keys lie in both caches and stay valid. The last common one is run again:
        the draft's pair there needs the target's feature and the token that now follows."""
        prefix = self._caches.prefix if self._caches is not None and len(prompts) == 1 else None
        if not prefix:
            return 0
        common = next(
            (index for index, (old, new) in enumerate(zip(prefix, prompts[0], strict=False)) if old != new),
            min(len(prefix), len(prompts[0])),
        )
        return max(0, common - 1)

    def _caches_for(self, batch: int, slots: int, keep: int) -> Caches:
        """Caches with room for ``slots``: the present ones if they are large enough, else new ones that take over the
        first ``keep`` positions."""
        old = self._caches
        if old is not None and old.target.batch == batch and old.slots >= slots:
            return old
        if keep == 0:
            old = self._caches = None  # free before taking
        try:
            new = Caches(self.target.new_cache(batch, slots), self.draft.new_cache(batch, slots))
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU; a CPU allocator raises the base class
            if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
                raise
            layers = [*self.target.layer_shapes, *self.draft.layer_shapes]
            need = sum(layer.bytes for layer in layers) * batch * slots / 2**30
            raise OutOfMemoryError(
                f"the KV caches for {batch} sequences of {slots} positions need {need:.1f} GiB, more than is free; "
                "lower max_new_tokens, max_length or the batch"
            ) from error
        if keep and old is not None:
            new.target.carry_over(old.target, keep)
            new.draft.carry_over(old.draft, keep)
        self._caches = new
        return new
