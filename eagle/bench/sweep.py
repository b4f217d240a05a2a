"""Trees × prefix lengths × batch sizes: what a step costs and yields in each cell, and which tree is fastest there.

Replies do not end at an end token: every tree writes the same number of tokens after the same prompts, and the figures
are of decoding alone, since prefill is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eagle.bench.prefixes import Encode, check_prefix, padded_prompts
from eagle.bench.runs import RunFigures, measure, parting
from eagle.engine.tree_choice import CANDIDATES
from eagle.errors import OutOfMemoryError
from eagle.model.ops import TreeShape

if TYPE_CHECKING:
    from eagle.model.ea_model import EaModel

PREFIXES, BATCHES, NEW_TOKENS, PROMPTS = (128, 1024, 4096), (1, 4, 16), 64, 2
QUICK_PREFIXES, QUICK_BATCHES, QUICK_NEW_TOKENS, QUICK_PROMPTS = (128,), (1,), 24, 1
QUICK_TREES = (TreeShape(60, 7, 10), TreeShape(16, 5, 4), TreeShape(8, 4, 2))


@dataclass(frozen=True)
class Grid:
    """What is measured."""

    trees: tuple[TreeShape, ...] = CANDIDATES
    prefixes: tuple[int, ...] = PREFIXES
    batches: tuple[int, ...] = BATCHES
    new_tokens: int = NEW_TOKENS
    prompts: int = PROMPTS
    """The least number of prompts in a cell; a larger batch takes as many as it holds."""


QUICK = Grid(QUICK_TREES, QUICK_PREFIXES, QUICK_BATCHES, QUICK_NEW_TOKENS, QUICK_PROMPTS)


@dataclass(frozen=True)
class TreeRow:
    """One tree in one cell; ``shape`` None is plain decoding."""

    shape: TreeShape | None
    figures: RunFigures | None
    identical: int = 0
    """Outputs that equal plain decoding's."""
    reason: str = ""
    """Why there are no figures."""

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, over all rows of the batch; 0 where nothing was measured."""
        return 0.0 if self.figures is None else self.figures.decode_tokens_per_second

    def to_json(self) -> dict[str, Any]:
        """JSON values; ``tree`` is None for plain decoding."""
        shape = self.shape
        values: dict[str, Any] = {
            "tree": None if shape is None else [shape.total_token, shape.depth, shape.top_k],
            "reason": self.reason,
        }
        if (figures := self.figures) is not None:
            values |= {
                "step_ms": figures.step_ms,
                "accept_length": figures.accept_length,
                "tokens_per_second": self.tokens_per_second,
                "first_token_ms": 1e3 * figures.first_token_seconds,
                "prompts": figures.prompts,
                "identical": self.identical,
                "peak_memory_bytes": figures.peak_memory_bytes,
            }
        return values


@dataclass
class Cell:
    """One prefix length and batch size."""

    prefix: int
    batch: int
    reason: str = ""
    """Why nothing could be measured."""
    rows: list[TreeRow] = field(default_factory=list)
    """Plain decoding first."""

    @property
    def best(self) -> TreeRow | None:
        """The tree with the most tokens a second."""
        measured = [row for row in self.rows if row.shape is not None and row.figures is not None]
        return max(measured, key=lambda row: row.tokens_per_second, default=None)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        best = self.best
        return {
            "prefix": self.prefix,
            "batch": self.batch,
            "reason": self.reason,
            "rows": [row.to_json() for row in self.rows],
            "best": None if best is None else best.to_json()["tree"],
        }


def measure_sweep(
    model: EaModel,
    encode: Encode,
    texts: list[str],
    grid: Grid = QUICK,
    *,
    told: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Cell]:
    """Measure each cell of ``grid``. The model's own tree is left as it was.

    A cell beyond the model's context, and a tree the head's vocabulary or the device's memory does not allow, get a
    reason in place of figures. told: (what runs, trees done, trees in all). Raises what `check_prefix` (before anything is
    measured) and `EaModel.set_tree` raise.
    """
    for prefix in grid.prefixes:
        check_prefix(encode, prefix)
    before, context = model.tree_shape, model.target.context_length
    cells = [Cell(prefix, batch) for prefix in grid.prefixes for batch in grid.batches]
    ways: list[TreeShape | None] = [None, *grid.trees]
    try:
        for number, cell in enumerate(cells):
            if cell.prefix + grid.new_tokens > context:
                cell.reason = f"{cell.prefix} + {grid.new_tokens} tokens exceed the model's context of {context}"
                continue
            prompts = padded_prompts(encode, texts, cell.prefix, max(cell.batch, grid.prompts))
            for index, shape in enumerate(ways):
                told(
                    f"{_name(shape)} at {cell.prefix} × {cell.batch}",
                    number * len(ways) + index,
                    len(cells) * len(ways),
                )
                cell.rows.append(_measure(model, prompts, shape, cell, grid.new_tokens))
    finally:
        model.set_tree(before.total_token, before.depth, before.top_k)
    return cells


def _measure(model: EaModel, prompts: list[list[int]], shape: TreeShape | None, cell: Cell, new_tokens: int) -> TreeRow:
    if shape is not None:
        vocabulary = model.ea_layer.config.draft_vocab_size
        if shape.top_k > vocabulary:
            return TreeRow(shape, None, reason=f"the head has {vocabulary} tokens, fewer than top_k")
        model.set_tree(shape.total_token, shape.depth, shape.top_k)
    try:
        figures = measure(model, prompts, new_tokens, speculative=shape is not None, batch=cell.batch, eos_token_id=())
    except OutOfMemoryError as error:
        return TreeRow(shape, None, reason=str(error))
    plain: Sequence[Sequence[int]] = figures.outputs
    if cell.rows and (first := cell.rows[0].figures) is not None:
        plain = first.outputs
    same = sum(parting(one, other) is None for one, other in zip(figures.outputs, plain, strict=True))
    return TreeRow(shape, figures, same)


def _name(shape: TreeShape | None) -> str:
    return "plain" if shape is None else f"{shape.total_token}/{shape.depth}/{shape.top_k}"
