"""A session: one model's caches and captures over its calls, and the lock that keeps two generations apart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from eagle.engine.captures import Captures
from eagle.engine.loop import GenerationStats, decode
from eagle.engine.memory import GIB, cache_bytes, check_fits, free_bytes, is_out_of_memory, roomy_slots, too_large
from eagle.engine.prefill_graph import StaticPrefill
from eagle.engine.settings import EngineSettings
from eagle.engine.state import Caches, Run, slots_needed
from eagle.errors import InvalidInputError, OutOfMemoryError
from eagle.model.drafts import DraftModel
from eagle.model.fused_draft import FusedDraft
from eagle.model.ops import Ops, Sampling, TreeShape
from eagle.model.target import Target
from eagle.model.triton_kernels.dispatch import decoding_ops, products_by_kernel

MOST_CACHES = 4
"""Batch sizes whose caches are kept; all but the one in use go when memory is short."""

WORTH_SAYING = 1.0
"""GiB of caches from which on a user is told before they are taken."""

SCRATCH = 0
"""The key of the one-row caches in which the rows of a batch take turns for prefill."""


class Session:
    """Runs generations of one target and one draft, one at a time, and keeps the memory between them.

    told: called with a line of text before something that takes seconds or memory.
    """

    def __init__(self, target: Target, draft: DraftModel) -> None:
        self.target = target
        self.draft: DraftModel | FusedDraft = draft
        self.settings = EngineSettings()
        self.told: Callable[[str], None] | None = None
        self.captures = Captures()
        self._caches: dict[int, Caches] = {}
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
        refresh: Callable[[], None] = lambda: None,
    ) -> Generator[list[list[int]], None, None]:
        """Yield each step's new tokens of each row. A second thread waits for its turn; a second generation of the same
        thread, which would wait forever, raises InvalidInputError. refresh: called first, when the turn has come."""
        with self.exclusive():
            refresh()
            batch, pad_rows = len(prompts), self.pads_rows(ops)
            reused = self._common_prefix(prompts) if reuse_prefix else 0
            longest = max(len(prompt) + budget for prompt, budget in zip(prompts, budgets, strict=True))
            needed = slots_needed(longest, shape, speculative, pad_rows)
            try:
                caches, reused = self._caches_for(batch, needed, reused, shape, pad_rows)
                draft = self.draft if speculative else None
                step_ops = decoding_ops(ops) if self.settings.exact else ops
                run = Run(self.target, draft, step_ops, shape, sampling, caches, eos, uniforms, pad_rows)
                static = chunks = None
                if self.replays:
                    static = self.captures.step(run, stats, self.told, required=self.settings.engine == "captured")
                if static is not None:
                    run = static.prepare(run)
                    chunks = self._chunks(run, reused, stats)
                yield from decode(run, prompts, budgets, stats, reused, static, chunks)
            except torch.OutOfMemoryError as error:
                self.forget()
                free = free_bytes(self.target.device)
                raise too_large(self.target, self.draft, batch, needed, shape, free) from error

    @property
    def replays(self) -> bool:
        """Whether steps are replayed from a capture."""
        return self._why_eager() is None

    def pads_rows(self, ops: Ops) -> bool:
        """Whether target passes are padded to whole tiles, so that a library's products keep each row's bits."""
        return self.settings.exact and (self.target.fused is None or not products_by_kernel(ops))

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait for this model's turn. Raises InvalidInputError where this thread has a generation open."""
        if self._owner == threading.get_ident():
            raise InvalidInputError("a generation of this thread is still open on this model; finish or close it first")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def configure(self, settings: EngineSettings, draft: DraftModel | FusedDraft) -> None:
        """Change how steps run. What was captured is dropped. The caller holds `exclusive`."""
        if draft is not self.draft:
            self._caches.clear()
        self.settings, self.draft = settings, draft
        self.captures.drop()

    def forget(self) -> None:
        """Give caches and captures back."""
        self.captures.drop()
        self._caches.clear()

    def engine_choice(self) -> tuple[str, str]:
        """How steps run, and why."""
        reason = self._why_eager()
        if reason is not None:
            return "eager", reason
        if self.captures.prefill_reason is not None:
            return "captured", f"one CUDA graph a step; prompts could not be captured: {self.captures.prefill_reason}"
        return "captured", "one CUDA graph a step"

    def _why_eager(self) -> str | None:
        device = self.target.device
        if self.settings.engine == "eager":
            return "as asked, or as loaded; optimize_eagle_with_triton captures on a GPU"
        if device.type != "cuda":
            return f"a capture needs a CUDA device, not {device.type}"
        if len({layer.device for layer in self.target.layer_shapes}) > 1:
            return "the target is spread over several devices"
        if self.captures.step_reason is not None:
            return f"the capture failed: {self.captures.step_reason}"
        return None

    def _chunks(self, run: Run, reused: int, stats: GenerationStats) -> Callable[[int], StaticPrefill | None]:
        """Captured prompt chunks for `prefill`. They serve one sequence; a batch's rows take turns in a cache of one row,
        so that a row's bits are what they are alone."""
        if run.caches.target.batch > 1:
            caches, _ = self._caches_for(1, run.caches.slots, 0, run.shape, run.pad_rows, key=SCRATCH)
            run = replace(run, caches=caches)
        required = self.settings.engine == "captured"
        return lambda rows: self.captures.chunk(run, rows, reused, stats, self.told, required=required)

    def _common_prefix(self, prompts: list[list[int]]) -> int:
        """Positions of a single prompt whose keys lie in both caches and stay valid. The last common one is run again:
        the draft's pair there needs the target's feature and the token that now follows."""
        caches = self._caches.get(1) if len(prompts) == 1 else None
        prefix = caches.prefix if caches is not None else None
        if not prefix:
            return 0
        common = next(
            (index for index, (old, new) in enumerate(zip(prefix, prompts[0], strict=False)) if old != new),
            min(len(prefix), len(prompts[0])),
        )
        return max(0, common - 1)

    def _caches_for(
        self, batch: int, slots: int, keep: int, shape: TreeShape, pad_rows: bool, key: int | None = None
    ) -> tuple[Caches, int]:
        """Caches with room for ``slots``: those kept for the batch if they are large enough, else new ones that take over
        the first ``keep`` positions. Returns them and how many positions they hold. key: what to keep them under."""
        key = batch if key is None else key
        old = self._caches.pop(key, None)
        if old is not None and old.slots >= slots:
            self._caches[key] = old  # at the end: used last
            return old, keep
        while len(self._caches) >= MOST_CACHES:
            self._let_go(next(iter(self._caches)))
        if old is not None:
            self.captures.drop(old)
            if not keep:
                old = None
        try:
            check_fits(self.target, self.draft, batch, slots, shape)
        except OutOfMemoryError:  # what is kept for other calls goes first
            old, keep = None, 0
            for other in list(self._caches):
                self._let_go(other)
            check_fits(self.target, self.draft, batch, slots, shape)
        if self.replays:
            most = slots_needed(self.target.context_length, shape, speculative=True, pad_rows=pad_rows)
            slots = roomy_slots(self.target, self.draft, batch, slots, most, shape)
        need = cache_bytes(self.target, self.draft, batch, slots) / GIB
        if self.told is not None and need >= WORTH_SAYING:
            self.told(f"taking {need:.2f} GiB for the KV caches of batch {batch}, {slots} positions each")
        try:
            new = Caches(self.target.new_cache(batch, slots), self.draft.new_cache(batch, slots))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            free = free_bytes(self.target.device)
            raise too_large(self.target, self.draft, batch, slots, shape, free) from error
        if keep and old is not None:
            new.target.carry_over(old.target, keep)
            new.draft.carry_over(old.draft, keep)
        self._caches[key] = new
        return new, keep

    def _let_go(self, key: int) -> None:
        self.captures.drop(self._caches.pop(key))
