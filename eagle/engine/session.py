"""A session: one model's generations, one at a time, and the caches and captures that outlive them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace

import torch

from eagle.engine.cache_store import CacheStore, Demand, captured_rows
from eagle.engine.captures import Captures
from eagle.engine.loop import GenerationStats, decode
from eagle.engine.memory import allocator_line, free_bytes, is_out_of_memory, too_large
from eagle.engine.prefill import Chunks
from eagle.engine.row_bits import Passes, RowBits
from eagle.engine.settings import EngineSettings
from eagle.engine.state import Run, slots_needed
from eagle.engine.turns import Turns
from eagle.errors import OutOfMemoryError
from eagle.model.drafts import DraftModel
from eagle.model.fused_draft import FusedDraft
from eagle.model.ops import Sampling, TreeShape
from eagle.model.row_local import NotRowLocal
from eagle.model.target import Target


@dataclass(frozen=True)
class Call:
    """What one generation is asked for."""

    prompts: list[list[int]]
    budgets: list[int]  # new tokens of each row
    shape: TreeShape
    sampling: Sampling
    eos: torch.Tensor  # [E] int64
    uniforms: torch.Tensor | None  # [B, max_new_tokens + P]
    speculative: bool = True
    reuse_prefix: bool = False

    def slots(self, pad_rows: bool) -> int:
        """Cache slots it needs."""
        longest = max(len(prompt) + budget for prompt, budget in zip(self.prompts, self.budgets, strict=True))
        return slots_needed(longest, self.shape, self.speculative, pad_rows)


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
        self._store = CacheStore(target, draft, self.captures)
        self._bits = RowBits(target)
        self._turns = Turns()

    def run(
        self, call: Call, stats: GenerationStats, refresh: Callable[[], None] = lambda: None
    ) -> Generator[list[list[int]], None, None]:
        """Yield each step's new tokens of each row. A second thread waits for its turn; a second generation of the thread
        that drives this one, which would wait forever, raises InvalidInputError. refresh: called first, when the turn
        has come. Raises OutOfMemoryError where caches, captures or a step don't fit; what was kept is then given back."""
        with self._turns.generation():
            try:
                with self._on_device():
                    refresh()
                    steps = self._steps(call, stats)
                with closing(steps):
                    while True:
                        with self._on_device():  # left at each yield: the caller's current device is its own
                            new = next(steps, None)
                        if new is None:
                            return
                        yield new
                        self._turns.driven_here()
            except torch.OutOfMemoryError as error:
                free = free_bytes(self.target.device)  # before anything is given back
                self.forget()
                batch, slots = len(call.prompts), call.slots(self.passes(call).pad_rows)
                raise too_large(self.target, self.draft, batch, slots, call.shape, free, cause=error) from error

    @property
    def replays(self) -> bool:
        """Whether steps are replayed from a capture."""
        return self._why_eager() is None

    @property
    def library_products(self) -> bool:
        """Whether a library computes products of the target, whose order of sums follows from the number of rows."""
        self._try_modules()
        return self._bits.library_products(self.settings, self.replays)

    def passes(self, call: Call) -> Passes:
        """How a call's target passes run, as far as is known."""
        nodes, batch = call.shape.total_token if call.speculative else 1, len(call.prompts)
        replays = self.replays
        trees = captured_rows(batch) if replays else batch
        return self._bits.passes(self.settings, replays, nodes, trees)

    def exclusive(self) -> AbstractContextManager[None]:
        """Wait for this model's turn to change something; may be nested. Raises InvalidInputError where this thread has a
        generation open."""
        return self._turns.change()

    def configure(self, settings: EngineSettings, draft: DraftModel | FusedDraft) -> None:
        """Change how steps run. What was captured is dropped. The caller holds `exclusive`."""
        if draft is not self.draft or settings.engine != self.settings.engine:  # captured steps take other sizes
            self._store.forget()
        self.settings, self.draft, self._store.draft = settings, draft, draft
        self.captures.drop()
        self._bits.forget()

    def forget(self) -> None:
        """Give caches and captures back."""
        self.captures.drop()
        self._store.forget()

    def engine_choice(self) -> tuple[str, str]:
        """How steps run, and why."""
        engine, reason = "eager", self._why_eager()
        if reason is None:
            engine, reason = "captured", "one CUDA graph a step"
            if self.captures.prefill_reason is not None:
                reason += f"; prompts could not be captured: {self.captures.prefill_reason}"
        self._try_modules()
        return engine, "; ".join([reason, *self._bits.words(self.settings, self.replays)])

    def _try_modules(self) -> None:
        """Have modules that are to run row by row tried, in this model's turn, where no generation has done so. Raises
        OutOfMemoryError where that runs out of memory."""
        if self._bits.tried or not self._bits.watches(self.settings, self.replays):
            return
        with self.exclusive():
            try:
                self._bits.try_modules(told=self.told)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(
                    f"a pass of two rows through the target ran out of memory ({allocator_line(error)}); free some first"
                ) from error

    def _why_eager(self) -> str | None:
        device = self.target.device
        if device.type != "cuda":
            return f"a capture needs a CUDA device, not {device.type}"
        if self.settings.engine == "eager":
            return "as asked, or as loaded; optimize_eagle_with_triton captures the step"
        if len({layer.device for layer in self.target.layer_shapes}) > 1:
            return "the target is spread over several devices"
        if self.captures.step_reason is not None:
            return f"the capture failed: {self.captures.step_reason}"
        return None

    def _steps(self, call: Call, stats: GenerationStats) -> Generator[list[list[int]], None, None]:
        """The call's prefill and steps. Where they can't be captured, or not as chosen, they are chosen anew: idle rows
        and rows by themselves are for captured steps alone."""
        while True:
            try:
                steps = self._begun(call, self.passes(call), stats)
            except NotRowLocal as error:
                self._bits.refuse(str(error))
                steps = None
            if steps is not None:
                return steps
            self._store.forget()

    def _begun(
        self, call: Call, passes: Passes, stats: GenerationStats
    ) -> Generator[list[list[int]], None, None] | None:
        """The call's prefill and steps, with their caches allocated and what can be captured captured; None where its
        passes turned out not to be as chosen."""
        batch, captured, required = len(call.prompts), self.replays, self.settings.engine == "captured"
        in_turns = captured and batch > 1 and self.captures.prefill_reason is None
        demand = Demand(batch, call.slots(passes.pad_rows), call.shape, passes.pad_rows, captured, in_turns)
        run, reused = self._run(call, passes, demand, self._common_prefix(call.prompts) if call.reuse_prefix else 0)
        if self._bits.watches(self.settings, captured):
            self._bits.try_modules((run.caches.target.batch, run.nodes) if passes.row_local else None, self.told)
            if self.passes(call) != passes:
                return None
        static = self.captures.step(run, stats, self.told, required=required) if captured else None
        chunks = None
        if captured:
            if static is None:
                return None
            run = static.prepare(run)
            if in_turns or batch == 1:
                chunks = self._chunks(run, demand, reused, stats)
        return decode(run, call.prompts, call.budgets, stats, reused, static, chunks)

    def _run(self, call: Call, passes: Passes, demand: Demand, reused: int) -> tuple[Run, int]:
        """The run of a call over caches for ``demand``, and how many positions those hold."""
        caches, reused = self._store.take(demand, reused, self.told)
        draft = self.draft if call.speculative else None
        fixed = call.shape, call.sampling, caches, call.eos, call.uniforms, passes.pad_rows, passes.row_local
        return Run(self.target, draft, passes.ops, *fixed), reused

    def _chunks(self, run: Run, demand: Demand, reused: int, stats: GenerationStats) -> Chunks:
        """Captured prompt chunks for `prefill`. They serve one sequence; a batch's rows take turns in a cache of one row,
        so that a row's bits are what they are alone."""
        required = self.settings.engine == "captured"
        if demand.in_turns:
            run = replace(run, caches=self._store.one_row(demand, run.caches, self.told))
        return lambda rows: self.captures.chunk(run, rows, reused, stats, self.told, required=required)

    def _common_prefix(self, prompts: list[list[int]]) -> int:
        """Positions of a single prompt whose keys lie in both caches and stay valid. The last common one is run again:
        the draft's pair there needs the target's feature and the token that now follows."""
        caches = self._store.kept(1) if len(prompts) == 1 else None
        prefix = caches.prefix if caches is not None else None
        if not prefix:
            return 0
        common = next(
            (index for index, (old, new) in enumerate(zip(prefix, prompts[0], strict=False)) if old != new),
            min(len(prefix), len(prompts[0])),
        )
        return max(0, common - 1)

    def _on_device(self) -> AbstractContextManager[object]:
        """The target's CUDA device made the current one, where Triton and torch's own defaults look."""
        device = self.target.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
