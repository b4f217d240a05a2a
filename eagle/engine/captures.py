"""The captured steps and prompt chunks of one model: made on first use, kept, dropped with the caches they are bound to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from eagle.engine.graphs import StaticStep, StepKey, device_index
from eagle.engine.loop import GenerationStats
from eagle.engine.prefill_graph import BUCKETS, StaticPrefill
from eagle.engine.state import Caches, Run
from eagle.errors import UnsupportedModelError

MOST_STEPS = 32
MOST_CHUNKS = 24
"""Captures kept; the one unused longest goes first. A chunk has five sizes, each with and without the head."""

Told = Callable[[str], None]
Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made", StaticStep, StaticPrefill)


class Captures:
    """Steps and chunks by what they are made for, in one memory pool and on one stream."""

    def __init__(self) -> None:
        self.step_reason: str | None = None
        """Why steps can't be captured, where that was tried."""
        self.prefill_reason: str | None = None
        self._steps: dict[StepKey, StaticStep] = {}
        self._chunks: dict[tuple[Any, ...], StaticPrefill] = {}
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None

    def step(self, run: Run, stats: GenerationStats, told: Told | None, *, required: bool) -> StaticStep | None:
        """The step for a run, captured if need be; None where it can't be.

        Raises UnsupportedModelError then if it is ``required``. stats: takes the seconds of a capture.
        """
        found = _used(self._steps, key := StepKey.of(run))
        if found is not None or self.step_reason is not None:
            return found
        if told is not None:
            kind = "plain decoding" if run.draft is None else f"tree {run.shape}"
            told(f"capturing the step for batch {run.caches.target.batch}, {kind}")
        try:
            return _kept(self._steps, key, StaticStep(run, **self._place(run)), MOST_STEPS, stats)
        except torch.OutOfMemoryError:
            self._leave_pool()
            raise
        except RuntimeError as error:
            self.step_reason = self._refused("a step", run, error, required)
            return None

    def chunk(
        self, run: Run, rows: int, reused: int, stats: GenerationStats, told: Told | None, *, required: bool
    ) -> StaticPrefill | None:
        """A prompt chunk of at least ``rows`` rows, captured if need be; None where there can be none. As `step`."""
        rows = next(bucket for bucket in BUCKETS if bucket >= rows)
        key = (rows, id(run.draft) if run.draft is not None else 0, run.target.ops, id(run.caches))
        found = _used(self._chunks, key)
        if found is not None or self.prefill_reason is not None:
            return found
        if reused > run.caches.slots - rows:  # the warm-up would write where a reused prefix lies
            return None
        if told is not None:
            told(f"capturing prompts of up to {rows} tokens")
        try:
            return _kept(self._chunks, key, StaticPrefill(run, rows, **self._place(run)), MOST_CHUNKS, stats)
        except torch.OutOfMemoryError:
            self._leave_pool()
            raise
        except RuntimeError as error:
            self.prefill_reason = self._refused("a prompt's pass", run, error, required)
            return None

    def drop(self, caches: Caches | None = None) -> None:
        """Forget all captures, or those bound to ``caches``. Without caches also what could not be captured."""
        for kept in (self._steps, self._chunks):
            for key in [key for key, made in kept.items() if caches is None or made.run.caches is caches]:
                del kept[key]
        if not self._steps and not self._chunks:
            self._leave_pool()
        if caches is None:
            self.step_reason = self.prefill_reason = None

    def steps(self) -> list[StaticStep]:
        """The captured steps, the one used last at the end."""
        return list(self._steps.values())

    def _place(self, run: Run) -> dict[str, Any]:
        device = run.target.device
        if device.type != "cuda":  # tests run the same ops in turn
            return {"capture": False, "pool": None, "stream": None}
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None or self._stream.device_index != device_index(device):
            self._stream = torch.cuda.Stream(device)  # one for good: cuBLAS keeps 32 MB for each it has seen
        return {"capture": True, "pool": self._pool, "stream": self._stream}

    def _leave_pool(self) -> None:
        """Have later captures begin a pool of their own: what a failed one took from this pool never comes back to it,
        and an empty one holds memory for nothing."""
        self._pool = None

    def _refused(self, what: str, run: Run, error: RuntimeError, required: bool) -> str:
        self._leave_pool()
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if required:
            raise UnsupportedModelError(
                f"{what} of {type(run.target.model).__name__} can't be captured ({reason}); use engine='eager'"
            ) from error
        warnings.warn(f"{what} runs one op at a time: the capture failed ({reason})", stacklevel=2)
        return reason


def _used(kept: dict[Key, Made], key: Key) -> Made | None:
    """What is kept under ``key``, which goes to the end: used last."""
    if key in kept:
        kept[key] = kept.pop(key)
    return kept.get(key)


def _kept(kept: dict[Key, Made], key: Key, made: Made, most: int, stats: GenerationStats) -> Made:
    """Keep ``made``, in place of what was unused longest where there are ``most`` already."""
    while len(kept) >= most:
        del kept[next(iter(kept))]
    kept[key] = made
    stats.setup_seconds += made.seconds
    return made
