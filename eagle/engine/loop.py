"""The loop: prefill, then step after step, handing out each row's new tokens as they come.

Where the steps run ahead of the reader, the next one is queued before a result is handed out, so the device works while
the caller does.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field

from eagle.engine.graphs import StaticStep
from eagle.engine.prefill import Chunks, prefill
from eagle.engine.state import Run
from eagle.engine.steps import EagerSteps, StaticSteps, Steps


@dataclass
class GenerationStats:
    """The figures of one run. ``accept_lengths`` has one entry for each step of each running row: the tokens it
    committed. Prefill's token is in ``new_tokens`` and its pass is not in ``steps``. ``setup_seconds``: capturing the
    step, where this call was the first of its kind; in no other figure."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    reused_tokens: int = 0
    setup_seconds: float = 0.0
    accept_lengths: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def accept_length(self) -> float:
        """τ: tokens committed by a target pass, averaged over the steps after prefill; 1.0 where there was none."""
        return sum(self.accept_lengths) / len(self.accept_lengths) if self.accept_lengths else 1.0


def decode(
    run: Run,
    prompts: list[list[int]],
    budgets: list[int],
    stats: GenerationStats,
    reused: int = 0,
    static: StaticStep | None = None,
    chunks: Chunks | None = None,
) -> Generator[list[list[int]], None, None]:
    """Yield, for prefill and then for each step, the new tokens of each row (empty for a finished row).

    static: the step to replay, prepared for this run; None runs each step anew. chunks: captured prefill. Afterwards,
    and after an early end, ``run.caches.prefix`` holds what may be reused (single-sequence runs).
    """
    run.caches.prefix = None
    started = time.perf_counter()
    lengths = [len(prompt) for prompt in prompts]
    produced: list[list[int]] = [[] for _ in prompts]
    reusable, queued, setup = 0, 0, stats.setup_seconds
    stats.prompt_tokens, stats.reused_tokens = sum(lengths), reused
    try:
        state = prefill(run, prompts, budgets, reused, chunks)
        first = EagerSteps(run, state)
        steps: Steps = first if static is None else StaticSteps(static, state)  # queued before the host waits
        new, done = first.read()
        stats.prefill_seconds = time.perf_counter() - started - (stats.setup_seconds - setup)
        running = [True] * len(prompts)
        started, waited = time.perf_counter(), 0.0
        while True:
            for row, tokens in enumerate(new):
                produced[row] += tokens
                if stats.steps:
                    lengths[row] += len(tokens)
                    if running[row]:
                        stats.accept_lengths.append(len(tokens))
            stats.new_tokens += sum(map(len, new))
            # The draft's pairs of the newest tokens are not written yet, so its cache ends that much earlier.
            reusable = lengths[0] - len(new[0]) + 1
            while queued < steps.ahead and not all(done):
                steps.queue(max(lengths))
                queued += 1
            handed = time.perf_counter()
            yield new
            if all(done):
                return
            if not steps.ahead:  # steps ahead run on while the caller has the floor
                waited += time.perf_counter() - handed
            while queued < 1 + steps.ahead:
                steps.queue(max(lengths))
                queued += 1
            running = [not flag for flag in done]
            new, done = steps.read()
            queued -= 1
            stats.steps += 1
            stats.decode_seconds = time.perf_counter() - started - waited
    finally:
        # Also after an interruption: a step writes at and beyond what was committed before it.
        if len(prompts) == 1 and run.draft is not None and reusable:
            run.caches.prefix = (prompts[0] + produced[0])[:reusable]
