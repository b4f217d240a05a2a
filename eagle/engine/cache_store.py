"""The caches of one model between its calls: by number of rows, grown when a call needs more, let go of when memory is
short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from eagle.engine.captures import Captures
from eagle.engine.memory import GIB, cache_bytes, fits, free_bytes, is_out_of_memory, roomy_slots, too_large
from eagle.engine.state import Caches, slots_needed
from eagle.model.drafts import DraftModel
from eagle.model.fused_draft import FusedDraft
from eagle.model.ops import TreeShape
from eagle.model.target import Target

MOST_CACHES = 4
"""Numbers of rows whose caches are kept where steps are not captured, and only the memory is saved."""

MOST_CAPTURED_CACHES = 16
"""The same where captures are bound to them. Rows come in powers of two, so that this is every batch up to 32,768."""

WORTH_SAYING = 1.0
"""GiB of caches from which on a user is told before they are taken."""


def captured_rows(batch: int) -> int:
    """Rows of the captured step that serves ``batch`` prompts: the next power of two, so that few are captured."""
    return 1 << (batch - 1).bit_length()


@dataclass(frozen=True)
class Demand:
    """What a call needs. captured: steps are replayed; in_turns: rows take turns for prefill, in caches of one row."""

    batch: int
    slots: int
    shape: TreeShape
    pad_rows: bool
    captured: bool
    in_turns: bool

    @property
    def sizes(self) -> list[int]:
        """Rows to allocate, best first."""
        bucket = captured_rows(self.batch)
        return [bucket, self.batch] if self.captured and bucket != self.batch else [self.batch]

    @property
    def beside(self) -> int:
        """Rows of the caches that prefill needs beside the batch's own."""
        return 1 if self.in_turns else 0


class CacheStore:
    """Caches by number of rows, and those of one row in which a batch's rows take turns.

    Captured steps are bound to caches, so what is let go of here takes its captures with it.
    """

    def __init__(self, target: Target, draft: DraftModel | FusedDraft, captures: Captures) -> None:
        self.target, self.captures = target, captures
        self.draft = draft
        self._kept: dict[int, Caches] = {}  # the one used last at the end
        self._one_row: Caches | None = None

    def kept(self, rows: int) -> Caches | None:
        """The caches kept for ``rows`` rows."""
        return self._kept.get(rows)

    def take(self, demand: Demand, keep: int, told: Callable[[str], None] | None) -> tuple[Caches, int]:
        """Caches with room for a call: kept ones if they are large enough, else new ones that take over the first
        ``keep`` positions. Returns them and how many positions they hold.

        Raises OutOfMemoryError, before anything is allocated where that can be known, if they don't fit with all
        others let go of.
        """
        kept = next((rows for rows in demand.sizes if self._has(rows, demand.slots)), None)
        if kept is not None:
            self._kept[kept] = self._kept.pop(kept)
            return self._kept[kept], keep
        # No local name may hold caches from here on: their memory counts as free once they are let go of.
        for rows in demand.sizes:
            if rows in self._kept:
                self.captures.drop(self._kept[rows])
                self._kept[rows] = self._kept.pop(rows)  # at the end: let go of last
                if not keep:
                    del self._kept[rows]
        most = MOST_CAPTURED_CACHES if demand.captured else MOST_CACHES
        while len(self._kept) >= most:
            self._let_go(next(iter(self._kept)))
        rows = self._size_that_fits(demand)
        slots = demand.slots
        if demand.captured:
            limit = slots_needed(self.target.context_length, demand.shape, speculative=True, pad_rows=demand.pad_rows)
            slots = roomy_slots(self.target, self.draft, rows + demand.beside, slots, limit, demand.shape)
        new = self._new(rows, slots, demand, told)
        old = self._kept.pop(rows, None)
        if old is None:
            keep = 0
        elif keep:
            new.target.carry_over(old.target, keep)
            new.draft.carry_over(old.draft, keep)
        self._kept[rows] = new
        return new, keep

    def one_row(self, demand: Demand, own: Caches, told: Callable[[str], None] | None) -> Caches:
        """Caches of one row with as many slots as the batch's ``own``, which stay. Raises OutOfMemoryError."""
        if self._one_row is None or self._one_row.slots < own.slots:
            self._drop_one_row()
            while not fits(self.target, self.draft, 1, own.slots, demand.shape):
                if not self._let_go_of_one(but=own):
                    free = free_bytes(self.target.device)
                    raise too_large(self.target, self.draft, demand.batch, own.slots, demand.shape, free, beside=1)
            self._one_row = self._new(1, own.slots, demand, told, own)
        return self._one_row

    def forget(self, but: Caches | None = None) -> None:
        """Let go of all caches and their captures, or of all ``but`` those."""
        for rows in [rows for rows, caches in self._kept.items() if caches is not but]:
            self._let_go(rows)
        self._drop_one_row()

    def _has(self, rows: int, slots: int) -> bool:
        return rows in self._kept and self._kept[rows].slots >= slots

    def _size_that_fits(self, demand: Demand) -> int:
        """The first of the demand's sizes that fits; what is kept for other calls goes until one does."""
        while True:
            for rows in demand.sizes:
                if fits(self.target, self.draft, rows, demand.slots, demand.shape, demand.beside):
                    return rows
            if not self._let_go_of_one():
                free = free_bytes(self.target.device)
                raise too_large(self.target, self.draft, demand.batch, demand.slots, demand.shape, free, demand.beside)

    def _new(
        self, rows: int, slots: int, demand: Demand, told: Callable[[str], None] | None, own: Caches | None = None
    ) -> Caches:
        """New caches. What is free by the count may lie in pieces, or in captures' pools: where it can't be had, all
        but the call's ``own`` caches are let go of for a second attempt."""
        need = cache_bytes(self.target, self.draft, rows, slots) / GIB
        if told is not None and need >= WORTH_SAYING:
            told(f"taking {need:.2f} GiB for the KV caches of batch {rows}, {slots} positions each")
        try:
            return self._allocated(rows, slots)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        self.forget(but=own)  # outside the handler: the error holds what the attempt had got
        if self.target.device.type == "cuda":
            torch.cuda.empty_cache()
        free = free_bytes(self.target.device)
        try:
            return self._allocated(rows, slots)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise too_large(self.target, self.draft, rows, slots, demand.shape, free, cause=error) from error

    def _allocated(self, rows: int, slots: int) -> Caches:
        return Caches(self.target.new_cache(rows, slots), self.draft.new_cache(rows, slots))

    def _let_go_of_one(self, but: Caches | None = None) -> bool:
        """Let go of the caches unused longest. Returns False where there are none ``but`` those."""
        for rows, caches in self._kept.items():
            if caches is not but:
                self._let_go(rows)
                return True
        found = self._one_row is not None
        self._drop_one_row()
        return found

    def _let_go(self, rows: int) -> None:
        self.captures.drop(self._kept.pop(rows))

    def _drop_one_row(self) -> None:
        if self._one_row is not None:
            self.captures.drop(self._one_row)
            self._one_row = None
