"""Who runs the steps of a run and how their results reach the host: one after the other, or ahead of the reader."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch

from eagle.engine.graphs import StaticStep
from eagle.engine.state import Run
from eagle.engine.step import step
from eagle.model.ops import DecodeState

Result = tuple[list[list[int]], list[bool]]
"""Each row's new tokens, and whether it is done."""


class Steps(Protocol):
    """Steps are queued and read in order; ``ahead`` more than the one being read may be under way."""

    ahead: int

    def queue(self, longest: int) -> None: ...

    def read(self) -> Result: ...


class EagerSteps:
    """Each step runs when it is asked for, and is read before the next one."""

    ahead = 0

    def __init__(self, run: Run, state: DecodeState) -> None:
        self.run, self.state = run, state

    def queue(self, longest: int) -> None:
        """Run a step. longest: host-side bound on the committed lengths."""
        self.state = step(self.run, self.state, longest)

    def read(self) -> Result:
        """The one host read of a step: what it committed."""
        counts = self.state.count.tolist()
        tokens = self.state.tokens.tolist()
        return [row[:count] for row, count in zip(tokens, counts, strict=True)], self.state.done.tolist()


class StaticSteps:
    """Replays of a static step. Each result goes to a ring in pinned memory and is read while the next step runs.

    A step that was queued before the host learned that every row is done changes nothing. The step may have more rows
    than the state; those are idle.
    """

    ahead = 1

    @torch.no_grad()
    def __init__(self, static: StaticStep, state: DecodeState) -> None:
        self.static, self._rows = static, state.root.shape[0]
        static.static.begin(state)
        self._free = deque(range(len(static.ring)))
        self._queued: deque[tuple[int, torch.cuda.Event | None]] = deque()

    def queue(self, longest: int) -> None:
        """Queue a replay and the copy of its result."""
        self.static.replay()
        slot = self._free.popleft()
        report = self.static.static.report
        self.static.ring[slot].copy_(report, non_blocking=True)
        event = None
        if report.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(report.device))
        self._queued.append((slot, event))

    def read(self) -> Result:
        """The oldest queued step's result, waiting for it if need be."""
        slot, event = self._queued.popleft()
        if event is not None:
            event.synchronize()
        self._free.append(slot)
        new, done = self.static.static.read(self.static.ring[slot])
        return new[: self._rows], done[: self._rows]
