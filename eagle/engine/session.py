"""A session: one model's caches and captured steps over its calls, and the lock that keeps two generations apart."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import torch

from eagle.engine.graphs import StaticStep, StepKey
from eagle.engine.loop import GenerationStats, decode
from eagle.engine.memory import check_fits, is_out_of_memory, roomy_slots, too_large
from eagle.engine.prefill_graph import BUCKETS, StaticPrefill
from eagle.engine.settings import EngineSettings
from eagle.engine.state import Caches, Run, slots_needed
from eagle.errors import InvalidInputError, UnsupportedModelError
from eagle.model.drafts import DraftModel
from eagle.model.fused_draft import FusedDraft
from eagle.model.ops import Ops, Sampling, TreeShape
from eagle.model.target import Target
from eagle.model.triton_kernels.dispatch import decoding_ops

MOST_GRAPHS = 8
"""Captured steps kept; the one unused longest goes first."""


class Session:
    """Runs generations of one target and one draft, one at a time, and keeps the memory between them.

    told: called with a line of text before something that takes seconds.
    """

    def __init__(self, target: Target, draft: DraftModel) -> None:
        self.target = target
        self.draft: DraftModel | FusedDraft = draft
        self.settings = EngineSettings()
        self.told: Callable[[str], None] | None = None
        self.eager_reason: str | None = None
        self.prefill_reason: str | None = None
        self._caches: Caches | None = None
        self._static: dict[StepKey, StaticStep] = {}
        self._chunks: dict[tuple[Any, ...], StaticPrefill | None] = {}
        self._pool: tuple[int, int] | None = None
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
        self.refuse_nesting()
        with self._lock:
            self._owner = threading.get_ident()
            try:
                reused = self._common_prefix(prompts) if reuse_prefix else 0
                longest = max(len(prompt) + budget for prompt, budget in zip(prompts, budgets, strict=True))
                pad_rows = self.pads_rows
                needed = slots_needed(longest, shape, speculative, pad_rows)
                caches = self._caches_for(len(prompts), needed, reused, shape)
                draft = self.draft if speculative else None
                run = Run(
                    self.target,
                    draft,
                    decoding_ops(ops) if self.settings.exact else ops,
                    shape,
                    sampling,
                    caches,
                    eos,
                    uniforms,
                    pad_rows,
                )
                static = self._static_step(run, stats) if self.captures else None
                chunks = None if static is None else partial(self._chunk, run, stats, reused)
                try:
                    run = run if static is None else static.prepare(run)
                    yield from decode(run, prompts, budgets, stats, reused, static, chunks)
                except torch.OutOfMemoryError as error:
                    self.forget()
                    raise too_large(self.target, self.draft, len(prompts), needed, shape) from error
            finally:
                self._owner = None

    @property
    def captures(self) -> bool:
        """Whether steps are replayed from a capture."""
        settings, device = self.settings, self.target.device
        return settings.engine != "eager" and device.type == "cuda" and self.eager_reason is None

    @property
    def pads_rows(self) -> bool:
        """Whether target passes are padded to whole tiles, so that a library's products keep each row's bits."""
        return self.settings.exact and getattr(self.target, "fused", None) is None

    def configure(self, settings: EngineSettings, draft: DraftModel | FusedDraft) -> None:
        """Change how steps run, between generations. What was captured is dropped."""
        self.refuse_nesting()
        with self._lock:
            if draft is not self.draft:
                self._caches = None
            self.settings, self.draft = settings, draft
            self.eager_reason = self.prefill_reason = None
            self._drop_captures()

    def forget(self) -> None:
        """Give caches and captured steps back."""
        self._drop_captures()
        self._caches = None

    def _drop_captures(self) -> None:
        self._static.clear()
        self._chunks.clear()

    def engine_choice(self) -> tuple[str, str]:
        """How steps run, and why."""
        if self.settings.engine == "eager":
            return "eager", "as asked, or as loaded; optimize_eagle_with_triton captures on a GPU"
        if self.target.device.type != "cuda":
            return "eager", f"a capture needs a CUDA device, not {self.target.device.type}"
        if self.eager_reason is not None:
            return "eager", f"the capture failed: {self.eager_reason}"
        if self.prefill_reason is not None:
            return "captured", f"one CUDA graph a step; the capture of prefill failed: {self.prefill_reason}"
        return "captured", "one CUDA graph a step"

    def refuse_nesting(self) -> None:
        """Raise InvalidInputError while a generation of this thread is open."""
        if self._owner == threading.get_ident():
            raise InvalidInputError("a generation of this thread is still open on this model; finish or close it first")

    def _static_step(self, run: Run, stats: GenerationStats) -> StaticStep | None:
        """The captured step for a run: one made before, or a new one. None where it can't be captured, in "auto"."""
        key = StepKey.of(run)
        found = self._static.pop(key, None)
        if found is None:
            if self.told is not None:
                self.told(f"capturing the {'speculative' if run.draft is not None else 'plain'} step")
            on_gpu = self.target.device.type == "cuda"  # elsewhere, which tests use, the same ops in turn
            if self._pool is None and on_gpu:
                self._pool = torch.cuda.graph_pool_handle()
            try:
                found = StaticStep(run, capture=on_gpu, pool=self._pool)
            except torch.OutOfMemoryError as error:
                batch, slots = run.caches.target.batch, run.caches.slots
                self.forget()
                raise too_large(self.target, self.draft, batch, slots, run.shape) from error
            except RuntimeError as error:
                reason = first_line(error)
                if self.settings.engine == "captured":
                    raise UnsupportedModelError(
                        f"a step of {type(self.target.model).__name__} can't be captured ({reason}); use engine='eager'"
                    ) from error
                self.eager_reason = reason
                warnings.warn(f"steps run one op at a time: the capture failed ({reason})", stacklevel=2)
                return None
            stats.setup_seconds = found.seconds
            while len(self._static) >= MOST_GRAPHS:
                self._static.pop(next(iter(self._static)))
        self._static[key] = found  # at the end: used last
        return found

    def _chunk(self, run: Run, stats: GenerationStats, reused: int, rows: int) -> StaticPrefill | None:
        """A captured prefill chunk of at least ``rows`` rows, made on first use; None where there is none."""
        rows = next(bucket for bucket in BUCKETS if bucket >= rows)
        key = (rows, run.draft is not None, run.target.ops, id(run.caches))
        if key not in self._chunks:
            if reused > run.caches.slots - rows:  # the warm-up would write where a reused prefix lies
                return None
            on_gpu = self.target.device.type == "cuda"
            try:
                chunk = StaticPrefill(run, rows, capture=on_gpu, pool=self._pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                chunk, self.prefill_reason = None, first_line(error)
            else:
                stats.setup_seconds += chunk.seconds
            self._chunks[key] = chunk
        return self._chunks[key]

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

    def _caches_for(self, batch: int, slots: int, keep: int, shape: TreeShape) -> Caches:
        """Caches with room for ``slots``: the present ones if they are large enough, else new ones that take over the
        first ``keep`` positions."""
        old = self._caches
        if old is not None and old.target.batch == batch and old.slots >= slots:
            return old
        self._drop_captures()
        if keep == 0:
            old = self._caches = None  # free before taking
        check_fits(self.target, self.draft, batch, slots, shape)
        if self.captures:
            most = slots_needed(self.target.context_length, shape, speculative=True, pad_rows=self.pads_rows)
            slots = roomy_slots(self.target, self.draft, batch, slots, most)
        try:
            new = Caches(self.target.new_cache(batch, slots), self.draft.new_cache(batch, slots))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise too_large(self.target, self.draft, batch, slots, shape) from error
        if keep and old is not None:
            new.target.carry_over(old.target, keep)
            new.draft.carry_over(old.draft, keep)
        self._caches = new
        return new


def first_line(error: Exception) -> str:
    """What an error says first."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
