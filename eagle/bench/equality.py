"""Is greedy EAGLE output plain decoding's, token for token, and what does a step take? Over prompts, trees, batch sizes
and prefix lengths.

Plain decoding of each prompt alone is the reference, and comes first. Everything else is compared with it: each tree,
alone and in batches, and plain decoding in batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from eagle.bench.runs import check_prompts, parting
from eagle.model.ops import TreeShape

if TYPE_CHECKING:
    from eagle.model.ea_model import EaModel


@dataclass(frozen=True)
class Equality:
    """One way of decoding, against plain decoding of each prompt alone. ``shape`` is None for plain decoding."""

    shape: TreeShape | None
    batch: int
    prompts: int
    tokens: int
    accept_length: float
    step_ms: float
    """Decoding time of all runs ÷ their steps: without prefill and captures."""
    partings: dict[int, int]
    """For each prompt that differs, counted from 1: the first new token that does, counted from 1."""

    @property
    def equal(self) -> int:
        return self.prompts - len(self.partings)

    @property
    def is_reference(self) -> bool:
        return self.shape is None and self.batch == 1

    @property
    def name(self) -> str:
        return "plain" if self.shape is None else f"{self.shape.total_token},{self.shape.depth},{self.shape.top_k}"

    def __str__(self) -> str:
        parted = "".join(f"; prompt {number} parts at token {where}" for number, where in self.partings.items())
        role = ", the reference" if self.is_reference else ""
        return (
            f"{self.name}, batch {self.batch}{role}: {self.equal} of {self.prompts} equal, {self.tokens} tokens, "
            f"accept length {self.accept_length:.2f}, {self.step_ms:.2f} ms a step{parted}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"name": self.name, "equal": self.equal}


def compare(
    model: EaModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    shapes: Iterable[TreeShape],
    batches: Iterable[int] = (1,),
    told: Callable[[Equality], None] = lambda result: None,
) -> list[Equality]:
    """Decode ``prompts`` every way and compare; the reference's own figures come first. The model's tree is left as it
    was. Raises what `EaModel.stream` does."""
    check_prompts(model, prompts)
    others = [(shape, batch) for batch in batches for shape in (*shapes, None) if (shape, batch) != (None, 1)]
    reference: list[list[int]] | None = None
    found = []
    before = model.tree_shape
    try:
        for shape, batch in [(None, 1), *others]:
            if shape is not None:
                model.set_tree(shape.total_token, shape.depth, shape.top_k)
            rows, lengths, step_ms = _decode(model, prompts, max_new_tokens, batch, speculative=shape is not None)
            reference = rows if reference is None else reference
            pairs = enumerate(zip(rows, reference, strict=True), start=1)
            parted = {number: parting(one, other) for number, (one, other) in pairs}
            result = Equality(
                shape,
                batch,
                len(prompts),
                sum(map(len, rows)),
                sum(lengths) / max(1, len(lengths)),
                step_ms,
                {number: where + 1 for number, where in parted.items() if where is not None},
            )
            found.append(result)
            told(result)
    finally:
        model.set_tree(before.total_token, before.depth, before.top_k)
    return found


def lengthened(prompt: list[int], filler: list[int], length: int) -> list[int]:
    """A prompt of ``length`` tokens: as much of ``filler``, again and again, as it takes, and then ``prompt``."""
    missing = max(0, length - len(prompt))
    return (filler * (missing // len(filler) + 1))[:missing] + prompt


def _decode(
    model: EaModel, prompts: list[list[int]], max_new_tokens: int, batch: int, *, speculative: bool
) -> tuple[list[list[int]], list[int], float]:
    rows: list[list[int]] = []
    lengths: list[int] = []
    seconds, steps = 0.0, 0
    for begin in range(0, len(prompts), batch):
        group = prompts[begin : begin + batch]
        outputs: list[list[int]] = [[] for _ in group]
        with closing(model.stream(group, max_new_tokens=max_new_tokens, speculative=speculative)) as stream:
            for new in stream:
                for row, tokens in zip(outputs, new, strict=True):
                    row += tokens
        stats = model.last_stats
        lengths += stats.accept_lengths
        seconds, steps = seconds + stats.decode_seconds, steps + stats.steps
        rows += outputs
    return rows, lengths, 1e3 * seconds / max(1, steps)
