"""One prompt, four ways: EAGLE and plain decoding, each with the model as loaded and after optimising.

Time, tokens/s and steps of each, the bytes a second a step reaches, and whether all four say the same. Where optimising
changes nothing, as on a CPU, there are two ways: timing the same thing twice would only show noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eagle.bench.read_speed import read_gb_s
from eagle.bench.runs import RunFigures, measure, parting
from eagle.bench.step_bytes import step_bytes
from eagle.model.triton_kernels import optimize_eagle_with_triton, restore_eagle
from eagle.model.triton_kernels.integration import ENGINE

if TYPE_CHECKING:
    from eagle.model.ea_model import EaModel

LOADED, OPTIMISED = "as loaded", "optimised"
EAGLE, PLAIN = "EAGLE", "plain"


@dataclass(frozen=True)
class Way:
    """One way of decoding and its figures."""

    decoding: str
    ops: str
    figures: RunFigures
    bytes_per_step: int
    """At the middle of the generation; see `eagle.bench.step_bytes`."""

    @property
    def name(self) -> str:
        return f"{self.decoding}, {self.ops}"

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the median time: one run that was disturbed does not change it."""
        return len(self.figures.outputs[0]) / self.figures.seconds_median

    @property
    def gb_s(self) -> float:
        """What the median step reads in a second; 0 where there was no step."""
        seconds = self.figures.step_seconds_median
        return self.bytes_per_step / seconds * 1e-9 if seconds else 0.0


@dataclass(frozen=True)
class Comparison:
    """The ways, plain as loaded first, and what they are compared with."""

    ways: tuple[Way, ...]
    """Four, or those as loaded where optimising changed nothing."""
    changed: tuple[str, ...]
    """What optimising changed: ops by name, and "engine"."""
    read_gb_s: float
    """Measured read bandwidth of the device."""
    kernel_ops: tuple[str, ...]
    """The ops that Triton kernels served when optimised."""
    kernels_off: str
    """Why no kernel served, or an empty text."""
    library_products: bool
    """Whether a library computed the target's matrix products when optimised."""

    def way(self, decoding: str, ops: str) -> Way:
        return next(way for way in self.ways if (way.decoding, way.ops) == (decoding, ops))

    def speedup(self, way: Way) -> float:
        """Tokens/s over those of plain decoding as loaded."""
        return way.tokens_per_second / self.way(PLAIN, LOADED).tokens_per_second

    def partings(self) -> dict[str, int | None]:
        """For each pair that should agree, the index of the first new token that differs, or None."""
        pairs = [(self.way(EAGLE, LOADED), self.way(PLAIN, LOADED))]
        if self.changed:
            pairs.append((self.way(EAGLE, OPTIMISED), self.way(PLAIN, OPTIMISED)))
            pairs.append((self.way(EAGLE, OPTIMISED), self.way(EAGLE, LOADED)))
        return {
            f"{one.name} = {other.name}": parting(one.figures.outputs[0], other.figures.outputs[0])
            for one, other in pairs
        }

    @property
    def identical(self) -> bool:
        return all(where is None for where in self.partings().values())

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "read_gb_per_second": self.read_gb_s,
            "changed": list(self.changed),
            "kernel_ops": list(self.kernel_ops),
            "kernels_off": self.kernels_off,
            "library_products": self.library_products,
            "identical": self.identical,
            "first_difference": self.partings(),
            "ways": [
                {
                    "decoding": way.decoding,
                    "ops": way.ops,
                    **way.figures.to_json(),
                    "tokens_per_second": way.tokens_per_second,
                    "bytes_per_step": way.bytes_per_step,
                    "gb_per_second": way.gb_s,
                    "bandwidth_share": way.gb_s / self.read_gb_s,
                    "speedup": self.speedup(way),
                }
                for way in self.ways
            ],
        }


def compare(
    model: EaModel,
    prompt: list[int],
    max_new_tokens: int,
    *,
    repeats: int = 3,
    warmup: int = 1,
    told: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Comparison:
    """Measure the ways, greedily. The model leaves as it came.

    told: (what runs, runs done, runs in all). Raises what `measure` raises.
    """
    total = 4 * (repeats + warmup)
    ways: list[Way] = []

    def run(ops: str) -> None:
        for decoding in (PLAIN, EAGLE):
            before = len(ways) * (repeats + warmup)

            def tell(done: int, _: int, before: int = before, name: str = f"{decoding}, {ops}") -> None:
                told(name, before + done, total)

            speculative = decoding == EAGLE
            figures = measure(
                model,
                [prompt],
                max_new_tokens,
                speculative=speculative,
                repeats=repeats,
                warmup=warmup,
                told=tell,
            )
            middle = len(prompt) + len(figures.outputs[0]) // 2
            read = step_bytes(model, speculative=speculative, positions=middle).total
            ways.append(Way(decoding, ops, figures, read))

    told("bandwidth", 0, total)
    settings = model.engine
    bandwidth = read_gb_s(model.device)
    run(LOADED)
    _, originals = optimize_eagle_with_triton(model)
    try:
        choices, library_products = model.kernel_report(), model.library_products
        changed = tuple(name for name in originals if name != ENGINE or model.engine != settings)
        if originals:
            run(OPTIMISED)
    finally:
        restore_eagle(model, originals)
    served = tuple(dict.fromkeys(choice.op for choice in choices if choice.implementation == "triton"))
    why_none = "" if served else choices[0].reason
    return Comparison(tuple(ways), changed, bandwidth, served, why_none, library_products)
