"""How a call's target passes keep each row's bits, whatever stands in the other rows and however many there are."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from eagle.engine import exactness
from eagle.engine.settings import EngineSettings
from eagle.engine.state import ROW_TILE
from eagle.errors import UnsupportedModelError
from eagle.model.ops import Ops
from eagle.model.target import Target
from eagle.model.triton_kernels.dispatch import decoding_ops, products_by_kernel


@dataclass(frozen=True)
class Passes:
    """What a call's target passes are. ops: for their products and all else; row_local: see `Target.forward`; pad_rows:
    see `Run.rows`."""

    ops: Ops
    row_local: bool
    pad_rows: bool


class RowBits:
    """The choice for one target: the kernels' products, of the fused route or under its own modules, where they serve;
    else passes padded to whole tiles, in which a library's products keep each row's bits."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._refusals: dict[Ops, str | None] = {}

    def forget(self) -> None:
        """Look at the modules anew: they may have changed."""
        self._refusals.clear()

    def library_products(self, settings: EngineSettings, replays: bool) -> bool:
        """Whether a library computes products of the target, whose order of sums follows from the number of rows."""
        if self.target.fused is not None:
            return not products_by_kernel(self.target.ops)
        return not self.row_local(settings, replays)

    def row_local(self, settings: EngineSettings, replays: bool) -> bool:
        """Whether the target runs its own modules, and these row by row."""
        return self._watched(settings, replays) and self.refusal() is None

    def passes(self, settings: EngineSettings, replays: bool, nodes: int, trees: int) -> Passes:
        """The passes of a call over ``trees`` trees of ``nodes`` nodes, 1 for plain decoding. replays: whether its steps
        are captured."""
        ops, size = self.target.ops, (nodes, trees, *self._size)
        auto = settings.exact == "auto"
        kernels = exactness.keeps_kernels(*size) if auto else bool(settings.exact)
        padded = exactness.pads(*size) if auto else bool(settings.exact)
        return Passes(
            ops=decoding_ops(ops) if kernels else ops,
            row_local=kernels and self.row_local(settings, replays),
            pad_rows=padded and self.library_products(settings, replays),
        )

    def words(self, settings: EngineSettings, replays: bool) -> list[str]:
        """Where a row's bits depend on nothing else, or don't: nothing where that follows from the kernels."""
        if not settings.exact:
            return []
        auto, words = settings.exact == "auto", []
        if self.library_products(settings, replays):
            where = " where that takes at most a tenth longer" if auto else ""
            why = f" ({self.refusal()})" if self._watched(settings, replays) else ""
            return [f"exact: every pass in whole tiles of {ROW_TILE} rows{where}{why}"]
        if self.target.fused is None:
            words.append("exact: the kernels compute the products of the target's own modules")
        if auto and not exactness.favours_kernels(*self._size):
            most = exactness.KERNEL_ROWS
            words.append(f"not exact: products of more than {most} rows, where the library serves them")
        return words

    def refusal(self) -> str | None:
        """Why the target's modules can't run `row_local`; None where they can. Found by one small pass, and kept."""
        ops = decoding_ops(self.target.ops)
        if ops not in self._refusals:
            device = self.target.device
            try:
                with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                    self.target.check_row_local(ops)
                self._refusals[ops] = None
            except UnsupportedModelError as error:
                self._refusals[ops] = str(error)
        return self._refusals[ops]

    def _watched(self, settings: EngineSettings, replays: bool) -> bool:
        """Whether modules are to be watched. Only under capture is that free: launched one by one, the ops of 30 layers
        took 51 ms of Python's time in place of 14 (2-core machine), where padding takes none."""
        own = self.target.fused is None and products_by_kernel(self.target.ops)
        return own and bool(settings.exact) and replays

    @property
    def _size(self) -> tuple[int, torch.dtype]:
        """The target's hidden size and dtype."""
        return self.target.spec.hidden_size, self.target.feature_dtype
