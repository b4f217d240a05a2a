"""How a call's target passes keep each row's bits, whatever stands in the other rows and however many there are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from eagle.engine import exactness
from eagle.engine.memory import is_out_of_memory
from eagle.engine.settings import EngineSettings
from eagle.engine.state import ROW_TILE
from eagle.errors import EagleError
from eagle.model.ops import Ops
from eagle.model.row_local import NotRowLocal
from eagle.model.row_trial import check_row_local
from eagle.model.target import Target
from eagle.model.target_support import has_experts
from eagle.model.triton_kernels.dispatch import decoding_ops, kernel_serves_attention, products_by_kernel

SMALL = (1, 2)
"""Trees and nodes of a trial that no pass asks for."""


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
        self._ops: Ops | None = None
        self._tried: set[tuple[int, int]] = set()  # passes of the modules, by trees and nodes
        self._refusal: str | None = None

    def forget(self) -> None:
        """Try the modules anew: they may have changed."""
        self._tried.clear()
        self._refusal = None

    def library_products(self, settings: EngineSettings, replays: bool) -> bool:
        """Whether a library computes products of the target, whose order of sums follows from the number of rows, as far
        as is known."""
        if self.target.fused is not None:
            return not products_by_kernel(self.target.ops)
        return not self.watches(settings, replays) or self.refusal is not None

    def passes(self, settings: EngineSettings, replays: bool, nodes: int, trees: int) -> Passes:
        """The passes of a call over ``trees`` trees of ``nodes`` nodes, 1 for plain decoding, as far as is known: what a
        trial finds may change them. replays: whether its steps are captured."""
        ops, size = self.target.ops, (nodes, trees, *self._size)
        auto = settings.exact == "auto"
        kernels = exactness.keeps_kernels(*size) if auto else bool(settings.exact)
        padded = exactness.pads(*size) if auto else bool(settings.exact)
        library = self.library_products(settings, replays)
        return Passes(
            ops=decoding_ops(ops) if kernels else ops,
            row_local=kernels and not library and self.target.fused is None,
            pad_rows=padded and library,
        )

    def words(self, settings: EngineSettings, replays: bool) -> list[str]:
        """Where a row's bits depend on nothing else, or don't: nothing where that follows from the kernels."""
        if not settings.exact:
            return []
        if not self._attention_by_kernel:
            return ["not exact: no kernel serves attention"]
        auto, words = settings.exact == "auto", []
        if self.library_products(settings, replays):
            where = " where that takes at most a tenth longer" if auto else ""
            but = " but for products of experts" if has_experts(self.target.model) else ""
            why = f" ({self._why_library(settings, replays)})"
            return [f"exact{but}: every pass in whole tiles of {ROW_TILE} rows{where}{why}"]
        if self.target.fused is None:
            sizes = ", ".join(f"{trees} × {nodes}" for trees, nodes in sorted(self._tried))
            words.append(f"exact: the kernels compute the products of the target's own modules (tried on {sizes} rows)")
        if auto and not exactness.favours_kernels(*self._size):
            most = exactness.KERNEL_ROWS
            words.append(f"not exact: products of more than {most} rows, where the library serves them")
        return words

    def watches(self, settings: EngineSettings, replays: bool) -> bool:
        """Whether the target runs its own modules, and these row by row unless there is a `refusal`. Only under capture is
        that free: launched one by one, the ops of 30 layers took 51 ms of Python's time in place of 14 (2-core machine),
        where padding takes none."""
        kernels = products_by_kernel(self.target.ops) and self._attention_by_kernel
        return self.target.fused is None and kernels and bool(settings.exact) and replays

    @property
    def tried(self) -> bool:
        """Whether the modules have been tried with the present ops."""
        return self._ops is decoding_ops(self.target.ops) and (bool(self._tried) or self._refusal is not None)

    @property
    def refusal(self) -> str | None:
        """Why the target's modules can't run row by row; None where they can, or have not been tried. It holds for all
        sizes: EAGLE's passes and plain decoding's must be of one kind."""
        return self._refusal if self.tried else None

    def refuse(self, reason: str) -> None:
        """Hold the modules for refused: a pass has met what no trial has."""
        self._refusal = reason

    def try_modules(self, size: tuple[int, int] | None = None, told: Callable[[str], None] | None = None) -> None:
        """Try a size of pass, trees and nodes, once; None: a small one unless any has been tried. told: as in `Session`.
        Raises what runs out of memory, and a user's mistake."""
        ops = decoding_ops(self.target.ops)
        if ops is not self._ops:
            self.forget()
            self._ops = ops
        if self._refusal is not None or (size in self._tried if size else self._tried):
            return
        trees, nodes = size or SMALL
        if told is not None:
            told(f"trying the target's modules on {trees} × {nodes} rows")
        self._refusal = self._trial(ops, trees, nodes)
        self._tried.add((trees, nodes))

    def _trial(self, ops: Ops, trees: int, nodes: int) -> str | None:
        device = self.target.device
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                check_row_local(self.target, ops, trees, nodes)
        except NotRowLocal as error:
            return str(error)
        except EagleError:
            raise
        except Exception as error:  # what is not the trial's own, the passes that follow raise again
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            reason = next(iter(str(error).strip().splitlines()), "")
            return f"a trial of its modules failed: {type(error).__name__}: {reason}"
        return None

    def _why_library(self, settings: EngineSettings, replays: bool) -> str:
        """Why a library computes products of a target."""
        if self.watches(settings, replays):
            return str(self.refusal)
        if not products_by_kernel(self.target.ops):
            return "the kernels don't compute all its products"
        return "the kernels take the products of its own modules in captured steps alone"

    @property
    def _attention_by_kernel(self) -> bool:
        return kernel_serves_attention(self.target.ops, self.target.layer_shapes)

    @property
    def _size(self) -> tuple[int, torch.dtype]:
        """The target's hidden size and dtype."""
        return self.target.spec.hidden_size, self.target.feature_dtype
